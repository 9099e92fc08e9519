"""The compiled C library, and the products that `lorapre.linalg` takes from it.

`kernels.c` is compiled once for each machine and user, in some seconds, by the compiler that $CC
names, or cc. The library is kept under $LORAPRE_CACHE, or lorapre under $XDG_CACHE_HOME or
~/.cache. It is optional: without it torch's operations do the same, slower.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = (
    "-O3 -march=native -fopenmp -fPIC -shared -lm -fno-math-errno -fno-trapping-math "
    "-ffp-contract=fast "
    "-fno-strict-aliasing "
    "-fno-tree-loop-distribute-patterns"  # rows of a tile are too short for calls of memcpy
)
LIMIT = 60.0  # seconds for the compiler, and for one of another process
WITHOUT = "does without compiled kernels, slower"
LEAST = 2**18  # multiplications that are worth a call
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # their numbers in kernels.c

_loaded: Any = None


class Matrices(ctypes.Structure):
    """The struct of the same name: the address of an array of addresses, strides in elements."""

    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("row", "column", "dtype", "absolute")),
    )  # fmt: skip


def prepare() -> str | None:
    """Load the library, compiled where it is missing; what is amiss, for a warning, or None."""
    global _loaded
    _loaded, complaint = _library()
    return complaint


def loaded() -> Any:
    """The library, None where `prepare` has not loaded it."""
    return _loaded


def takes(X: Tensor, operations: int) -> bool:
    """Whether the library is there, and so many multiplications are worth a call."""
    return (
        operations >= LEAST
        and not torch.compiler.is_compiling()
        and _loaded is not None
        and type(X) is Tensor
        and X.dtype == torch.float32
        and X.is_cpu
        and X.ndim == 3
    )


def products(X: Tensor, Y: Tensor) -> Tensor:
    """X Y (N, a, c) of X (N, a, b), which the library `takes`, and Y (N, b, c)."""
    if not (
        type(Y) is Tensor
        and Y.dtype == torch.float32
        and Y.is_cpu
        and Y.ndim == 3
        and len(X) == len(Y)
    ):
        return X @ Y
    (N, a, b), c = X.shape, Y.shape[2]
    if Y.shape[1] != b:
        raise ValueError(f"cannot multiply {tuple(X.shape)} by {tuple(Y.shape)}")
    out, matrices = X.new_empty(N, a, c), [*_addresses(X), *_addresses(Y)]
    left, right = (Matrices(0, *x.stride()[1:], 0, 0) for x in (X, Y))
    array = (c_int64 * len(matrices))(*matrices)
    left.data, right.data = ctypes.addressof(array), ctypes.addressof(array) + 8 * N
    _loaded.products(
        N,
        a,
        b,
        c,
        ctypes.byref(left),
        ctypes.byref(right),
        None,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def inverse_roots(G: Tensor) -> Tensor:
    """R (N, r, r), lower triangular, with R^T R = G^-1 of positive definite G.

    Where rounding has left nothing of a direction, its row of R is zero.
    """
    if G.shape[1] != G.shape[2]:
        raise ValueError(f"{tuple(G.shape)} are no square matrices")
    U = G.clone(memory_format=torch.contiguous_format)
    R = torch.zeros_like(U)
    _loaded.inverse_roots(len(U), U.shape[1], U.data_ptr(), R.data_ptr(), torch.get_num_threads())
    return R


def _addresses(x: Tensor) -> list[int]:
    first, step = x.data_ptr(), x.stride(0) * x.element_size()
    return [first + n * step for n in range(len(x))]


def warn(message: str) -> None:
    """Warn in the name of the line outside of lorapre and torch that called them."""
    inside = tuple(
        f"{Path(file).parent}{os.sep}" for file in (Path(__file__).parent, torch.__file__)
    )
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


@functools.cache
def _library() -> tuple[Any, str | None]:
    """The compiled kernels, or None; and what is amiss."""
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        return None, f"{WITHOUT}: $CC is no command: {error}"
    made_of = repr((compiler, FLAGS, _processor(), SOURCE.read_bytes()))
    name = f"kernels-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    try:
        folder = _folder()
        if isinstance(folder, str):  # the file may go once it is loaded
            with tempfile.TemporaryDirectory(prefix="lorapre-") as temporary:
                library = _load(_compiled(compiler, Path(temporary), name))
            return library, f"compiles its kernels anew in every process, in some seconds: {folder}"
        path = _kept(folder, name)
        if path is None:
            with _alone(folder):
                path = _kept(folder, name) or _compiled(compiler, folder, name)
        return _load(path), None
    except FileNotFoundError:
        reason = f"there is no C compiler {compiler[0]!r}: install one, or name one in $CC"
    except subprocess.TimeoutExpired:
        reason = f"the C compiler {compiler[0]!r} has not ended after {LIMIT:g} s"
    except subprocess.CalledProcessError as error:
        reason = f"the C compiler {compiler[0]!r} failed: {_complaint(error.stderr)}"
    except OSError as error:
        reason = f"the kernels that {compiler[0]!r} compiled cannot be kept or loaded: {error}"
    return None, f"{WITHOUT}: {reason}"


def _load(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    library.products.argtypes = [*[c_int64] * 4, *[c_void_p] * 4, c_int64]
    library.inverse_roots.argtypes = [*[c_int64] * 2, *[c_void_p] * 2, c_int64]
    library.step.argtypes = [c_void_p]
    for function in (library.products, library.inverse_roots, library.step):
        function.restype = None
    return library


def _processor() -> str:
    """What the processor can, as far as the kernel tells: the library is compiled for it alone."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", "rb") as file:
        first = file.read(2**13).decode(errors="replace").split("\n\n")[0]  # of many alike
        telling = ("vendor_id", "cpu family", "model", "flags", "CPU ", "Features")
        return "\n".join(line for line in first.splitlines() if line.startswith(telling))
    return f"{platform.platform()} {platform.processor()}"


