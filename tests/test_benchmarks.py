"""The benchmarks at tiny sizes: every row has its figures or says why not, whatever is installed."""

import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from allocations import peak_bytes, segments

from lorapre_recipes.config import UserError
from lorapre_recipes.presets import llama_tiny
from test_docs import blocks
from test_docs import check as check_command

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FACTS = {"benchmark", "title", "device", "settings", "columns", "rows", "notes", "command", "environment"}

Bench = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def bench(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Bench]:
    """Run a benchmark: (its JSON, what it prints)."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("COLUMNS", "80")

    def run(name: str, *arguments: str) -> tuple[dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *arguments, "--out", str(tmp_path)])
        app = importlib.import_module(name).app
        app(sys.argv[1:], result_action="return_value", exit_on_error=False)
        written = [json.loads(file.read_text()) for file in tmp_path.glob(f"{name}-*.json")]
        return (written[-1] if written else {}), capsys.readouterr().out

    yield run
    for name in ("common", "step_time", "memory", "scaling", "bf16", "report", "predicted", "gpu"):
        sys.modules.pop(name, None)


def check(result: dict[str, Any], printed: str, *figures: str) -> None:
    assert set(result) == FACTS
    assert result["command"].startswith(f"python benchmarks/{result['benchmark']}.py")
    assert result["environment"]["versions"]["torch"] == torch.__version__
    for row in result["rows"]:
        if row.get("reason"):
            assert "\n" not in row["reason"]
        else:
            assert all(isinstance(row[name], (int, float)) for name in figures), row
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert "…" not in printed


def rows_of(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["optimizer"].startswith(name)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_step_time(bench: Bench, tmp_path: Path, dtype: str) -> None:
    arguments = ("--model", "48x64", "--ranks", "2", "4", "--rounds", "2", "--dtype", dtype)
    result, printed = bench("step_time", *arguments)
    check(result, printed, "ms", "min_ms", "spread", "ratio", "ratio_fused")
    for name in ("LoRA-Pre", "AdamW (", "Muon"):
        assert {"ms" in row for row in rows_of(result, name)} == {True}
    assert rows_of(result, "MoFaSGD")[0]["reason"] == "no package"
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_step_time_of_all_matrices_of_some_layers(bench: Bench, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    folder = tmp_path / "model"
    LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=64
    ).save_pretrained(folder)
    result, printed = bench(
        "step_time", "--model", str(folder), "--ranks", "2", "40", "--rounds", "1", "--layers", "2"
    )
    assert "14 matrices" in result["title"]
    reasons = {row["rank"]: row.get("reason") for row in rows_of(result, "LoRA-Pre")}
    assert reasons == {2: None, 40: "factors not smaller for 14 of 14 matrices"}
    assert "factors not smaller" in printed


def test_what_needs_a_gpu_is_not_measured_without(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("step_time", "scaling", "memory"):
        result, printed = bench(name, "--device", "cuda", "--ranks", "2")
        check(result, printed)
        assert {row["reason"] for row in result["rows"]} == {"not measured"}
    for arguments in ([], ["--minutes", "1"]):
        with pytest.raises(SystemExit, match=r"^gpu.py: torch .* this needs an NVIDIA GPU"):
            bench("gpu", *arguments)


def test_memory(bench: Bench, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    folder = tmp_path / "model"
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=500
    )
    config.save_pretrained(folder)
    result, printed = bench("memory", "--model", str(folder), "--ranks", "4", "--length", "4")
    figures = ("weights", "gradients", "state", "activations", "transient", "peak")
    check(result, printed, *figures)
    adamw, ours, released = (
        rows_of(result, name)[0] for name in ("AdamW (foreach)", "LoRA-Pre, split", "LoRA-Pre, release")
    )
    weights = 4 * sum(p.numel() for p in transformers_model(config).parameters())
    assert adamw["gradients"] == weights <= adamw["weights"]  # and buffers
    assert 2 * weights < adamw["state"] < 2.01 * weights
    assert ours["state"] < adamw["state"]
    assert released["gradients"] == 4 * 500 * 64  # the largest one
    assert released["peak"] < ours["peak"]
    for row in (adamw, ours, released):
        assert sum(row["at_peak"].values()) == row["peak"]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_predicted(bench: Bench, tmp_path: Path, lorapre: Callable[..., Any], device: str) -> None:
    from transformers import LlamaConfig

    folder = tmp_path / "model"
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    LlamaConfig(**shape, vocab_size=500, max_position_embeddings=256).save_pretrained(folder)
    arguments = ["--rank", "4", "--dtype", "bf16", "--release", "--gradient-checkpointing"]
    where = ["--device", device, *(("--cap", "24") if device == "cuda" else ())]
    result, printed = bench("predicted", "--model", str(folder), *arguments, *where)
    (row,) = result["rows"]
    if device == "cuda" and not torch.cuda.is_available():
        assert row["reason"] == "not measured"
    else:
        check(result, printed.replace(str(folder), ""), "measured", "predicted", "error")
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    command = next(note for note in result["notes"] if "lorapre plan" in note).split("`")[1]
    _, out, _ = lorapre(*command.split()[1:])
    assert f"peak: {row['predicted'] / 2**20:.1f} MiB" in out


@pytest.fixture
def gpu(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/gpu.py, with its logs in a folder of the test."""
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "SCRATCH", tmp_path)
    return module


