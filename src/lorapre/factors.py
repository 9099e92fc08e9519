"""One momentum as a product of two factors, m = B A, updated in closed form (paper, Section 3).

Shapes, with any leading batch dimensions: `B` (..., p, r), `A` (..., r, q), target `T` (..., p, q),
r < min(p, q). A tracker takes two half-steps, the left factor first. It never needs T itself, only its
projections `T A^T` (..., p, r) and then `L^T T` (..., r, q) on a left basis L (..., p, r) that the first
half-step finds, and of each a few rows or columns at a time, so T can come in tiles and in shards:

    Printed   L = B, the old factor                       paper, Theorem 3.1, Eq. 11-12, both factors at once
    Newton    L = B', the new factor                      the same two steps, one after the other
    Subspace  L = orth((beta B A + (1 - beta) T) A^T)     one subspace iteration on the projected EMA

docs/maths.md says where each comes from and which test holds it. Nothing here synchronises with the host.
Where the matrices are spread over processes, `shards` says how to sum over them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lorapre import cpu_kernels
from lorapre.linalg import (
    ALL,
    WHOLE,
    Shards,
    compiled,
    gram,
    in_parts,
    inverse,
    inverse_root,
    matmul,
    norm,
    orth,
    waves,
)

# As printed; of the trace of the Gram matrix in all variants but "paper", and there too where that is more.
DAMPING = 1e-6


def gaussian(rows: int, columns: int, *, seed: int) -> Tensor:
    """A (rows, columns) float32 standard normal matrix on the CPU, a function of its arguments alone.

    Neither the global random state nor the order of the parameters, nor the device or the sharding of the
    weight plays a part in it, so a run starts the same way everywhere.
    """
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def product(B: Tensor, A: Tensor) -> Tensor:
    """m = B A (..., p, q) of B (..., p, r) and A (..., r, q)."""
    return matmul(B, A)


def gauge_(B: Tensor, A: Tensor, shards: Shards = WHOLE, before: Tensor | None = None) -> None:
    """Rescale B (..., p, r) and A (..., r, q) in place: ||A||_F = sqrt(r), B A as it was (departure d).

    Where A is zero, or has left the range of its type, the product becomes zero and A what it was `before`,
    or the first r unit vectors, so that the factor always has directions.
    """
    if shards.count == 1 and A.is_contiguous() and B.is_contiguous() and compiled(A, 2**18):
        return cpu_kernels.gauge_(B, A, before)
    size = norm(A, shards, columns=True) / math.sqrt(A.shape[-2])
    alive = (size >= torch.finfo(A.dtype).tiny) & size.isfinite()
    A.mul_(torch.where(alive, 1 / size, 0))
    B.mul_(torch.where(alive, size, 0))
    if before is not None:
        torch.where(alive, A, before, out=A)
    else:
        A.diagonal(dim1=-2, dim2=-1).add_((~alive).squeeze(-1))


def start(sketch: Tensor, fallback: Tensor, shards: Shards = WHOLE) -> Tensor:
    """The first A (..., r, q) from `sketch` = Omega^T T (..., r, q), at the scale of `gauge_` (departure b).

    Where the sketch is zero or not finite, `fallback` (r, q) takes its place, at the same scale.
    """
    size = norm(sketch, shards, columns=True)
    A = torch.where((size > 0) & size.isfinite(), sketch, fallback)
    return A * (math.sqrt(A.shape[-2]) / norm(A, shards, columns=True))


def ramp(gamma: float, t: Tensor) -> Tensor:
    """w_t = 1 - (1 - gamma)**(2 t): the product B A of the Newton tracker, fed the constant 1 for t steps.

    Exact (departure c): one step takes w to (1 - gamma)**2 w + 1 - (1 - gamma)**2, from w_0 = 0.
    """
    return -torch.expm1(2 * t * math.log(max(1 - gamma, 1e-300)))


class Tracker(ABC):
    """How the factors of N momenta follow their targets; B and A are overwritten, or replaced.

        tracker = Newton(B, A, rate)
        tracker.left(members, rows, T[members, rows] @ tracker.probe(ALL)[members].mT)        for all rows
        tracker.turn()
        tracker.right(members, columns, tracker.basis(members, ALL) @ T[members, :, columns])      for all
        tracker.finish()

    Sums over other processes are taken in `turn` and `finish`; `send` starts the last one.

    Args:
        B: (N, p, r).
        A: (N, r, q).
        rate: in [0, 1], a number or one per matrix (N, 1, 1). Of Printed and Newton the length gamma of a
            step, of Subspace the decay beta of the EMA.
        shards: how to sum over other processes.
        whole: take each half-step of all members, rows and columns at once: faster if they are small.
    """

    probes = True  # whether T A^T is taken with the probe of A instead of A

    def __init__(
        self, B: Tensor, A: Tensor, rate: Tensor | float, shards: Shards = WHOLE, whole: bool = False
    ) -> None:
        self.B, self.A, self.shards = B, A, shards
        self.rate = torch.as_tensor(rate, dtype=B.dtype, device=B.device).expand(len(B), 1, 1)
        self._projected = torch.empty_like(B) if shards.spread_columns or whole else None  # T A^T
        self._answers: Tensor | None = None  # L^T T
        self._whole = shards.spread_rows or whole
        self._sums: Callable[[], tuple[Tensor, ...]] | None = None
        self._start_left(*shards.sum_columns(gram(A.mT)))

    def probe(self, columns: slice) -> Tensor:
        """A + eps W (N, r, columns), the A of T A^T, or rather R (A + eps W) where the tracker says so.

        W has rows of A's length, in general position.

        A target orthogonal to A in its rows and to B in its columns has no projection at all, and the factors
        would never see it. Rounding errors, of size eps, are enough to find it, but where the new rows or
        columns were exactly zero before there are none (docs/maths.md, departure g).
        """
        if not self.probes:
            return self.A[..., columns]
        q, eps = self.shards.size(1, self.A.shape[-1])[1], torch.finfo(self.A.dtype).eps
        if self.shards.count == 1 and compiled(self.A, 2**18):
            return cpu_kernels.add_waves(self.A, columns, eps * math.sqrt(2 / q))
        W = waves(self.A.mT, self.shards.columns, q, columns).mT
        return torch.add(self.A[..., columns], W, alpha=eps)

    def left(self, members: slice, rows: slice, TAt: Tensor) -> None:
        """The left half-step of some rows, from T A^T (n, rows, r), summed over the columns held here."""
        if self._projected is not None:
            self._projected[members, rows] = TAt
        else:
            self._left(members, rows, TAt)

    def turn(self) -> None:
        """After all rows: find the left basis."""
        if self._projected is not None:
            self._left(ALL, ALL, *self.shards.sum_columns(self._projected))
            self._projected = None
        self._turn()
        self._answers = torch.empty_like(self.A) if self._whole else None
        self._start_right(*self.shards.sum_rows(*self._parts()))

    @abstractmethod
    def basis(self, members: slice, rows: slice) -> Tensor:
        """L^T (n, r, rows) of the left basis, from `turn` on; or rather R L^T."""

    def right(self, members: slice, columns: slice, LtT: Tensor) -> None:
        """The right half-step of some columns, from L^T T (n, r, columns) of the rows held here.

        LtT is overwritten.
        """
        if self._answers is not None:
            self._answers[members, :, columns] = LtT
        else:
            self._right(members, columns, LtT)

    def send(self) -> None:
        """After all columns: start the last sum over processes; arithmetic can go on until `finish`."""
        if self._answers is not None:
            self._sums = self.shards.send_rows(self._answers)
            self._answers = None

    def finish(self) -> None:
        """Wait for the sums; from then on the new factors are in B and A."""
        self.send()
        if self._sums is not None:
            self._right(ALL, ALL, *self._sums())
        self._finish()

    @abstractmethod
    def _start_left(self, G: Tensor) -> None:
        """From G = A A^T (N, r, r)."""

    @abstractmethod
    def _left(self, members: slice, rows: slice, TAt: Tensor) -> None: ...

    @abstractmethod
    def _turn(self) -> None: ...

    @abstractmethod
    def _parts(self) -> tuple[Tensor, ...]:
        """What `_start_right` takes, to be summed over all rows."""

    @abstractmethod
    def _start_right(self, *parts: Tensor) -> None: ...

    @abstractmethod
    def _right(self, members: slice, columns: slice, LtT: Tensor) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


class Newton(Tracker):
    """A Newton step of length gamma in the left factor, then one in the right factor.

        B' = (1 - gamma) B + gamma T A^T (A A^T + lambda I)^-1,      lambda = 1e-6 trace, departure a
        A' = (1 - gamma) A + gamma (B'^T B' + lambda I)^-1 B'^T T
        (B, A) = (B', A') in the gauge of `gauge_`

    Taken from the new left factor and not, as printed, from the old one, the product is
    B' A' = (1 - gamma) B' A + gamma P T with P the projection on the columns of B': no term is quadratic in
    T, nothing grows when T is much larger than B A (departure f).

    The second system is formed from L = B' / ||B'||_F, in units of ||B'||, so that neither a gradient of
    1e-20 nor one of 1e20 leaves the range of float32.
    """

    absolute = False  # whether lambda is at least 1e-6

    def _start_left(self, G: Tensor) -> None:
        self._root = _damped_root(G, DAMPING if self.absolute else 0.0)

    def probe(self, columns: slice) -> Tensor:
        """R (A + eps W), R^T R the damped inverse: whitened before somebody rounds it (docs/maths.md)."""
        return matmul(self._root, super().probe(columns), cpu_kernels.LOWER)

    def _left(self, members: slice, rows: slice, TAt: Tensor) -> None:
        self.B[members, rows].lerp_(matmul(TAt, self._root[members]), self.rate[members])

    def _turn(self) -> None:
        self._size = norm(self.B, self.shards)
        self._unit = inverse(self._size)

    def basis(self, members: slice, rows: slice) -> Tensor:
        """R L^T (n, r, rows) with L = B' / ||B'||_F, whitened as the probe is."""
        return matmul(self._root[members], self.B[members, rows].mT * self._unit[members], cpu_kernels.LOWER)

    def _parts(self) -> tuple[Tensor, ...]:
        return (gram(self.B, self._unit),)

    def _start_right(self, *parts: Tensor) -> None:
        least = (DAMPING * self._unit * self._unit).clamp(max=1e30) if self.absolute else 0.0
        self._root = _damped_root(parts[0], least)

    def _right(self, members: slice, columns: slice, LtT: Tensor) -> None:
        solution = matmul(self._root[members].mT, LtT.mul_(self._unit[members]))
        self.A[members, :, columns].lerp_(solution, self.rate[members])

    def _finish(self) -> None:
        gauge_(self.B, self.A, self.shards)


class Printed(Newton):
    """Both Newton steps from the old factors, as printed (paper, Theorem 3.1, Eq. 11-12).

        B' = (1 - gamma) B + gamma T A^T (A A^T + lambda I)^-1,      lambda = 1e-6, or 1e-6 trace if more
        A' = (1 - gamma) A + gamma (B^T B + lambda I)^-1 B^T T

    Without probe and gauge. The new left factor is kept apart until the right one has seen the old.
    """

    probes = False
    absolute = True

    def __init__(
        self, B: Tensor, A: Tensor, rate: Tensor | float, shards: Shards = WHOLE, whole: bool = False
    ) -> None:
        super().__init__(B.clone(), A, rate, shards, whole)
        self.old_B = B

    def _turn(self) -> None:
        self.new_B, self.B = self.B, self.old_B
        super()._turn()

    def _finish(self) -> None:
        self.B.copy_(self.new_B)


class Subspace(Tracker):
    """One step of subspace iteration on the EMA beta B A + (1 - beta) T, from the row space of A.

        Q = orth(beta B A W^T + (1 - beta) T W^T),    W = R A with orthonormal rows, but for a damping
        A' = beta (Q^T B) A + (1 - beta) Q^T T
        (B, A) = (Q, A') in the gauge of `gauge_`

    The EMA projected on the columns of Q, linear in T (docs/maths.md, "The subspace tracker"). W has the rows
    of A and spares `orth` their condition.

    Attributes:
        W: (N, r, q); of columns that have taken their right half-step, the new A.
        BAWt: B A W^T (N, p, r), until `turn`.
        seen: T W^T (N, p, r), summed over columns; full from `turn` on, which lets go of it.
    """

    def _start_left(self, G: Tensor) -> None:
        self._root = _damped_root(G.clone(), 0.0)
        # In parts, for memory's sake; GPUs rather take fewer calls.
        size = self.A.shape[-1] if self.A.is_cuda else max(1, 2**18 // self.A.shape[-2])
        parts = [slice(start, start + size) for start in range(0, self.A.shape[-1], size)]
        if len(parts) == 1:
            self.W = matmul(self._root, super().probe(ALL), cpu_kernels.LOWER)
        else:
            self.W = torch.empty_like(self.A)
            for columns in parts:
                self.W[..., columns] = matmul(self._root, super().probe(columns), cpu_kernels.LOWER)
        self.BAWt = matmul(self.B, matmul(G, self._root.mT))
        self.seen = torch.empty_like(self.B)

    def probe(self, columns: slice) -> Tensor:
        """W = R (A + eps W'), with R^T R the damped inverse of A A^T and W' in general position."""
        return self.W[..., columns]

    def _left(self, members: slice, rows: slice, TAt: Tensor) -> None:
        self.seen[members, rows] = TAt

    def _turn(self) -> None:
        # No name holds what `orth` overwrites, so that it is free as soon as `orth` is done with it.
        self._Q = orth(self._estimate(), self.shards)

    def _estimate(self) -> Tensor:
        """(beta B A + (1 - beta) T) W^T (N, p, r)."""
        estimate = self.BAWt.lerp_(self.seen, 1 - self.rate)
        del self.BAWt, self.seen
        return estimate

    def basis(self, members: slice, rows: slice) -> Tensor:
        """Q^T (n, r, rows)."""
        return self._Q[members, rows].mT

    def _parts(self) -> tuple[Tensor, ...]:
        return (matmul(self._Q.mT, self.B),)

    def _start_right(self, *parts: Tensor) -> None:
        (self._QtB,) = parts

    def _right(self, members: slice, columns: slice, LtT: Tensor) -> None:
        # The old A stays, for `gauge_`, and W has served.
        kept = matmul(self._QtB[members], self.A[members, :, columns])
        torch.lerp(kept, LtT, 1 - self.rate[members], out=self.W[members, :, columns])

    def _finish(self) -> None:
        gauge_(self._Q, self.W, self.shards, before=self.A)
        self.B, self.A = self._Q, self.W


def track(
    kind: type[Tracker], B: Tensor, A: Tensor, T: Tensor, rate: Tensor | float, shards: Shards = WHOLE
) -> tuple[Tensor, Tensor]:
    """One step of B (..., p, r) and A (..., r, q), left as they are, towards T (..., p, q): (B', A')."""
    rate = torch.as_tensor(rate, dtype=B.dtype).expand(*B.shape[:-2], 1, 1).reshape(-1, 1, 1)
    tracker = kind(B.reshape(-1, *B.shape[-2:]).clone(), A.reshape(-1, *A.shape[-2:]).clone(), rate, shards)
    T = T.reshape(-1, *T.shape[-2:])
    tracker.left(ALL, ALL, matmul(T, tracker.probe(ALL).mT))
    tracker.turn()
    tracker.right(ALL, ALL, matmul(tracker.basis(ALL, ALL), T))
    tracker.finish()
    return tracker.B.view_as(B), tracker.A.view_as(A)


def match_means(
    B: Tensor, A: Tensor, row: Tensor, column: Tensor, shards: Shards = WHOLE, squares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factors on rows of B, then on columns of A, that make `row`, then `column` the means of (B A)**2.

    The square of an estimate of E|g| falls short of E g**2; the true means of g**2 over the rows and columns
    are cheap to keep and put that right (docs/maths.md, "The second moment"). Only Grams are formed.

    Args:
        B: (..., p, r).
        A: (..., r, q).
        row: (..., p), wanted means over each row.
        column: (..., q), wanted means over each column; these hold exactly, those of the rows nearly.
        shards: how to sum over other processes.
        squares: (..., p), sums of (B A)**2 over each row if they are known.

    Returns:
        Of the rows (..., p, 1), and of the columns (..., 1, q).
    """
    p, q = shards.size(B.shape[-2], A.shape[-1])
    if squares is None:
        (G,) = shards.sum_columns(gram(A.mT))
        squares = (matmul(B, G) * B).sum(-1)
    rows = _root_of_ratio(row, squares / q)[..., None]
    now = (matmul(shards.gram(B * rows), A) * A).sum(-2) / p
    return rows, _root_of_ratio(column, now)[..., None, :]


def rank_one_rest(
    B: Tensor, A: Tensor, squares: Tensor, keep: Tensor, row: Tensor, column: Tensor, shards: Shards = WHOLE
) -> tuple[Tensor, Tensor]:
    """Vectors whose outer product has the means that keep (B A)**2 leaves of `row` and `column`.

    Where it leaves less than nothing, nothing is left.

    Args:
        B: (..., p, r), its columns orthogonal and of one length, as Subspace makes them.
        A: (..., r, q).
        squares: (..., p), sums of (B A)**2 over each row.
        keep: (..., 1), how much of the square counts.
        row: (..., p), means of a non-negative matrix over each row.
        column: (..., q), its means over each column.
        shards: how to sum over other processes.

    Returns:
        Of the rows (..., p, 1), and of the columns (..., 1, q).
    """
    p, q = shards.size(B.shape[-2], A.shape[-1])
    # Infinities of both signs, of squares above 1e38, sum up to NaN: then nothing is known to be left.
    rows = (row - keep * squares / q).clamp(min=0).nan_to_num(nan=0.0)
    total, length = shards.sum_rows(rows.sum(-1, keepdim=True), B[..., :1].square().sum(-2))
    # B^T B is `length` times the identity.
    gathered = torch.cat([part.square().sum(-1) for part in in_parts(A.mT)], -1) * length
    columns = (column - keep * gathered / p).clamp(min=0).nan_to_num(nan=0.0)
    ratio = columns / (total / p)
    return rows[..., None], torch.where(ratio.isfinite(), ratio, 0)[..., None, :]


def _root_of_ratio(wanted: Tensor, now: Tensor) -> Tensor:
    """sqrt(wanted / now), and zero where that is no number, or none that float32 has."""
    ratio = wanted / now
    return torch.where((now > 0) & ratio.isfinite(), ratio.sqrt(), 0)


def _damped_root(G: Tensor, least: Tensor | float) -> Tensor:
    """R (..., r, r) with R^T R = (G + lambda I)^-1; lambda = 1e-6 trace, at least `least`, (..., 1, 1).

    G (..., r, r), a Gram matrix, is overwritten. Less would be below the resolution of float32: the Gram of a
    target of rank below r has eigenvalues that rounding makes negative. The smallest normal number on top
    lets the all-zero Gram of the first step solve to zero.
    """
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None]
    # No tensor is made of the number: copying one to a GPU would wait for it.
    lam = DAMPING * trace
    lam = torch.maximum(lam, least.squeeze(-1)) if isinstance(least, Tensor) else lam.clamp(min=least)
    G.diagonal(dim1=-2, dim2=-1).add_(lam + torch.finfo(G.dtype).tiny)
    return inverse_root(G)
