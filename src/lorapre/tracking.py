"""How the factors of a batch follow its gradient: two sweeps over tiles, nothing of size p x q beyond a tile.

The first sweep, over rows, takes T A^T, the second, over columns, L^T T for the trackers in
`lorapre.factors`, which move the factors in place. In one of them the weight is updated, from the old
factors: in the first or, where that needs T A^T, in the second.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lorapre import cpu_kernels, factors
from lorapre.batch import Batch
from lorapre.factors import Tracker
from lorapre.linalg import matmul


class Tracking:
    """Factorised moments of a batch, one after the other: B (k N, p, r), A (k N, r, q) of k moments.

    The first moment (m) follows g, the second (v) |g|. The factors of a single parameter are those of its
    state; of several, or of shards, whose sums then share collectives, they are stacked copies.
    """

    def __init__(
        self, batch: Batch, kind: type[Tracker], rates: dict[str, Tensor], gain: float = 1.0
    ) -> None:
        """`rates` (N,) of each moment, as the tracker takes them; `gain` is a factor on the targets."""
        self.batch, self.names, self.gain = batch, tuple(rates), gain
        pairs = [(batch.read(f"{name}_B"), batch.read(f"{name}_A")) for name in rates]
        if len(pairs) > 1:
            B, A = (torch.cat(pair) for pair in zip(*pairs, strict=True))
        else:
            ((B, A),) = pairs
            if batch.finite is not None:
                B, A = B.clone(), A.clone()
        # The state itself, for trackers that work in place.
        self.state = B if len(batch.state["step"]) == len(rates) == 1 and batch.finite is None else None
        rate = torch.cat(list(rates.values()))[:, None, None].to(B.dtype)
        self.tracker = kind(B, A, rate, batch.shards, whole=len(rates) > 1)
        self.sums: list[tuple[slice, Tensor]] = []
        self.probe: Tensor | None = None

    def of(self, name: str, members: slice | None = None) -> slice:
        """Where members of a moment, or all of them, are among the k N."""
        start = self.names.index(name) * self.batch.N
        if members is None:  # rather than `ALL`, which can be no default
            return slice(start, start + self.batch.N)
        return slice(
            start + (members.start or 0), start + (self.batch.N if members.stop is None else members.stop)
        )

    def squares(self, name: str) -> Tensor:
        """Sums of (B A)**2 over the rows (N, p) of a moment, of the subspace tracker before the sweeps."""
        assert isinstance(self.tracker, factors.Subspace)
        norms: Tensor = torch.linalg.vector_norm(self.tracker.BAWt[self.of(name)], dim=-1)
        return norms.square()

    def places(self, members: slice) -> list[tuple[slice, bool]]:
        """Of k moments the place, and whether the target is |g|."""
        return [(self.of(name, members), name == "v") for name in self.names]

    def targets(self, members: slice, g: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Of k moments the place and the target (n, rows, columns), one at a time."""
        g = g.to(self.batch.products) if g.is_cuda else g.float()
        for at, absolute in self.places(members):
            yield at, g.abs() if absolute else g

    def see(self, members: slice, columns: slice, g: Tensor | list[Tensor]) -> None:
        """Add up T A^T (n, rows, r) over the tiles g (n, rows, columns) of some rows."""
        probe = self.probe
        if probe is None:
            probe = self.tracker.probe(columns)
            if not self.batch.compiled:
                probe = probe.to(self.batch.products)
            if columns == slice(0, self.batch.q):
                self.probe = probe
        if isinstance(g, list):
            products = [
                (at, cpu_kernels.row_products(g, probe[at], absolute, **self.batch.signs(members)))
                for at, absolute in self.places(members)
            ]
        else:
            products = [(at, _times(T, probe[at].mT)) for at, T in self.targets(members, g)]
        self._add(products)

    def left(self, members: slice, rows: slice) -> None:
        """The left half-step of the rows whose tiles have been seen."""
        for at, TAt in self._take():
            self.tracker.left(at, rows, TAt)

    def turn(self) -> None:
        """Between the sweeps."""
        self.probe = None
        self.tracker.turn()

    def answer(self, members: slice, rows: slice, g: Tensor | list[Tensor]) -> None:
        """Add up L^T T (n, r, columns) over the tiles g (n, rows, columns) of some columns."""
        basis = self.tracker.basis
        if isinstance(g, list):
            products = [
                (at, cpu_kernels.column_products(g, basis(at, rows), absolute, **self.batch.signs(members)))
                for at, absolute in self.places(members)
            ]
        else:
            products = [
                (at, _times(basis(at, rows).to(self.batch.products), T)) for at, T in self.targets(members, g)
            ]
        self._add(products)

    def right(self, members: slice, columns: slice) -> None:
        """The right half-step of the columns whose tiles have been answered."""
        for at, LtT in self._take():
            self.tracker.right(at, columns, LtT)

    def finish(self) -> None:
        """Store the new factors."""
        self.tracker.finish()
        for name in self.names if self.tracker.B is not self.state else ():
            self.batch.write(f"{name}_B", self.tracker.B[self.of(name)])
            self.batch.write(f"{name}_A", self.tracker.A[self.of(name)])

    def _add(self, products: list[tuple[slice, Tensor]]) -> None:
        if self.sums:
            products = [(at, x.add_(y)) for (at, x), (_, y) in zip(self.sums, products, strict=True)]
        self.sums = products

    def _take(self) -> list[tuple[slice, Tensor]]:
        sums, self.sums = self.sums, []
        return [(at, x.mul_(self.gain)) for at, x in sums] if self.gain != 1 else sums


