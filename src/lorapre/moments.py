"""The step of a batch of same-shaped weights: its moments, dense or factorised, and the Adam update.

Weights of one shape are stepped together as N matrices, in sweeps over row tiles: nothing of size p x q is
formed beyond a tile. The first sweep updates the weights from the old factors and gathers T A^T, the second
gathers L^T T for the trackers in `lorapre.factors`.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lorapre import factors, rules, sharding
from lorapre.factors import Tracker
from lorapre.groups import is_low_rank, matrix_shape, state_shapes


class Variant(NamedTuple):
    """What tells the variants apart; they share every other line (docs/maths.md)."""

    tracker: Tracker
    start: Literal["printed", "sketch", "random"]  # of A; B starts at zero
    second: Literal["printed", "ramp", "means"]  # what corrects the second moment


VARIANTS = {
    "paper": Variant(factors.PRINTED, start="printed", second="printed"),
    "calibrated": Variant(factors.NEWTON, start="sketch", second="ramp"),
    "subspace": Variant(factors.SUBSPACE, start="random", second="means"),
}

# Elements of a tile and of a batch: a tile and its temporaries stay in a core's cache, a batch is large
# enough to hide the cost of a call and small enough that its stacked factors do not count.
TILE = 2**17
BATCH = 2**20


class Batch:
    """Same-shaped parameters, stepped together as N = n E matrices (p, q).

    `read` and `write` take a state tensor of all of them as one (N, ...); `gradient` and `descend` work on
    a slice of rows, since a whole (N, p, q) is what the step must not form. Of sharded parameters it holds,
    and (E, p, q) is, what is local; `shards` sums over the rest.
    """

    def __init__(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        state: dict[str, list[Tensor]],
    ) -> None:
        shape = weights[0].shape
        self.fused = len(shape) == 3 and not group["flatten"]
        self.low_rank = is_low_rank(shape, group["rank"], group["flatten"])
        self.shards = sharding.shards(weights[0], group["flatten"])
        weights, grads = [sharding.local(x) for x in weights], [sharding.local(x) for x in grads]
        self.E, self.p, self.q = matrix_shape(weights[0].shape, group["flatten"])
        self.device = weights[0].device
        self.dtype = torch.float32 if self.low_rank else wide(weights[0].dtype)
        self.sign = -1 if group["maximize"] else 1
        self.weights, self.grads = self.matrices(weights), self.matrices(grads)
        self.state = {name: [sharding.local(x) for x in tensors] for name, tensors in state.items()}
        height = max(1, TILE // max(1, len(weights) * self.E * self.q))
        self.tiles = [slice(i, i + height) for i in range(0, self.p, height)]
        self.finite: Tensor | None = None

    def begin(self, nonfinite: str) -> None:
        """Count the step: `t` and, if asked for, `finite` (N, 1, 1), whether the weight takes part in it."""
        steps = torch.stack(self.state["step"])
        self.t = self._per_matrix(steps + 1).to(self.dtype)
        if nonfinite == "skip":
            largest = torch.stack([
                torch.linalg.vector_norm(g, ord=math.inf) if g.numel() else g.new_zeros(()) for g in
                self.grads
            ])  # fmt: skip
            finite = self.shards.sum_all((~largest.isfinite()).to(steps.dtype)) == 0
            self.finite = self._per_matrix(finite)
            torch._foreach_add_(self.state["step"], list(finite.to(steps.dtype)))
            torch._foreach_add_(self.state["skipped"], list((~finite).to(steps.dtype)))
        else:
            torch._foreach_add_(self.state["step"], 1)

    def matrices(self, tensors: list[Tensor]) -> list[Tensor]:
        """Views (E, p, ...); load flattens what follows the rows, which need not be contiguous."""
        if self.fused:
            return tensors
        return [x[None] if x.ndim > 1 else x.view(1, 1, -1) for x in tensors]

    def _per_matrix(self, x: Tensor) -> Tensor:
        return x[:, None].expand(-1, self.E).reshape(-1, 1, 1)

    def load(self, matrices: list[Tensor], rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """(N, rows, q) in `dtype`, else the batch's; may share memory with the originals."""
        tiles = [x[:, rows].flatten(2) for x in matrices]
        return (tiles[0] if len(tiles) == 1 else torch.cat(tiles)).to(dtype or self.dtype)

    def store(self, matrices: list[Tensor], rows: slice, new: Tensor, old: Tensor) -> None:
        """Write (N, rows, q) back; `old` stays where the gradient was not finite."""
        if self.finite is not None:
            new = torch.where(self.finite, new, old)
        tiles = [x[:, rows] for x in matrices]
        torch._foreach_copy_(
            tiles, [y.view(x.shape) for x, y in zip(tiles, torch.split(new, self.E), strict=True)]
        )

    def gradient(self, rows: slice) -> Tensor:
        """Rows of the gradient (N, rows, q), to be minimised along, zero where it was not finite."""
        g = self.load(self.grads, rows)
        if self.finite is not None:
            g = torch.where(self.finite, g, 0)
        return -g if self.sign < 0 else g

    def descend(self, rows: slice, update: Tensor, lr: float | Tensor, keep: float | Tensor) -> None:
        """Rows of the weights <- keep * weights - lr * update; `update` (N, rows, q) is overwritten."""
        old = self.load(self.weights, rows, wide(self.weights[0].dtype))
        self.store(self.weights, rows, torch.sub(old * keep, update.mul_(lr)), old)

    def read(self, name: str) -> Tensor:
        """A state tensor of the whole batch, (N, ...)."""
        tensors = self.state[name]
        if self.fused:
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)

    def write(self, name: str, new: Tensor) -> None:
        """Write a state tensor (N, ...) back; the old one stays where the gradient was not finite."""
        if self.finite is not None:
            new = torch.where(self.finite.view(-1, *[1] * (new.ndim - 1)), new, self.read(name))
        tensors = self.state[name]
        torch._foreach_copy_(
            tensors, [y.view(x.shape) for x, y in zip(tensors, torch.split(new, self.E), strict=True)]
        )


