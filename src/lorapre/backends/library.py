"""Compile, keep and load the C library, or say why that is not possible.

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
import warnings
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = (
    "-O3 -march=native -fopenmp -fPIC -shared -lm -fno-math-errno -fno-trapping-math "
    "-ffp-contract=fast -fno-strict-aliasing "
    "-fno-tree-loop-distribute-patterns"  # rows of a tile are too short for calls of memcpy
)
LIMIT = 180.0  # seconds for the compiler
WITHOUT = "does without compiled kernels, slower"

_loaded: Any = None


def prepare() -> str | None:
    """Load the library, compiled first where it is missing; return a warning, or None."""
    global _loaded
    _loaded, complaint = _library()
    return complaint


def loaded() -> Any:
    """The library, None where `prepare` has not loaded it."""
    return _loaded


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
    """The compiled kernels or None, and a warning or None."""
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        return None, f"{WITHOUT}: $CC is no command: {error}"
    made_of = repr((compiler, FLAGS, _processor(), SOURCE.read_bytes()))
    name = f"kernels-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    folder, complaint = _folder()
    try:
        if folder is not None and _is_sound(folder / name):
            return ctypes.CDLL(str(folder / name)), None
        return _compiled(compiler, folder, name), complaint
    except FileNotFoundError:
        reason = f"there is no C compiler {compiler[0]!r}: install one, or name one in $CC"
    except subprocess.TimeoutExpired:
        reason = f"the C compiler {compiler[0]!r} has not ended after {LIMIT:g} s"
    except subprocess.CalledProcessError as error:
        reason = f"the C compiler {compiler[0]!r} failed: {_complaint(error.stderr)}"
    except OSError as error:
        reason = f"the kernels that {compiler[0]!r} compiled cannot be kept or loaded: {error}"
    return None, f"{WITHOUT}: {reason}"


def _compiled(compiler: list[str], folder: Path | None, name: str) -> Any:
    """Compile, load and keep the library.

    It is moved into the folder once it is whole, so that no process ever loads half a file. Of
    several that compile at once the last one leaves its own.
    """
    with tempfile.TemporaryDirectory(prefix="lorapre-", dir=folder) as temporary:
        path = Path(temporary, name)
        path.touch()
        subprocess.run(
            [*compiler, str(SOURCE), *FLAGS.split(), "-o", str(path)],
            capture_output=True, check=True, timeout=LIMIT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        content = path.read_bytes()
        path.write_bytes(content + hashlib.sha256(content).digest())
        library = ctypes.CDLL(str(path))
        if folder is not None:
            path.replace(folder / name)
        return library  # which no longer needs the file


def _is_sound(path: Path) -> bool:
    """Whether the file ends with the hash of the rest of it, as `_compiled` left it."""
    content = path.read_bytes() if path.is_file() else b""
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _processor() -> str:
    """What the processor can, as far as the kernel tells: the library is compiled for it alone."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", "rb") as file:
        first = file.read(2**13).decode(errors="replace").split("\n\n")[0]  # of many alike
        telling = ("vendor_id", "cpu family", "model", "flags", "CPU ", "Features")
        return "\n".join(line for line in first.splitlines() if line.startswith(telling))
    return f"{platform.platform()} {platform.processor()}"


def _folder() -> tuple[Path | None, str | None]:
    """Where the library is kept; or None, and why: the folder is not this user's alone.

    What lies there is loaded: who can write it can run code here.
    """
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(os.environ.get("LORAPRE_CACHE") or Path(cache) / "lorapre")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if not os.access(folder, os.W_OK):
            reason = f"the folder {folder} cannot be written"
        elif found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            reason = f"the folder {folder} can be written by others"
        else:
            return folder, None
    except (OSError, RuntimeError, AttributeError) as error:  # no home, or no users
        reason = f"there is no folder to keep them in: {error}"
    return None, f"compiles its kernels anew in every process, in some seconds: {reason}"


def _complaint(message: bytes) -> str:
    """The first error among what a compiler prints."""
    lines = message.decode(errors="replace").strip().splitlines()
    return next(
        (line for line in lines if "error" in line), lines[0] if lines else "without a message"
    )
