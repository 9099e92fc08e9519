"""Triton kernels for the two sweeps of a step of Adam over the gradients of a group of same-shaped weights.

Optional: nothing here is needed where `why_not` gives a reason, and then the caller takes the eager path,
which is the specification. This is the only module that imports triton; import it where it is used, so that
`import lorapre` does not load a compiler.

    reason = kernels.why_not(weights, grads, rank)
    rows = kernels.row_sweep(weights, grads, first, second, decay=..., lr=..., eps=...)      w in place, T A^T
    columns = kernels.column_sweep(grads, first_basis, second_basis)                         L^T T

T is the gradient g for the first moment (m) and |g| for the second (v). A group is N matrices (p, q), given
as `lorapre.operands` says. Every sweep is one launch for the group (a row sweep of large rank two), whose
addresses travel in a table on the device. Nothing waits for the device, everything can be captured in a CUDA
graph, and nothing depends on the order in which programs run: sums are never formed by atomics.

Precision: everything is float32 but the products with a bfloat16 gradient, for which the other operand is
rounded to bfloat16 and the sum kept in float32, and products with TF32 operands where the gradient is
bfloat16 or float16. TF32 has float16's mantissa and float32's range: it holds such a gradient exactly and
rounds a factor no more coarsely than the gradient itself was rounded. With a float32 gradient it would be the
largest error of the step, so that products are then split in three (tf32x3).
"""

import functools
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapre.operands import Dense, Factors, Matrices, Numbers, Split, addresses, count, stride

try:
    import triton
    import triton.language as tl
except ImportError:  # `why_not` says so, and what is below is never called
    triton = None
    tl = types.SimpleNamespace(constexpr=None)

_jit: Any = triton.jit if triton else lambda function: function

MAX_RANK = 512
MAX_COUNT, MAX_COLUMNS = 2**16 - 1, 2**21  # what the second and third dimension of a CUDA grid hold
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RowSweep(NamedTuple):
    """What `row_sweep` gathers, float32; moments in the order m, v, dense ones left out."""

    TAt: Tensor  # (moments, N, p, r)
    row_sums: Tensor | None  # (N, p), of g**2


class ColumnSweep(NamedTuple):
    """What `column_sweep` gathers, float32; moments in the order m, v, those without a basis left out."""

    LtT: Tensor  # (moments, N, r, q)
    column_sums: Tensor | None  # (N, q), of g**2


def why_not(weights: Matrices, grads: Matrices, rank: int) -> str | None:
    """Why the kernels cannot take these weights, for a warning, or None where they can."""
    device = weights[0].device
    if torch.compiler.is_compiling():
        return "inside torch.compile the eager path is compiled instead"
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda" and not _interpreted():
        return f"the weights are on {device.type}, and the kernels are for CUDA and ROCm devices"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if rank > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}"
    if count(weights) > MAX_COUNT or weights[0].shape[-1] > MAX_COLUMNS:
        return f"there are more than {MAX_COUNT} matrices, or {MAX_COLUMNS} columns"
    for name, tensors in (("weight", weights), ("gradient", grads)):
        first = tensors[0]
        if first.dtype not in DTYPES:
            return f"there is no kernel for {name}s in {first.dtype}"
        if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in tensors):
            return f"the rows of a {name} are not contiguous"
        if any((stride(x), x.dtype, x.device) != (stride(first), first.dtype, device) for x in tensors):
            return f"the {name}s of a group differ in stride, dtype or device"
    return None


