"""The three primitives of `lorapre.gradient.Gradient` in C, for CPUs: what `kernels.c` is given.

Everything is checked before its address is handed over. All buffers are float32 on the CPU,
whatever the default of torch.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lorapre.backends import library
from lorapre.backends.library import DTYPES, Matrices
from lorapre.gradient import Gradient, Moments, Number

HEIGHT = 128  # rows that a thread takes at a time, at least
PARTS = 64  # of a matrix, at most: each has its own sums over its rows


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("count", "rows", "columns", "height", "threads")),
        ("weights", Matrices), ("grads", Matrices), ("B", Matrices * 2), ("A", Matrices * 2),
        ("rank", c_int64 * 2), ("in_m", c_int64 * 2), ("in_v", c_int64 * 2),
        ("a", c_void_p * 2), ("b", c_void_p), ("c", c_void_p * 2), ("d", c_void_p),
        ("row", c_void_p), ("column", c_void_p),
        ("ema", Matrices * 2), ("rate", c_void_p * 2), ("unbias", c_void_p * 2),
        ("lr", c_void_p), ("decay", c_void_p), ("scale", c_float), ("eps", c_float),
        *((name, c_void_p) for name in ("finite", "keys", "row_index", "column_index")),
        ("row_sums", c_void_p), ("column_sums", c_void_p),
    )  # fmt: skip


def why_not(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot take these matrices, for a warning, or None where they can."""
    for name, matrices in (("weight", weights), ("gradient", grads)):
        if not matrices:
            continue
        first, strides = matrices[0], {x.stride() for x in matrices}
        for x in matrices:
            if type(x) not in (Tensor, Parameter):
                return f"a {name} is a {type(x).__name__}, not a plain tensor"
            if x.dtype not in DTYPES or x.dtype != first.dtype:
                return f"there is no kernel for {name}s in {x.dtype}"
            if x.shape != weights[0].shape or x.device.type != "cpu" or x.is_neg():
                return f"a {name} is not a plain matrix on the CPU"
            if x.numel() and x.data_ptr() == 0:
                return f"the memory of a {name} has been freed"
        if len(strides) > 1:
            return f"the {name}s of a group differ in stride"
        ((row, column),) = strides
        p, q = first.shape
        if (column != 1 and first.numel()) or (row < q and p > 1):
            return f"the rows of a {name} are not contiguous"
    return None


