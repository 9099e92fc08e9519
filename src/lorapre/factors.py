"""One momentum as a product of two factors, m = B A, updated in closed form (paper, Section 3).

Shapes, with any leading batch dimensions: `B` (..., p, r), `A` (..., r, q), target `T` (..., p, q),
r < min(p, q). A tracker takes two half-steps, the left factor first. It never needs T itself, only its
projections `T A^T` (..., p, r) and then `L^T T` (..., r, q) on a left basis L (..., p, r) that the first
half-step finds, and of each a few rows or columns at a time, so T can come in tiles and in shards:

    Printed   L = unit(B), the old factor                 paper, Theorem 3.1, Eq. 11-12, both factors at once
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

# As printed; of the trace of the Gram matrix in all variants but "paper", and there too where that is more.
DAMPING = 1e-6


class Shards:
    """The part of its matrices that a process holds: here, all of it; `lorapre.sharding` has the others."""

    count = 1  # processes that hold a part of the same parameters
    spread_rows = spread_columns = False  # whether other processes hold other rows, columns of a matrix

    def sum_all(self, x: Tensor) -> Tensor:
        """Sum over the processes that hold other parts of the same parameters."""
        return x

    def sum_rows(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sum over the processes that hold other rows of the same matrices, in one collective."""
        return parts

    def send_rows(self, *parts: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Start `sum_rows`; what is returned waits for the sums, so that arithmetic can go on until then."""
        return lambda: parts

    def sum_columns(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sum over the processes that hold other columns of the same matrices, in one collective."""
        return parts

    def gram(self, X: Tensor) -> Tensor:
        """X^T X (..., r, r) of X (..., p, r), whose rows may be spread."""
        return gram(X)

    def rows(self, count: int, device: torch.device) -> Tensor:
        """Which rows of the whole are the `count` rows held here, (count,)."""
        return torch.arange(count, device=device)

    def columns(self, count: int, device: torch.device) -> Tensor:
        """Which columns of the whole are the `count` columns held here, (count,)."""
        return torch.arange(count, device=device)

    def size(self, p: int, q: int) -> tuple[int, int]:
        """Shape of a whole matrix of which (p, q) is held here."""
        return p, q

    def whole(self, function: Callable[[Tensor], Tensor], M: Tensor) -> Tensor:
        """What is held here of `function` of whole matrices, of which M (N, p, q) is held here."""
        return function(M)


WHOLE = Shards()


def gaussian(rows: int, columns: int, *, seed: int) -> Tensor:
    """A (rows, columns) float32 standard normal matrix on the CPU, a function of its arguments alone.

    Neither the global random state nor the order of the parameters, nor the device or the sharding of the
    weight plays a part in it, so a run starts the same way everywhere.
    """
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def product(B: Tensor, A: Tensor) -> Tensor:
    """m = B A (..., p, q) of B (..., p, r) and A (..., r, q)."""
    return matmul(B, A)


def matmul(X: Tensor, Y: Tensor, kind: int = cpu_kernels.GENERAL) -> Tensor:
    """X Y, (..., a, c) of X (..., a, b) and Y (..., b, c), with the same leading dimensions.

    `kind` is what `cpu_kernels.products`, which takes large ones on CPUs, is told of zeros and symmetry.
    """
    if _compiled(X, X.numel() * Y.shape[-1]):
        return cpu_kernels.products(X, Y, kind)
    return torch.mm(X[0], Y[0])[None] if X.ndim == 3 and len(X) == 1 else X @ Y


def _compiled(X: Tensor, operations: int) -> bool:
    """Whether kernels for CPUs take X, with so many multiplications."""
    return X.ndim == 3 and X.dtype == torch.float32 and operations >= 2**18 and _at_hand(X)


def _at_hand(X: Tensor) -> bool:
    """Whether X is in this process's memory, for kernels for CPUs and for the host to look at."""
    return type(X) is Tensor and X.is_cpu and not torch.compiler.is_compiling() and cpu_kernels.ready()


def _all(condition: Tensor) -> bool:
    """Whether a condition holds everywhere; False where a look would make the host wait, or break a graph."""
    return _at_hand(condition) and bool(condition.all())


def gram(X: Tensor, scale: Tensor | None = None) -> Tensor:
    """X^T X (..., r, r) of X (..., n, r), or of scale * X; in parts where rows are copied.

    In float64 on CUDA: where TF32 is allowed, as many users do for speed, a float32 product is off by 5e-4,
    more than the damping, and Cholesky fails.
    """
    total = None
    for rows in [X] if scale is None and not X.is_cuda else _parts(X):
        rows = rows if scale is None else rows * scale
        part = (
            (rows.double().mT @ rows.double()).to(X.dtype)
            if X.is_cuda
            else matmul(rows.mT, rows, cpu_kernels.SYMMETRIC)
        )
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _parts(X: Tensor) -> tuple[Tensor, ...]:
    """Some rows of X (..., n, r) at a time, few enough for a copy."""
    return torch.split(X, max(64, 2**18 // max(1, X.shape[-1])), -2)


def norm(X: Tensor, shards: Shards = WHOLE, *, columns: bool = False) -> Tensor:
    """Frobenius norm (..., 1, 1) of X (..., n, r); exact where the squares would leave float32's range.

    Other processes of `shards` may hold other rows of X, or other columns.
    """
    largest = _largest(X)
    scale = torch.where(largest > 0, largest, 1)
    sizes = [torch.linalg.vector_norm(part / scale, dim=(-2, -1), keepdim=True) for part in _parts(X)]
    size: Tensor = torch.linalg.vector_norm(torch.stack(sizes), dim=0) if len(sizes) > 1 else sizes[0]
    size = largest * size
    if shards.count > 1:
        total = shards.sum_columns if columns else shards.sum_rows
        size = total(size.double().square())[0].sqrt()
    return size.to(X.dtype)


def _largest(X: Tensor) -> Tensor:
    """The largest absolute value (..., 1, 1) in X (..., n, r)."""
    if X.numel() == 0:  # an empty shard
        return X.new_zeros((*X.shape[:-2], 1, 1))
    return torch.maximum(X.amax((-2, -1), keepdim=True), -X.amin((-2, -1), keepdim=True))


def unit(B: Tensor, shards: Shards = WHOLE) -> Tensor:
    """B / ||B||_F, (..., p, r), and zero where B is zero."""
    size = norm(B, shards)
    return B / torch.where(size > 0, size, 1)


def gauge_(B: Tensor, A: Tensor, shards: Shards = WHOLE, before: Tensor | None = None) -> None:
    """Rescale B (..., p, r) and A (..., r, q) in place: ||A||_F = sqrt(r), B A as it was (departure d).

    Where A is zero, or has left the range of its type, the product becomes zero and A what it was `before`,
    or the first r unit vectors, so that the factor always has directions.
    """
    if shards.count == 1 and A.is_contiguous() and B.is_contiguous() and _compiled(A, 2**18):
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


ALL = slice(None)  # never a default: torch.compile of torch 2.9 takes no slice there


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
        if self.shards.count == 1 and _compiled(self.A, 2**18):
            return cpu_kernels.add_waves(self.A, columns, eps * math.sqrt(2 / q))
        W = _waves(self.A.mT, self.shards.columns, q, columns).mT
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
        self._unit = _inverse(self._size)

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
    gathered = torch.cat([part.square().sum(-1) for part in _parts(A.mT)], -1) * length
    columns = (column - keep * gathered / p).clamp(min=0).nan_to_num(nan=0.0)
    ratio = columns / (total / p)
    return rows[..., None], torch.where(ratio.isfinite(), ratio, 0)[..., None, :]


def _root_of_ratio(wanted: Tensor, now: Tensor) -> Tensor:
    """sqrt(wanted / now), and zero where that is no number, or none that float32 has."""
    ratio = wanted / now
    return torch.where((now > 0) & ratio.isfinite(), ratio.sqrt(), 0)


def orth(Y: Tensor, shards: Shards = WHOLE) -> Tensor:
    """An orthonormal basis Q (..., p, r) of the range of Y (..., p, r), r <= p; Y is overwritten.

    Cholesky QR, three times over: shifted twice, so that columns which almost depend on each other survive,
    then plain. The second is left out where a look shows that the first has lost less than half of any one
    direction: the condition of Q then is below 1.5. Where Y has lost rank (a gradient of rank below r, an
    expert with few tokens) the free columns of Q are directions in general position, orthogonal to the range.
    It needs no more than Y^T Y, so the rows of Y may be spread over processes.
    """
    r, eps = Y.shape[-1], torch.finfo(Y.dtype).eps
    # The shifts are what rounding of the Gram needs: less, and Cholesky meets negative eigenvalues.
    SRt, lengths = _whitening(_scaled_gram_(Y, shards), (r + 16) * eps)
    Y = _times_triangular_(Y, SRt)
    # Q^T Q = R (R^-1 R^-T - shift I) R^T = I - shift R R^T: what the squared lengths of the columns of Q lack
    # to one, nothing where a column has survived and all where Y has lost it.
    lost = (r + 16) * eps * lengths[..., None, :]
    shifts = [eps]
    if shards.count > 1 or not _all(lost.sum(-1) < 0.5):  # a collective too few would be one forever
        Y.addcmul_(4e-5 * lost, _waves(Y, shards.rows, shards.size(Y.shape[-2], 1)[0], ALL))
        shifts = [16 * eps, eps]
    for shift in shifts:
        SRt, _ = _whitening(shards.gram(Y), shift)
        Y = _times_triangular_(Y, SRt)
    return Y


def _times_triangular_(Y: Tensor, U: Tensor) -> Tensor:
    """Y U (..., p, r) of Y, overwritten where it is large, and U (..., r, r), upper triangular."""
    parts = _parts(Y)
    if len(parts) == 1 or Y.is_cuda:  # GPUs rather take fewer calls
        return matmul(Y, U, cpu_kernels.UPPER)
    for part in parts:
        part.copy_(matmul(part, U, cpu_kernels.UPPER))
    return Y


def _scaled_gram_(Y: Tensor, shards: Shards) -> Tensor:
    """Y^T Y (..., r, r), of Y (..., p, r) in units of its largest number, where the squares need that."""
    if shards.count == 1 and _at_hand(Y):
        G = gram(Y)
        squares = G.diagonal(dim1=-2, dim2=-1)
        if _all((squares > 1e-20) & (squares < 1e30)):
            return G
    (size,) = shards.sum_rows(_largest(Y))
    return shards.gram(Y.div_(torch.where(size > 0, size, 1)))


def _whitening(G: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """S R^T (..., r, r), upper triangular, and the squared lengths of the rows of R (..., r).

    S, diagonal, makes the diagonal of S G S (..., r, r) one, and R is the root of its inverse, with a shift:
    R^T R = (S G S + shift I)^-1. Columns Y with the Gram matrix G become orthonormal by S R^T, but for that.
    """
    if _compiled(G, 2**18):
        return cpu_kernels.whitening(G, shift)
    squares = G.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(squares > 0, squares.rsqrt(), 0)[..., None, :]
    G = scale.mT * G * scale
    G.diagonal(dim1=-2, dim2=-1).add_(shift)
    R = _inverse_root(G)
    return (R * scale).mT, R.square().sum(-1)


def _waves(like: Tensor, indices: Callable[[int, torch.device], Tensor], total: int, part: slice) -> Tensor:
    """`part` of the rows of (n, r) for `like` (..., n, r): columns in general position, of unit length.

    Sines of incommensurable frequencies, a function of the index of the row in the whole, of `total`. Any
    r <= n of them are independent: sin(i x) is sin(x) times a polynomial of degree i - 1 in cos(x). Saw teeth
    are not, since a few rows of two slow ones are straight lines.
    """
    n, r = like.shape[-2:]
    i = (indices(n, like.device)[part] + 1).to(like.dtype)
    frequency = torch.frac(math.sqrt(2) * torch.arange(1, r + 1, dtype=like.dtype, device=like.device))
    phase = torch.outer(frequency, i).mT.frac_()
    return phase.mul_(2 * math.pi).sin_().mul_(math.sqrt(2 / total))


def _inverse(size: Tensor) -> Tensor:
    """1 / size, and zero where that would leave the range of the dtype."""
    return torch.where(size >= torch.finfo(size.dtype).tiny, 1 / size, 0)


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
    return _inverse_root(G)


def _inverse_root(G: Tensor) -> Tensor:
    """R = C^-1 (..., r, r), lower triangular, of the Cholesky factor C of G = C C^T: R^T R = G^-1.

    Applied as R^T (R X) it is as stable as substitution, since the errors of both products lie where G is
    nearly singular; R^T R formed explicitly is not. Of large G by halves, so that most of it is products of
    matrices: libraries solve triangular systems at a fraction of their speed, on CPUs one after the other.
    """
    r = G.shape[-1]
    if _compiled(G, 2**18):
        return cpu_kernels.inverse_roots(G)
    if r <= 128:
        C = torch.linalg.cholesky_ex(G).L
        eye = torch.eye(r, dtype=G.dtype, device=G.device).expand_as(G)
        root: Tensor = torch.linalg.solve_triangular(C, eye, upper=False)
        return root
    h = r // 2
    first = _inverse_root(G[..., :h, :h])
    corner = matmul(G[..., h:, :h], first.mT)
    second = _inverse_root(G[..., h:, h:] - matmul(corner, corner.mT))
    R = torch.zeros_like(G)
    R[..., :h, :h], R[..., h:, h:] = first, second
    R[..., h:, :h] = -matmul(matmul(second, corner), first)
    return R
