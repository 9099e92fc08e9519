"""Linear algebra of many thin matrices: products, Grams, norms, roots of inverses, orthonormal bases.

Matrices have any leading batch dimensions. On CPUs large products and roots are those of
`lorapre.cpu_kernels`; nothing waits for a GPU. Where the matrices are spread over processes, `shards` says
how to sum over them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lorapre import cpu_kernels


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
ALL = slice(None)  # never a default: torch.compile of torch 2.9 takes no slice there


def matmul(X: Tensor, Y: Tensor, kind: int = cpu_kernels.GENERAL) -> Tensor:
    """X Y, (..., a, c) of X (..., a, b) and Y (..., b, c), with the same leading dimensions.

    `kind` is what `cpu_kernels.products`, which takes large ones on CPUs, is told of zeros and symmetry.
    """
    if compiled(X, X.numel() * Y.shape[-1]):
        return cpu_kernels.products(X, Y, kind)
    return torch.mm(X[0], Y[0])[None] if X.ndim == 3 and len(X) == 1 else X @ Y


def compiled(X: Tensor, operations: int) -> bool:
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
    for rows in [X] if scale is None and not X.is_cuda else in_parts(X):
        rows = rows if scale is None else rows * scale
        part = (
            (rows.double().mT @ rows.double()).to(X.dtype)
            if X.is_cuda
            else matmul(rows.mT, rows, cpu_kernels.SYMMETRIC)
        )
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def in_parts(X: Tensor) -> tuple[Tensor, ...]:
    """Some rows of X (..., n, r) at a time, few enough for a copy."""
    return torch.split(X, max(64, 2**18 // max(1, X.shape[-1])), -2)


def norm(X: Tensor, shards: Shards = WHOLE, *, columns: bool = False) -> Tensor:
    """Frobenius norm (..., 1, 1) of X (..., n, r); exact where the squares would leave float32's range.

    Other processes of `shards` may hold other rows of X, or other columns.
    """
    largest = _largest(X)
    scale = torch.where(largest > 0, largest, 1)
    sizes = [torch.linalg.vector_norm(part / scale, dim=(-2, -1), keepdim=True) for part in in_parts(X)]
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


def inverse(size: Tensor) -> Tensor:
    """1 / size, and zero where that would leave the range of the dtype."""
    return torch.where(size >= torch.finfo(size.dtype).tiny, 1 / size, 0)


def inverse_root(G: Tensor) -> Tensor:
    """R = C^-1 (..., r, r), lower triangular, of the Cholesky factor C of G = C C^T: R^T R = G^-1.

    Applied as R^T (R X) it is as stable as substitution, since the errors of both products lie where G is
    nearly singular; R^T R formed explicitly is not. Of large G by halves, so that most of it is products of
    matrices: libraries solve triangular systems at a fraction of their speed, on CPUs one after the other.
    """
    r = G.shape[-1]
    if compiled(G, 2**18):
        return cpu_kernels.inverse_roots(G)
    if r <= 128:
        C = torch.linalg.cholesky_ex(G).L
        eye = torch.eye(r, dtype=G.dtype, device=G.device).expand_as(G)
        root: Tensor = torch.linalg.solve_triangular(C, eye, upper=False)
        return root
    h = r // 2
    first = inverse_root(G[..., :h, :h])
    corner = matmul(G[..., h:, :h], first.mT)
    second = inverse_root(G[..., h:, h:] - matmul(corner, corner.mT))
    R = torch.zeros_like(G)
    R[..., :h, :h], R[..., h:, h:] = first, second
    R[..., h:, :h] = -matmul(matmul(second, corner), first)
    return R


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
        total, start = shards.size(Y.shape[-2], 1)[0], 0
        for part in _few_parts(Y):
            rows = slice(start, start := start + part.shape[-2])
            part.addcmul_(4e-5 * lost, waves(Y, shards.rows, total, rows))
        shifts = [16 * eps, eps]
    for shift in shifts:
        SRt, _ = _whitening(shards.gram(Y), shift)
        Y = _times_triangular_(Y, SRt)
    return Y


def _times_triangular_(Y: Tensor, U: Tensor) -> Tensor:
    """Y U (..., p, r) of Y, overwritten where it is large, and U (..., r, r), upper triangular."""
    parts = _few_parts(Y)
    if len(parts) == 1:
        return matmul(Y, U, cpu_kernels.UPPER)
    for part in parts:
        part.copy_(matmul(part, U, cpu_kernels.UPPER))
    return Y


def _few_parts(X: Tensor) -> tuple[Tensor, ...]:
    """`in_parts`, and X whole on GPUs, where calls cost more than memory."""
    return (X,) if X.is_cuda else in_parts(X)


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
    if compiled(G, 2**18):
        return cpu_kernels.whitening(G, shift)
    squares = G.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(squares > 0, squares.rsqrt(), 0)[..., None, :]
    G = scale.mT * G * scale
    G.diagonal(dim1=-2, dim2=-1).add_(shift)
    R = inverse_root(G)
    return (R * scale).mT, R.square().sum(-1)


def waves(like: Tensor, indices: Callable[[int, torch.device], Tensor], total: int, part: slice) -> Tensor:
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
