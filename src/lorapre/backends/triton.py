"""The three primitives of `lorapre.gradient.Gradient` as two Triton kernels, for CUDA and ROCm.

`lorapre.gradient` has the same in plain torch, and defines what they compute. This is the only
module that imports triton. Import it where it is used: it loads a compiler.

A launch serves all N matrices of a batch. Each weight and gradient is a tensor of its own, so their
addresses travel in a table on the device. Nothing waits for the device, and CUDA graphs can capture
everything. Each program writes sums of its own, so no result depends on their order.

Everything is float32 but for the operands of products. With a bfloat16 gradient the other operand
is rounded to bfloat16. Beside gradients of 16 bits all other products take TF32 operands, which
hold such a gradient exactly and a factor no more coarsely. With float32 gradients TF32 would be the
largest error of the step, so products are split in three (tf32x3).
"""

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lorapre import rounding
from lorapre.gradient import Full, Gradient, Moments, Number
from lorapre.linalg import debias

try:
    import triton
    import triton.language as tl
except ImportError:  # `why_not` says so, and nothing below is called
    triton = None
    tl = types.SimpleNamespace(constexpr=None)

_jit: Any = triton.jit if triton else lambda function: function

MAX_COUNT = 2**16 - 1  # what the last dimension of a grid holds
MAX_STRIDE = 2**24  # places within a tile are numbers of 32 bits
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A program of a product owns R rows of the rank and BJ columns of the result, and streams through
# BK elements of the length at a time. A program of an update owns a tile (BM, BN), and multiplies
# factors in chunks of R of the rank, so nothing a program holds grows with the rank. Compiled for
# capabilities 8.0 and 9.0 it takes at most 56 KB of shared memory (small devices have 99) and 8
# bytes of spilled registers. With more tiles for a program there would be fewer sums, but it takes
# twice the registers. The first key: whether gradients, and so products, are float32.
_PRODUCT = {  # padded rank, at most 128: BK, BJ, warps, stages
    False: {16: (64, 128, 8, 3), 32: (64, 64, 8, 3), 64: (64, 64, 8, 2), 128: (32, 64, 8, 2)},
    True: {16: (32, 64, 4, 3), 32: (32, 64, 4, 3), 64: (32, 64, 8, 3), 128: (32, 64, 8, 2)},
}
_UPDATE = {False: (32, 64, 64, 8, 2), True: (32, 32, 64, 8, 3)}  # most of R, BM, BN, warps, stages
# Where a batch has fewer blocks than a large device has processors, programs share the length of a
# product. That depends on shapes alone, so results do not depend on the size of the device.
_PROGRAMS = 256