class Dense:
    """A moment of a batch kept in full: the EMA of g or, as `exp_avg_sq`, of g**2."""

    def __init__(self, batch: Batch, name: str, beta: float) -> None:
        self.batch, self.beta, self.square = batch, beta, name == "exp_avg_sq"
        self.stored = batch.matrices(batch.state[name])
        self.correction = rules.debias(beta, batch.t)

    def sweep(self, rows: slice, g: Tensor) -> Tensor:
        """Update the rows of the moment; return them corrected, (N, rows, q)."""
        old = self.batch.load(self.stored, rows)
        new = old.lerp(g.square() if self.square else g, 1 - self.beta)
        self.batch.store(self.stored, rows, new, old)
        return new / self.correction


class Tracking:
    """The factorised moments of a batch, stacked: k moments of N matrices, B (kN, p, r), A (kN, r, q).

    The first moment (m) follows g, the second (v) |g|. Two sweeps over the rows of the gradient gather what
    the tracker wants to know of them.
    """

    def __init__(self, batch: Batch, tracker: Tracker, decays: dict[str, float]) -> None:
        self.batch, self.tracker, self.names = batch, tracker, tuple(decays)
        self.B = torch.cat([batch.read(f"{name}_B") for name in decays])
        self.A = torch.cat([batch.read(f"{name}_A") for name in decays])
        # Where a product decays by beta, each of its two factors decays by the root.
        debiased = tracker is factors.SUBSPACE
        self.rate = torch.cat([
            rules.debiased_rate(beta, batch.t) if debiased else torch.full_like(batch.t, 1 - math.sqrt(beta))
            for beta in decays.values()
        ])  # fmt: skip
        self.probe = tracker.probe(self.A, batch.shards)
        self.TAt = torch.empty_like(self.B)

    def part(self, name: str, x: Tensor) -> Tensor:
        """Of a stack (kN, ...) what belongs to one moment, (N, ...)."""
        count = x.shape[0] // len(self.names)
        return x[self.names.index(name) * count :][:count]

    def targets(self, g: Tensor) -> Tensor:
        """(kN, rows, q)."""
        return torch.cat([g.abs() if name == "v" else g for name in self.names])

    def first_sweep(self, rows: slice, g: Tensor) -> None:
        """Gather T A^T."""
        torch.bmm(self.targets(g), self.probe.mT, out=self.TAt[:, rows])

    def left(self) -> None:
        """The left half-step, between the sweeps."""
        self.L, self.new_B = self.tracker.left(self.B, self.A, self.TAt, self.rate, self.batch.shards)
        del self.probe, self.TAt
        self.LtT = torch.zeros_like(self.A)

    def second_sweep(self, rows: slice, g: Tensor) -> None:
        """Gather L^T T."""
        self.LtT.baddbmm_(self.L[:, rows].mT, self.targets(g))

    def send(self) -> None:
        """After the sweeps: start the last sum over processes."""
        parts = self.tracker.parts(self.B, self.L, self.new_B, self.LtT)
        del self.L, self.LtT
        self.sums = self.batch.shards.send_rows(*parts)

    def right(self) -> None:
        """The right half-step; stores the new factors."""
        B, A = self.tracker.right(self.B, self.A, self.new_B, self.sums(), self.rate, self.batch.shards)
        for name in self.names:
            self.batch.write(f"{name}_B", self.part(name, B))
            self.batch.write(f"{name}_A", self.part(name, A))


