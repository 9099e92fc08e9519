"""One momentum as a product of two factors, m = B A, updated in closed form (paper, Section 3).

Shapes, with any leading batch dimensions: `B` (..., p, r), `A` (..., r, q), target `T` (..., p, q),
r < min(p, q). A tracker never needs T itself, only its two projections `T A^T` (..., p, r) and `L^T T`
(..., r, q) on a left basis L (..., p, r), so T can come in tiles or in shards:

    printed   L = unit(B), the old factor                 paper, Theorem 3.1, Eq. 11-12, both factors at once
    newton    L = B', the new factor                      the same two steps, one after the other
    subspace  L = orth(beta B A A^T + (1 - beta) T A^T)   one subspace iteration on the projected EMA

docs/maths.md says where each comes from and which test holds it. Everything here is a pure function; nothing
synchronises with the host.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# As printed, but of the trace of the Gram matrix everywhere except in variant="paper".
DAMPING = 1e-6


def gaussian(rows: int, columns: int, *, seed: int) -> Tensor:
    """A (rows, columns) float32 standard normal matrix on the CPU, a function of its arguments alone.

    Neither the global random state nor the order of the parameters, nor the device or the sharding of the
    weight plays a part in it, so a run starts the same way everywhere.
    """
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def product(B: Tensor, A: Tensor) -> Tensor:
    """m = B A, (..., p, q)."""
    return B @ A


def norm(X: Tensor) -> Tensor:
    """Frobenius norm of each matrix, (..., 1, 1); exact where the squares would leave float32's range."""
    largest = X.abs().amax((-2, -1), keepdim=True)
    scaled = X / torch.where(largest > 0, largest, 1)
    length: Tensor = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    return largest * length


def unit(B: Tensor) -> Tensor:
    """B / ||B||_F, (..., p, r), and zero where B is zero."""
    size = norm(B)
    return B / torch.where(size > 0, size, 1)