def row_sweep(
    weights: Matrices, grads: Matrices, first: Factors | Dense, second: Factors | Dense | Split, *,
    decay: Numbers, lr: Numbers, eps: float, sign: float = 1.0, finite: Tensor | None = None,
    keys: Tensor | None = None, origin: tuple[int, int] = (0, 0), width: int | None = None,
    row_sums: bool = False,
) -> RowSweep | None:  # fmt: skip
    """The weights <- decay w - lr m / (sqrt(v) + eps), in place, with T A^T gathered on the way.

    Nothing is gathered, and None returned, for `Split`, which comes from T A^T: see `row_projection`.

    Args:
        weights: (p, q) each; rows contiguous, their stride common to the group, as `why_not` checks.
        grads: (p, q) each, likewise.
        first: how m comes about; at least one of the two moments is factorised, and both have one rank.
        second: how v does.
        decay: what W keeps, 1 - lr weight_decay.
        lr: the learning rate with all its factors.
        eps: as in Adam.
        sign: -1 to maximise; multiplies g.
        finite: (N,), bool. Where False, g is taken as zero and neither W nor a dense moment changes.
        keys: (N,), int64 in [0, 2**32): bfloat16 weights are rounded stochastically, with the bits of
            `lorapre.rounding`. None rounds to nearest.
        origin: row and column at which these weights, a shard, lie in their whole matrices; for `keys` only.
        width: columns of the whole matrices, q unless given; for `keys` only.
        row_sums: whether to return the sums of g**2 over each row.
    """
    first, second = _packed(first), _packed(second)  # named here, so that copies live until the launch
    finite, keys = (x if x is None else x.contiguous() for x in (finite, keys))
    (p, q), n, r = weights[0].shape[-2:], count(weights), _rank(first, second)
    fused, R, BM, BN, warps, stages = _row_blocks(r, grads[0], gathers=not isinstance(second, Split))
    factorised = [x for x in (first, second) if isinstance(x, Factors)]
    device, kinds = weights[0].device, _kinds(grads[0])
    splits, span = _split(q, BN, -(-p // BM) * n) if fused else (max(1, -(-q // BN)), BN)
    TAt = torch.empty((splits, len(factorised), n, p, r) if fused else (0,), device=device)
    sums = torch.empty((splits, n, p), device=device) if row_sums and fused else None
    probes = [(x.probe or x.A) if isinstance(x, Factors) else None for x in (first, second)]
    probed = any(x.probe is not None for x in factorised)
    if fused and probed:
        probes = [_contiguous(x, _narrow_type(grads[0])) for x in probes]
    table, aligned = _table(weights, grads, *_arrays(first), *_arrays(second), *probes)
    scales = (None, None) if isinstance(second, Dense) else (second.row, second.column)
    with torch.cuda.device_of(table):
        _row_sweep[(-(-p // BM), splits, n)](
            table, *_numbers(first, n, device), *_numbers(second, n, device), _vector(decay, n, device),
            _vector(lr, n, device), finite, *scales, keys, TAt, sums,
            p, q, r, stride(weights[0]), stride(grads[0]), span, *origin, width or q, float(sign), eps,
            W=_tl(weights[0].dtype), **kinds, FIRST=isinstance(first, Factors),
            SECOND=isinstance(second, Factors), SPLIT=isinstance(second, Split), FUSED=fused,
            PROBED=probed, ALIGNED=aligned, BM=BM, BN=BN, R=R, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if isinstance(second, Split):
        return None
    if fused:
        return RowSweep(_sum(TAt), None if sums is None else _sum(sums))
    return RowSweep(*_project(grads, *probes, sign=sign, finite=finite, sums=row_sums, rows=True))


def row_projection(
    grads: Matrices, probe: Matrices, *, sign: float = 1.0, finite: Tensor | None = None,
    row_sums: bool = False,
) -> RowSweep:  # fmt: skip
    """g A^T of a first moment alone.

    Args:
        grads: (p, q) each; rows contiguous, their stride common to the group.
        probe: A (r, q) each.
        sign: as in `row_sweep`.
        finite: as in `row_sweep`.
        row_sums: as in `row_sweep`.
    """
    return RowSweep(*_project(grads, probe, None, sign=sign, finite=finite, sums=row_sums, rows=True))


def column_sweep(
    grads: Matrices, first_basis: Matrices | None, second_basis: Matrices | None, *,
    sign: float = 1.0, finite: Tensor | None = None, column_sums: bool = False,
) -> ColumnSweep:  # fmt: skip
    """L^T g with the basis of the first moment, L^T |g| with that of the second.

    Args:
        grads: (p, q) each; rows contiguous, their stride common to the group.
        first_basis: L (p, r) each; None where the first moment is dense.
        second_basis: likewise.
        sign: as in `row_sweep`.
        finite: as in `row_sweep`.
        column_sums: whether to return the sums of g**2 over each column.
    """
    return ColumnSweep(*_project(
        grads, first_basis, second_basis, sign=sign, finite=finite, sums=column_sums, rows=False
    ))  # fmt: skip


def _project(
    grads: Matrices, first: Matrices | None, second: Matrices | None, *,
    sign: float, finite: Tensor | None, sums: bool, rows: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """L^T T over the rows of T or, with `rows` and A for L, T A^T over its columns; sums of g**2 likewise."""
    first, second = _contiguous(first), _contiguous(second)
    finite = finite if finite is None else finite.contiguous()
    bases = [x for x in (first, second) if x is not None]
    (p, q), n = grads[0].shape[-2:], count(grads)
    r = bases[0][0].shape[-2 if rows else -1]
    R = min(_padded(r), 128)
    BK, BJ, warps, stages = _COLUMN_BLOCKS[_exact(grads[0])][R]
    length, free = (q, p) if rows else (p, q)
    blocks = -(-free // BJ) * -(-r // R)
    splits, span = _split(length, BK, blocks * n)
    device, g_row = grads[0].device, stride(grads[0])
    out = torch.empty((splits, len(bases), n, *((p, r) if rows else (r, q))), device=device)
    total = torch.empty((splits, n, free), device=device) if sums else None
    table, aligned = _table(grads, first, second)
    with torch.cuda.device_of(table):
        _column_sweep[(blocks, splits, n)](
            table, finite, out, total, length, free, r,
            # Strides of T (length, free), L (length, r) and L^T T (r, free): with `rows`, of the transposes.
            *((1, g_row, 1, q, 1, r) if rows else (g_row, 1, r, 1, q, 1)), span, float(sign),
            **_kinds(grads[0]), FIRST=first is not None, SECOND=second is not None, ALIGNED=aligned,
            BK=BK, BJ=BJ, R=R, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return _sum(out), None if total is None else _sum(total)


# Blocks. A program of the row sweep owns BM rows and streams through the columns. It holds its rows of mB and
# vB in shared memory and of both sums T A^T in registers, 2 BM R floats each, so that g is read once for all;
# per element of g it reads 8 R / BM bytes of the A's, from the L2 cache. From some rank on (above 128, or
# above 32 where products are split in three, which doubles the operands) this does not fit. Then the update
# loops over the rank in chunks, one (BM, BN) tile a program, as a plain matrix product does, and T A^T is a
# launch of its own, in chunks of up to 128, that reads g again: nothing a program holds grows with the rank.
# By the compiler's reports, no program with a probe needs more than the 99 KB of shared memory that the
# smallest devices have (compiled for 8.9; on 9.0 some take 116 of 227 KB), and none spills registers on 9.0.
_ROW_BLOCKS = {  # whether products are exact: padded rank: BM, BN, warps, stages
    False: {16: (64, 64, 8, 3), 32: (64, 64, 8, 2), 64: (64, 32, 8, 3), 128: (64, 16, 8, 2)},
    True: {16: (64, 32, 8, 2), 32: (64, 32, 8, 2)},
}
_CHUNKED = {False: (64, 64, 64, 8, 2), True: (32, 64, 64, 8, 2)}  # chunk, BM, BN, warps, stages
_COLUMN_BLOCKS = {  # rows of T at a time, columns of a program, warps, stages
    False: {16: (64, 128, 8, 3), 32: (64, 64, 8, 3), 64: (64, 64, 8, 2), 128: (32, 64, 8, 2)},
    True: {16: (32, 64, 4, 3), 32: (32, 64, 4, 3), 64: (32, 64, 8, 3), 128: (32, 64, 8, 2)},
}
# Where a group has fewer blocks than a large device has processors, programs share a block and their sums are
# added up afterwards. It depends on the shapes alone, so that results do not depend on the device's size.
_PROGRAMS = 256


def _padded(r: int) -> int:
    return max(16, 1 << (r - 1).bit_length())


def _row_blocks(r: int, g: Tensor, gathers: bool) -> tuple[bool, int, int, int, int, int]:
    """(whether T A^T is gathered in the same launch, R, BM, BN, warps, stages)."""
    R, exact = _padded(r), _exact(g)
    if R not in _ROW_BLOCKS[exact] or not gathers:
        chunk, *blocks = _CHUNKED[exact]
        return (False, min(R, chunk), *blocks)  # type: ignore[return-value]
    BM, BN, warps, stages = _ROW_BLOCKS[exact][R]
    if g.dtype == torch.float16 and R > 16:
        stages -= 1  # the probe takes twice the room that it takes for bfloat16
    return True, R, BM, BN, warps, stages


def _split(length: int, block: int, programs: int) -> tuple[int, int]:
    """Into how many parts, of how many elements, a sweep over `length` is cut; a part is 8 blocks or more."""
    parts = max(1, min(_PROGRAMS // max(1, programs), length // (8 * block)))
    span = -(-max(1, length) // (parts * block)) * block
    return max(1, -(-length // span)), span


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _interpreted() -> bool:
    return not isinstance(_row_sweep, triton.JITFunction)


def _tl(dtype: torch.dtype) -> Any:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _exact(g: Tensor) -> bool:
    return g.dtype == torch.float32


def _narrow_type(g: Tensor) -> torch.dtype:
    """Of the other operand of products with the gradient."""
    return torch.bfloat16 if g.dtype == torch.bfloat16 else torch.float32


def _kinds(g: Tensor) -> dict[str, Any]:
    """Types of the gradient and of its products, the precision of products of float32, and an option."""
    precision = "ieee" if torch.version.hip else "tf32x3" if _exact(g) else "tf32"
    # Left to Triton, fusion of multiplications with additions depends on its version, and 3.9 warns of that.
    return {"G": _tl(g.dtype), "D": _tl(_narrow_type(g)), "PRECISION": precision,
            "INTERPRETED": _interpreted(), "enable_fp_fusion": True}  # fmt: skip


def _rank(*moments: Factors | Dense | Split) -> int:
    ranks = {x.B[0].shape[-1] for x in moments if isinstance(x, Factors)}
    assert len(ranks) == 1, "the factorised moments of a weight have one rank"
    return ranks.pop()


def _contiguous(matrices: Matrices | None, dtype: torch.dtype = torch.float32) -> Matrices | None:
    return matrices and [x.to(dtype).contiguous() for x in matrices]


def _packed(moment: Any) -> Any:
    """The moment with factors and vectors as the kernels read them, which solvers do not always return."""
    if isinstance(moment, Split):
        return Split(
            _contiguous(moment.C) or (), _contiguous(moment.W) or (), moment.keep, moment.fresh,
            moment.share, moment.row.contiguous(), moment.column.contiguous(),
        )  # fmt: skip
    if isinstance(moment, Dense):
        assert all(x.is_contiguous() and x.dtype == torch.float32 for x in moment.ema)
        return moment
    row, column = (x if x is None else x.contiguous() for x in (moment.row, moment.column))
    B, A = _contiguous(moment.B) or (), _contiguous(moment.A) or ()
    return moment._replace(B=B, A=A, row=row, column=column, probe=_contiguous(moment.probe))


def _arrays(moment: Factors | Dense | Split) -> tuple[Matrices | None, Matrices | None]:
    if isinstance(moment, Split):
        return moment.C, moment.W
    return (moment.B, moment.A) if isinstance(moment, Factors) else (moment.ema, None)


def _numbers(
    moment: Factors | Dense | Split, n: int, device: torch.device
) -> tuple[Tensor, Tensor | None, float]:
    """(keep or correction, fresh, 1 - beta or share)."""
    if not isinstance(moment, Dense):
        share = moment.share if isinstance(moment, Split) else 0.0
        return _vector(moment.keep, n, device), _vector(moment.fresh, n, device), share
    return _vector(moment.correction, n, device), None, 1 - moment.beta


def _vector(x: Numbers, n: int, device: torch.device) -> Tensor:
    """(N,) float32 on the device; a number on the host, in a tensor or not, goes as a kernel's argument."""
    if isinstance(x, Tensor) and x.device == device:
        return x.to(torch.float32).reshape(-1).expand(n).contiguous()
    return torch.full((n,), float(x), dtype=torch.float32, device=device)


def _table(*arrays: Matrices | None) -> tuple[Tensor, bool]:
    """Addresses of all matrices (N, arrays) on the device, 0 for None, and whether all rows are aligned."""
    n = count(arrays[0] or ())
    columns = [addresses(array) if array else [0] * n for array in arrays]
    aligned = not any(
        (x.data_ptr() | stride(x) * x.itemsize | (x.stride(0) if x.ndim == 3 else 0) * x.itemsize) % 16
        for array in arrays
        for x in array or ()
    )
    device = arrays[0][0].device if arrays[0] else torch.device("cpu")
    table = tuple(address for matrix in zip(*columns, strict=True) for address in matrix)
    if device.type != "cuda":
        return _upload(table, device, 0), aligned
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            # Its own, filled at every replay: one from the cache may be gone by then, or not be filled yet.
            return _upload.__wrapped__(table, device, 0), aligned
    return _upload(table, device, torch.cuda.current_stream(device).cuda_stream), aligned


@functools.lru_cache(maxsize=256)
def _upload(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """The addresses on the device, (count,), int64; the same ones are not sent again in a steady loop.

    They travel as arguments of a kernel: no host memory has to live on for it, no host waits for it, and a
    CUDA graph holds them. On another stream the table might be read before it is written, hence `stream`.
    """
    table = torch.zeros(len(addresses), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(addresses))
    return table


@_jit
def _array(table, n, k: tl.constexpr, arrays: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the k-th array of matrix n begins."""
    base = tl.load(table + n * arrays + k).to(tl.pointer_type(dtype))
    return tl.multiple_of(base, 16) if ALIGNED else base


@_jit
def _tile(base, i, j, rows, columns, row_stride, column_stride):
    """Rows i and columns j, zero outside of (rows, columns)."""
    at = i.to(tl.int64)[:, None] * row_stride + j.to(tl.int64)[None, :] * column_stride
    return tl.load(base + at, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)


@_jit
def _narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """x rounded to nearest even, where the interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where((bits & 0x7F800000) == 0x7F800000, x, nearest)
    return x.to(dtype)


@_jit
def _add(out, x, y, D: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """out + x y, both rounded to D before."""
    x, y = _narrow(x, D, INTERPRETED), _narrow(y, D, INTERPRETED)
    if INTERPRETED:  # it would multiply the bits of bfloat16 numbers
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, out, input_precision=PRECISION)


@_jit
def _noisy(x, index, key):
    """x rounded to a bfloat16 above or below, bit for bit as `lorapre.rounding.round_` does."""
    h = (index * 0x9E3779B1) ^ key
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    h ^= h >> 16
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + (h & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    rounded = tl.minimum(tl.maximum(rounded, -3.3895313892515355e38), 3.3895313892515355e38)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)


@_jit
def _product(B, A, i, j, p, q, r, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Rows i and columns j of B A, in chunks of the rank."""
    out = tl.zeros((BM, BN), tl.float32)
    for start in range(0, r, R):
        k = start + tl.arange(0, R)
        out = tl.dot(_tile(B, i, k, p, r, r, 1), _tile(A, k, j, r, q, q, 1), out, input_precision=PRECISION)
    return out


@_jit
def _row_sweep(
    table, keep_m, fresh_m, weight_m, keep_v, fresh_v, weight_v, decay, lr, finite, row, column, keys,
    TAt, sums, p, q, r, w_stride, g_stride, span, row0, column0, width, sign, eps,
    W: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, SPLIT: tl.constexpr, FUSED: tl.constexpr, PROBED: tl.constexpr,
    ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """BM rows of matrix n by `span` columns; see `row_sweep` and the table of blocks."""
    n = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    start = tl.program_id(1) * span
    k = tl.arange(0, R)
    weight = _array(table, n, 0, 8, W, ALIGNED)
    grad = _array(table, n, 1, 8, G, ALIGNED)
    mB = _array(table, n, 2, 8, tl.float32, ALIGNED)  # or the dense moment
    mA = _array(table, n, 3, 8, tl.float32, ALIGNED)
    vB = _array(table, n, 4, 8, tl.float32, ALIGNED)  # or, of SPLIT, C and W
    vA = _array(table, n, 5, 8, tl.float32, ALIGNED)
    m_probe = _array(table, n, 6, 8, D, ALIGNED)
    v_probe = _array(table, n, 7, 8, D, ALIGNED)
    height = p if finite is None else p * tl.load(finite + n).to(tl.int32)
    if FUSED and FIRST:
        mB_rows = _tile(mB, i, k, p, r, r, 1)
        m_sum = tl.zeros((BM, R), tl.float32)
    if FUSED and SECOND:
        vB_rows = _tile(vB, i, k, p, r, r, 1)
        v_sum = tl.zeros((BM, R), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    if row is not None:
        scale = tl.load(row + n * p + i, mask=i < p, other=0.0)
    for block in range(start, tl.minimum(start + span, q), BN):
        j = block + tl.arange(0, BN)
        inside = (i < height)[:, None] & (j < q)[None, :]
        g = tl.load(grad + i.to(tl.int64)[:, None] * g_stride + j[None, :], mask=inside, other=0.0)
        g = g.to(tl.float32) * sign
        squares += tl.sum(g * g, 1)

        if not FIRST:
            at = mB + i.to(tl.int64)[:, None] * q + j[None, :]
            old = tl.load(at, mask=inside, other=0.0)
            new = old + weight_m * (g - old)
            tl.store(at, new, mask=inside)
            m = new / tl.load(keep_m + n)
        else:
            if FUSED:
                A = _tile(mA, k, j, r, q, q, 1)
                m = tl.dot(mB_rows, A, input_precision=PRECISION)
                P = _tile(m_probe, k, j, r, q, q, 1) if PROBED else _narrow(A, D, INTERPRETED)
                m_sum = _add(m_sum, g, tl.trans(P), D, PRECISION, INTERPRETED)
            else:
                m = _product(mB, mA, i, j, p, q, r, BM, BN, R, PRECISION)
            if SPLIT:
                held = _product(vB, vA, i, j, p, q, r, BM, BN, R, PRECISION)
                v = (tl.load(keep_v + n) * (1 - weight_v) * m) * m + tl.load(fresh_v + n) * g * g
                v += (tl.load(keep_v + n) * weight_v * held) * held  # the square alone may be infinite
                m -= held
            m = tl.load(keep_m + n) * m + tl.load(fresh_m + n) * g

        if SPLIT:
            v += scale[:, None] * tl.load(column + n * q + j, mask=j < q, other=0.0)[None, :]
        elif not SECOND:
            at = vB + i.to(tl.int64)[:, None] * q + j[None, :]
            old = tl.load(at, mask=inside, other=0.0)
            new = (1 - weight_v) * old + weight_v * g * g  # without a difference of what may be infinite
            tl.store(at, new, mask=inside)
            v = new / tl.load(keep_v + n)
        else:
            if FUSED:
                A = _tile(vA, k, j, r, q, q, 1)
                v = tl.dot(vB_rows, A, input_precision=PRECISION)
                P = _tile(v_probe, k, j, r, q, q, 1) if PROBED else _narrow(A, D, INTERPRETED)
                v_sum = _add(v_sum, tl.abs(g), tl.trans(P), D, PRECISION, INTERPRETED)
            else:
                v = _product(vB, vA, i, j, p, q, r, BM, BN, R, PRECISION)
            if row is not None:
                v = scale[:, None] * v * tl.load(column + n * q + j, mask=j < q, other=0.0)[None, :]
            v = tl.load(keep_v + n) * v * v + tl.load(fresh_v + n) * g * g

        at = weight + i.to(tl.int64)[:, None] * w_stride + j[None, :]
        new = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        new = tl.load(decay + n) * new - tl.load(lr + n) * m / (tl.sqrt(v) + eps)
        if keys is not None:
            index = (row0 + i).to(tl.uint32)[:, None] * width + (column0 + j).to(tl.uint32)[None, :]
            new = _noisy(new, index, tl.load(keys + n).to(tl.uint32))
        tl.store(at, _narrow(new, W, INTERPRETED), mask=inside)

    if FUSED:
        group = tl.num_programs(2).to(tl.int64)
        at = (tl.program_id(1) * (FIRST + SECOND) * group + n) * p + i
        at = at[:, None] * r + k[None, :]
        mask = (i < p)[:, None] & (k < r)[None, :]
        if FIRST:
            tl.store(TAt + at, m_sum, mask=mask)
        if SECOND:
            tl.store(TAt + at + FIRST * group * p * r, v_sum, mask=mask)
        if sums is not None:
            tl.store(sums + (tl.program_id(1) * group + n) * p + i, squares, mask=i < p)


@_jit
def _column_sweep(
    table, finite, out, sums, length, free, r, g_length, g_free, L_length, L_rank, out_rank, out_free,
    span, sign,
    G: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, ALIGNED: tl.constexpr,
    BK: tl.constexpr, BJ: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """R rows and BJ columns of L^T T (r, free) of matrix n, over `span` of T's length; see `_project`."""
    n = tl.program_id(2).to(tl.int64)
    chunks = tl.cdiv(r, R)  # neighbours read the same T
    chunk = tl.program_id(0) % chunks
    k = chunk * R + tl.arange(0, R)
    j = tl.program_id(0) // chunks * BJ + tl.arange(0, BJ)
    start = tl.program_id(1) * span
    grad = _array(table, n, 0, 3, G, ALIGNED)
    first = _array(table, n, 1, 3, tl.float32, ALIGNED)
    second = _array(table, n, 2, 3, tl.float32, ALIGNED)
    height = length if finite is None else length * tl.load(finite + n).to(tl.int32)
    if FIRST:
        m_sum = tl.zeros((R, BJ), tl.float32)
    if SECOND:
        v_sum = tl.zeros((R, BJ), tl.float32)
    squares = tl.zeros((BJ,), tl.float32)
    for block in range(start, tl.minimum(start + span, length), BK):
        i = block + tl.arange(0, BK)
        g = _tile(grad, i, j, height, free, g_length, g_free).to(tl.float32) * sign
        squares += tl.sum(g * g, 0)
        if FIRST:
            L = _tile(first, i, k, length, r, L_length, L_rank)
            m_sum = _add(m_sum, tl.trans(L), g, D, PRECISION, INTERPRETED)
        if SECOND:
            L = _tile(second, i, k, length, r, L_length, L_rank)
            v_sum = _add(v_sum, tl.trans(L), tl.abs(g), D, PRECISION, INTERPRETED)
    group = tl.num_programs(2).to(tl.int64)
    at = (tl.program_id(1) * (FIRST + SECOND) * group + n) * r * free
    at += k.to(tl.int64)[:, None] * out_rank + j.to(tl.int64)[None, :] * out_free
    mask = (k < r)[:, None] & (j < free)[None, :]
    if FIRST:
        tl.store(out + at, m_sum, mask=mask)
    if SECOND:
        tl.store(out + at + FIRST * group * r * free, v_sum, mask=mask)
    if sums is not None and chunk == 0:
        tl.store(sums + (tl.program_id(1) * group + n) * free + j, squares, mask=j < free)