@pytest.mark.parametrize("gigabytes", [8, 24, 80])
def test_the_parts_of_gpu_are_commands_that_exist(gpu: Any, gigabytes: int) -> None:
    parts = gpu.parts(gigabytes * 10**9, None)
    assert [part.name for part in parts] == ["predicted", "training", "step_time", "tests"]
    for part in parts:
        assert part.name in gpu.report.ORDER
        for command in part.commands:
            check_command(shlex.split(command), [], BENCHMARKS)
    assert sum(limit for _, limit in gpu.shares(parts, 480)) == pytest.approx(480)
    pretrain = shlex.split(parts[1].commands[1])
    size, passes = (int(pretrain[pretrain.index(x) + 1]) for x in ("--batch-size", "--accumulation"))
    assert size * passes * 256 == gpu.TOKENS
    assert ("--layers" in parts[2].commands[0]) == (gigabytes < 40)
    assert all((BENCHMARKS.parent / file).is_file() for file in gpu.marked())
    assert "tests/test_backends_triton.py" in gpu.marked()


def test_gpu_prints_its_commands_without_one(bench: Bench, tmp_path: Path) -> None:
    _, printed = bench("gpu", "--dry-run")
    lines = [line for line in printed.splitlines() if not line.startswith("#")]
    assert [line.split()[0] for line in lines] == ["python", "lorapre", "lorapre", "python", "python"]
    assert not list(tmp_path.iterdir())