def why_not(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot take these matrices, for a warning; None where they can."""
    if triton is None:
        return "Triton is not installed"
    device, nvidia = weights[0].device, not torch.version.hip
    if device.type == "cuda" and nvidia and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if device.type != "cuda" and not _interpreted():
        return f"the weights are on {device.type}, and the kernels are for CUDA and ROCm devices"
    if len(weights) > MAX_COUNT:
        return f"there are more than {MAX_COUNT} matrices"
    for name, tensors in (("weight", weights), ("gradient", grads)):
        first = tensors[0]
        if any(type(x) not in (Tensor, Parameter) for x in tensors):
            return f"a {name} is a {type(first).__name__}, not a plain tensor"
        if first.dtype not in DTYPES:
            return f"there is no kernel for {name}s in {first.dtype}"
        if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in tensors):
            return f"the rows of a {name} are not contiguous"
        if _stride(first) > MAX_STRIDE:
            return f"the rows of a {name} are more than {MAX_STRIDE} elements apart"
        kinds = {(_stride(x), x.dtype, x.device) for x in tensors}
        if kinds != {(_stride(first), first.dtype, device)}:
            return f"the {name}s of a batch differ in stride, dtype or device"
    return None


class TritonGradient(Gradient):
    """N same-shaped gradients, which `why_not` has nothing against, as one operand."""

    def _right(self, X: Tensor) -> Tensor:
        return self._product(X, transposed=True)

    def _left(self, L: Tensor) -> Tensor:
        return self._product(L.mT, transposed=False)

    def _product(self, X: Tensor, *, transposed: bool) -> Tensor:
        """X^T T (N, r, q) of X (N, p, r); if `transposed`, T X (N, p, r) of X (N, q, r)."""
        (p, q), N, r, g = self.local_shape, len(self), X.shape[-1], self.grads[0]
        R = min(128, triton.next_power_of_2(max(16, r)))
        BK, BJ, warps, stages = _PRODUCT[g.dtype == torch.float32][R]
        # Sizes and strides of T (length, free), strides of X^T T (r, free). T X is (X^T T^T)^T.
        length, free, *strides = p, q, _stride(g), 1, q, 1
        if transposed:
            length, free, *strides = q, p, 1, _stride(g), 1, r
        blocks = -(-free // BJ) * -(-r // R)
        parts, span = _split(length, BK, blocks * N)
        shape = (p, r) if transposed else (r, q)
        out = torch.empty(parts, N, *shape, dtype=torch.float32, device=self.device)
        table, aligned = _table(self.grads)
        with torch.cuda.device_of(table):
            _product_kernel[(blocks, parts, N)](
                table, _packed(self.finite, torch.bool), X.float(), out, length, free, r, *strides,
                *X.stride(), span, **_kinds(g), ABSOLUTE=self.absolute, ALIGNED=aligned,
                BK=BK, BJ=BJ, R=R, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return out[0] if parts == 1 else out.sum(0)

    def _adamw_(
        self, weights: Sequence[Tensor], full: Full, lr: Number, decay: Number, eps: float,
        keys: Tensor | None,
    ) -> None:  # fmt: skip
        if not all(E.is_contiguous() for E in (*full.exp_avg, *full.exp_avg_sq)):
            return super()._adamw_(weights, full, lr, decay, eps, keys)
        self._step_(weights, Moments(), lr, decay, eps, keys, False, full)

    def _step_(
        self, weights: Sequence[Tensor], M: Moments, lr: Number, decay: Number, eps: float,
        keys: Tensor | None, sums: bool, full: Full | None = None,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        assert not self.absolute and (M.row is None) == (M.column is None)
        (p, q), N, g = self.local_shape, len(self), self.grads[0]
        r, *others = {x.B.shape[-1] for x in M.products if x is not None} or {1}
        assert not others, "the products of an update have one rank"
        chunk, BM, BN, warps, stages = _UPDATE[g.dtype == torch.float32]
        R = min(chunk, triton.next_power_of_2(max(16, r)))
        blocks, parts = -(-p // BM), -(-q // BN)
        rows = columns = None
        if sums:
            rows = torch.empty(parts, N, p, 1, dtype=torch.float32, device=self.device)
            columns = torch.empty(blocks, N, 1, q, dtype=torch.float32, device=self.device)
        rates: list[Number | None] = [None] * 4
        if full is not None:
            rates = [x for b in full.betas for x in (1 - b, debias(b, full.t))]
        indices = (rounding.indices(x, self.device) for x in (self.rows, self.columns))
        places: Sequence[Tensor | None] = (None, None, None) if keys is None else (keys, *indices)
        table, aligned = _table(weights, self.grads, *(full[:2] if full else (None, None)))
        with torch.cuda.device_of(table):
            _update_kernel[(blocks * parts, N)](
                table, _packed(self.finite, torch.bool), *self._products(M),
                *map(self._number, (M.b, M.d)), _packed(M.row), _packed(M.column),
                *map(self._number, (*rates, lr, decay)), *places, rows, columns,
                p, q, r, _stride(weights[0]), _stride(g), self.q, float(self.scale), float(eps),
                W=_tl(weights[0].dtype), **_kinds(g), ALIGNED=aligned,
                BM=BM, BN=BN, R=R, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return None if rows is None or columns is None else (rows.sum(0), columns.sum(0))

    def _products(self, M: Moments) -> list[Any]:
        """B, A, a and c of two products, None for zero."""
        arguments: list[Any] = []
        for factors, *weights in zip(M.products, M.a, M.c, strict=True):
            if factors is not None:
                numbers = [self._number(x if isinstance(x, Tensor) or x else None) for x in weights]
                arguments += [*map(_packed, factors), *numbers]
        assert len(arguments) <= 8, "an update has two products"
        return arguments + [None] * (8 - len(arguments))

    def _number(self, x: Number | None) -> Any:
        """(N,) float32 on the device; a number on the host is an argument of the kernel."""
        if isinstance(x, Tensor) and x.device == self.device:
            return x.float().reshape(-1).expand(len(self)).contiguous()
        return x if x is None else float(x)


def _split(length: int, block: int, programs: int) -> tuple[int, int]:
    """How many parts programs make of a length, and their size, which is 8 blocks or more."""
    parts = max(1, min(_PROGRAMS // max(1, programs), length // (8 * block)))
    span = -(-max(1, length) // (parts * block)) * block
    return max(1, -(-length // span)), span


def _stride(x: Tensor) -> int:
    """Elements from a row to the next; that of a single row means nothing."""
    return x.stride(0) if x.shape[0] > 1 else 0


def _packed(x: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return x if x is None else x.to(dtype).contiguous()


def _interpreted() -> bool:
    return not isinstance(_update_kernel, triton.JITFunction)


def _tl(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _kinds(g: Tensor) -> dict[str, Any]:
    """Types of the gradient (G) and of its products (D), the precision of others, and an option."""
    exact = g.dtype == torch.float32
    # Left to Triton, fusion of products with sums depends on its version, and 3.9 warns of that.
    return {"G": _tl(g.dtype), "D": tl.bfloat16 if g.dtype == torch.bfloat16 else tl.float32,
            "PRECISION": "ieee" if torch.version.hip else "tf32x3" if exact else "tf32",
            "INTERPRETED": _interpreted(), "enable_fp_fusion": True}  # fmt: skip


def _table(*arrays: Sequence[Tensor] | None) -> tuple[Tensor, bool]:
    """Addresses (N, arrays) on the device, 0 for None, and whether all rows are aligned."""
    tensors = [x for array in arrays for x in array or ()]
    aligned = not any((x.data_ptr() | _stride(x) * x.itemsize) % 16 for x in tensors)
    N, device = len(arrays[0] or ()), tensors[0].device
    columns = [[x.data_ptr() for x in array] if array else [0] * N for array in arrays]
    table = tuple(address for matrix in zip(*columns, strict=True) for address in matrix)
    if device.type != "cuda":
        return _upload(table, device, 0), aligned
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            # Its own, filled at every replay: one from the cache may be gone or not filled by then.
            return _upload.__wrapped__(table, device, 0), aligned
    return _upload(table, device, torch.cuda.current_stream(device).cuda_stream), aligned


@functools.lru_cache(maxsize=256)
def _upload(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """The addresses on the device, (count,), int64; a steady loop does not send them again.

    They travel as arguments of a kernel: no host waits, and a CUDA graph holds them. On another
    `stream` the table might be read before it is written.
    """
    table = torch.zeros(len(addresses), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(addresses))
    return table


@_jit
def _array(
    table, n, k: tl.constexpr, arrays: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Where the k-th array of matrix n begins."""
    base = tl.load(table + n * arrays + k).to(tl.pointer_type(dtype))
    return tl.multiple_of(base, 16) if ALIGNED else base


@_jit
def _pick(x, n):
    """The number x of matrix n: an argument, or an element of a vector on the device."""
    number = x  # the assignment makes the interpreter wrap a float of Python, which has no dtype
    return tl.load(number + n) if number.dtype.is_ptr() else number


@_jit
def _offset(i, stride):
    """Elements before row i, in 64 bits; within a tile 32 do, and take fewer registers."""
    return tl.cast(i, tl.int64) * stride


@_jit
def _tile(base, i, j, rows, columns, row_stride, column_stride, BM: tl.constexpr, BN: tl.constexpr):
    """BM rows from i and BN columns from j, zero outside of (rows, columns)."""
    di, dj = tl.arange(0, BM), tl.arange(0, BN)
    pointers = base + _offset(i, row_stride) + _offset(j, column_stride)
    mask = (di < rows - i)[:, None] & (dj < columns - j)[None, :]
    pointers += di[:, None] * row_stride + dj[None, :] * column_stride
    return tl.load(pointers, mask=mask, other=0.0)


@_jit
def _narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """x rounded to nearest even, where the interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where((bits & 0x7F800000) == 0x7F800000, x, nearest)
    return x.to(dtype)


@_jit
def _product_kernel(
    table, finite, X, out, length, free, r, g_length, g_free, out_rank, out_free,
    X_n, X_length, X_rank, span,
    G: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    ABSOLUTE: tl.constexpr, ALIGNED: tl.constexpr,
    BK: tl.constexpr, BJ: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """R rows and BJ columns of X^T T (r, free) of matrix n, over `span` of the length."""
    n = tl.program_id(2).to(tl.int64)
    chunks = tl.cdiv(r, R)  # neighbours read the same T
    k, j = tl.program_id(0) % chunks * R, tl.program_id(0) // chunks * BJ
    start = tl.program_id(1) * span
    grad = _array(table, n, 0, 1, G, ALIGNED)
    height = length if finite is None else length * tl.load(finite + n).to(tl.int32)
    total = tl.zeros((R, BJ), tl.float32)
    for i in range(start, tl.minimum(start + span, length), BK):
        g = _tile(grad, i, j, height, free, g_length, g_free, BK, BJ)
        if ABSOLUTE:
            g = tl.abs(g.to(tl.float32))
        x = tl.trans(_tile(X + n * X_n, i, k, length, r, X_length, X_rank, BK, R))
        x, g = _narrow(x, D, INTERPRETED), g.to(D)
        if INTERPRETED:  # it would multiply the bits of bfloat16 numbers
            x, g = x.to(tl.float32), g.to(tl.float32)
        total = tl.dot(x, g, total, input_precision=PRECISION)
    pointers = out + (tl.program_id(1) * tl.num_programs(2).to(tl.int64) + n) * r * free
    dk, dj = tl.arange(0, R), tl.arange(0, BJ)
    pointers += _offset(k, out_rank) + _offset(j, out_free)
    pointers += dk[:, None] * out_rank + dj[None, :] * out_free
    tl.store(pointers, total, mask=(dk < r - k)[:, None] & (dj < free - j)[None, :])


@_jit
def _add_product(
    m, v, B, A, a, c, n, i, j, p, q, r, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """m + a P and v + c P**2 of rows i and columns j of P = B A, in chunks of the rank."""
    if B is not None:
        P = tl.zeros((BM, BN), tl.float32)
        for k in range(0, r, R):
            X = _tile(B + n * p * r, i, k, p, r, r, 1, BM, R)
            Y = _tile(A + n * r * q, k, j, r, q, q, 1, R, BN)
            P = tl.dot(X, Y, P, input_precision=PRECISION)
        if c is not None:
            v += _pick(c, n) * P * P  # weighed before it is squared: a square may be infinite
        if a is not None:
            m += _pick(a, n) * P
    return m, v


@_jit
def _moved(pointers, x, rate, unbias, finite, n, inside):
    """The moment whose EMA is stored there, moved towards x; E - x may be no number."""
    if finite is not None:
        rate *= tl.load(finite + n).to(tl.float32)
    E = (1 - rate) * tl.load(pointers, mask=inside, other=0.0) + rate * x
    tl.store(pointers, E, mask=inside)
    return E / _pick(unbias, n)


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
def _update_kernel(
    table, finite, B0, A0, a0, c0, B1, A1, a1, c1, b, d, row, column, m_rate, m_unbias, v_rate,
    v_unbias, lr, decay, keys, row_places, column_places, row_sums, column_sums, p, q, r, w_stride,
    g_stride, width, scale, eps,
    W: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A tile of the update of matrix n, and its part of the sums of T**2."""
    n, group = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    parts = tl.cdiv(q, BN)
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    i0, j0, di, dj = block * BM, part * BN, tl.arange(0, BM), tl.arange(0, BN)
    i, j = i0 + di, j0 + dj
    weight = _array(table, n, 0, 4, W, ALIGNED) + _offset(i0, w_stride)
    grad = _array(table, n, 1, 4, G, ALIGNED) + _offset(i0, g_stride)
    exp_avg = _array(table, n, 2, 4, tl.float32, ALIGNED) + _offset(i0, q)
    exp_avg_sq = _array(table, n, 3, 4, tl.float32, ALIGNED) + _offset(i0, q)
    height = p if finite is None else p * tl.load(finite + n).to(tl.int32)
    inside = (i < p)[:, None] & (j < q)[None, :]
    offsets = j0 + (di[:, None] * g_stride + dj[None, :])
    g = tl.load(grad + offsets, mask=inside & (i < height)[:, None], other=0.0)
    g = g.to(tl.float32) * scale
    square = g * g
    if row_sums is not None:
        tl.store(row_sums + (part * group + n) * p + i, tl.sum(square, 1), mask=i < p)
        tl.store(column_sums + (block * group + n) * q + j, tl.sum(square, 0), mask=j < q)

    m, v = _pick(b, n) * g, _pick(d, n) * square
    if row is not None:
        row_part = tl.load(row + n * p + i, mask=i < p, other=0.0)
        v += row_part[:, None] * tl.load(column + n * q + j, mask=j < q, other=0.0)[None, :]
    m, v = _add_product(m, v, B0, A0, a0, c0, n, i0, j0, p, q, r, BM, BN, R, PRECISION)
    m, v = _add_product(m, v, B1, A1, a1, c1, n, i0, j0, p, q, r, BM, BN, R, PRECISION)
    offsets = j0 + (di[:, None] * q + dj[None, :])
    if m_rate is not None:
        m = _moved(exp_avg + offsets, g, m_rate, m_unbias, finite, n, inside)
        v = _moved(exp_avg_sq + offsets, square, v_rate, v_unbias, finite, n, inside)

    weight += j0 + (di[:, None] * w_stride + dj[None, :])
    new = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
    new = _pick(decay, n) * new - _pick(lr, n) * m / (tl.sqrt(v) + eps)
    if keys is not None:
        key = tl.load(keys + n).to(tl.uint32)
        row_index = tl.load(row_places + i, mask=i < p, other=0).to(tl.uint32) * width
        column_index = tl.load(column_places + j, mask=j < q, other=0).to(tl.uint32)
        new = _noisy(new, row_index[:, None] + column_index[None, :], key)
    tl.store(weight, _narrow(new, W, INTERPRETED), mask=inside)
