"""`lorapre compare` and `lorapre report`: cells, seeds, edges, resuming, what the report says, mistakes."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lorapre_recipes import presets
from lorapre_recipes.compare import compare
from lorapre_recipes.compare.cells import Cell, Comparison, Contender, cell_config, read_sweep
from lorapre_recipes.compare.compare import Outcome, beyond_the_edge
from lorapre_recipes.config import ONLY_FOR, OptimizerName, PretrainConfig, UserError
from lorapre_recipes.console import one_line
from lorapre_recipes.train.optim import build_optimizer, state_bytes
from lorapre_recipes.train.pretrain import build_model, pretrain
from lorapre_recipes.train.summary import read_metrics
from tiny_runs import TEXTS, Interrupt, tiny_config, write_corpus


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PretrainConfig]:
    short = dict(layers=1, steps=6, log_points=6, evaluations=2, checkpoints=2)
    data = str(write_corpus(tmp_path))

    def preset(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
        config = tiny_config(optimizer, data=data, **short)
        return config if config.refresh is None else config.replace(refresh=2)

    monkeypatch.setitem(presets.PRETRAIN, "tiny", preset)
    return preset


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run cells in this process, which knows the preset `tiny`; the list fills with what was started."""
    started = []
    start = subprocess.run

    def run(arguments: list[str], **options: Any) -> Any:
        if arguments[:3] != [sys.executable, "-m", "lorapre_recipes.compare.compare"]:
            return start(arguments, **options)  # a compiler
        started.append(arguments)
        compare.run_cell(Path(arguments[3]), arguments[4])
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    return started


def test_a_comparison_and_its_report(tiny: Any, here: list[Any], lorapre: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ours = "lorapre-adamw:variant=subspace,rank=4/8"
    options = ["--preset", "tiny", "--optimizers", "adamw", "--optimizers", ours, "--jobs", 1, "--out", out]
    code, stdout, _ = lorapre("compare", *options, "--sweep", "scale=0.05,0.5", "--seeds", 2)
    assert code == 0
    assert len(here) == 2 + 1 + 2 * 2 + 1
    assert len(list(out.glob("*/*/summary.json"))) == len(here)
    assert not list(out.rglob("checkpoint-*"))

    # The same batches and first weights for all: the first loss is the same until rounding.
    first = {read_metrics(file)[0]["loss"] for file in out.glob("*/*seed0/metrics.jsonl")}
    assert len(first) == 1

    # The best values on the first seed run on the second, and the table has their mean.
    losses = {
        path.parent.relative_to(out).as_posix(): json.loads(path.read_text())["validation_loss"]
        for path in out.glob("*/*/summary.json")
    }
    best = min((v, k) for k, v in losses.items() if k.startswith("adamw") and k.endswith("seed0"))[1]
    mean = (losses[best] + losses[best.replace("seed0", "seed1")]) / 2
    markdown = (out / "report.md").read_text()
    row = next(line for line in markdown.splitlines() if line.startswith("| adamw |"))
    assert f"| {mean:.4f} ± " in row
    assert "| 2 |" in row
    assert "*" in row  # two values are two edges
    assert max(map(len, stdout.splitlines())) <= 80 or str(out) in stdout.splitlines()[-1]

    pictures = {path.name for path in out.glob("report-*.png")}
    assert {"report-curves.png", "report-time.png", "report-state.png"} < pictures
    assert {"report-rank.png", "report-sensitivity-scale.png", "report-sensitivity-rank.png"} < pictures
    assert all(name in markdown for name in pictures)
    assert "lorapre compare --preset tiny" in markdown
    figures = json.loads((out / "report.json").read_text())
    assert {run["validation_loss"] for run in figures} == set(losses.values())
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r'src="[^d]', page)

    # Again, from the folders alone.
    (out / "report.md").unlink()
    assert lorapre("report", out)[0] == 0
    assert (out / "report.md").read_text().split("Made with")[0] == markdown.split("Made with")[0]
    code, stdout, _ = lorapre("report", next(out.glob("adamw/*seed1")), "--out", tmp_path / "one")
    assert code == 0
    assert "adamw" in stdout