class FirstMoment:
    """m = beta1 (mB mA) + (1 - beta1) g from the old factors, corrected."""

    def __init__(self, batch: Batch, tracking: Tracking, beta1: float) -> None:
        correction = rules.debias(beta1, batch.t)
        # The subspace tracker follows the debiased EMA.
        debiased = tracking.tracker is factors.SUBSPACE
        keep = tracking.part("m", tracking.rate) if debiased else beta1 / correction
        self.left = tracking.part("m", tracking.B) * keep
        self.right = tracking.part("m", tracking.A)
        self.fresh = (1 - beta1) / correction

    def sweep(self, rows: slice, g: Tensor) -> Tensor:
        """Rows of the corrected m (N, rows, q)."""
        return torch.bmm(self.left[:, rows], self.right).addcmul_(g, self.fresh)


class SecondMoment:
    """v = beta2 (vB vA)**2 + (1 - beta2) g**2 from the old factors, corrected."""

    def __init__(self, batch: Batch, tracking: Tracking, beta2: float, correct: str) -> None:
        left, self.right = tracking.part("v", tracking.B), tracking.part("v", tracking.A)
        correction = rules.debias(beta2, batch.t)
        self.means: Means | None = None
        if correct == "ramp":
            # The product ramps up to the root of v: its square is behind the EMA of g**2.
            ramp = factors.ramp(1 - beta2**0.25, batch.t - 1)
            correction = beta2 * ramp.square() + (1 - beta2)
        elif correct == "means":
            self.means = Means(batch, beta2)
            left, self.right = factors.match_means(
                left, self.right, self.means.row, self.means.column, batch.shards
            )
        self.left = left * (beta2 / correction).sqrt()
        self.fresh = (1 - beta2) / correction

    def sweep(self, rows: slice, g: Tensor) -> Tensor:
        """Rows of the corrected v (N, rows, q)."""
        square = g.square()
        if self.means is not None:
            self.means.gather(rows, square)
        return torch.bmm(self.left[:, rows], self.right).square_().addcmul_(square, self.fresh)


