"""The step of a batch of same-shaped weights: Algorithms 1 and 2 of the paper, in all variants."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lorapre import factors, launch, rules
from lorapre.batch import GPU_BATCH, SMALL, Batch, cut
from lorapre.factors import Tracker
from lorapre.linalg import matmul
from lorapre.moments import Dense, Means, Product, Split
from lorapre.tracking import Tracking, sweep, trackings


class Variant(NamedTuple):
    """What tells the variants apart; they share every other line (docs/maths.md)."""

    tracker: type[Tracker]
    start: Literal["printed", "sketch", "random"]  # of A; B starts at zero
    second: Literal["printed", "ramp", "means", "split"]  # how the second moment is corrected, or made


VARIANTS = {
    "paper": Variant(factors.Printed, start="printed", second="printed"),
    "calibrated": Variant(factors.Newton, start="sketch", second="ramp"),
    "subspace": Variant(factors.Subspace, start="random", second="means"),
    "split": Variant(factors.Subspace, start="random", second="split"),
}


def adam(
    batch: Batch, variant: Variant, *, betas: tuple[float, float],
    lr: float | Tensor, scale: float, eps: float, weight_decay: float,
) -> Callable[[], None]:  # fmt: skip
    """Algorithm 1 of the paper on a batch; a moment without factors in the state is dense, as in AdamW.

    Returns with the last sum over processes on its way; what is returned stores the new factors.
    """
    beta1, beta2 = betas
    debiased = variant.tracker is factors.Subspace
    rates = {
        # Where a product decays by beta, each of its two factors decays by the root.
        name: rules.debiased_rate(beta, batch.t)
        if debiased
        else torch.full_like(batch.t, 1 - math.sqrt(beta))
        for name, beta in (("m", beta1), ("v", math.sqrt(beta2)))
        if f"{name}_B" in batch.state
    }
    launches, batch.compiled = launch.kernels_take(batch), launch.cpu_kernels_take(batch)
    followed = trackings(batch, variant.tracker, rates, stack=GPU_BATCH if launches else 0)
    of = {name: tracking for tracking in followed for name in tracking.names}
    first = Product(of["m"], "m") if "m" in of else Dense(batch, "exp_avg")
    second: Product | Dense | Split
    if "exp_avg_sq" in batch.state:
        second = Dense(batch, "exp_avg_sq")
    elif "v" in of:
        second = Product(of["v"], "v")
    correction: Tensor | None = None
    means = Means(batch, beta2) if "v_row" in batch.state else None
    if "v" not in of and means is not None:
        assert isinstance(first, Product)
        second = Split(batch, of["m"], first, means, betas, rates["m"])
    elif isinstance(first, Product) and debiased:
        # It follows the debiased EMA, where the rule starts from the EMA.
        first.rows = rules.debias(beta1, batch.t - 1)[:, None, None].to(first.B.dtype)
    if isinstance(second, Product) and variant.second == "ramp":
        # The product ramps up to the root of v: its square is behind the EMA of g**2.
        ramp = factors.ramp(1 - beta2**0.25, batch.t - 1)
        correction = beta2 * ramp.square() + (1 - beta2)
    elif isinstance(second, Product) and means is not None:
        second.rows, second.columns = factors.match_means(
            second.B, second.A, means.row, means.column, batch.shards, of["v"].squares("v")
        )
    same: dict[str, Any] = dict(lr=lr * scale, decay=1 - lr * weight_decay, eps=eps)
    if launches or batch.compiled:
        # So that autograd refuses a graph that was made with the old weights, as after operations of torch.
        torch.autograd.graph.increment_version(batch.weights)
        m, v = launch.moment_operands(batch, first, second, betas, correction)
        if launches:
            launch.kernel_sweeps(batch, followed, m, v, means, **same)
        else:
            update = functools.partial(launch.compiled_update, batch, m, v, means, **same)
            sweep(batch, followed, update, late=isinstance(second, Split))
        return _sent(followed, means)
    rule = rules.Adam(betas, batch.t, lr * scale, eps, correction, batch.finite)
    keep = batch.per_matrix(1 - lr * weight_decay, 1.0) if weight_decay else None

    def step(members: slice, rows: slice, columns: slice, g: Tensor) -> None:
        g = g.to(batch.dtype)
        if means is not None:
            means.gather(members, rows, columns, g)
        m = first.tiles(members, rows, columns)
        if isinstance(second, Split):
            m, v = second.moments(m, g, members, rows, columns)
        else:
            v = second.tiles(members, rows, columns)
        for k, i in enumerate(range(members.start, members.stop)):
            w = batch.work(batch.weights[i], rows, columns)
            if keep is not None:
                w.mul_(keep[i])
            rule.step_(i, w, g[k].contiguous(), m[k].to(w.dtype), v[k].to(w.dtype))
            batch.store_weight(i, rows, columns, w)
        for moment, tiles in ((first, m), (second, v)):
            if isinstance(moment, Dense):
                moment.store(members, rows, columns, tiles)
        del m, v, tiles

    sweep(batch, followed, step, late=isinstance(second, Split))
    return _sent(followed, means)


def muon(
    batch: Batch, variant: Variant, *, momentum: float, nesterov: bool,
    newton_schulz: Callable[[Tensor], Tensor], lr: float | Tensor, scale: float, weight_decay: float,
) -> Callable[[], None]:  # fmt: skip
    """Algorithm 2 of the paper on a batch; returns as `adam` does.

    `newton_schulz` orthogonalises whole matrices (N, p, q).
    """
    # The sum m is the EMA of g / (1 - mu), which the factors follow; the sum is never debiased.
    rate = momentum if variant.tracker is factors.Subspace else 1 - math.sqrt(momentum)
    followed = trackings(batch, variant.tracker, {"m": torch.full_like(batch.t, rate)}, 1 / (1 - momentum))
    (tracking,) = followed
    batch.compiled = launch.cpu_kernels_take(batch)
    everything = slice(0, batch.p), slice(0, batch.q)
    lrs = batch.per_matrix(batch.t.new_zeros(()) + lr * scale, 0.0)
    keep = batch.per_matrix(1 - lr * weight_decay, 1.0)
    # One dense matrix at a time, or some small ones; of sharded ones every process takes its share.
    count = SMALL // max(1, batch.p * batch.q) if batch.shards.count == 1 else batch.N
    for members in cut(batch.N, max(1, count)) or [slice(0, 0)]:
        g = batch.gradient(members, *everything).to(batch.dtype)
        m = matmul(tracking.tracker.B[members] * momentum, tracking.tracker.A[members]).add_(g)
        if nesterov:
            m.mul_(momentum).add_(g)
        del g
        update = batch.shards.whole(newton_schulz, m)
        del m
        for k, i in enumerate(range(batch.N)[members]):
            w = batch.work(batch.weights[i], *everything)
            if weight_decay:
                w.mul_(keep[i])
            w.addcmul_(update[k].to(w.dtype), lrs[i], value=-1)
            batch.store_weight(i, *everything, w)
        del update
    sweep(batch, followed)
    return _sent(followed)


def _sent(followed: list[Tracking], means: Means | None = None) -> Callable[[], None]:
    """Start the last sum over processes; what is returned stores the new factors, and means."""
    for tracking in followed:
        tracking.tracker.send()

    def finish() -> None:
        for tracking in followed:
            tracking.finish()
        if means is not None:
            means.finish()

    return finish
