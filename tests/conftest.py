"""Settings that every test shares."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # for the counter of allocations in it

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # set before torch is imported: its profiler prints to stderr

import torch

from lorapre.gradient import Gradient

# Set before Triton is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Results must not depend on how many cores a machine has, and xdist runs one worker per core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state and precision, alone or in the suite."""
    torch.manual_seed(0)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # a Trainer in bfloat16 sets it and leaves it


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """Take imported modules out of garbage collection, which transformers' Trainer starts in every run."""
    gc.freeze()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tokenizers and token files in a folder of the test session, not in the user's cache."""
    monkeypatch.setenv("LORAPRE_CACHE", str(tmp_path_factory.getbasetemp() / "lorapre-cache"))


@pytest.fixture
def compiler() -> None:
    """Skip the test if there is no C compiler. Fail it if the kernels do not compile."""
    from lorapre.backends import library

    reason = library.prepare()
    if reason is not None and "there is no C compiler" in reason:
        pytest.skip(reason)
    assert reason is None, reason


@pytest.fixture
def torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step as on other devices: without the kernels for CPUs, and without branches on values."""
    monkeypatch.setattr("lorapre.batch.backend", lambda *_, **__: (Gradient, None))
    monkeypatch.setattr("lorapre.linalg.at_hand", lambda _: False)
    monkeypatch.setattr("lorapre.gradient.at_hand", lambda _: False)


@pytest.fixture(params=["compiler", "torch_operations"], ids=["compiled", "torch"])
def arithmetic(request: pytest.FixtureRequest) -> None:
    """Run the test twice: with the kernels for CPUs, and with torch's operations instead."""
    request.getfixturevalue(request.param)


@pytest.fixture
def lorapre(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line: (exit code, stdout, stderr)."""
    from lorapre_recipes import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["lorapre", *map(str, arguments)])
        code = cli.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run