def gauge(B: Tensor, A: Tensor, A_before: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale so that ||A||_F = sqrt(r) without changing the product (docs/maths.md, departure d).

    Where A is zero, or has left the range of its type, the product is taken as zero and `A_before` (..., r,
    q) stays, so that the factor never loses its directions.
    """
    size = norm(A) / math.sqrt(A.shape[-2])
    alive = (size >= torch.finfo(A.dtype).tiny) & size.isfinite()
    size = torch.where(alive, size, 1)
    return torch.where(alive, B * size, 0), torch.where(alive, A / size, A_before)


def start(sketch: Tensor, fallback: Tensor) -> Tensor:
    """The first A (..., r, q) from `sketch` = Omega^T T, at the scale of `gauge` (departure b).

    Where the sketch is zero or not finite, `fallback` (r, q) takes its place, at the same scale.
    """
    size = norm(sketch)
    A = torch.where((size > 0) & size.isfinite(), sketch, fallback)
    return A * (math.sqrt(A.shape[-2]) / norm(A))


def ramp(gamma: float, t: Tensor) -> Tensor:
    """w_t = 1 - (1 - gamma)**(2 t): the product B A of the Newton tracker, fed the constant 1 for t steps.

    Exact (departure c): one step takes w to (1 - gamma)**2 w + 1 - (1 - gamma)**2, from w_0 = 0.
    """
    return -torch.expm1(2 * t * math.log(max(1 - gamma, 1e-300)))


def printed_basis(B: Tensor, A: Tensor, TAt: Tensor, gamma: float) -> Tensor:
    """L = unit(B) (..., p, r): as printed, the right factor looks at the target through the old left one."""
    return unit(B)


def printed(B: Tensor, A: Tensor, L: Tensor, TAt: Tensor, LtT: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """One Newton step of length gamma in both factors at once (paper, Theorem 3.1, Eq. 11-12).

        B' = (1 - gamma) B + gamma T A^T (A A^T + lambda I)^-1
        A' = (1 - gamma) A + gamma (B^T B + lambda I)^-1 B^T T,   lambda = 1e-6

    Args:
        B: (..., p, r).
        A: (..., r, q).
        L: (..., p, r), B / ||B||_F. The second system is formed from it in units of ||B||, so that neither a
            gradient of 1e-20 nor one of 1e20 leaves the range of float32.
        TAt: (..., p, r), the target seen by A.
        LtT: (..., r, q), the target seen by L.
        gamma: length of the step, in (0, 1].
    """
    size = norm(B)
    inverse = _inverse(size)
    new_B = torch.lerp(B, _damped_solve(A @ A.mT, TAt.mT, torch.full_like(size, DAMPING)).mT, gamma)
    damping = (DAMPING * inverse * inverse).clamp(max=1e30)
    return new_B, torch.lerp(A, inverse * _damped_solve(L.mT @ L, LtT, damping), gamma)


def newton_basis(B: Tensor, A: Tensor, TAt: Tensor, gamma: float) -> Tensor:
    """B' (..., p, r): a Newton step of length gamma in the left factor, the right one fixed (Eq. 11)."""
    gram = A @ A.mT
    return torch.lerp(B, _damped_solve(gram, TAt.mT, DAMPING * _trace(gram)).mT, gamma)


def newton(B: Tensor, A: Tensor, L: Tensor, TAt: Tensor, LtT: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """A Newton step of length gamma in the right factor, the left one fixed at L = B' (paper, Eq. 12).

        A' = (1 - gamma) A + gamma (L^T L + lambda I)^-1 L^T T,   lambda = 1e-6 trace
        (B, A) = gauge(L, A')

    Taken from the new left factor and not, as printed, from the old one, the product is
    B' A' = (1 - gamma) B' A + gamma P T with P the projection on the columns of B': no term is quadratic in
    T, nothing grows when T is much larger than B A (departure f). Shapes as in `printed`.
    """
    inverse = _inverse(norm(L))
    U = L * inverse
    gram = U.mT @ U
    solution = _damped_solve(gram, LtT * inverse, DAMPING * _trace(gram)) * inverse
    return gauge(L, torch.lerp(A, solution, gamma), A)


def subspace_basis(B: Tensor, A: Tensor, TAt: Tensor, beta: Tensor | float) -> Tensor:
    """Q (..., p, r): one step of subspace iteration on beta B A + (1 - beta) T, from the row space of A."""
    return orth(beta * (B @ (A @ A.mT)) + (1 - beta) * TAt)


def subspace(
    B: Tensor, A: Tensor, L: Tensor, TAt: Tensor, LtT: Tensor, beta: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The EMA beta B A + (1 - beta) T projected on the columns of L = Q.

        A' = beta (Q^T B) A + (1 - beta) Q^T T,   (B, A) = gauge(Q, A')

    Linear in T and undamped (docs/maths.md, "The subspace tracker"). `beta` is the decay of the EMA, a number
    or one per matrix (..., 1, 1); other shapes as in `printed`.
    """
    return gauge(L, beta * ((L.mT @ B) @ A) + (1 - beta) * LtT, A)


def probe(A: Tensor) -> Tensor:
    """A + eps W (..., r, q), the A of T A^T; W has rows of A's length, in general position.

    A target orthogonal to A in its rows and to B in its columns has no projection at all, and the factors
    would never see it. Rounding errors, of size eps, are enough to find it, but where the new rows or columns
    were exactly zero before there are none (docs/maths.md, departure g).
    """
    r, q = A.shape[-2:]
    return A + torch.finfo(A.dtype).eps * _waves(q, r, A).mT


def _as_it_is(A: Tensor) -> Tensor:
    return A


class Tracker(NamedTuple):
    """How factors follow a target T.

    TAt = T probe(A)^T, then L = basis(B, A, TAt, rate), then (B', A') = step(B, A, L, TAt, L^T T, rate).
    """

    probe: Callable[[Tensor], Tensor]
    basis: Callable[..., Tensor]
    step: Callable[..., tuple[Tensor, Tensor]]


PRINTED = Tracker(_as_it_is, printed_basis, printed)
NEWTON = Tracker(probe, newton_basis, newton)
SUBSPACE = Tracker(probe, subspace_basis, subspace)


def track(tracker: Tracker, B: Tensor, A: Tensor, T: Tensor, rate: Tensor | float) -> tuple[Tensor, Tensor]:
    """One step of `tracker` towards T (..., p, q), which is at hand as a whole: (B', A')."""
    TAt = T @ tracker.probe(A).mT
    L = tracker.basis(B, A, TAt, rate)
    return tracker.step(B, A, L, TAt, L.mT @ T, rate)


def match_means(B: Tensor, A: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale rows of B, then columns of A, so that the means of (B A)**2 are `row`, then `column`.

    The square of an estimate of E|g| falls short of E g**2; the true means of g**2 over the rows and columns
    are cheap to keep and put that right (docs/maths.md, "The second moment"). Only Grams are formed.

    Args:
        B: (..., p, r).
        A: (..., r, q).
        row: (..., p), wanted means over each row.
        column: (..., q), wanted means over each column; these hold exactly, those of the rows nearly.
    """
    p, q = B.shape[-2], A.shape[-1]
    now = ((B @ (A @ A.mT)) * B).sum(-1) / q
    B = B * torch.where(now > 0, (row / now).sqrt(), 0)[..., None]
    now = (((B.mT @ B) @ A) * A).sum(-2) / p
    return B, A * torch.where(now > 0, (column / now).sqrt(), 0)[..., None, :]


def orth(Y: Tensor) -> Tensor:
    """An orthonormal basis Q (..., p, r) of the range of Y (..., p, r), r <= p.

    Cholesky QR, three times over: shifted twice, so that columns which almost depend on each other survive,
    then plain. Where Y has lost rank (a gradient of rank below r, an expert with few tokens) the free columns
    of Q are directions in general position, orthogonal to the range. It needs no more than Y^T Y, so the rows
    of Y may be spread over processes.
    """
    p, r = Y.shape[-2:]
    eps = torch.finfo(Y.dtype).eps
    Q = _cholesky_qr(unit(Y), shift=r * eps)
    # A column that survived has length one by now and gets nothing; a lost one is filled.
    lost = (1 - Q.square().sum(-2, keepdim=True)).clamp(min=0)
    Q = _cholesky_qr(Q + 1e-5 * lost * _waves(p, r, Q), shift=r * eps)
    return _cholesky_qr(Q, shift=eps)


def _cholesky_qr(Y: Tensor, *, shift: float) -> Tensor:
    """Y R^-1 with R^T R = Y^T Y + shift I, the columns of Y brought to equal length before."""
    G = Y.mT @ Y
    squares = G.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(squares > 0, squares.rsqrt(), 0)[..., None, :]
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    L = torch.linalg.cholesky_ex(scale.mT * G * scale + shift * eye).L
    Q: Tensor = torch.linalg.solve_triangular(L.mT, scale * Y, upper=True, left=False)
    return Q


def _waves(n: int, r: int, like: Tensor) -> Tensor:
    """(n, r) columns of unit length in general position: saw teeth of incommensurable frequencies."""
    i = torch.arange(1, n + 1, dtype=like.dtype, device=like.device)
    frequency = torch.frac(math.sqrt(2) * torch.arange(1, r + 1, dtype=like.dtype, device=like.device))
    return (torch.frac(i[:, None] * frequency) - 0.5) * math.sqrt(12 / n)


def _inverse(size: Tensor) -> Tensor:
    """1 / size, and zero where that would leave the range of the dtype."""
    return torch.where(size >= torch.finfo(size.dtype).tiny, 1 / size, 0)


def _trace(G: Tensor) -> Tensor:
    """The trace of each Gram matrix (..., r, r), (..., 1, 1)."""
    return G.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _damped_solve(G: Tensor, R: Tensor, damping: Tensor) -> Tensor:
    """(G + lambda I)^-1 R for Gram matrices G (..., r, r), R (..., r, n), damping (..., 1, 1).

    lambda is never below the resolution of G, whose smallest eigenvalues rounding makes negative where the
    target has a rank below r. The last term lets the all-zero Gram of the first step solve to zero.
    """
    limits = torch.finfo(G.dtype)
    lam = torch.maximum(damping, limits.eps * _trace(G)) + limits.tiny
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return torch.cholesky_solve(R, torch.linalg.cholesky_ex(G + lam * eye).L)