class CGradient(Gradient):
    """N same-shaped gradients, which `why_not` has nothing against, as one operand."""

    def _right(self, X: Tensor) -> Tensor:
        return self._product(X, (len(self), self.held[1], X.shape[-1]), left=False)

    def _left(self, L: Tensor) -> Tensor:
        return self._product(L, (len(self), L.shape[-2], self.held[0]), left=True)

    def _product(self, X: Tensor, shape: tuple[int, ...], left: bool) -> Tensor:
        """T X or X T."""
        (N, p, q), held = (len(self), *self.held), _Held()
        X = _checked(X, shape)
        a, b, c = (shape[1], p, q) if left else (p, q, shape[2])
        out = torch.empty(N, a, c, dtype=torch.float32, device="cpu")
        T, other = held.matrices(self.grads), held.stack(X)
        T.absolute = self.absolute
        first, second = (other, T) if left else (T, other)
        library.loaded().products(
            N, a, b, c, ctypes.byref(first), ctypes.byref(second), held.finite(self.finite, N),
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _step_(
        self, weights: Sequence[Tensor], M: Moments, lr: Number, decay: Number, eps: float,
        keys: Tensor | None, sums: bool,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        (N, p, q), held = (len(self), *self.held), _Held()
        height = max(HEIGHT, -(-p // (PARTS * HEIGHT)) * HEIGHT)
        rows = torch.zeros(N, p, 1, dtype=torch.float32, device="cpu")
        columns = torch.zeros(N, -(-p // height), q, dtype=torch.float32, device="cpu")
        if len(weights) != N:
            raise ValueError(f"{len(weights)} weights have {N} gradients")
        s = _Step(
            N, p, q, height, torch.get_num_threads(), held.matrices(weights),
            held.matrices(self.grads), scale=self.scale, eps=eps,
            finite=held.finite(self.finite, N), row_sums=rows.data_ptr() if sums else None,
            column_sums=columns.data_ptr(),
        )  # fmt: skip
        s.grads.absolute = self.absolute
        numbers: list[Number] = [lr, decay, 0.0 if M.exp_avg else M.b, 0.0 if M.exp_avg_sq else M.d]
        for x, ema in enumerate((M.exp_avg, M.exp_avg_sq)):
            factors = M.products[x] if x < len(M.products) else None
            a, c = (M.a[x], M.c[x] if M.c else 0.0) if factors is not None else (0.0, 0.0)
            if factors is not None:
                r = factors.B.shape[-1]
                s.B[x] = held.stack(_rows(_checked(factors.B, (N, p, r))))
                s.A[x] = held.stack(_rows(_checked(factors.A, (N, r, q))))
                s.rank[x], s.in_m[x], s.in_v[x] = r, _counts(a), _counts(c)
            rate: Number = 0.0
            unbias: Number = 0.0
            if ema is not None:
                if factors is not None and (_counts(a) or _counts(c)):
                    raise ValueError("a moment that is kept in full takes the place of a product")
                if len(ema.E) != N:
                    raise ValueError(f"{len(ema.E)} moments have {N} gradients")
                for E in ema.E:
                    _checked(E, (p, q))
                s.ema[x] = held.matrices(ema.E)
                s.rank[x], s.in_v[x] = 0, 0
                rate, unbias = ema.rate, ema.scale
                if x == 0:
                    a, s.in_m[0] = 1.0, 1
            numbers += [a, c, rate, unbias]
        pointers = held.numbers(numbers, N)
        s.lr, s.decay, s.b, s.d = pointers[:4]
        for x in range(2):
            s.a[x], s.c[x], s.rate[x], s.unbias[x] = pointers[4 + 4 * x : 8 + 4 * x]
        if M.row is not None and M.column is not None:
            s.row = held.tensor(_checked(M.row, (N, p, 1)).contiguous())
            s.column = held.tensor(_checked(M.column, (N, 1, q)).contiguous())
        if keys is not None:
            s.keys = held.tensor(_checked(keys, (N,), torch.int64).contiguous())
            s.row_index = held.tensor(_index(self.rows, p, self.q))
            s.column_index = held.tensor(_index(self.columns, q, 1))
        library.loaded().step(ctypes.byref(s))
        return (rows, columns.sum(1, keepdim=True)) if sums else None


class _Held:
    """What addresses point to; it has to live until the call."""

    def __init__(self) -> None:
        self.objects: list[Any] = []

    def tensor(self, x: Tensor) -> int:
        self.objects.append(x)
        return x.data_ptr()

    def finite(self, x: Tensor | None, N: int) -> int | None:
        return None if x is None else self.tensor(_checked(x, (N,), torch.bool).contiguous())

    def matrices(self, tensors: Sequence[Tensor]) -> Matrices:
        """Matrices of one shape, dtype and stride."""
        if not tensors:
            return Matrices(None, 1, 1, 0, 0)
        x = tensors[0]
        return self._matrices(x, [y.data_ptr() for y in tensors], *x.stride())

    def stack(self, x: Tensor) -> Matrices:
        """Matrices (N, ...) of a tensor."""
        first, step = x.data_ptr(), x.stride(0) * x.element_size()
        return self._matrices(x, [first + n * step for n in range(len(x))], *x.stride()[1:])

    def _matrices(self, x: Any, addresses: list[int], row: int, column: int) -> Matrices:
        array = (c_int64 * len(addresses))(*addresses)
        self.objects += [x, array]
        return Matrices(ctypes.addressof(array), row, column, DTYPES[x.dtype], 0)

    def numbers(self, numbers: Sequence[Number], N: int) -> list[int]:
        """Vectors of N numbers each."""
        values: list[float] = []
        for x in numbers:
            own = x.reshape(-1).tolist() if isinstance(x, Tensor) else [x]
            values += own * N if len(own) == 1 else own
        if len(values) != N * len(numbers):
            raise ValueError(f"a number is there for each of {N} matrices, or one for all")
        array = (c_float * len(values))(*values)
        self.objects.append(array)
        start = ctypes.addressof(array)
        return [start + 4 * N * k for k in range(len(numbers))]


def _checked(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    if type(x) not in (Tensor, Parameter) or x.shape != shape or x.dtype != dtype or not x.is_cpu:
        found = f"{type(x).__name__} {tuple(x.shape)} in {x.dtype} on {x.device}"
        raise ValueError(
            f"expected a plain tensor {shape} in {dtype} on the CPU, but found a {found}"
        )
    return x


def _rows(x: Tensor) -> Tensor:
    """With contiguous rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _counts(x: Number) -> bool:
    return isinstance(x, Tensor) or x != 0


def _index(places: range | Tensor, n: int, step: int) -> Tensor:
    """The lower 32 bits of places times `step`."""
    if isinstance(places, range):
        places = torch.arange(places.start, places.stop, dtype=torch.int64, device="cpu")
    return (_checked(places, (n,), torch.int64) * step).to(torch.int32).contiguous()
