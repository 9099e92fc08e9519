"""`benchmarks/finetuning.py --real --tiny`: contenders run, rates are searched, a second one goes on."""

import importlib
import json
import os
import pickle
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PROBLEMS = [
    {
        "question": f"Ida reads {pages} pages on each of 5 days. How many pages is that?",
        "answer": f"She reads {pages}*5 = <<{pages}*5={5 * pages}>>{5 * pages} pages.\n#### {5 * pages}",
    }
    for pages in range(2, 40)
]
SCORES = ("exact_match", "test_loss", "general_loss", "own_loss")
COLUMNS = (
    *SCORES,
    "loss",
    "state_bytes",
    "adapter_bytes",
    "peak_bytes",
    "step_seconds",
)

Start = Callable[..., tuple[list[dict[str, Any]], str]]


def here(function: Any, *arguments: Any) -> int:
    """In this process, which is quicker. What goes to a new one must survive pickling."""
    function, *arguments = pickle.loads(pickle.dumps((function, *arguments)))
    function(*arguments)
    return 0


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, without new processes."""
    module = importlib.import_module("real_model")
    monkeypatch.setattr(module, "apart", here)
    return module


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Start the benchmark: (the rows of the results, what it prints)."""
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    monkeypatch.setenv("COLUMNS", "120")

    def run(seeds: int, *more: str) -> tuple[list[dict[str, Any]], str]:
        options = ("--real", str(file), "--tiny", "--steps", "4", "--seeds", str(seeds), "--test", "2")
        app = importlib.import_module("finetuning").app
        app([str(tmp_path / "out"), *options, *more], result_action="return_value", exit_on_error=False)
        lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], capsys.readouterr().out

    return run


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_every_contender_runs_and_a_second_start_goes_on(
    real: Any, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_rate = {name: contender | {"lrs": (1e-3,)} for name, contender in real.CONTENDERS.items()}
    monkeypatch.setattr(real, "CONTENDERS", one_rate)
    monkeypatch.setattr(real, "MORE_RATES", 0)
    rows, printed = start(1)
    names, count = [row["name"] for row in rows], 1 + len(one_rate)
    assert names[:count] == ["before", *one_rate]
    ends, beta1 = names[count : count + 2], names[count + 2 :]
    assert ends == [f"{name}, low-rank ends" for name in (real.SMALLEST, real.NO_MOMENTUM)]
    without = ("RACS", "Adafactor", real.NO_MOMENTUM, "LoRA-Pre Muon, rank 8", "LoRA-Pre Muon, rank 64")
    losses = {row["name"]: row["loss"] for row in rows[1:count] if row["name"] not in without}
    ranking = sorted(losses, key=losses.__getitem__)
    tried = [name for place, name in enumerate(ranking) if place < 2 or name == "AdamW"]
    assert beta1 == [f"{name}, beta1 0.8" for name in tried]
    assert all(row[column] >= 0 for row in rows[1:] for column in COLUMNS)
    assert {row["problems"] for row in rows} == {2}
    assert all(name in printed for name in one_rate)
    state = {row["name"]: row["state_bytes"] for row in rows[1:]}
    assert state["LoRA-Pre Adam, rank 8, low-rank ends"] < state["LoRA-Pre Adam, rank 8"]
    assert state[real.NO_MOMENTUM] < state["LoRA-Pre Adam, rank 8"]
    assert state["LoRA-Pre Adam, rank 8"] < state["LoRA-Pre Adam, rank 64"] < state["AdamW"]
    assert state["LoRA-FA"] < state["LoRA"] < state["DoRA"]
    assert state["RACS"] < state["LoRA-Pre Muon, rank 8"]
    out = tmp_path / "out"
    assert len((out / "train.jsonl").read_text().splitlines()) == len(PROBLEMS) - 2
    assert (out / "finetuning.png").stat().st_size > 10_000

    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))  # cut off
    again, _ = start(1)
    assert again[:-1] == rows[:-1]
    assert again[-1]["loss"] == rows[-1]["loss"]
    assert start(1, "--only", "RACS")[0] == again  # though others, which are left out, lead
    with pytest.raises(SystemExit, match="--only Lion: in no name of LoRA-Pre Adam"):
        start(1, "--only", "Lion")


def test_rates_go_beyond_the_edge_and_a_failed_run_is_a_row(
    real: Any, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses made up: the least lies at a rate of 0.003, and one run ends early."""
    ran: list[float] = []

    def fails_at(function: Any, config: Any, folder: Path, *rest: Any) -> int:
        ran.append(config.lr)
        folder.mkdir()
        made = dict.fromkeys(("loss_before", "state_bytes", "adapter_bytes", "peak_bytes", "tokens"), 1)
        loss = abs(config.lr - 3e-3)
        (folder / "summary.json").write_text(
            json.dumps({"validation_loss": loss, "step_seconds": 1.0} | made)
        )
        return 1 if config.lr == 3e-4 else 0

    monkeypatch.setattr(real, "apart", fails_at)
    monkeypatch.setattr(real, "scores", lambda *_: dict.fromkeys(SCORES, 0.0) | {"problems": 2})
    monkeypatch.setattr(real, "CONTENDERS", {"AdamW": {"method": "adamw", "lrs": (1e-4, 3e-4, 1e-3)}})
    monkeypatch.setattr(real, "for_beta1", lambda *_: [])
    rows, printed = start(2)
    assert ran == [1e-4, 3e-4, 1e-3, 3e-3, 9e-3, 3e-3]  # the last: the second seed of the best
    assert [row["lr"] for row in rows if row.get("failed")] == [3e-4]
    assert "0.003 2" in " ".join(printed.split())
    assert ["exact_match" in row for row in rows] == [True, *5 * [False], True]  # before, and the last seed
    assert start(2)[0] == rows  # and nothing runs again
    assert len(ran) == 6


def exit_with_peak() -> None:
    """Hundreds of megabytes that this process has held, at most, as its exit code."""
    os._exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 10**8)


@pytest.mark.skipif(sys.platform != "linux", reason="units and inheritance of ru_maxrss are Linux's")
def test_a_new_process_hands_over_its_exit_code_and_has_a_peak_of_its_own() -> None:
    apart = importlib.import_module("real_model").apart
    held = torch.ones(2 * 10**8)  # 800 MB, for the new process to inherit or not
    assert 0 < apart(exit_with_peak) < held.nbytes // 10**8