def test_parts_that_fail_are_rows_and_do_not_stop_the_others(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of `main`, with other commands, and as if there were a GPU."""

    def python(code: str) -> str:
        return shlex.join(["python", "-c", code])

    commands = {
        "step_time": [
            python("print('|no| [such](thing)'); raise SystemExit(3)"),
            python("print('unreached')"),
        ],
        "predicted": [python("pass")],
        "training": [python("import time; time.sleep(600)")],
        "tests": [
            python(
                "print('[gw0] [ 50%] PASSED tests/test_x.py::x '); print('tests/test_x.py::y FAILED [100%]');"
                "print('FAILED tests/test_x.py::y'); raise SystemExit(1)"
            )
        ],
    }
    weights = {name: 1 if name == "training" else 10 for name in commands}
    parts = [gpu.Part(name, f"Title of {name}", weights[name], code) for name, code in commands.items()]
    monkeypatch.setattr(gpu, "parts", lambda memory, out: parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Example")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24e9))
    monkeypatch.setattr(gpu, "SCRATCH", tmp_path / "scratch")
    for name in commands:
        (tmp_path / f"{name}-old-cuda.json").write_text("of an earlier run")
    gpu.main(minutes=1, out=tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "exit code 3 after" in page
    assert "`no   such (thing)`" in page
    assert "unreached`" not in page
    assert "predicted: left no result." in page
    assert "GPU: NVIDIA Example" in page
    assert re.search(r"LoRA-Pre, split: cut off at its limit of \d s\.", page)
    assert "| tests | 1 | 1 | 0 | 0 |" in page
    assert "* `tests/test_x.py::y FAILED  100%`" in page
    assert not list(tmp_path.glob("*-old-*"))
    for block in blocks(tmp_path / "report.md"):
        assert block.language == "bash"
    assert [page.index(f"Title of {name}") for name in gpu.report.ORDER[:4]] == sorted(
        page.index(f"Title of {name}") for name in gpu.report.ORDER[:4]
    )


def test_the_speed_of_a_run_is_that_after_its_first_steps(gpu: Any, tmp_path: Path) -> None:
    lines = [
        {"step": 10, "tokens": 1000, "loss": 9.0, "step_seconds": 50.0, "optimizer_seconds": 40.0},
        {"step": 20, "tokens": 2000, "loss": 8.0, "step_seconds": 52.0, "optimizer_seconds": 40.5},
        {"step": 40, "tokens": 4000, "loss": 7.0, "step_seconds": 56.0, "optimizer_seconds": 41.5},
        {"step": 40, "tokens": 4000, "validation_loss": 7.0},
    ]
    part = gpu.parts(80 * 10**9, None)[1]
    cut = gpu.Outcome("cut off at its limit of 9 s", 9.0, "some\noutput")
    (row,) = gpu.training(part, cut, tmp_path).rows
    assert row["reason"] == cut.reason
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = gpu.training(part, cut, tmp_path)
    (row,) = found.rows
    assert (row["steps"], row["ms"], row["tokens_per_second"]) == ("11 to 40", 200.0, 500.0)
    assert (row["share"], row["first"]) == (0.25, 50.0)
    assert found.notes[0] == "Cut off at its limit of 9 s."


def transformers_model(config: Any) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(config)


@pytest.mark.parametrize("options", [("--variant", "paper"), ("--optimizer", "muon")])
def test_scaling(bench: Bench, options: tuple[str, ...]) -> None:
    sizes = ("--sizes", "32", "48", "64", "--ranks", "2", "4", "8", "200", "--size", "48", "--rank", "4")
    result, printed = bench("scaling", *sizes, "--fit-from", "32", "2", "--rounds", "2", *options)
    check(result, printed, "ms", "spread")
    assert set(result["settings"]["exponents"]) == {"p q", "r"}
    assert all(isinstance(power, float) for power in result["settings"]["exponents"].values())
    assert result["rows"][-1]["reason"].startswith("factors not smaller")


def test_exponents_are_those_of_a_power(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = importlib.import_module("scaling").fit
    rows = [{"series": "r", "rank": r, "ms": 0.5 * r**1.5 if r > 4 else 9.0} for r in (2, 4, 8, 16, 32)]
    assert fit(rows, "r", lambda row: row["rank"], 8) == pytest.approx(1.5)
    assert [row.get("fit_ms") for row in rows[:2]] == [None, None]
    assert rows[2]["fit_ms"] == pytest.approx(rows[2]["ms"])
    assert fit(rows, "p q", lambda row: row["rank"], 8) is None


def test_a_peer_that_fails_is_a_row(bench: Bench) -> None:
    common = importlib.import_module("common")
    with pytest.raises(common.NotMeasured, match="not installed"):
        common.load("no_such_package", "Optimizer", "no-such-package")
    assert "\n" not in common.reason(RuntimeError("one\ntwo"))
    assert common.reason(RuntimeError()) == "RuntimeError: no message"


def test_amortised_over_the_gap(bench: Bench) -> None:
    row = importlib.import_module("step_time").figures([0.002, 0.001, 0.003], refresh=0.402, gap=200)
    assert row["ms"] == pytest.approx((402 + 199 * 2) / 200)
    assert row["min_ms"] == pytest.approx((402 + 199 * 1) / 200)


def test_the_report_has_every_command_and_row(bench: Bench, tmp_path: Path) -> None:
    bench("step_time", "--model", "32x48", "--ranks", "2", "--rounds", "1")
    bench("scaling", "--device", "cuda", "--ranks", "2")
    _, printed = bench("report")
    assert "report.md" in printed
    page = (tmp_path / "report.md").read_text()
    for file in tmp_path.glob("*.json"):
        result = json.loads(file.read_text())
        assert result["command"] in page
        assert result["title"] in page
    assert "](step_time-32x48-fp32-cpu.png)" in page
    assert "| LoRA-Pre, split | 2 |" in page


def test_bf16(bench: Bench, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i}: the cat sat on mat {i * i}." for i in range(4000)))
    result, printed = bench("bf16", "--steps", "2", "--data", str(text))
    check(result, printed, "loss", "perplexity", "gap")
    assert len(result["rows"]) == 3
    assert not any(row.get("reason") for row in result["rows"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamw", "stochastic_rounding": True, "dtype": "bf16"}, "adamw has no such option"),
        ({"optimizer": "lorapre-adamw", "stochastic_rounding": True}, "give --dtype bf16"),
        ({"optimizer": "lorapre-adamw", "dtype": "fp16"}, "--dtype: there is no 'fp16'"),
    ],
)
def test_rounding_needs_what_it_rounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        llama_tiny(options.pop("optimizer")).replace(**options)


# The counter


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    def three_of_four() -> torch.Tensor:
        x, y = torch.empty(1000), torch.empty(1000)
        z = torch.cat([x, y])
        del x, y, z
        return torch.empty(1000)

    assert peak_bytes(three_of_four) == 4 * 4000
    assert peak_bytes(lambda: None) == 0


def test_peak_bytes_sees_inside_of_kernels_and_of_the_backward_pass() -> None:
    x = torch.randn(64, 64)
    assert peak_bytes(lambda: torch.linalg.svd(x)) > 3 * x.nbytes  # u, s, vh and the workspace
    layer = torch.nn.Linear(100, 100)
    assert peak_bytes(lambda: layer(torch.ones(1, 100)).sum().backward()) >= 4 * 100 * 101


def test_segments_lie_between_marks() -> None:
    held: list[torch.Tensor] = []

    def work(mark: Callable[[Any], None]) -> None:
        held.append(torch.empty(10))
        mark("a")
        torch.empty(20)
        mark("b")
        held.clear()

    assert [tuple(segment) for segment in segments(work)] == [(None, 0, 40), ("a", 40, 120), ("b", 40, 40)]
