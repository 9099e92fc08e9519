"""The step of a batch of same-shaped weights: its moments, dense or factorised, and the Adam update.

Weights of one shape are stepped together as N matrices, in sweeps over row tiles: nothing of size p x q is
formed beyond a tile. The first sweep updates the weights from the old factors and gathers T A^T, the second
gathers L^T T for the trackers in `lorapre.factors`.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lorapre import factors, rules
from lorapre.factors import Tracker
from lorapre.groups import is_low_rank, matrix_shape, state_shapes


class Variant(NamedTuple):
    """What tells the variants apart; they share every other line (ALGORITHM in docs/maths.md)."""

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
    a slice of rows, since a whole (N, p, q) is what the step must not form.
    """

    def __init__(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        state: dict[str, list[Tensor]],
    ) -> None:
        shape = weights[0].shape
        self.E, self.p, self.q = matrix_shape(shape, group["flatten"])
        self.fused = len(shape) == 3 and not group["flatten"]
        self.low_rank = is_low_rank(shape, group["rank"], group["flatten"])
        self.device = weights[0].device
        self.dtype = torch.float32 if self.low_rank else wide(weights[0].dtype)
        self.sign = -1 if group["maximize"] else 1
        self.weights, self.grads = self.matrices(weights), self.matrices(grads)
        self.state = state
        height = max(1, TILE // (len(weights) * self.E * self.q))
        self.tiles = [slice(i, i + height) for i in range(0, self.p, height)]
        self.finite: Tensor | None = None

    def begin(self, nonfinite: str) -> None:
        """Count the step: `t` and, if asked for, `finite` (N, 1, 1), whether the weight takes part in it."""
        steps = torch.stack(self.state["step"])
        self.t = self._per_matrix(steps + 1).to(self.dtype)
        if nonfinite == "skip":
            finite = torch.stack([torch.linalg.vector_norm(g, ord=math.inf) for g in self.grads]).isfinite()
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


class Factors:
    """A factorised moment of a batch, B (N, p, r), A (N, r, q), and what the sweeps gather to track a target.

    The corrected moment of a row tile is `left @ A + fresh g` from the old factors, for the second moment
    with both terms squared.
    """

    def __init__(self, batch: Batch, prefix: str, tracker: Tracker, beta: float) -> None:
        self.batch, self.prefix, self.tracker = batch, prefix, tracker
        self.B, self.A = batch.read(f"{prefix}_B"), batch.read(f"{prefix}_A")
        # Where m m decays by beta, each of two factors decays by its root.
        subspace = tracker is factors.SUBSPACE
        self.rate = rules.debiased_rate(beta, batch.t) if subspace else 1 - math.sqrt(beta)
        self.probe = tracker.probe(self.A)
        self.TAt = torch.empty_like(self.B)

    def target(self, g: Tensor) -> Tensor:
        """What the factors follow."""
        raise NotImplementedError

    def find_basis(self) -> None:
        """Between the sweeps: from T A^T to the left basis L."""
        self.L = self.tracker.basis(self.B, self.A, self.TAt, self.rate)
        self.LtT = torch.zeros_like(self.A)

    def second_sweep(self, rows: slice, g: Tensor) -> None:
        """Gather L^T T."""
        self.LtT.baddbmm_(self.L[:, rows].mT, self.target(g))

    def finish(self) -> None:
        """Take the tracking step and store the new factors."""
        B, A = self.tracker.step(self.B, self.A, self.L, self.TAt, self.LtT, self.rate)
        self.batch.write(f"{self.prefix}_B", B)
        self.batch.write(f"{self.prefix}_A", A)


class FirstMoment(Factors):
    """m = beta1 (mB mA) + (1 - beta1) g; its factors follow g."""

    def __init__(self, batch: Batch, beta1: float, variant: Variant) -> None:
        super().__init__(batch, "m", variant.tracker, beta1)
        correction = rules.debias(beta1, batch.t)
        self.fresh = (1 - beta1) / correction
        # The subspace tracker follows the debiased EMA.
        keep = self.rate if variant.tracker is factors.SUBSPACE else beta1 / correction
        self.left = self.B * keep

    def target(self, g: Tensor) -> Tensor:
        """The gradient."""
        return g

    def sweep(self, rows: slice, g: Tensor) -> Tensor:
        """Rows of the corrected m (N, rows, q); gathers T A^T."""
        torch.bmm(g, self.probe.mT, out=self.TAt[:, rows])
        return torch.bmm(self.left[:, rows], self.A).addcmul_(g, self.fresh)


class SecondMoment(Factors):
    """v = beta2 (vB vA)**2 + (1 - beta2) g**2; its factors follow |g|."""

    def __init__(self, batch: Batch, beta2: float, variant: Variant) -> None:
        super().__init__(batch, "v", variant.tracker, math.sqrt(beta2))
        t, self.beta2 = batch.t, beta2
        correction = rules.debias(beta2, t)
        left, self.right = self.B, self.A
        self.row: Tensor | None = None
        if variant.second == "ramp":
            # (1 - gamma2)**2 is the root of beta2: the product ramps up faster than its square decays.
            ramp = factors.ramp(1 - beta2**0.25, t - 1)
            correction = beta2 * ramp.square() + (1 - beta2)
        elif variant.second == "means":
            self.row, self.column = batch.read("v_row"), batch.read("v_col")
            left, self.right = factors.match_means(self.B, self.A, self.row, self.column)
            self.new_row, self.new_column = torch.empty_like(self.row), self.column * beta2
        self.left = left * (beta2 / correction).sqrt()
        self.fresh = (1 - beta2) / correction

    def target(self, g: Tensor) -> Tensor:
        """The gradient's absolute value, not its square."""
        return g.abs()

    def sweep(self, rows: slice, g: Tensor) -> Tensor:
        """Rows of the corrected v (N, rows, q); gathers T A^T and the means of g**2."""
        torch.bmm(g.abs(), self.probe.mT, out=self.TAt[:, rows])
        square = g.square()
        if self.row is not None:
            self.new_row[:, rows] = torch.lerp(self.row[:, rows], square.mean(-1), 1 - self.beta2)
            self.new_column += square.sum(-2) * ((1 - self.beta2) / self.batch.p)
        return torch.bmm(self.left[:, rows], self.right).square_().addcmul_(square, self.fresh)

    def finish(self) -> None:
        """Take the tracking step and store the new factors and means."""
        super().finish()
        if self.row is not None:
            self.batch.write("v_row", self.new_row)
            self.batch.write("v_col", self.new_column)


def adam(
    batch: Batch, first: Dense | FirstMoment, second: Dense | SecondMoment, *,
    lr: float | Tensor, scale: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Algorithm 1 of the paper on a batch, whichever of the two moments are factorised."""
    for rows in batch.tiles:
        g = batch.gradient(rows)
        update = rules.adam_direction(first.sweep(rows, g), second.sweep(rows, g), eps)
        batch.descend(rows, update, lr * scale, 1 - lr * weight_decay)
    tracked = [moment for moment in (first, second) if isinstance(moment, Factors)]
    if not tracked:
        return
    for moment in tracked:
        moment.find_basis()
    for rows in batch.tiles:
        g = batch.gradient(rows)
        for moment in tracked:
            moment.second_sweep(rows, g)
    for moment in tracked:
        moment.finish()


def batches(
    group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], state: list[Tensor]
) -> Iterator[Batch]:
    """Sort parameters by shape, dtype and device into batches of at most BATCH elements, or one parameter."""
    kinds: dict[Any, list[int]] = {}
    starts, offset = [], 0
    for i, (p, g) in enumerate(zip(weights, grads, strict=True)):
        kinds.setdefault((p.shape, p.dtype, g.dtype, p.device), []).append(i)
        starts.append(offset)
        offset += len(state_shapes(group, p.shape))
    for (shape, *_), members in kinds.items():
        if 0 in shape:
            continue  # no elements, nothing to step
        names = list(state_shapes(group, shape))
        size = max(1, BATCH // max(1, math.prod(shape)))
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
