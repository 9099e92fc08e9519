"""`lorapre pretrain` on several processes of one CPU: losses, sharded checkpoints, and processes that die."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from lorapre_recipes.config import UserError
from lorapre_recipes.train import distributed
from lorapre_recipes.train.pretrain import pretrain
from lorapre_recipes.train.session import check_machine
from recipes_main import tiny
from tiny_runs import Interrupt, losses, write_corpus

ROOT = Path(__file__).parent.parent
MAIN = str(Path(__file__).parent / "recipes_main.py")
SECONDS = 1800  # a hang is a failure, a busy machine is none

# The last bit of a float32 loss is 1.2e-7 of it; sums in another order differ in the last few bits.
ROUNDING = dict(rel=3e-6)

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder)
    return folder


def launch(
    launcher: list[str], *arguments: object, folder: Path, kill: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "LORAPRE_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore:TypedStorage is deprecated",  # of torch 2.9 in its own checkpoints
    }
    if kill is not None:
        environment["LORAPRE_TEST_KILL"] = kill
    return subprocess.run(
        [*launcher, MAIN, "pretrain", *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip


def torchrun(processes: int) -> list[str]:
    return [*TORCHRUN, f"--nproc-per-node={processes}"]


def begin(launcher: list[str], out: str, *more: str, folder: Path, kill: str | None = None) -> Any:
    arguments = ("--preset", "tiny", "--data", "corpus.jsonl", "--out", out, *more)
    return launch(launcher, *arguments, folder=folder, kill=kill)


def assert_same_up_to_rounding(run: Path, other: Path) -> None:
    rows, others = losses(run), losses(other)
    assert len(rows) == len(others) == 15
    for row, expected in zip(rows, others, strict=True):
        assert row.pop("grad_norm", 0.0) == pytest.approx(expected.pop("grad_norm", 0.0), rel=1e-4)
        assert row == pytest.approx(expected, **ROUNDING)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The run on one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPRE_CACHE", str(folder / "cache"))
        pretrain(tiny(data=str(folder / "corpus.jsonl")), folder / "alone")
    return folder / "alone"


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*"))


def assert_quiet_and_done(done: subprocess.CompletedProcess[str], run: str) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"Run folder: {run}") == 1  # by one process
    assert "Warning" not in done.stderr


def assert_died_clearly(done: subprocess.CompletedProcess[str], victim: int) -> None:
    assert done.returncode == 1
    assert "(SIGKILL)" in done.stderr  # torchrun names who died
    for rank in {0, 1} - {victim}:  # the others say so, unless torchrun was faster to end them
        said = f"lorapre pretrain: rank {rank} lost contact with another process" in done.stderr
        assert said or "closing signal SIGTERM" in done.stderr
    assert 'Traceback (most recent call last):\n  File "' + MAIN not in done.stderr


def test_killed_in_a_checkpoint_and_in_a_step_then_resumed(alone: Path, folder: Path) -> None:
    whole = folder / "whole"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    accelerate += ["--config_file", str(ROOT / "configs" / "fsdp2.yaml")]
    done = begin(accelerate, "whole", folder=folder)
    assert_quiet_and_done(done, "whole")
    assert done.stdout.count("validation perplexity") == 4  # three evaluations and the table, once each
    assert_same_up_to_rounding(whole, alone)
    one, two = (json.loads((run / "summary.json").read_text()) for run in (alone, whole))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["tokens"] == one["tokens"] == 12 * 6 * 16
    assert two["parameters"] == one["parameters"]
    assert two["state_bytes"] < 0.7 * one["state_bytes"]  # of one process
    assert two["adamw_state_bytes"] < 0.6 * one["adamw_state_bytes"]
    assert json.loads((whole / "config.json").read_text())["fsdp"] is True
    assert (whole / "command.txt").read_text().endswith("# 2 processes\n")
    assert "q_proj" in (whole / "coverage.txt").read_text()
    assert checkpoints(whole) == [8, 12]

    run = folder / "cut"
    done = begin(torchrun(2), "cut", "--fsdp", folder=folder, kill="0 checkpoint 8")
    assert_died_clearly(done, victim=0)
    assert checkpoints(run) == [4]
    assert (run / "partial" / "checkpoint-8" / "pytorch_model_fsdp_0" / ".metadata").is_file()
    assert not (run / "partial" / "checkpoint-8" / "optimizer_0" / ".metadata").exists()

    done = launch(torchrun(2), "--resume", "cut", folder=folder, kill="1 step 11")
    assert "goes on from cut/checkpoint-4" in done.stderr
    assert_died_clearly(done, victim=1)
    assert checkpoints(run) == [4, 8]
    assert not (run / "partial").exists()
    assert losses(run)[-1]["step"] == 10

    assert_quiet_and_done(launch(torchrun(2), "--resume", "cut", folder=folder), "cut")
    assert losses(run) == losses(whole)  # exactly
    assert checkpoints(run) == [8, 12]


def test_two_processes_then_three_then_one(alone: Path, folder: Path) -> None:
    run = folder / "moved"
    assert_died_clearly(begin(torchrun(2), "moved", "--fsdp", folder=folder, kill="1 step 6"), victim=1)
    assert checkpoints(run) == [4]
    launch(torchrun(3), "--resume", "moved", folder=folder, kill="2 step 10")
    assert checkpoints(run) == [4, 8]
    assert len(list((run / "checkpoint-8" / "optimizer_0").glob("*.distcp"))) == 3
    assert_quiet_and_done(launch(torchrun(1), "--resume", "moved", folder=folder), "moved")
    assert_same_up_to_rounding(run, alone)


def test_a_signal_to_one_process_ends_all_with_a_checkpoint(folder: Path) -> None:
    run = folder / "stopped"
    done = begin(torchrun(2), "stopped", "--fsdp", folder=folder, kill="1 interrupt 6")
    assert done.returncode == 1
    assert done.stderr.count("interrupted; go on with: torchrun --nproc-per-node N") == 1
    assert checkpoints(run) == [4, 6]
    assert losses(run)[-1]["step"] == 6


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="on the CPU, older transformers load an optimizer onto cpu:0, which torch refuses",
)
def test_without_fsdp_one_process_then_two(alone: Path, folder: Path) -> None:
    run = folder / "copies"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPRE_CACHE", str(folder / "cache"))
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(data=str(folder / "corpus.jsonl")), run, callbacks=[Interrupt(step=6)])
    assert_quiet_and_done(launch(torchrun(2), "--resume", "copies", folder=folder), "copies")
    assert_same_up_to_rounding(run, alone)
    one, two = (json.loads((path / "summary.json").read_text()) for path in (alone, run))
    assert two["state_bytes"] == one["state_bytes"]  # a copy on each
    assert (run / "checkpoint-12" / "model.safetensors").is_file()


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^--fsdp: start it with torchrun"):
        check_machine(tiny(fsdp=True))
    monkeypatch.setattr(distributed, "processes", lambda: 4)
    with pytest.raises(UserError, match=r"^--batch-size 6: 4 processes cannot share it evenly"):
        check_machine(tiny())


def test_which_errors_are_lost_contact(monkeypatch: pytest.MonkeyPatch) -> None:
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    assert not distributed.is_lost_contact(gloo)  # nobody to lose
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    assert distributed.is_lost_contact(gloo)
    assert distributed.is_lost_contact(torch.distributed.DistBackendError("NCCL"))
    assert not distributed.is_lost_contact(RuntimeError("shapes do not match"))
