"""Kernels for CPUs: what a step of Adam does with tiles of gradients, in C (cpu_kernels.c).

They are compiled on first use, in about a second, by the compiler that $CC names, or cc, for the processor at
hand, and kept under $LORAPRE_CACHE, or lorapre under $XDG_CACHE_HOME or ~/.cache. Optional: where `why_not`
gives a reason the caller takes torch's operations, which are the specification.

A tile is the same part (rows, columns) of n matrices. Everything is computed in float32 whatever the dtype,
and depends neither on the number of threads nor on which of them was first.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import math
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lorapre.operands import Dense, Factors, Matrices, Numbers, Split, addresses, stride

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = (
    "-O3 -march=native -fopenmp -fPIC -shared -lm -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-fno-tree-loop-distribute-patterns"  # rows of a tile are too short for calls of memcpy
)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FACTORS, DENSE, SPLIT = range(3)
GENERAL, LOWER, UPPER, SYMMETRIC = range(4)


class _Tile(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("count", "rows", "columns", "stride", "dtype", "threads")),
        ("data", c_void_p), ("finite", c_void_p), ("sign", c_float),
    )  # fmt: skip


class _Weights(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("stride", "dtype", "row0", "column0", "width")),
        ("keys", c_void_p), ("decay", c_void_p), ("lr", c_void_p), ("eps", c_float),
    )  # fmt: skip


class _Moment(ctypes.Structure):
    _fields_ = (
        ("kind", c_int64), ("rank", c_int64), ("B", c_void_p), ("A", c_void_p), ("B_stride", c_int64),
        ("A_stride", c_int64), ("keep", c_void_p), ("fresh", c_void_p), ("share", c_float),
        ("row", c_void_p), ("column", c_void_p),
    )  # fmt: skip


def why_not(weights: Matrices, grads: Matrices) -> str | None:
    """Why the kernels cannot take these tiles, for a warning, or None where they can."""
    for name, tensors in (("weight", weights), ("gradient", grads)):
        if any(type(x) not in (Tensor, Parameter) for x in tensors):
            return f"a {name} is a {type(tensors[0]).__name__}, not a plain tensor"
        if any(x.dtype not in DTYPES for x in tensors):
            return f"there is no kernel for {name}s in {tensors[0].dtype}"
        if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in tensors):
            return f"the rows of a {name} are not contiguous"
        if len({(stride(x), x.dtype) for x in tensors}) > 1:
            return f"the {name}s of a group differ in stride or dtype"
    library = _library()
    return library if isinstance(library, str) else None


def ready() -> bool:
    """Whether there is a compiler, and the kernels could be loaded."""
    return not isinstance(_library(), str)


def row_products(
    grads: Matrices, probe: Tensor, absolute: bool = False, *, sign: float = 1.0, finite: Tensor | None = None
) -> Tensor:
    """T A^T (n, rows, r).

    Args:
        grads: n tiles g (rows, columns), as `why_not` checks.
        probe: A (n, r, columns), float32; rounded to bfloat16 where the gradients are.
        absolute: whether T is |g|, not g.
        sign: -1 to maximise; multiplies g.
        finite: (n,), bool. Where False, g is taken as zero.
    """
    held: list[Any] = []
    tile, probe = _tile(grads, sign, finite, held), _rows(probe)
    r, library = probe.shape[1], _loaded()
    scratch = probe.new_empty(library.row_products_scratch(tile.count, tile.columns, r, tile.threads))
    out = probe.new_empty(tile.count, tile.rows, r)
    library.row_products(
        ctypes.byref(tile), _pointers([probe], held), stride(probe), r, int(absolute), out.data_ptr(),
        scratch.data_ptr(),
    )  # fmt: skip
    return out


def column_products(
    grads: Matrices, basis: Tensor, absolute: bool = False, *, sign: float = 1.0, finite: Tensor | None = None
) -> Tensor:
    """L^T T (n, r, columns); see `row_products`.

    Args:
        grads: n tiles g (rows, columns).
        basis: L^T (n, r, rows), float32, one of its strides 1; rounded as there.
        absolute: as there.
        sign: as there.
        finite: as there.
    """
    held: list[Any] = []
    tile, library, r = _tile(grads, sign, finite, held), _loaded(), basis.shape[1]
    size = library.column_products_scratch(tile.count, tile.rows, tile.dtype, r, tile.threads)
    scratch = basis.new_empty(size)
    out = basis.new_empty(tile.count, r, tile.columns)
    library.column_products(
        ctypes.byref(tile), _pointers([basis], held), basis.stride(2), basis.stride(1), r, int(absolute),
        out.data_ptr(), scratch.data_ptr(),
    )  # fmt: skip
    return out


def adam(
    weights: Matrices, grads: Matrices, first: Factors | Dense, second: Factors | Dense | Split, *,
    decay: Numbers, lr: Numbers, eps: float, sign: float = 1.0, finite: Tensor | None = None,
    keys: Tensor | None = None, origin: tuple[int, int] = (0, 0), width: int | None = None,
    sums: bool = False,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """The weights <- decay w - lr m / (sqrt(v) + eps), in place.

    Args:
        weights: n tiles (rows, columns), as `why_not` checks.
        grads: likewise.
        first: how m comes about, of the tile.
        second: how v does.
        decay: what w keeps, 1 - lr weight_decay.
        lr: the learning rate with all its factors.
        eps: as in Adam.
        sign: as in `row_products`.
        finite: (n,), bool. Where False, neither w nor a dense moment changes, and g counts as zero.
        keys: (n,), int64 in [0, 2**32): bfloat16 weights are rounded stochastically, with the bits of
            `lorapre.rounding`. None rounds to nearest.
        origin: row and column of the whole matrices at which the tiles lie; for `keys` only.
        width: columns of the whole matrices, those of the tile unless given; for `keys` only.
        sums: whether to return the sums of g**2 over each row (n, rows) and over each column (n, columns).
    """
    held: list[Any] = []
    tile, library = _tile(grads, sign, finite, held), _loaded()
    n, p, q = tile.count, tile.rows, tile.columns
    m, v = _moment(first, n, held), _moment(second, n, held)
    w = _Weights(
        _pointers(weights, held), stride(weights[0]), DTYPES[weights[0].dtype], *origin, width or q,
        None if keys is None else _pointer(keys.long().contiguous(), held),
        _vector(decay, n, held), _vector(lr, n, held), eps,
    )  # fmt: skip
    space = library.adam_scratch(n, p, q, tile.threads, int(sums))
    scratch = torch.empty(space)
    row_sums, column_sums = (torch.zeros(n, k) if sums else None for k in (p, q))
    library.adam(
        ctypes.byref(tile), ctypes.byref(w), ctypes.byref(m), ctypes.byref(v),
        None if row_sums is None else row_sums.data_ptr(),
        None if column_sums is None else column_sums.data_ptr(), scratch.data_ptr(),
    )  # fmt: skip
    return None if row_sums is None or column_sums is None else (row_sums, column_sums)


def products(X: Tensor, Y: Tensor, kind: int = GENERAL) -> Tensor:
    """X Y (n, a, c) of X (n, a, b) and Y (n, b, c), float32.

    Of `kind` LOWER X is lower, of UPPER Y upper triangular, of SYMMETRIC the product is symmetric.
    """
    (n, a, b), c, library, threads = X.shape, Y.shape[2], _loaded(), torch.get_num_threads()
    strides = (c_int64 * 6)(*X.stride(), *Y.stride())
    scratch, out = X.new_empty(library.products_scratch(threads)), X.new_empty(n, a, c)
    library.products(
        n, a, b, c, X.data_ptr(), ctypes.addressof(strides), Y.data_ptr(), ctypes.addressof(strides) + 24,
        kind, out.data_ptr(), threads, scratch.data_ptr(),
    )  # fmt: skip
    return out


def inverse_roots(G: Tensor) -> Tensor:
    """R (n, r, r), lower triangular, with R^T R = G^-1 of G (n, r, r), float32, positive definite.

    Where rounding has left nothing of a direction, its row of R is zero.
    """
    (n, r, _), threads, G = G.shape, torch.get_num_threads(), G.contiguous()
    R, scratch = torch.empty_like(G), G.new_empty(_loaded().roots_scratch(r, threads))
    _loaded().inverse_roots(n, r, G.data_ptr(), R.data_ptr(), threads, scratch.data_ptr())
    return R


def whitening(G: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """What `linalg._whitening` makes of G (n, r, r), float32: (n, r, r) and (n, r)."""
    (n, r, _), threads, G = G.shape, torch.get_num_threads(), G.contiguous()
    out, lengths = torch.empty_like(G), G.new_empty(n, r)
    scratch = G.new_empty(_loaded().roots_scratch(r, threads))
    _loaded().whitening(
        n, r, G.data_ptr(), shift, out.data_ptr(), lengths.data_ptr(), threads, scratch.data_ptr()
    )
    return out, lengths


def add_waves(A: Tensor, columns: slice, scale: float) -> Tensor:
    """A (n, r, columns), float32, plus `scale` times the rows that `linalg.waves` has for them."""
    A = _rows(A[..., columns])
    (n, r, q), threads = A.shape, torch.get_num_threads()
    out, turns = A.new_empty(n, r, q), A.new_empty(2 * r, dtype=torch.float64)
    strides = (c_int64 * 2)(*A.stride()[:2])
    _loaded().add_waves(
        n, r, q, A.data_ptr(), ctypes.addressof(strides), columns.start or 0, scale, out.data_ptr(), threads,
        turns.data_ptr(),
    )  # fmt: skip
    return out


def gauge_(B: Tensor, A: Tensor, before: Tensor | None) -> None:
    """`factors.gauge_` of B (n, p, r) and A (n, r, q), contiguous float32."""
    (n, p, r), q, threads = B.shape, A.shape[-1], torch.get_num_threads()
    scratch = A.new_empty(_loaded().gauge_scratch(n, r * q), dtype=torch.float64)
    held: list[Any] = []
    old = None if before is None else _pointer(before.contiguous(), held)
    _loaded().gauge(
        n, p * r, r * q, math.sqrt(r), B.data_ptr(), A.data_ptr(), old, q + 1, threads, scratch.data_ptr()
    )


# What a pointer points to has to live until the call: that is what the lists `held` are for.


def _tile(grads: Matrices, sign: float, finite: Tensor | None, held: list[Any]) -> _Tile:
    return _Tile(
        len(grads), *grads[0].shape, stride(grads[0]), DTYPES[grads[0].dtype], torch.get_num_threads(),
        _pointers(grads, held), None if finite is None else _pointer(finite.contiguous(), held), sign,
    )  # fmt: skip


def _moment(moment: Factors | Dense | Split, n: int, held: list[Any]) -> _Moment:
    if isinstance(moment, Dense):
        return _Moment(
            DENSE, 0, _pointers(moment.ema, held), None, stride(moment.ema[0]), 0,
            _vector(moment.correction, n, held), None, 1 - moment.beta, None, None,
        )  # fmt: skip
    split = isinstance(moment, Split)
    (B,), (A,) = (moment.C, moment.W) if isinstance(moment, Split) else (moment.B, moment.A)
    B, A = _rows(B), _rows(A)
    vectors = (x if x is None else _pointers([x[:, None]], held) for x in (moment.row, moment.column))
    return _Moment(
        SPLIT if split else FACTORS, B.shape[-1], _pointers([B], held), _pointers([A], held), stride(B),
        stride(A), _vector(moment.keep, n, held), _vector(moment.fresh, n, held),
        moment.share if isinstance(moment, Split) else 0.0, *vectors,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """With contiguous rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pointer(x: Tensor, held: list[Any]) -> int:
    held.append(x)
    return x.data_ptr()


