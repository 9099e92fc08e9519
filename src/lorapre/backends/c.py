"""The primitives of `lorapre.gradient.Gradient` in C, for CPUs: hands tensors to `kernels.c`.

Everything is checked before its address is handed over. All buffers are float32 on the CPU,
whatever the default of torch.
"""

import ctypes
import itertools
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from lorapre.backends import library
from lorapre.gradient import Gradient, Moments, Number

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # their numbers in kernels.c
HEIGHT = 128  # rows that a thread takes at a time, at least
PARTS = 64  # of a matrix, at most: each has its own sums over its rows

Shape: TypeAlias = tuple[int, ...]


class _Matrices(ctypes.Structure):
    _fields_ = (("data", POINTER(c_void_p)), ("row", c_int64), ("dtype", c_int64))


class _Step(ctypes.Structure):
    """The struct of the same name."""

    _fields_ = (
        *((name, c_int64) for name in ("count", "rows", "columns", "height", "threads")),
        ("weights", _Matrices), ("grads", _Matrices),
        ("B", c_void_p * 2), ("A", c_void_p * 2), ("rank", c_int64 * 2),
        ("factor", c_void_p), ("out", c_void_p), ("absolute", c_int64),
        ("numbers", POINTER(c_float)),
        *((name, c_void_p) for name in ("row", "column", "finite", "keys")),
        *((name, c_void_p) for name in ("row_index", "column_index", "row_sums", "column_sums")),
        ("scale", c_float), ("eps", c_float),
    )  # fmt: skip
    alive: tuple[Tensor, ...] = ()  # what addresses point to

    def address(self, x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> int:
        """The address of the numbers of x; this struct keeps them alive."""
        self.alive += (_checked(x, shape, dtype).contiguous(),)
        return self.alive[-1].data_ptr()

    def noise(
        self, keys: Tensor, rows: range | Tensor, columns: range | Tensor, width: int
    ) -> None:
        """What `rounding.round_` takes."""
        self.keys = self.address(keys, self.count, dtype=torch.int64)
        self.row_index = self.address(_index(rows, width), self.rows, dtype=torch.int32)
        self.column_index = self.address(_index(columns, 1), self.columns, dtype=torch.int32)


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
        (p, q), r = self.local_shape, X.shape[-1]
        return self._product(library.loaded().right, X, (q, r), (p, r), r)

    def _left(self, L: Tensor) -> Tensor:
        (p, q), r = self.local_shape, L.shape[-2]
        return self._product(library.loaded().left, L, (r, p), (r, q), r)

    def _product(self, function: Any, X: Tensor, given: Shape, made: Shape, rank: int) -> Tensor:
        """What a function makes of the gradients and a factor X."""
        s, out = self._struct(), torch.zeros(len(self), *made, dtype=torch.float32, device="cpu")
        s.factor, s.out, s.rank[0] = s.address(X, len(self), *given), out.data_ptr(), rank
        s.absolute, s.scale = self.absolute, 1.0
        function(ctypes.byref(s))
        return out

    def _struct(self) -> _Step:
        """What every function needs."""
        N = len(self)
        s = _Step(N, *self.local_shape, threads=torch.get_num_threads(), scale=self.scale)
        s.grads = _matrices("gradients", self.grads, N)
        if self.finite is not None:
            s.finite = s.address(self.finite, N, dtype=torch.bool)
        return s

    def _step_(
        self, weights: Sequence[Tensor], M: Moments, lr: Number, decay: Number, eps: float,
        keys: Tensor | None, sums: bool,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        N, p, q = len(self), *self.local_shape
        assert not self.absolute and len(M.products) <= 2
        s = self._struct()
        s.height, s.eps = max(HEIGHT, -(-p // (PARTS * HEIGHT)) * HEIGHT), eps
        s.weights = _matrices("weights", weights, N)
        rows = torch.zeros(N, p, 1, dtype=torch.float32, device="cpu")
        columns = torch.zeros(N, -(-p // s.height), q, dtype=torch.float32, device="cpu")
        s.row_sums, s.column_sums = rows.data_ptr() if sums else None, columns.data_ptr()
        numbers = [lr, decay, M.b, M.d, 0.0, 0.0, 0.0, 0.0]
        for k, factors in enumerate(M.products):
            if factors is not None:
                r = factors.B.shape[-1]
                s.rank[k], s.B[k] = r, s.address(factors.B, N, p, r)
                s.A[k] = s.address(factors.A, N, r, q)
                numbers[4 + 2 * k : 6 + 2 * k] = M.a[k], M.c[k]
        each = [_for_each(x, N) for x in numbers]
        s.numbers = (c_float * (N * len(each)))(*itertools.chain(*zip(*each, strict=True)))
        if M.row is not None and M.column is not None:
            s.row, s.column = s.address(M.row, N, p, 1), s.address(M.column, N, 1, q)
        if keys is not None:
            s.noise(keys, self.rows, self.columns, self.q)
        library.loaded().step(ctypes.byref(s))
        return (rows, columns.sum(1, keepdim=True)) if sums else None

    def _store_(
        self, weights: Sequence[Tensor], n: slice, i: slice, w: Tensor, keys: Tensor | None
    ) -> None:
        if keys is None:
            return super()._store_(weights, n, i, w, keys)
        s = _Step(*w.shape, threads=torch.get_num_threads())
        s.weights = _matrices("weights", [x[i] for x in weights[n]], len(w))
        s.out = s.address(w, *w.shape)
        s.noise(keys[n], self.rows[i], self.columns, self.q)
        library.loaded().store(ctypes.byref(s))


def _matrices(name: str, tensors: Sequence[Tensor], N: int) -> _Matrices:
    if len(tensors) != N:
        raise ValueError(f"{len(tensors)} {name} have {N} gradients")
    if N == 0:
        return _Matrices()
    addresses = (c_void_p * N)(*[x.data_ptr() for x in tensors])
    return _Matrices(addresses, tensors[0].stride(0), DTYPES[tensors[0].dtype])


def _checked(x: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    if type(x) not in (Tensor, Parameter) or x.shape != shape or x.dtype != dtype or not x.is_cpu:
        found = f"{type(x).__name__} {tuple(x.shape)} in {x.dtype} on {x.device}"
        raise ValueError(f"expected a plain tensor {shape} in {dtype} on the CPU, not a {found}")
    return x


def _for_each(x: Number, N: int) -> list[float]:
    """The number of each of N matrices."""
    values = x.reshape(-1).tolist() if isinstance(x, Tensor) else [x]
    if len(values) not in (1, N):
        raise ValueError(f"{len(values)} numbers are not one for each of {N} matrices, or for all")
    return values * N if len(values) == 1 else values


def _index(places: range | Tensor, step: int) -> Tensor:
    """The lower 32 bits of places times `step`."""
    if isinstance(places, range):
        places = torch.arange(places.start, places.stop, dtype=torch.int64, device="cpu")
    return (places * step).to(torch.int32)
