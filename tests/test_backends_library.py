"""The compiled library: where it is kept, and the warnings and steps without one."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorapre import LoRAPreAdamW, LoRAPreMuon
from lorapre.backends import library
from lorapre.backends.library import _library as find


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Start as a new process with an empty cache does."""
    monkeypatch.setenv("LORAPRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(library, "_loaded", None)
    find.cache_clear()
    yield
    find.cache_clear()


@pytest.fixture
def cc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Use a script as the compiler."""

    def write(script: str) -> Path:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CC", str(path))
        return path

    return write


def said(make: type[Any] = LoRAPreAdamW, steps: int = 2) -> list[str]:
    """The warnings of an optimizer while it is made and steps. They must point to a line of this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weight = nn.Parameter(torch.ones(30, 40))
        optimizer = make([weight], rank=4)
        for _ in range(steps):
            weight.grad = torch.ones(30, 40)
            optimizer.step()
    assert weight.isfinite().all()
    assert steps == 0 or (weight < 1).all()
    assert {x.filename for x in caught} <= {__file__}
    return [str(x.message) for x in caught]


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


# --- no compiler


@pytest.mark.parametrize("make", [LoRAPreAdamW, LoRAPreMuon])
def test_without_a_compiler_each_optimizer_says_it_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    expected = [
        f"{make.__name__} does without compiled kernels, slower: there is no C compiler 'no-such-compiler': "
        "install one, or name one in $CC"
    ]
    assert said(make) == expected
    assert said(make) == expected
    assert library.loaded() is None


def test_a_compiler_that_fails_is_quoted(cc: Callable[[str], Path], tmp_path: Path) -> None:
    path = cc("echo note >&2; echo 'kernels.c:1: error: not today' >&2; exit 1")
    (message,) = said()
    assert message.endswith(f"the C compiler '{path}' failed: kernels.c:1: error: not today")
    assert kept(tmp_path) == []


def test_a_compiler_that_fails_in_silence(cc: Callable[[str], Path]) -> None:
    path = cc("exit 3")
    (message,) = said()
    assert message.endswith(f"the C compiler '{path}' failed: without a message")


def test_a_compiler_that_hangs_is_left(
    cc: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = cc("exec sleep 600")
    monkeypatch.setattr(library, "LIMIT", 0.2)
    (message,) = said()
    assert message.endswith(f"the C compiler '{path}' has not ended after 0.2 s")
    assert kept(tmp_path) == []


def test_a_compiler_that_makes_no_library(cc: Callable[[str], Path], tmp_path: Path) -> None:
    path = cc("exit 0")
    (message,) = said()
    assert f"the kernels that '{path}' compiled cannot be kept or loaded: " in message
    assert kept(tmp_path) == []


def test_a_command_with_an_open_quote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc 'oops")
    (message,) = said()
    assert message.endswith("$CC is no command: No closing quotation")


def test_float64_on_other_devices_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoRAPreAdamW([nn.Parameter(torch.ones(30, 40, device="meta"))], rank=4)


@pytest.mark.parametrize("way", ["pickled", "copied"])
def test_a_copy_of_an_optimizer_says_it_too(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(UserWarning, match="no-such-compiler"):
        optimizer = LoRAPreAdamW([nn.Parameter(torch.ones(30, 40))], rank=4)
    with pytest.warns(UserWarning, match="no-such-compiler") as caught:
        other = copy.deepcopy(optimizer) if way == "copied" else pickle.loads(pickle.dumps(optimizer))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.step()


# --- where it is kept


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled library, for fake compilers that copy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPRE_CACHE", str(tmp_path_factory.getbasetemp() / "lorapre-cache"))
        find.cache_clear()
        reason = library.prepare()
    if reason is not None and "there is no C compiler" in reason:
        pytest.skip(reason)
    assert reason is None, reason
    (path,) = (tmp_path_factory.getbasetemp() / "lorapre-cache").glob("kernels-*.so")
    return path


class TestKept:
    """How the compiled library is kept. The compiler is a command that copies a finished one."""

    @pytest.fixture(autouse=True)
    def quick_cc(self, compiled: Path, anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A `cc` that counts its calls."""
        path = tmp_path / "bin" / "cc"
        path.parent.mkdir()
        copies = f"for last; do :; done\necho >> {tmp_path}/calls\nsleep 0.5\nexec cp {compiled} $last\n"
        path.write_text(f"#!/bin/sh\n{copies}")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")

    def test_one_file_that_is_not_made_again(self, tmp_path: Path) -> None:
        assert said() == []
        assert library.loaded() is not None
        before = [(path, path.stat().st_mtime_ns) for path in kept(tmp_path)]
        find.cache_clear()
        assert said() == []
        assert [(path, path.stat().st_mtime_ns) for path in kept(tmp_path)] == before
        assert len(before) == 1
        assert (tmp_path / "calls").read_text() == "\n"

    @pytest.mark.parametrize("command", ["", "   ", "\t"])
    def test_a_blank_command_is_cc(
        self, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CC", command)
        assert said(steps=0) == []
        assert len(kept(tmp_path)) == 1

    def test_a_copy_of_an_optimizer_loads_it(self) -> None:
        optimizer = LoRAPreAdamW([nn.Parameter(torch.ones(30, 40))], rank=4)
        data = pickle.dumps(optimizer)
        library._loaded = None  # as if in another process
        pickle.loads(data)
        assert library.loaded() is not None

    @pytest.mark.parametrize("damage", ["empty", "truncated", "another"])
    def test_a_damaged_library_is_compiled_anew(self, damage: str, tmp_path: Path) -> None:
        said(steps=0)
        find.cache_clear()
        (path,) = kept(tmp_path)
        content = path.read_bytes()
        path.unlink()  # this process has it mapped
        path.write_bytes({"empty": b"", "truncated": content[:5000], "another": content[::-1]}[damage])
        assert said() == []
        assert library.loaded() is not None
        assert [x.stat().st_size > 5000 for x in kept(tmp_path)] == [True]

    def test_another_source_is_another_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = tmp_path / "kernels.c"
        source.write_text(library.SOURCE.read_text() + "\n/* changed */\n")
        assert said(steps=0) == []
        find.cache_clear()
        monkeypatch.setattr(library, "SOURCE", source)
        assert said(steps=0) == []
        assert len(kept(tmp_path)) == 2

    def test_a_cache_that_others_can_write_is_not_loaded_from(self, tmp_path: Path) -> None:
        folder = tmp_path / "cache"
        folder.mkdir()
        folder.chmod(0o777)
        expected = [
            "LoRAPreAdamW compiles its kernels anew in every process, in some seconds: "
            f"the folder {folder} can be written by others"
        ]
        assert said() == expected
        assert said(steps=0) == expected
        assert library.loaded() is not None
        assert kept(tmp_path) == []

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder, access = tmp_path / "cache", os.access  # a mode would not stop root from writing
        monkeypatch.setattr(os, "access", lambda path, mode: path != folder and access(path, mode))
        (message,) = said()
        assert message.endswith(f"the folder {folder} cannot be written")
        assert library.loaded() is not None

    @pytest.mark.parametrize("name", ["LORAPRE_CACHE", "XDG_CACHE_HOME"])
    def test_a_cache_that_cannot_be_made(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.delenv("LORAPRE_CACHE")
        monkeypatch.setenv(name, str(tmp_path / "file" / "cache"))
        (message,) = said()
        assert "anew in every process, in some seconds: there is no folder to keep them in: " in message
        assert library.loaded() is not None

    def test_processes_that_compile_at_once_leave_one_library(self, tmp_path: Path) -> None:
        environment = {**os.environ, "LORAPRE_CACHE": str(tmp_path / "shared")}
        program = """
            import torch, warnings
            from lorapre import LoRAPreAdamW
            from lorapre.backends import library
            warnings.simplefilter("error")
            LoRAPreAdamW([torch.nn.Parameter(torch.ones(3, 4))], rank=1)
            assert library.loaded() is not None
        """
        command = [sys.executable, "-c", textwrap.dedent(program)]
        processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
        assert [process.wait() for process in processes] == [0, 0]
        (path,) = (tmp_path / "shared").iterdir()
        calls = (tmp_path / "calls").read_text()
        subprocess.run(command, env=environment, check=True)
        assert list((tmp_path / "shared").iterdir()) == [path]
        assert (tmp_path / "calls").read_text() == calls


def test_a_warning_names_the_line_that_called() -> None:
    with pytest.warns(UserWarning, match="here") as caught:
        library.warn("here")
    assert caught[0].filename == __file__