class Means:
    """v_row (N, p) and v_col (N, q): the EMAs of the means of g**2 over rows and columns."""

    def __init__(self, batch: Batch, beta2: float) -> None:
        self.batch, self.beta2 = batch, beta2
        self.row, self.column = batch.read("v_row"), batch.read("v_col")
        self.row_sums, self.column_sums = torch.zeros_like(self.row), torch.zeros_like(self.column)

    def gather(self, rows: slice, square: Tensor) -> None:
        """Add up g**2 (N, rows, q)."""
        self.row_sums[:, rows] = square.sum(-1)
        self.column_sums += square.sum(-2)

    def finish(self) -> None:
        """Store the new means."""
        shards = self.batch.shards
        p, q = shards.size(self.batch.p, self.batch.q)
        (rows,), (columns,) = shards.sum_columns(self.row_sums), shards.sum_rows(self.column_sums)
        self.batch.write("v_row", torch.lerp(self.row, rows / q, 1 - self.beta2))
        self.batch.write("v_col", torch.lerp(self.column, columns / p, 1 - self.beta2))


def adam(
    batch: Batch, variant: Variant, *, betas: tuple[float, float],
    lr: float | Tensor, scale: float, eps: float, weight_decay: float,
) -> Callable[[], None]:  # fmt: skip
    """Algorithm 1 of the paper on a batch; a moment without factors in the state is dense, as in AdamW.

    Returns with the last sum over processes on its way; what is returned stores the new factors.
    """
    beta1, beta2 = betas
    decays = {"m": beta1, "v": math.sqrt(beta2)}
    decays = {name: beta for name, beta in decays.items() if f"{name}_B" in batch.state}
    tracking = Tracking(batch, variant.tracker, decays) if decays else None
    first: Dense | FirstMoment = (
        FirstMoment(batch, tracking, beta1) if tracking and "m" in decays else Dense(batch, "exp_avg", beta1)
    )
    second: Dense | SecondMoment = (
        SecondMoment(batch, tracking, beta2, variant.second)
        if tracking and "v" in decays
        else Dense(batch, "exp_avg_sq", beta2)
    )
    for rows in batch.tiles:
        g = batch.gradient(rows)
        update = rules.adam_direction(first.sweep(rows, g), second.sweep(rows, g), eps)
        batch.descend(rows, update, lr * scale, 1 - lr * weight_decay)
        if tracking:
            tracking.first_sweep(rows, g)
    if not tracking:
        return lambda: None
    tracking.left()
    for rows in batch.tiles:
        tracking.second_sweep(rows, batch.gradient(rows))
    tracking.send()

    def finish() -> None:
        tracking.right()
        if isinstance(second, SecondMoment) and second.means is not None:
            second.means.finish()

    return finish


def batches(
    group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], state: list[Tensor]
) -> Iterator[Batch]:
    """Sort parameters by shape, dtype and device into batches of at most BATCH elements, or one parameter."""
    kinds: dict[Any, list[int]] = {}
    starts, offset = [], 0
    for i, (p, g) in enumerate(zip(weights, grads, strict=True)):
        kinds.setdefault((p.shape, p.dtype, g.dtype, p.device, sharding.layout(p)), []).append(i)
        starts.append(offset)
        offset += len(state_shapes(group, p.shape))
    for (shape, *_), members in kinds.items():
        if 0 in shape:
            continue  # no elements, nothing to step
        names = list(state_shapes(group, shape))
        # Of a sharded weight a part counts, and Muon wants a matrix for every process.
        count = sharding.shards(weights[members[0]], group["flatten"]).count
        size = max(count, BATCH * count // math.prod(shape))
        for chunk in (members[i : i + size] for i in range(0, len(members), size)):
            yield Batch(
                group,
                [weights[i] for i in chunk],
                [grads[i] for i in chunk],
                {name: [state[starts[i] + k] for i in chunk] for k, name in enumerate(names)},
            )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype dense arithmetic and dense moments have: float32, or float64 for float64 weights."""
    return torch.promote_types(dtype, torch.float32)
