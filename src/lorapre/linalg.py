"""Linear algebra of many thin matrices: roots of inverses, orthonormal bases, gauge, Newton-Schulz.

Matrices have three dimensions, (N, rows, columns): N of them at a time. `T` is the gradient as an
operand (`lorapre.gradient`); of it these functions need the sums over processes, and which rows and
columns it holds. Nothing here waits for a GPU.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

# Of the trace of a Gram matrix (departure b): less would be below the resolution of float32.
DAMPING = 1e-6
TINY = torch.finfo(torch.float32).tiny
EPS = torch.finfo(torch.float32).eps


class Operand(Protocol):
    """The gradient T: its size, which part is local, and sums over processes."""

    p: int  # rows of the whole matrix
    q: int  # columns
    rows: range | Tensor  # which rows of the whole are local
    columns: range | Tensor
    spread: bool  # whether other processes hold other parts

    def sum_p(self, x: Tensor) -> Tensor:
        """The sum of x over the processes that hold other rows."""

    def sum_q(self, x: Tensor) -> Tensor:
        """The sum of x over the processes that hold other columns."""


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32: no autocast, no TF32, no bfloat16, which models may use.

    In less precision Gram matrices are off by more than their damping. A graph of torch.compile
    keeps the setting of the process.
    """
    if torch.compiler.is_compiling():
        with torch.autocast(device.type, enabled=False):
            yield
        return
    backends: tuple[Any, ...] = torch.backends.mkldnn, torch.backends.cuda
    settings = [x.matmul for x in backends]
    before = [x.fp32_precision for x in settings]
    try:
        for x in settings:
            x.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for x, precision in zip(settings, before, strict=True):
            x.fp32_precision = precision


def matmul(X: Tensor, Y: Tensor) -> Tensor:
    """X Y (N, a, c) of X (N, a, b) and Y (N, b, c)."""
    return torch.mm(X[0], Y[0])[None] if len(X) == 1 else X @ Y


def inverse_root(G: Tensor) -> Tensor:
    """R = C^-1 (N, r, r), lower triangular, of the Cholesky factor C of G = C C^T: R^T R = G^-1.

    Applied as R^T (R X) it is as stable as substitution: the errors of both products lie where G is
    nearly singular. R^T R formed explicitly is not. Large G are taken by halves, so that most of
    the work is products of matrices: libraries solve triangular systems at a fraction of the speed.
    """
    r = G.shape[-1]
    if r <= 64:
        eye = torch.eye(r, dtype=G.dtype, device=G.device).expand_as(G)
        C = torch.linalg.cholesky_ex(G).L
        root: Tensor = torch.linalg.solve_triangular(C, eye, upper=False)
        return root
    h = r // 2
    first = inverse_root(G[:, :h, :h])
    corner = matmul(G[:, h:, :h], first.mT)
    second = inverse_root(G[:, h:, h:] - matmul(corner, corner.mT))
    R = torch.zeros_like(G)
    R[:, :h, :h], R[:, h:, h:] = first, second
    R[:, h:, :h] = -matmul(matmul(second, corner), first)
    return R


def damped_root(G: Tensor, least: float | Tensor = 0.0) -> Tensor:
    """R (N, r, r) with R^T R = (G + lambda I)^-1, lambda = max(1e-6 trace(G), least).

    The smallest normal number on top lets the all-zero Gram matrix of the first step solve to zero.
    """
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    damping = (DAMPING * trace).clamp(min=least) + TINY
    G = G.clone()
    G.diagonal(dim1=-2, dim2=-1).add_(damping[:, 0])
    return inverse_root(G)


def norm(X: Tensor) -> Tensor:
    """Frobenius norm (N, 1, 1) of X; exact where the squares would leave the range of float32."""
    size = largest(X)
    unit = X / torch.where(size > 0, size, 1)
    of_unit: Tensor = torch.linalg.vector_norm(unit, dim=(-2, -1), keepdim=True)
    return size * of_unit


def largest(X: Tensor) -> Tensor:
    """The largest absolute value (N, 1, 1) in X; zero in an empty one."""
    if X.numel() == 0:
        return X.new_zeros(len(X), 1, 1)
    return torch.maximum(X.amax((-2, -1), keepdim=True), -X.amin((-2, -1), keepdim=True))