def test_what_has_ended_is_not_run_again(tiny: Any, here: list[Any], lorapre: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--preset", "tiny", "--optimizers", "adamw", "--optimizers", "lorapre-muon", "--jobs", 1]
    assert lorapre("compare", *options, "--out", out)[0] == 0
    losses = [path.read_text() for path in sorted(out.glob("*/*/summary.json"))]
    removed = out / "lorapre-muon" / "seed0"
    (removed / "summary.json").unlink()
    here.clear()
    assert lorapre("compare", "--resume", out)[0] == 0
    assert len(here) == 1

    def loss(text: str) -> float:
        return json.loads(text)["validation_loss"]  # type: ignore[no-any-return]

    assert [loss(text) for text in losses] == [
        loss(path.read_text()) for path in sorted(out.glob("*/*/summary.json"))
    ]


def test_a_cell_that_was_killed_goes_on(
    tiny: Any, here: list[Any], lorapre: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lorapre_recipes.train.pretrain as recipe

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--preset", "tiny", "--optimizers", "lorapre-adamw", "--jobs", 1]
    assert lorapre("compare", *options, "--out", whole)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "pretrain", lambda *a, **k: pretrain(*a, **k, callbacks=[Interrupt(step=5)]))
        code, _, stderr = lorapre("compare", *options, "--out", cut)
        assert code == 130
        assert f"lorapre compare --resume {cut}" in stderr
    assert list(cut.rglob("checkpoint-3"))
    assert lorapre("compare", "--resume", cut)[0] == 0
    a, b = (json.loads((x / "lorapre-adamw" / "seed0" / "summary.json").read_text()) for x in (whole, cut))
    assert a["validation_loss"] == b["validation_loss"]


def test_one_that_breaks_down_does_not_end_the_others(
    tiny: Any, here: list[Any], lorapre: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--preset", "tiny", "--optimizers", "adamw:lr=1e30", "--optimizers", "sgd", "--jobs", 1]
    code, stdout, _ = lorapre("compare", *options, "--out", out)
    assert code == 0
    row = next(line for line in (out / "report.md").read_text().splitlines() if "the loss is" in line)
    assert row.startswith("| adamw |")
    assert "Runs that ended without a figure: 1" in stdout.replace("\n", " ")


def test_a_process_of_its_own(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(TEXTS) * 3)
    changes = {"data": str(corpus), "steps": 2, "batch_size": 2}
    comparison = Comparison(
        preset="llama-1m", contenders=("adamw",), grid={}, seeds=1, extend=0, changes=changes
    )
    (outcome,) = compare.compare(comparison, tmp_path / "out", jobs=2, command=None)
    assert math.isfinite(outcome.loss), (tmp_path / "out/adamw/seed0/log.txt").read_text()
    assert json.loads((tmp_path / "out/adamw/seed0/config.json").read_text())["steps"] == 2


# Which cells


def outcome(contender: Contender, loss: float, **values: float) -> Outcome:
    return Outcome(cell=Cell(contender=contender, values=values, seed=0), loss=loss)


def test_the_grid_goes_on_beyond_its_edge() -> None:
    contender = Contender.parse("adamw")
    rising = [outcome(contender, loss, scale=s, lr=0.01) for s, loss in ((0.1, 3.0), (0.2, 2.0), (0.4, 1.0))]
    (cell,) = beyond_the_edge(rising)
    assert cell.values == {"scale": 0.8, "lr": 0.01}  # of lr there is one value: no edge
    inside = [*rising, outcome(contender, 1.5, scale=0.8, lr=0.01)]
    assert list(beyond_the_edge(inside)) == []
    falling = [outcome(contender, loss, scale=s) for s, loss in ((0.1, 1.0), (0.2, 2.0))]
    assert [cell.values for cell in beyond_the_edge(falling)] == [{"scale": 0.05}]
    assert list(beyond_the_edge([outcome(contender, math.inf, scale=0.1)])) == []


def test_contenders_and_their_configs(tiny: Any) -> None:
    contender = Contender.parse("lorapre-adamw:variant=paper,rank=2,beta2=0.999,scale=0.2/0.1")
    assert contender.choices == {"variant": "paper"}
    assert contender.grid == {"rank": (2.0,), "beta2": (0.999,), "scale": (0.1, 0.2)}
    comparison = Comparison(
        preset="tiny", contenders=(contender.name,), grid={}, seeds=1, extend=0, changes={"steps": 3}
    )
    cell = Cell(contender=contender, values={"rank": 2.0, "beta2": 0.999, "scale": 0.2}, seed=7)
    config = cell_config(comparison, cell)
    assert (config.variant, config.rank, config.betas, config.scale) == ("paper", 2, (0.9, 0.999), 0.2)
    assert (config.steps, config.seed) == (3, 7)
    assert read_sweep(["lr=0.02,0.01"]) == {"lr": (0.01, 0.02)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "adam"], "--optimizers: there is no 'adam'; choose from lorapre-adamw"),
        (["--optimizers", "adamw:size=3"], "--optimizers adamw:size=3: there is no option 'size'"),
        (["--optimizers", "adamw:rank=3"], "--rank: adamw has no such option"),
        (["--optimizers", "adamw:lr=fast"], "--optimizers adamw:lr=fast: give numbers"),
        (["--sweep", "speed=1"], "--sweep speed=1: there is no 'speed' to sweep"),
        (["--sweep", "lr="], "--sweep lr=: give numbers"),
        (["--seeds", "0"], "--seeds: must be at least 1"),
        (["--jobs", "0"], "--jobs: must be at least 1"),
        (["--resume", "nowhere"], "--resume"),
        (["--resume", "x", "--seeds", "2"], "--resume"),
        (["--preset", "huge"], "--preset: there is no 'huge'"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, lorapre: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = lorapre("compare", *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert message in stderr
    assert not list(tmp_path.iterdir())


def test_report_of_nothing(lorapre: Any, tmp_path: Path) -> None:
    for arguments in ([], [tmp_path], [tmp_path / "missing"]):
        code, _, stderr = lorapre("report", *arguments)
        assert code == 2
        assert stderr.startswith("lorapre: RUNS")


# Peers


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_every_optimizer_trains(optimizer: OptimizerName, tiny: Any) -> None:
    config = tiny(optimizer)
    torch.manual_seed(0)
    model = build_model(config, 0)
    try:
        built = build_optimizer(model, config)
    except UserError as error:
        assert re.search("is not installed", str(error)), error  # noqa: PT017
        pytest.skip(str(error))
    tokens = torch.randint(0, 300, (4, 16))
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        try:
            built.step()
        except torch._dynamo.exc.TorchDynamoException as error:
            if optimizer not in ("adam8bit", "adam4bit"):
                raise
            pytest.skip(f"torchao compiles its step, and the compiler fails here: {one_line(error)}")
        built.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert state_bytes(built) > 0
    for group in built.param_groups:
        ours = optimizer in ONLY_FOR["variant"] and group.get("rank") is not None
        rate = group["lr"] * (group.get("scale", 1.0) if ours else 1.0)
        if any("_proj" in name for name in group.get("param_names", ())):
            assert float(rate) == pytest.approx(config.lr * config.scale)
