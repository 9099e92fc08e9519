"""`lorapre compare`: cells, seeds, edges, resuming, records, progress, tables and pictures, mistakes."""

import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lorapre_recipes import presets
from lorapre_recipes.compare import compare, progress
from lorapre_recipes.compare.cells import Cell, Comparison, Contender, cell_config, read_sweep
from lorapre_recipes.compare.compare import Outcome, beyond_the_edge
from lorapre_recipes.compare.progress import Progress
from lorapre_recipes.compare.record import command_of, record
from lorapre_recipes.compare.tables import Row, draw_state, draw_tokens, series_of
from lorapre_recipes.config import ONLY_FOR, OptimizerName, PretrainConfig, Terms, UserError
from lorapre_recipes.console import one_line
from lorapre_recipes.files import write_json
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


def test_a_comparison_and_its_tables(tiny: Any, here: list[Any], lorapre: Any, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept.json"
    ours = "lorapre-adamw:variant=paper,rank=4/8"
    options = ["--preset", "tiny", "--optimizers", "adamw", "--optimizers", ours, "--jobs", 1, "--out", out]
    sweep = ["--sweep", "scale=0.05,0.5", "--seeds", 2, "--record", kept]
    assert lorapre("compare", *options, *sweep)[0] == 0
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
    markdown = (out / "tables.md").read_text()
    cells = next(table_rows(markdown, "adamw"))
    assert cells[6].split()[-1] == f"{mean:.4f}"
    assert cells[5].endswith("*")  # two values are two edges
    assert float(cells[7]) > 0
    assert "(state.png)" in markdown
    assert (out / "state.png").is_file()
    assert not (out / "tokens.png").exists()  # there is one horizon

    # A row of every run, in both files; from these alone the tables are made again.
    rows = json.loads(kept.read_text())
    assert {row["loss"] for row in rows} == set(losses.values())
    assert kept.read_text() == (out / "runs.json").read_text()
    assert lorapre("compare", "--tables", kept)[0] == 0
    assert (tmp_path / "tables.md").read_text() == markdown


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
    assert "the loss is" in stdout
    assert next(table_rows(stdout, "adamw"))[6] == "none"
    assert math.isfinite(float(next(table_rows(stdout, "sgd"))[6]))


def test_processes_and_a_pipe(tmp_path: Path) -> None:
    """Each cell has a process of its own; plan and cells are printed at once, not at the end."""
    corpus, out = tmp_path / "corpus.txt", tmp_path / "out"
    corpus.write_text("".join(TEXTS) * 3)
    sizes = ["--data", corpus, "--steps", "2", "--batch-size", "2", "--accumulation", "1"]
    sizes += ["--vocab-size", "300", "--layers", "1"]
    options = ["--optimizers", "adamw", "--optimizers", "sgd", "--jobs", "1", "--out", out]
    command = [sys.executable, "-m", "lorapre_recipes", "compare", *sizes, *options]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, env=buffered, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "2 runs of 512 tokens, 1 at a time; no more\n"
        assert not list(out.rglob("summary.json"))
        assert running.stdout.readline().startswith("time: ")
        words = running.stdout.readline()
        assert re.fullmatch(r"1/2  (adamw|sgd)/seed0  validation loss [\d.]+; about .* left\n", words), words
        assert len(list(out.rglob("summary.json"))) == 1
        assert "Sorted by loss" in running.stdout.read()
    assert running.returncode == 0
    assert json.loads((out / "adamw/seed0/config.json").read_text())["steps"] == 2


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
    assert contender.grid == {"rank": (2,), "beta2": (0.999,), "scale": (0.1, 0.2)}
    comparison = Comparison(
        preset="tiny", contenders=(contender.name,), grid={}, seeds=1, extend=0, changes={"steps": 3}
    )
    cell = Cell(contender=contender, values={"rank": 2, "beta2": 0.999, "scale": 0.2}, seed=7)
    config = cell_config(comparison, cell)
    assert (config.variant, config.rank, config.betas, config.scale) == ("paper", 2, (0.9, 0.999), 0.2)
    assert (config.steps, config.seed) == (3, 7)
    assert read_sweep(["lr=0.02,0.01"]) == {"lr": (0.01, 0.02)}
    contender = Contender.parse("lorapre-muon:rank=0")
    config = cell_config(comparison, Cell(contender=contender, values={"rank": 0}, seed=7))
    assert build_optimizer(build_model(config, 0), config).defaults["rank"] == config.rank == 0


@pytest.mark.parametrize("optimizer", ["lorapre-adamw", "lorapre-muon"])
def test_ends_of_low_rank(optimizer: OptimizerName, tiny: Any) -> None:
    contender = Contender.parse(f"{optimizer}:ends=low-rank,rank=2")
    assert contender.choices == {"ends": "low-rank"}
    comparison = Comparison(
        preset="tiny", contenders=(contender.name,), grid={}, seeds=1, extend=0, changes={"terms": "whole"}
    )
    config = cell_config(comparison, Cell(contender=contender, values={"rank": 2}, seed=0))
    model = build_model(config, 0)
    built = build_optimizer(model, config)
    ends = [group for group in built.param_groups if "lm_head.weight" in group["param_names"]]
    assert [sorted(group["param_names"]) for group in ends] == [
        ["lm_head.weight", "model.embed_tokens.weight"]
    ]
    rates = {
        name: group["lr"] * group.get("scale", 1.0)
        for group in built.param_groups
        for name in group["param_names"]
    }
    assert rates["lm_head.weight"] == pytest.approx(config.lr)
    assert rates["model.layers.0.mlp.up_proj.weight"] == pytest.approx(config.lr * config.scale)
    dense = build_optimizer(model, config.replace(ends="dense"))
    tokens = torch.randint(0, 300, (4, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    built.step(), dense.step()
    assert state_bytes(built) < state_bytes(dense)
    config = config.replace(terms="matrices")
    with pytest.raises(UserError, match="give --terms whole"):
        build_optimizer(model, config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "adam"], "--optimizers: there is no 'adam'; choose from lorapre-adamw"),
        (["--optimizers", "adamw:size=3"], "--optimizers adamw:size=3: there is no 'size'; choose from"),
        (["--optimizers", "adamw:rank=3"], "--rank: adamw has no such option"),
        (["--optimizers", "adamw:lr=fast"], "--optimizers adamw:lr=fast: give numbers"),
        (["--sweep", "speed=1"], "--sweep speed=1: there is no 'speed'; choose from lr"),
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


# Records and progress


def test_the_command_of_a_record_repeats_the_run(
    tiny: Any, lorapre: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("lorapre-adamw").replace(
        seed=3, betas=(0.8, 0.9), rules=("lm_head=2",), packed=False, scale=0.1, refresh=None
    )
    summary = pretrain(config, tmp_path / "run")
    file = tmp_path / "kept" / "rows.json"
    record(tmp_path / "run", file)
    (row,) = json.loads(file.read_text())
    assert row["loss"] == summary.validation_loss
    assert row["curve"][-1] == [row["tokens"], row["loss"]]
    assert row["tokens"] == 6 * row["batch_tokens"] == 6 * 4 * 16
    assert (row["beta1"], row["rules"], row["terms"]) == (0.8, ["lm_head=2"], "whole")
    assert row["state_bytes"] > row["matrix_state_bytes"] > 0

    monkeypatch.chdir(tmp_path)  # of the data it knows the name alone
    assert str(tmp_path) not in row["command"]
    assert lorapre(*shlex.split(row["command"])[1:], "--out", "again")[0] == 0
    record(tmp_path / "again", file)
    (again,) = json.loads(file.read_text())  # in the place of the first
    assert again["loss"] == pytest.approx(row["loss"], abs=1e-6)


def test_a_recorded_command_outlives_the_rates_of_its_preset() -> None:
    llama = presets.PRETRAIN["llama-1m"]
    command = command_of(llama("lorapre-adamw"))
    assert "--rank 16 --variant split --lr 0.08 --scale 0.05 --steps 160 --batch-size 32" in command
    assert "--rank" not in command_of(llama("adamw"))


def test_records_of_several_processes_and_of_failures(tiny: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    runs = []
    for seed in range(8):
        run = tmp_path / f"run{seed}"
        run.mkdir()
        write_json(run / "config.json", tiny("adamw").replace(seed=seed))
        write_json(run / "ended.json", {"reason": "the loss is nan"})
        runs.append(run)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda run: record(run, file), runs))
    rows = json.loads(file.read_text())
    assert sorted(row["seed"] for row in rows) == list(range(8))
    assert {row["loss"] for row in rows} == {None}
    assert len(file.read_text().splitlines()) == 8 + 2  # a line a run: small differences in git
    (runs[0] / "ended.json").unlink()
    record(runs[0], tmp_path / "other.json")  # has not ended
    (runs[1] / "config.json").unlink()
    record(runs[1], tmp_path / "other.json")  # did not begin
    assert not (tmp_path / "other.json").exists()


def test_progress(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setenv("LORAPRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(progress, "MINUTE", 0.01)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    comparison = Comparison(preset="tiny", contenders=("a",), grid={}, seeds=2, extend=0, changes={})

    def begun(planned: int) -> Progress:
        watch = Progress(tmp_path, tiny(), jobs=2)
        watch.planned = planned
        watch.start(comparison)
        return watch

    watch = begun(4)
    plan = capsys.readouterr().out
    assert "4 runs of 384 tokens, 2 at a time; more for edges and seeds" in plan
    assert "time: not known before a run has ended" in plan
    cells = [Path("a", f"seed{seed}") for seed in range(2)]
    for cell in cells:
        watch.begin(cell)
    (tmp_path / cells[1]).mkdir(parents=True)
    (tmp_path / cells[1] / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n')
    now += 60
    watch.end(cells[0], "validation loss 3.0000", finished=True)
    assert capsys.readouterr().out == "1/4  a/seed0  validation loss 3.0000; about 1 min 00 s left\n"
    # Three are left, one of them for no more than a moment; two run at a time.
    assert watch.left() == "about 1 min 00 s"
    log = tmp_path / "progress.log"
    for _ in range(500):
        lines = log.read_text().splitlines() if log.is_file() else [""]
        if "1/4" in lines[-1]:
            break
        time.sleep(0.01)
    watch.stop()
    assert re.fullmatch(r"[\d-]+ \d\d:\d\d  1/4 runs, about 1 min 00 s left;  a/seed1 4/6", lines[-1])

    # The next comparison of this kind knows how long a run takes; one that went on does not count.
    watch = begun(2)
    assert "time: about 1 min 00 s" in capsys.readouterr().out
    watch.begin(cells[0])
    now += 1
    watch.end(cells[0], "exit code 1", finished=False)
    watch.stop()
    assert watch.left() == "about 30 s"


# Terms


def ends_after(optimizer: OptimizerName, tiny: Any, terms: Terms) -> tuple[dict[str, torch.Tensor], Any]:
    """Embeddings, head and norms after two steps, and the optimizer; beta1 and momentum as in a sweep."""
    config = tiny(optimizer).replace(terms=terms, betas=(0.6, 0.9), momentum=0.6)
    torch.manual_seed(0)
    model = build_model(config, 0)
    try:
        built = build_optimizer(model, config)
    except UserError as error:
        pytest.skip(str(error))
    for step in range(2):
        for i, weight in enumerate(model.parameters()):
            draw = torch.Generator().manual_seed(100 * step + i)
            weight.grad = torch.randn(weight.shape, generator=draw)
        built.step()
    ends = {name: p.detach() for name, p in model.named_parameters() if "_proj" not in name}
    return ends, (built, model)


@pytest.mark.parametrize("optimizer", sorted({*get_args(OptimizerName)} - {"lora", "relora", "adamw"}))
def test_terms_of_matrices_are_the_same_ends_for_all(optimizer: OptimizerName, tiny: Any) -> None:
    ends, _ = ends_after(optimizer, tiny, "matrices")
    for name, expected in ends_after("adamw", tiny, "matrices")[0].items():
        torch.testing.assert_close(ends[name], expected)


def test_terms_of_the_whole_model_are_each_ones_own(tiny: Any) -> None:
    adamw, _ = ends_after("adamw", tiny, "whole")
    fixed, _ = ends_after("adamw", tiny, "matrices")
    head, table, norm = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
    assert not torch.allclose(adamw[head], fixed[head])  # swept
    racs, _ = ends_after("racs", tiny, "whole")
    torch.testing.assert_close(racs[head], adamw[head])
    scale, (built, model) = ends_after("scale", tiny, "whole")
    torch.testing.assert_close(scale[norm], adamw[norm])
    states = {name: set(built.state[p]) for name, p in model.named_parameters()}
    assert (states[head], states[table]) == ({"m"}, set())
    assert {"exp_avg", "exp_avg_sq"} < states[norm]
    for optimizer in ("adafactor", "column-sgd"):
        ends, _ = ends_after(optimizer, tiny, "whole")
        assert not torch.allclose(ends[head], adamw[head])


# Tables


def table_rows(text: str, optimizer: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] == optimizer:
            yield cells


def row(optimizer: str, loss: float | None, *, tokens: int = 20, seed: int = 0, **fields: Any) -> Row:
    """A recorded run, with what a run that broke down does not know."""
    shared = {"rank": None, "scale": 0.1} | fields
    figures: dict[str, Any] = {
        "parameters": 10**6,
        "matrix_state_bytes": 2**20,
        "state_bytes": 3 * 2**20,
        "peak_bytes": 2**30,
    }
    return {
        "optimizer": optimizer,
        "variant": None,
        **dict(model="llama-1m", data="sotu", precision="bf16", terms="matrices", batch_tokens=32_768),
        **dict(tokens=tokens * 10**6, seed=seed, lr=0.02, beta1=0.9, momentum=0.95, loss=loss, curve=[]),
        **(figures if loss is not None else dict.fromkeys(figures)),
        "command": f"lorapre pretrain --optimizer {optimizer} --scale {shared['scale']} --steps {tokens}"
        + f" --seed {seed}" * (seed > 0),
        **shared,
    }


def seeds(optimizer: str, *losses: float, **fields: Any) -> list[Row]:
    return [row(optimizer, loss, seed=seed, **fields) for seed, loss in enumerate(losses)]


RECORDED = [
    *(
        row(optimizer, 3.0 + gain / tokens + abs(scale - 0.1), tokens=tokens, scale=scale)
        for optimizer, gain in (("adamw", 2.0), ("muon", 3.0))
        for tokens in (5, 10)
        for scale in (0.05, 0.1, 0.2)
    ),
    *seeds("adamw", 3.000, 3.010, 3.020),
    *seeds("muon", 2.981, 2.991, 3.000, scale=0.1),
    *seeds("lorapre-adamw", 2.960, 3.020, 3.010, variant="split", rank=16, matrix_state_bytes=2**16),
    *seeds("scale", 3.050, matrix_state_bytes=0),
    row("scale", None, scale=0.4),
    row("sgd", None),
    row("sgd", 9.0, tokens=10),
]


def test_tables_of_recorded_runs(lorapre: Any, tmp_path: Path) -> None:
    file = tmp_path / "arena.json"
    file.write_text(json.dumps(RECORDED))
    code, stdout, _ = lorapre("compare", "--tables", file, "--out", tmp_path / "out")
    assert code == 0
    assert max(map(len, stdout.splitlines())) <= 80
    markdown = (tmp_path / "out/tables.md").read_text()
    assert markdown.startswith(stdout.rstrip())
    short, middle, long = markdown.split("\n## ")
    assert middle.splitlines()[0] == "llama-1m, sotu, matrices: 10 M tokens (10 a parameter), 32,768 a step"
    assert ("Only swept" in short, "Only swept" in middle, "Only swept" in long) == (True, True, False)

    (ours,) = table_rows(long, "lorapre-adamw split")
    assert ours == ["lorapre-adamw split", "16", "0.0625", "3", "1024", "0.02 x 0.1*", "= 2.9967", "0.0321"]
    (muon,), (adamw,) = table_rows(long, "muon"), table_rows(long, "adamw")
    assert muon[6:] == ["2.9907", "0.0095"]
    assert muon[5] == "0.02 x 0.1"  # inside what was tried at other horizons
    assert adamw[6] == "= 3.0100"  # from the row above; from Muon's the seeds do tell it apart
    assert next(table_rows(long, "sgd"))[5:] == ["", "none", ""]
    assert next(table_rows(long, "scale"))[5:] == ["0.02 x 0.1*", "3.0500", ""]
    assert [line.split("|")[1].split()[0] for line in long.splitlines() if line.startswith("|")][2:] == [
        *("muon", "lorapre-adamw", "adamw", "scale", "sgd")
    ]
    for name in ("state", "tokens"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_recorded_runs() -> None:
    from matplotlib.figure import Figure

    ((_, series),) = series_of(RECORDED).items()
    axes = Figure().add_subplot()
    assert draw_state(axes, series[20 * 10**6])
    x, y = axes.lines[0].get_data()
    assert list(zip(x, y, strict=True)) == [
        (0, 3.05),
        (2**-4, pytest.approx(2.9967, abs=1e-4)),
        (1, pytest.approx(2.9907, abs=1e-4)),
        (1, pytest.approx(2.9907, abs=1e-4)),
    ]
    assert {"muon", "adamw", "lorapre-adamw split r16", "scale"} <= {text.get_text() for text in axes.texts}

    axes = Figure().add_subplot()
    assert draw_tokens(axes, series)
    places = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert places == [([5, 10, 20], [2, 2, 1]), ([5, 10, 20], [1, 1, 2])]
    assert [text.get_text() for text in axes.texts] == ["muon -0.019", "adamw +0.000"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not a file of recorded runs"),
        ("{", "not a file"),
        ("[{}]", "not a file"),
        ("[]", "holds no run"),
    ],
)
def test_tables_of_nothing(text: str | None, message: str, lorapre: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    if text is not None:
        file.write_text(text)
    code, stdout, stderr = lorapre("compare", "--tables", file)
    assert (code, stdout) == (2, "")
    assert message in stderr
    code, _, stderr = lorapre("compare", "--tables", file, "--seeds", 0, "--sweep", "lr=1")
    assert code == 2
    assert "leave out all but --out" in stderr


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
    # A cell goes on from a checkpoint, which a safe load must take.
    torch.save(built.state_dict(), saved := io.BytesIO())
    saved.seek(0)
    torch.load(saved, weights_only=True)
    for group in built.param_groups:
        ours = optimizer in ONLY_FOR["variant"] and group.get("rank") is not None
        rate = group["lr"] * (group.get("scale", 1.0) if ours else 1.0)
        if any("_proj" in name for name in group.get("param_names", ())):
            assert float(rate) == pytest.approx(config.lr * config.scale)