def _kept(folder: Path, name: str) -> Path | None:
    """The library compiled before, whose name ends with its hash; a damaged one is removed."""
    for path in folder.glob(f"{name}-*.so"):
        if path.name == _named(name, path.read_bytes()):
            return path
        path.unlink(missing_ok=True)
    return None


def _named(name: str, content: bytes) -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _compiled(compiler: list[str], folder: Path, name: str) -> Path:
    """Compile under another name first: a process must not load half a file."""
    descriptor, temporary = tempfile.mkstemp(suffix=".tmp", dir=folder)
    os.close(descriptor)
    try:
        command = [*compiler, str(SOURCE), *FLAGS.split(), "-o", temporary]
        subprocess.run(
            command, capture_output=True, check=True, timeout=LIMIT, stdin=subprocess.DEVNULL
        )
        path = folder / _named(name, Path(temporary).read_bytes())
        os.replace(temporary, path)
        return path
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder, or go on without it once a compiler must have ended.

    The system unlocks what a process has locked that dies.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def _folder() -> Path | str:
    """Where the library is kept, or why it is kept nowhere: the folder is not this user's alone.

    What lies there is loaded: who can write it can run code here.
    """
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(os.environ.get("LORAPRE_CACHE") or Path(cache) / "lorapre")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if not os.access(folder, os.W_OK):
            return f"the folder {folder} cannot be written"
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"the folder {folder} can be written by others"
        return folder
    except (OSError, RuntimeError, AttributeError) as error:  # no home, or no users
        return f"there is no folder to keep them in: {error}"


def _complaint(message: bytes) -> str:
    """The first error among what a compiler prints."""
    lines = message.decode(errors="replace").strip().splitlines()
    return next(
        (line for line in lines if "error" in line), lines[0] if lines else "without a message"
    )