def trackings(
    batch: Batch, kind: type[Tracker], rates: dict[str, Tensor], gain: float = 1.0, stack: int = 0
) -> list[Tracking]:
    """Of a single parameter of more than `stack` elements one per moment, in place; else one for all."""
    size = batch.N * len(rates) * batch.rank * (batch.p + batch.q)
    if len(batch.state["step"]) == 1 and batch.shards.count == 1 and size > stack:
        return [Tracking(batch, kind, {name: rate}, gain) for name, rate in rates.items()]
    return [Tracking(batch, kind, rates, gain)] if rates else []


def sweep(
    batch: Batch,
    followed: list[Tracking],
    update: Callable[[slice, slice, slice, Any], None] | None = None,
    late: bool = False,
) -> None:
    """Take the factors through a step.

    Args:
        batch: whose gradient is swept.
        followed: the factors.
        update: sees each tile of the gradient once, before the factors move.
        late: whether it does in the second sweep, with T A^T known.
    """
    g: Tensor | list[Tensor]
    for members, rows, tiles in batch.row_tiles():
        for columns in tiles:
            g = _gradient(batch, members, rows, columns)
            if update is not None and not late:
                update(members, rows, columns, g)
            for tracking in followed:
                tracking.see(members, columns, g)
        for tracking in followed:
            tracking.left(members, rows)
    for tracking in followed:
        tracking.turn()
    if followed:
        for members, columns, tiles in batch.column_tiles(late):
            for rows in tiles:
                g = _gradient(batch, members, rows, columns)
                if update is not None and late:
                    update(members, rows, columns, g)
                for tracking in followed:
                    tracking.answer(members, rows, g)
            for tracking in followed:
                tracking.right(members, columns)


def _gradient(batch: Batch, members: slice, rows: slice, columns: slice) -> Tensor | list[Tensor]:
    """A tile of the gradient (n, rows, columns) or, for compiled kernels, n of them as they are."""
    if batch.compiled:
        return batch.tiles(batch.grads, members, rows, columns)
    g = batch.gradient(members, rows, columns)
    return g if g.is_cuda else g.to(batch.dtype)  # once for all that is done with it; GPUs convert on the way


def _times(X: Tensor, Y: Tensor) -> Tensor:
    """X Y in float32 of two in the dtype of products: float32, or bfloat16 accumulated in float32."""
    if X.is_cuda and X.dtype == torch.bfloat16:
        return torch.bmm(X, Y, out_dtype=torch.float32)
    return matmul(X.float(), Y.float())