def _pointers(tensors: Matrices, held: list[Any]) -> int:
    """The address of an array of the addresses of matrices."""
    starts = addresses(tensors)
    array = (c_int64 * len(starts))(*starts)
    held += [tensors, array]
    return ctypes.addressof(array)


def _vector(x: Numbers, n: int, held: list[Any]) -> int:
    """The address of n float32 numbers."""
    if isinstance(x, Tensor):
        return _pointer(x.to(torch.float32).reshape(-1).expand(n).contiguous(), held)
    held.append((c_float * n)(*[x] * n))
    return ctypes.addressof(held[-1])


def _loaded() -> Any:
    library = _library()
    assert not isinstance(library, str), library
    return library


@functools.cache
def _library() -> Any:
    """The compiled kernels, or why there are none."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        # What the compiler defines names its version and, with -march=native, all that the processor can.
        asked = [*compiler, *FLAGS.split(), "-dM", "-E", "-x", "c", os.devnull]
        defined = subprocess.run(asked, capture_output=True, check=True).stdout
        made_of = repr((compiler, FLAGS, defined, SOURCE.read_bytes()))
        path = _folder() / f"cpu_kernels-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except FileNotFoundError:
        return f"there is no C compiler {compiler[0]!r}: install one, or name one in $CC"
    except subprocess.CalledProcessError as error:
        return f"the C compiler {compiler[0]!r} failed: {_complaint(error.stderr)}"
    except OSError as error:
        return f"the kernels that {compiler[0]!r} compiled cannot be kept or loaded: {error}"
    for name, arguments in {
        "row_products_scratch": [c_int64] * 4,
        "column_products_scratch": [c_int64] * 5,
        "adam_scratch": [c_int64] * 5,
        "products_scratch": [c_int64],
        "roots_scratch": [c_int64] * 2,
        "gauge_scratch": [c_int64] * 2,
    }.items():
        getattr(library, name).argtypes, getattr(library, name).restype = arguments, c_int64
    library.row_products.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p]
    library.column_products.argtypes = [
        c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p
    ]  # fmt: skip
    library.adam.argtypes = [c_void_p] * 7
    library.inverse_roots.argtypes = [c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p]
    library.whitening.argtypes = [c_int64, c_int64, c_void_p, c_float, *[c_void_p] * 2, c_int64, c_void_p]
    library.add_waves.argtypes = [
        *[c_int64] * 3, c_void_p, c_void_p, c_int64, c_float, c_void_p, c_int64, c_void_p
    ]  # fmt: skip
    library.gauge.argtypes = [*[c_int64] * 3, c_float, *[c_void_p] * 3, *[c_int64] * 2, c_void_p]
    library.products.argtypes = [
        *[c_int64] * 4, *[c_void_p] * 4, c_int64, c_void_p, c_int64, c_void_p
    ]  # fmt: skip
    return library


def _compile(compiler: list[str], path: Path) -> None:
    """Under another name first: processes that compile at the same time must not load half a file."""
    descriptor, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(descriptor)
    try:
        command = [*compiler, str(SOURCE), *FLAGS.split(), "-o", name]
        subprocess.run(command, capture_output=True, check=True)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _folder() -> Path:
    """Where compiled kernels are kept; a folder that this process removes where that is not its user's alone.

    What lies there is loaded: who can write it can run code here.
    """
    with contextlib.suppress(OSError, RuntimeError, AttributeError):  # no home, or no users
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(os.environ.get("LORAPRE_CACHE") or Path(cache) / "lorapre")
        folder.mkdir(parents=True, exist_ok=True)
        owned = folder.stat()
        if os.access(folder, os.W_OK) and owned.st_uid == os.getuid() and not owned.st_mode & stat.S_IWOTH:
            return folder
    folder = Path(tempfile.mkdtemp(prefix="lorapre-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _complaint(message: bytes) -> str:
    """The first error among what a compiler prints."""
    lines = message.decode(errors="replace").strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "without a message")