def gauge_(B: Tensor, A: Tensor, T: Operand, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rescale B (N, p, r) and A (N, r, q) in place: ||A||_F = sqrt(r), B A as it was (departure c).

    Where A is zero, or has left the range of float32, B becomes zero and A what it was `before`, or
    the first r unit vectors, so that the factors always have directions.
    """
    size = (T.sum_q(norm(A).double().square()) / A.shape[-2]).sqrt().to(A.dtype)
    alive = (size >= TINY) & size.isfinite()
    B.mul_(torch.where(alive, size, 0))
    A.mul_(torch.where(alive, 1 / size, 0))
    if before is None:
        A.diagonal(dim1=-2, dim2=-1).add_((~alive).squeeze(-1))
    else:
        torch.where(alive, A, before, out=A)
    return B, A


def orth_(Y: Tensor, T: Operand) -> Tensor:
    """Make the columns of Y (N, p, r), r <= p, an orthonormal basis of their span, in place.

    Cholesky QR three times: twice with a shift, so that columns which almost depend on each other
    survive, then without one. The second is left out where the first has lost less than half of
    every direction: the condition of Y is below 1.5 then. Where Y has lost rank (a gradient of rank
    below r, an expert with few tokens), the free columns become directions in general position,
    orthogonal to the span. It needs no more than Y^T Y, so the rows of Y may be spread over
    processes.
    """
    r = Y.shape[-1]
    if r == 0:
        return Y
    size = T.sum_p(largest(Y))
    Y.div_(torch.where(size > 0, size, 1))
    # Rounding of the Gram matrix needs this shift: with less, Cholesky meets negative eigenvalues.
    shift = (r + 16) * EPS
    # After the first pass Y^T Y = I - shift R R^T: the squared lengths of the rows of R tell what
    # is lost of each column, nothing where it has survived and all of it where Y has lost rank.
    lost = shift * _whiten_(Y, T, shift)
    # Processes that differ in their answer would wait for one another for ever.
    if T.spread or not at_hand(lost) or not bool((lost.sum(-1) < 0.5).all()):
        Y.addcmul_(4e-5 * lost, waves(Y.mT, T.rows, T.p).mT)
        _whiten_(Y, T, 16 * EPS)
    _whiten_(Y, T, EPS)
    return Y


def _whiten_(Y: Tensor, T: Operand, shift: float) -> Tensor:
    """One Cholesky QR of Y (N, p, r) in place; the squared lengths of the rows of R (N, 1, r)."""
    G = T.sum_p(matmul(Y.mT, Y))
    squares = G.diagonal(dim1=-2, dim2=-1)[:, None]
    scale = torch.where(squares > 0, squares.rsqrt(), 0)
    G = scale.mT * G * scale
    G.diagonal(dim1=-2, dim2=-1).add_(shift)
    R = inverse_root(G)
    U = (R * scale).mT
    height = max(64, 2**18 // Y.shape[-1])
    for rows in torch.split(Y, height, -2):  # in parts, so that no second Y is needed
        rows.copy_(matmul(rows, U))
    return R.square().sum(-1)[:, None]


def local(x: Tensor, dim: int, places: range | Tensor) -> Tensor:
    """The part of x (whole) at these places of a dimension."""
    if isinstance(places, Tensor):
        return x.index_select(dim, places.to(x.device))
    return x.narrow(dim, places.start, len(places))


def at_hand(x: Tensor) -> bool:
    """Whether the host may look at numbers, without a wait for a GPU or a break of a graph."""
    plain = type(x) in (Tensor, Parameter)
    return plain and x.is_cpu and not torch.compiler.is_compiling()


def probe(A: Tensor, T: Operand) -> Tensor:
    """A + eps W (N, r, q), with the rows of W in general position (departure d).

    A target orthogonal to A in its rows and to B in its columns has no projection on either, and
    the factors would never see it. Rounding errors are enough to find it, but where the new rows or
    columns were exactly zero before there are none.
    """
    return A + waves(A, T.columns, T.q).mul_(EPS)


def waves(like: Tensor, places: range | Tensor, total: int) -> Tensor:
    """(r, n) for `like` (N, r, n): rows in general position.

    Row k has sqrt(2 / total) sin(2 pi frac(k sqrt 2) i) at each place i.

    Sines of incommensurable frequencies. Any r <= total rows are independent, since sin(k x) is
    sin(x) times a polynomial of degree k - 1 in cos(x).
    """
    if isinstance(places, Tensor):
        return local(waves(like, range(total), total), 1, places)
    # From the angle of a coarse grid and that of a fine one: a sine for every place would be the
    # dearest part of a step at small ranks.
    fine, device = 64, like.device
    coarse = 1 + places.start + fine * torch.arange(-(-len(places) // fine), device=device)
    number = torch.arange(1, like.shape[-2] + 1, dtype=torch.float64, device=device)
    turns = number.mul_(math.sqrt(2)).frac_()
    x = torch.outer(turns, coarse.double()).frac_().mul_(2 * math.pi)[:, :, None]
    y = torch.outer(turns, torch.arange(fine, device=device).double()).mul_(2 * math.pi)[:, None]
    size = math.sqrt(2 / total)
    sine, cosine = (x.sin() * size).to(like.dtype), (x.cos() * size).to(like.dtype)
    sums = (sine * y.cos().to(like.dtype)).addcmul_(cosine, y.sin().to(like.dtype))
    return sums.flatten(1)[:, : len(places)]


def debias(beta: float, t: Tensor) -> Tensor:
    """1 - beta**t, exact for beta near one: what an EMA from zero has gathered after t steps."""
    return -torch.expm1(t * math.log(max(beta, 1e-300)))


def newton_schulz(
    M: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Orthogonalise M (..., p, q): about U V^T of its singular value decomposition U S V^T.

    The quintic iteration of Keller Jordan's Muon, X <- a X + (b G + c G G) X with G = X X^T, from
    X = M / ||M||_F, with the operations of torch.optim.Muon, on a batch.

    Args:
        M: (..., p, q).
        coefficients: (a, b, c).
        steps: number of iterations.
        eps: the least norm M is divided by.
        dtype: the type the iteration runs in, and of the result; torch.optim.Muon uses bfloat16.
    """
    a, b, c = coefficients
    single = M.ndim == 3 and len(M) == 1  # products of two matrices are faster than of batches
    X = (M[0] if single else M).to(dtype)
    add_product = torch.addmm if X.ndim == 2 else torch.baddbmm
    tall = M.shape[-2] > M.shape[-1]
    X = X.mT if tall else X
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        G = X @ X.mT
        X = add_product(X, add_product(G, G, G, beta=b, alpha=c), X, beta=a)
    X = X.mT if tall else X
    return X[None] if single else X


def lr_factor(adjust_lr_fn: str | None, p: int, q: int) -> float:
    """The factor on Muon's learning rate for a (p, q) matrix, as torch.optim.Muon has it.

    None or "original": sqrt(max(1, p / q)); "match_rms_adamw": 0.2 sqrt(max(p, q)), with which
    AdamW's learning rates carry over.
    """
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(p, q))
    return math.sqrt(max(1.0, p / q))
