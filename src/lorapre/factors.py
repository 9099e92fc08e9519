"""One momentum as a product of two factors, m = B A, updated in closed form (paper, Section 3).

Shapes, with any leading batch dimensions: `B` (..., p, r), `A` (..., r, q), target `T` (..., p, q),
r < min(p, q). A tracker takes two half-steps, the left factor first. It never needs T itself, only its
projections `T A^T` (..., p, r) and then `L^T T` (..., r, q) on a left basis L (..., p, r) that the first
half-step finds, so T can come in tiles and in shards:

    printed   L = unit(B), the old factor                 paper, Theorem 3.1, Eq. 11-12, both factors at once
    newton    L = B', the new factor                      the same two steps, one after the other
    subspace  L = orth(beta B A A^T + (1 - beta) T A^T)   one subspace iteration on the projected EMA

docs/maths.md says where each comes from and which test holds it. Everything here is a pure function; nothing
synchronises with the host. Where the matrices are spread over processes, `shards` says how to sum over them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# As printed; of the trace of the Gram matrix in all variants but "paper", and there too where that is more.
DAMPING = 1e-6


class Shards:
    """The part of its matrices that a process holds: here, all of it; `lorapre.sharding` has the others."""

    count = 1  # processes that hold a part of the same parameters

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
    """m = B A, (..., p, q)."""
    return B @ A


def gram(X: Tensor) -> Tensor:
    """X^T X, (..., r, r).

    In float64 on CUDA: where TF32 is allowed, as many users do for speed, a float32 product is off by 5e-4,
    more than the damping, and Cholesky fails.
    """
    if X.is_cuda:
        wide = X.double()
        return (wide.mT @ wide).to(X.dtype)
    return X.mT @ X


def norm(X: Tensor, total: Callable[..., tuple[Tensor, ...]] = WHOLE.sum_rows) -> Tensor:
    """Frobenius norm of each matrix, (..., 1, 1); exact where the squares would leave float32's range.

    `total` sums over the processes that hold the rest of X.
    """
    if X.numel() == 0:  # an empty shard
        size = X.new_zeros((*X.shape[:-2], 1, 1))
    else:
        largest = X.abs().amax((-2, -1), keepdim=True)
        scaled = X / torch.where(largest > 0, largest, 1)
        size = largest * torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    if total in (WHOLE.sum_rows, WHOLE.sum_columns):
        return size
    return total(size.double().square())[0].sqrt().to(X.dtype)


def unit(B: Tensor, shards: Shards = WHOLE) -> Tensor:
    """B / ||B||_F, (..., p, r), and zero where B is zero."""
    size = norm(B, shards.sum_rows)
    return B / torch.where(size > 0, size, 1)


def gauge(B: Tensor, A: Tensor, A_before: Tensor, shards: Shards = WHOLE) -> tuple[Tensor, Tensor]:
    """Rescale so that ||A||_F = sqrt(r) without changing the product (docs/maths.md, departure d).

    Where A is zero, or has left the range of its type, the product is taken as zero and `A_before` (..., r,
    q) stays, so that the factor never loses its directions.
    """
    size = norm(A, shards.sum_columns) / math.sqrt(A.shape[-2])
    alive = (size >= torch.finfo(A.dtype).tiny) & size.isfinite()
    size = torch.where(alive, size, 1)
    return torch.where(alive, B * size, 0), torch.where(alive, A / size, A_before)


def start(sketch: Tensor, fallback: Tensor, shards: Shards = WHOLE) -> Tensor:
    """The first A (..., r, q) from `sketch` = Omega^T T, at the scale of `gauge` (departure b).

    Where the sketch is zero or not finite, `fallback` (r, q) takes its place, at the same scale.
    """
    size = norm(sketch, shards.sum_columns)
    A = torch.where((size > 0) & size.isfinite(), sketch, fallback)
    return A * (math.sqrt(A.shape[-2]) / norm(A, shards.sum_columns))


def ramp(gamma: float, t: Tensor) -> Tensor:
    """w_t = 1 - (1 - gamma)**(2 t): the product B A of the Newton tracker, fed the constant 1 for t steps.

    Exact (departure c): one step takes w to (1 - gamma)**2 w + 1 - (1 - gamma)**2, from w_0 = 0.
    """
    return -torch.expm1(2 * t * math.log(max(1 - gamma, 1e-300)))


Half = tuple[Tensor, Tensor]


def printed_left(B: Tensor, A: Tensor, TAt: Tensor, gamma: Tensor | float, shards: Shards = WHOLE) -> Half:
    """A Newton step of length gamma in the left factor, the right one fixed (paper, Theorem 3.1, Eq. 11).

        B' = (1 - gamma) B + gamma T A^T (A A^T + lambda I)^-1,   lambda = 1e-6 (or more, see `_damped_solve`)

    Args:
        B: (..., p, r).
        A: (..., r, q).
        TAt: (..., p, r), the target seen by A, summed over the columns held here.
        gamma: length of the step, in (0, 1]; a number or one per matrix (..., 1, 1).
        shards: how to sum over other processes.

    Returns:
        (L, B'): the left basis L = unit(B), since as printed the right factor sees the old left one, and the
        new left factor, (..., p, r) each.
    """
    TAt, G = shards.sum_columns(TAt, gram(A.mT))
    return unit(B, shards), torch.lerp(B, _damped_solve(G, TAt.mT, DAMPING).mT, _as_tensor(gamma, B))


def printed_parts(B: Tensor, L: Tensor, new_B: Tensor, LtT: Tensor) -> tuple[Tensor, ...]:
    """What `printed_right` wants of all rows: L^T T (..., r, q), L^T L (..., r, r), ||B||; L = unit(B)."""
    return LtT, gram(L), (B * L).sum((-2, -1), keepdim=True)


def printed_right(
    B: Tensor,
    A: Tensor,
    new_B: Tensor,
    sums: tuple[Tensor, ...],
    gamma: Tensor | float,
    shards: Shards = WHOLE,
) -> Half:
    """A Newton step of length gamma in the right factor, the left one fixed at its old value (paper, Eq. 12).

        A' = (1 - gamma) A + gamma (B^T B + lambda I)^-1 B^T T,   lambda = 1e-6 (or more, see `_damped_solve`)

    The system is formed from L = B / ||B||_F, in units of ||B||, so that neither a gradient of 1e-20 nor one
    of 1e20 leaves the range of float32.

    Args:
        B: (..., p, r), the old left factor.
        A: (..., r, q).
        new_B: (..., p, r), the new one.
        sums: `printed_parts`, summed over all rows.
        gamma: as in `printed_left`.
        shards: how to sum over other processes.

    Returns:
        (B', A').
    """
    LtT, G, size = sums
    inverse = _inverse(size)
    damping = (DAMPING * inverse * inverse).clamp(max=1e30)
    return new_B, torch.lerp(A, inverse * _damped_solve(G, LtT, damping), _as_tensor(gamma, A))


def newton_left(B: Tensor, A: Tensor, TAt: Tensor, gamma: Tensor | float, shards: Shards = WHOLE) -> Half:
    """The step of `printed_left` with lambda = 1e-6 trace; returns (unit(B'), B')."""
    TAt, G = shards.sum_columns(TAt, gram(A.mT))
    new_B = torch.lerp(B, _damped_solve(G, TAt.mT).mT, _as_tensor(gamma, B))
    return unit(new_B, shards), new_B


def newton_parts(B: Tensor, L: Tensor, new_B: Tensor, LtT: Tensor) -> tuple[Tensor, ...]:
    """As `printed_parts`, L being the unit of the new left factor."""
    return printed_parts(new_B, L, new_B, LtT)


def newton_right(
    B: Tensor,
    A: Tensor,
    new_B: Tensor,
    sums: tuple[Tensor, ...],
    gamma: Tensor | float,
    shards: Shards = WHOLE,
) -> Half:
    """A Newton step of length gamma in the right factor, the left one fixed at its new value B'.

        A' = (1 - gamma) A + gamma (B'^T B' + lambda I)^-1 B'^T T,   lambda = 1e-6 trace
        (B, A) = gauge(B', A')

    Taken from the new left factor and not, as printed, from the old one, the product is
    B' A' = (1 - gamma) B' A + gamma P T with P the projection on the columns of B': no term is quadratic in
    T, nothing grows when T is much larger than B A (departure f). Arguments as in `printed_right`.
    """
    LtT, G, size = sums
    solution = _inverse(size) * _damped_solve(G, LtT)
    return gauge(new_B, torch.lerp(A, solution, _as_tensor(gamma, A)), A, shards)


def subspace_left(B: Tensor, A: Tensor, TAt: Tensor, beta: Tensor | float, shards: Shards = WHOLE) -> Half:
    """(Q, Q): one step of subspace iteration on beta B A + (1 - beta) T, from the row space of A."""
    TAt, G = shards.sum_columns(TAt, gram(A.mT))
    Q = orth(beta * (B @ G) + (1 - beta) * TAt, shards)
    return Q, Q


def subspace_parts(B: Tensor, L: Tensor, new_B: Tensor, LtT: Tensor) -> tuple[Tensor, ...]:
    """What `subspace_right` wants summed over rows: Q^T T (..., r, q) and Q^T B (..., r, r)."""
    return LtT, L.mT @ B


def subspace_right(
    B: Tensor,
    A: Tensor,
    new_B: Tensor,
    sums: tuple[Tensor, ...],
    beta: Tensor | float,
    shards: Shards = WHOLE,
) -> Half:
    """The EMA beta B A + (1 - beta) T projected on the columns of Q.

        A' = beta (Q^T B) A + (1 - beta) Q^T T,   (B, A) = gauge(Q, A')

    Linear in T and undamped (docs/maths.md, "The subspace tracker"). `new_B` is Q; `beta` is the decay of the
    EMA, a number or one per matrix (..., 1, 1); other arguments as in `printed_right`.
    """
    LtT, LtB = sums
    return gauge(new_B, beta * (LtB @ A) + (1 - beta) * LtT, A, shards)


def probe(A: Tensor, shards: Shards = WHOLE) -> Tensor:
    """A + eps W (..., r, q), the A of T A^T; W has rows of A's length, in general position.

    A target orthogonal to A in its rows and to B in its columns has no projection at all, and the factors
    would never see it. Rounding errors, of size eps, are enough to find it, but where the new rows or columns
    were exactly zero before there are none (docs/maths.md, departure g).
    """
    return A + torch.finfo(A.dtype).eps * _waves(A.mT, shards.columns, shards.size(1, A.shape[-1])[1]).mT


def _as_it_is(A: Tensor, shards: Shards = WHOLE) -> Tensor:
    return A


class Tracker(NamedTuple):
    """How factors follow a target T.

    With TAt = T probe(A)^T the left half-step is L, B' = left(B, A, TAt, rate). What the right one wants to
    know of other rows is summed, sums = sum of parts(B, L, B', L^T T), and then B', A' = right(B, A, B',
    sums, rate).
    """

    probe: Callable[..., Tensor]
    left: Callable[..., Half]
    parts: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
    right: Callable[..., Half]


PRINTED = Tracker(_as_it_is, printed_left, printed_parts, printed_right)
NEWTON = Tracker(probe, newton_left, newton_parts, newton_right)
SUBSPACE = Tracker(probe, subspace_left, subspace_parts, subspace_right)


def track(
    tracker: Tracker, B: Tensor, A: Tensor, T: Tensor, rate: Tensor | float, shards: Shards = WHOLE
) -> Half:
    """One step of `tracker` towards T (..., p, q), of which all that is held here is at hand: (B', A')."""
    return start_tracking(tracker, B, A, T, rate, shards)()


def start_tracking(
    tracker: Tracker, B: Tensor, A: Tensor, T: Tensor, rate: Tensor | float, shards: Shards = WHOLE
) -> Callable[[], Half]:
    """`track` up to the last sum, which is on its way when this returns; what is returned takes the step."""
    L, new_B = tracker.left(B, A, T @ tracker.probe(A, shards).mT, rate, shards)
    sums = shards.send_rows(*tracker.parts(B, L, new_B, L.mT @ T))
    return lambda: tracker.right(B, A, new_B, sums(), rate, shards)


def match_means(
    B: Tensor, A: Tensor, row: Tensor, column: Tensor, shards: Shards = WHOLE
) -> tuple[Tensor, Tensor]:
    """Rescale rows of B, then columns of A, so that the means of (B A)**2 are `row`, then `column`.

    The square of an estimate of E|g| falls short of E g**2; the true means of g**2 over the rows and columns
    are cheap to keep and put that right (docs/maths.md, "The second moment"). Only Grams are formed.

    Args:
        B: (..., p, r).
        A: (..., r, q).
        row: (..., p), wanted means over each row.
        column: (..., q), wanted means over each column; these hold exactly, those of the rows nearly.
        shards: how to sum over other processes.
    """
    p, q = shards.size(B.shape[-2], A.shape[-1])
    (G,) = shards.sum_columns(gram(A.mT))
    now = ((B @ G) * B).sum(-1) / q
    B = B * torch.where(now > 0, (row / now).sqrt(), 0)[..., None]
    now = ((shards.gram(B) @ A) * A).sum(-2) / p
    return B, A * torch.where(now > 0, (column / now).sqrt(), 0)[..., None, :]


def orth(Y: Tensor, shards: Shards = WHOLE) -> Tensor:
    """An orthonormal basis Q (..., p, r) of the range of Y (..., p, r), r <= p.

    Cholesky QR, three times over: shifted twice, so that columns which almost depend on each other survive,
    then plain. Where Y has lost rank (a gradient of rank below r, an expert with few tokens) the free columns
    of Q are directions in general position, orthogonal to the range. It needs no more than Y^T Y, so the rows
    of Y may be spread over processes.
    """
    r, eps = Y.shape[-1], torch.finfo(Y.dtype).eps
    # The shifts are what rounding of the Gram needs: less, and Cholesky meets negative eigenvalues.
    Q, lost = _cholesky_qr(unit(Y, shards), (r + 16) * eps, shards)
    Q = Q + 1e-5 * lost * _waves(Q, shards.rows, shards.size(Q.shape[-2], 1)[0])
    Q, _ = _cholesky_qr(Q, 16 * eps, shards)
    return _cholesky_qr(Q, eps, shards)[0]


def _cholesky_qr(Y: Tensor, shift: float, shards: Shards) -> tuple[Tensor, Tensor]:
    """Q = Y R^-1 with R^T R = Y^T Y + shift I, the columns of Y brought to equal length before.

    Also what the squared lengths (..., 1, r) of the columns of Q lack to one: nothing where a column has
    survived, all where Y has lost it.
    """
    G = shards.gram(Y)
    squares = G.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(squares > 0, squares.rsqrt(), 0)[..., None, :]
    G = scale.mT * G * scale
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    L = torch.linalg.cholesky_ex(G + shift * eye).L
    Q = torch.linalg.solve_triangular(L.mT, scale * Y, upper=True, left=False)
    # Q^T Q = L^-1 G L^-T = I - shift (L L^T)^-1: no need for the rows of Q, which other processes may hold.
    lost = shift * torch.linalg.solve_triangular(L, eye, upper=False).square().sum(-1)[..., None, :]
    return Q, lost


def _waves(like: Tensor, indices: Callable[[int, torch.device], Tensor], total: int) -> Tensor:
    """(n, r) for `like` (..., n, r): columns in general position, of unit length over all `total` rows.

    Saw teeth of incommensurable frequencies, a function of the index of the row in the whole.
    """
    n, r = like.shape[-2:]
    i = (indices(n, like.device) + 1).to(like.dtype)
    frequency = torch.frac(math.sqrt(2) * torch.arange(1, r + 1, dtype=like.dtype, device=like.device))
    return (torch.frac(i[:, None] * frequency) - 0.5) * math.sqrt(12 / total)


def _as_tensor(rate: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(rate, dtype=like.dtype, device=like.device)


def _inverse(size: Tensor) -> Tensor:
    """1 / size, and zero where that would leave the range of the dtype."""
    return torch.where(size >= torch.finfo(size.dtype).tiny, 1 / size, 0)


def _damped_solve(G: Tensor, R: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """(G + lambda I)^-1 R, G (..., r, r) a Gram matrix, R (..., r, n); lambda = 1e-6 trace, at least `least`.

    Less would be below the resolution of float32: the Gram of a target of rank below r has eigenvalues that
    rounding makes negative. The last term lets the all-zero Gram of the first step solve to zero.
    """
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    lam = torch.maximum(DAMPING * trace, _as_tensor(least, G)) + torch.finfo(G.dtype).tiny
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return torch.cholesky_solve(R, torch.linalg.cholesky_ex(G + lam * eye).L)
