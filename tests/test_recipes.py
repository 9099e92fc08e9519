"""`lorapre pretrain`: the run folder, resuming, the four optimizers, and what a user's mistakes get."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, TrainerCallback

from lorapre_recipes import presets
from lorapre_recipes.config import OptimizerName, PretrainConfig, UserError
from lorapre_recipes.files import write_json
from lorapre_recipes.presets import llama_tiny
from lorapre_recipes.train.optim import WithAdamW, build_optimizer
from lorapre_recipes.train.pretrain import build_model, pretrain
from lorapre_recipes.train.runs import load_run
from lorapre_recipes.train.summary import STATS, Summary, plot_curves, read_metrics, summary_table
from lorapre_recipes.train.trainer import Brake
from tiny_runs import TEXTS, Interrupt, losses, tiny_config, write_corpus

# The peers are in test_compare.py; adapters, and state that a safe load refuses, are not for resuming.
OPTIMIZERS = ["adamw", "muon", "lorapre-adamw", "lorapre-muon"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path)


Tiny = Callable[..., PretrainConfig]


@pytest.fixture
def tiny(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """The preset `tiny` for the command line, and as a function: seconds for a whole run."""

    def preset(optimizer: OptimizerName = "lorapre-adamw", **changes: Any) -> PretrainConfig:
        return tiny_config(optimizer, **({"data": str(corpus)} | changes))

    monkeypatch.setitem(presets.PRETRAIN, "tiny", preset)
    return preset


# Runs


def test_a_card_of_24_gigabytes(
    tiny: Tiny, lorapre: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The savings of llama-7b-24gb on a small Llama; a run that does not fit is refused with the plan."""
    large, small = presets.llama_7b_24gb(), tiny()
    names = ("dtype", "precision", "stochastic_rounding", "release", "ends", "gradient_checkpointing")
    savings = {name: getattr(large, name) for name in (*names, "accumulation", "chunked_loss")}

    def preset(optimizer: OptimizerName = "lorapre-adamw", **changes: Any) -> PretrainConfig:
        return small.replace(preset="llama-7b-24gb", **savings, **changes)

    monkeypatch.setitem(presets.PRETRAIN, "llama-7b-24gb", preset)
    monkeypatch.setattr("lorapre_recipes.plan.tables.gpu_bytes", lambda: None)
    out = tmp_path / "run"
    code, _, err = lorapre("pretrain", "--preset", "llama-7b-24gb", "--out", out)
    assert code == 0
    assert "low-rank ends, gradients released, bf16 weights, stochastic rounding, activations computed" in err
    assert "; fits: 0.0 of 24 GiB\n" in err
    assert losses(out)[-1]["validation_loss"] < losses(out)[0]["loss"]

    monkeypatch.setitem(presets.BUDGETS, "llama-7b-24gb", "100KiB")
    code, _, err = lorapre("pretrain", "--preset", "llama-7b-24gb", "--out", tmp_path / "none")
    assert code == 2
    assert "--preset llama-7b-24gb: no room; lower --batch-size or --rank\n" in err
    assert "GiB too much for" in err
    assert not (tmp_path / "none").exists()


def test_run_folder(tiny: Tiny, lorapre: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, stdout, stderr = lorapre("pretrain", "--preset", "tiny", "--out", out, "--seed", "3")
    assert code == 0

    summary = json.loads((out / "summary.json").read_text())
    assert f"{summary['validation_perplexity']:.2f}" in stdout
    assert "12/12" in stderr  # the bar
    assert "validation perplexity" in stdout
    assert "{" not in stdout + stderr  # no dumps of the trainer
    assert max(map(len, stdout.splitlines())) <= 80 or str(out) in stdout.splitlines()[-1]

    assert PretrainConfig.load(out / "config.json") == tiny(seed=3)
    assert (out / "command.txt").read_text() == f"lorapre pretrain --preset tiny --out {out} --seed 3\n"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "q_proj" in (out / "coverage.txt").read_text()

    metrics = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in metrics if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in metrics if "validation_loss" in row] == [4, 8, 12]
    assert metrics[-1]["tokens"] == summary["tokens"] == 12 * 4 * 16
    assert metrics[-1]["validation_loss"] == summary["validation_loss"]
    assert summary["state_bytes"] < summary["adamw_state_bytes"]
    assert 0 < summary["optimizer_share"] < 1

    before, checkpoint = (out / f"checkpoint-{step}" for step in (8, 12))
    assert {*out.glob("checkpoint-*")} == {before, checkpoint}  # the last two
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.decode(tokenizer("lazy dogs")["input_ids"]) == "lazy dogs"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    torch.load(checkpoint / "optimizer.pt", weights_only=True)
    torch.load(checkpoint / "scheduler.pt", weights_only=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_gives_the_losses_of_the_uninterrupted_run(
    optimizer: OptimizerName, tiny: Tiny, lorapre: Any, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(tiny(optimizer), whole)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(optimizer), cut, callbacks=[Interrupt(step=7)])
    assert [row["step"] for row in losses(cut)][-2:] == [5, 6]  # after the checkpoint of step 4

    code, _, _ = lorapre("pretrain", "--resume", cut)
    assert code == 0
    assert losses(cut) == losses(whole)
    first, second = (load_file(run / "checkpoint-12" / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)

    train = [row["loss"] for row in losses(whole) if "loss" in row]
    assert train[-1] < train[0] - 0.1


@pytest.mark.parametrize("streamed", [False, True])
def test_resume_in_a_later_epoch(
    streamed: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    config = tiny(batch_size=12, accumulation=3, steps=18, **({"data": "owner/corpus"} if streamed else {}))
    pretrain(config, tmp_path / "whole")
    state = json.loads((tmp_path / "whole" / "checkpoint-18" / "trainer_state.json").read_text())
    assert streamed or state["epoch"] > 1
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, tmp_path / "cut", callbacks=[Interrupt(step=14)])
    pretrain(load_run(tmp_path / "cut", PretrainConfig), tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_equal_configs_give_equal_losses(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("a", "b"):
        pretrain(tiny(steps=4), tmp_path / name)
    pretrain(tiny(steps=4, seed=1), tmp_path / "c")
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_bf16_accumulation_and_a_logger(tiny: Tiny, lorapre: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {"precision": "bf16", "accumulation": 2, "steps": 4, "report-to": "tensorboard"}
    code, _, _ = lorapre(
        "pretrain", "--preset", "tiny", "--out", out, *(x for k, v in options.items() for x in (f"--{k}", v))
    )
    assert code == 0
    assert losses(out)[-1]["tokens"] == 4 * 2 * 4 * 16
    assert list(out.rglob("events.out.tfevents.*"))
    weights = load_file(out / "checkpoint-4" / "model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.float32}


class Kill(TrainerCallback):
    """A signal in the middle of a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def with_callback(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainerCallback], None]:
    """Give the runs of the command line a callback."""
    from lorapre_recipes.train import pretrain as recipe

    def give(callback: TrainerCallback) -> None:
        monkeypatch.setattr(recipe, "pretrain", lambda *a, **k: pretrain(*a, **k, callbacks=[callback]))

    return give


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(
    number: int, tiny: Tiny, lorapre: Any, with_callback: Any, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("pretrain", "--preset", "tiny", "--accumulation", "2", "--out")
    assert lorapre(*options, whole)[0] == 0
    before = signal.getsignal(number)
    with_callback(Kill(number, step=2))  # before the first checkpoint
    code, _, stderr = lorapre(*options, cut)
    assert code == 130
    assert stderr.splitlines()[-1] == (
        f"lorapre pretrain: interrupted; go on with: lorapre pretrain --resume {cut}"
    )
    assert [path.name for path in cut.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (cut / "summary.json").exists()
    assert signal.getsignal(number) == before
    assert lorapre("pretrain", "--resume", cut)[0] == 0
    assert losses(cut) == losses(whole)


def test_the_second_signal_ends_a_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("lorapre_recipes.train.trainer.time", SimpleNamespace(monotonic=lambda: now))
    with Brake():
        os.kill(os.getpid(), signal.SIGINT)
        now = 0.5  # torchrun hands on what the terminal has sent already
        os.kill(os.getpid(), signal.SIGINT)
        now = 2.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_without_a_checkpoint_a_run_starts_anew(
    tiny: Tiny, lorapre: Any, with_callback: Any, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(tiny(), whole)
    with_callback(Interrupt(step=2))
    code, _, stderr = lorapre("pretrain", "--preset", "tiny", "--out", cut)
    assert code == 130
    assert "there is no checkpoint yet; start anew with: lorapre pretrain --resume" in stderr.splitlines()[-1]
    with_callback(Interrupt(step=13))
    assert lorapre("pretrain", "--resume", cut)[0] == 0
    assert losses(cut) == losses(whole)


def test_a_finished_run_can_be_made_longer(tiny: Tiny, lorapre: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(tiny(), run)
    before = losses(run)
    code, _, stderr = lorapre("pretrain", "--resume", run, "--steps", "12")
    assert (code, stderr) == (2, "lorapre: --steps 12: the run has taken 12 already; give more\n")
    assert lorapre("pretrain", "--resume", run, "--steps", "16")[0] == 0
    assert losses(run)[: len(before)] == before
    assert losses(run)[-1]["step"] == 16
    assert json.loads((run / "summary.json").read_text())["steps"] == 16
    assert PretrainConfig.load(run / "config.json") == tiny(steps=16)


@pytest.mark.parametrize("optimizer", ["lorapre-adamw", "lorapre-muon"])
def test_rank_0_trains_without_momentum_and_resumes(
    optimizer: OptimizerName, tiny: Tiny, lorapre: Any, tmp_path: Path
) -> None:
    options = ("--preset", "tiny", "--optimizer", optimizer, "--rank", 0, "--steps", 2)
    code, stdout, _ = lorapre("pretrain", *options, "--out", tmp_path / "run")
    assert (code, f"{optimizer}, rank 0" in stdout) == (0, True)
    model = build_model(tiny(), end_of_document=0)
    shapes = [weight.shape for name, weight in model.named_parameters() if "_proj" in name]
    means = sum(map(sum, shapes)) if optimizer == "lorapre-adamw" else 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["matrix_state_bytes"] == 4 * (means + len(shapes))
    assert lorapre("pretrain", "--resume", tmp_path / "run", "--steps", 3)[0] == 0


def test_divergence_is_an_error(tiny: Tiny, lorapre: Any, tmp_path: Path) -> None:
    options = ("--preset", "tiny", "--optimizer", "adamw", "--lr", "1e30", "--out", tmp_path / "run")
    code, _, stderr = lorapre("pretrain", *options)
    assert code == 1
    assert "try a lower --lr or --scale" in stderr.splitlines()[-1]


# Optimizers


def model_and_optimizer(config: PretrainConfig) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build_model(config, end_of_document=0)
    return model, build_optimizer(model, config)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_matrices_have_their_own_learning_rate(optimizer: OptimizerName, tiny: Tiny) -> None:
    config = tiny(optimizer, lr=0.01, scale=0.5)
    model, built = model_and_optimizer(config)
    rates = {
        name: group["lr"] * (group.get("scale", 1.0) if group.get("rank") else 1.0)
        for group in built.param_groups
        for name in group["param_names"]
    }
    assert rates.keys() == {name for name, _ in model.named_parameters()}
    matrices = {name for name, rate in rates.items() if rate == 0.005}
    assert matrices == {name for name in rates if "_proj" in name}
    assert {rate for name, rate in rates.items() if name not in matrices} == {0.01}
    assert built.param_groups[0]["lr"] == 0.01  # what loggers report


def test_muon_with_adamw_is_both(tiny: Tiny) -> None:
    ours, combined = model_and_optimizer(tiny("muon"))
    theirs, _ = model_and_optimizer(tiny("muon"))
    assert isinstance(combined, WithAdamW)
    named = dict(theirs.named_parameters())
    matrices = [p for name, p in named.items() if "_proj" in name]
    rest = [p for name, p in named.items() if "_proj" not in name]
    config = tiny("muon")
    muon = torch.optim.Muon(
        matrices, lr=config.lr * config.scale, momentum=0.95, weight_decay=0, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=0)
    for step in range(4):
        if step == 2:  # through a checkpoint
            state = combined.state_dict()
            _, combined = ours, build_optimizer(ours, config)
            combined.load_state_dict(state)
        tokens = torch.randint(0, 300, (2, 16))
        for model in (ours, theirs):
            model.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
        for optimizer in (combined, muon, adamw):
            optimizer.step()
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, named[name]), name


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "nadam"], "--optimizer. Choose from"),
        (["--preset", "huge"], "--preset: there is no 'huge'; choose from llama-tiny"),
        (["--rank", "0", "--variant", "paper"], "--rank: must be at least 1 for variant paper, not 0"),
        (["--optimizer", "galore", "--rank", "0"], "--rank: must be at least 1 for galore, not 0"),
        (["--rank", "four"], "--rank"),
        (
            ["--rank", "16"],
            "--rank: rank: factors would not be smaller than the matrix for model.layers.0.self_attn.q_proj",
        ),
        (["--optimizer", "adamw", "--rank", "4"], "--rank: adamw has no such option"),
        (["--optimizer", "adamw", "--variant", "paper"], "--variant: adamw has no such option"),
        (
            ["--optimizer", "lorapre-muon", "--variant", "split"],
            "--variant: lorapre-muon has subspace and paper, not split",
        ),
        (["--variant", "better"], "--variant"),
        (["--lr", "0"], "--lr: must be a positive number"),
        (["--scale", "nan"], "--scale: must be a positive number"),
        (["--steps", "0"], "--steps: must be at least 1"),
        (["--seed", "-1"], "--seed: must be at least 0"),
        (["--report-to", "nowhere"], "--report-to: 'nowhere' is unknown or not installed"),
        (["--data", "missing.txt"], "--data missing.txt: no such file or folder"),
        (["--wrong", "1"], "--wrong"),
        (["--lr"], "--lr"),
        (["--out", "full"], "--out full: this folder is not empty"),
        (["--out", "file"], "--out file: this is a file"),
        (["--out", "file/run"], "--out file/run: this folder cannot be made"),
        (["--resume", "full"], "--resume full: not a run folder"),
        (["--resume", "full", "--lr", "1"], "--resume: a run goes on as it began; leave out --preset, --lr"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tiny: Tiny,
    lorapre: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "file").touch()
    preset = [] if arguments[0] == "--preset" or arguments == ["--resume", "full"] else ["--preset", "tiny"]
    code, stdout, stderr = lorapre("pretrain", *preset, *arguments)
    assert code == 2
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert message in stderr
    assert not (tmp_path / "runs").exists()  # nothing left behind


def test_runs_that_cannot_go_on(tiny: Tiny, lorapre: Any, tmp_path: Path, corpus: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "config.json", tiny())
    (run / "config.json").write_text('{"steps": 12}')
    assert "not a config that this version of lorapre wrote" in lorapre("pretrain", "--resume", run)[2]
    (run / "config.json").unlink()

    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(), run, callbacks=[Interrupt(step=5)])
    before = losses(run)
    corpus.write_text(corpus.read_text() + json.dumps({"text": "more"}) + "\n")
    code, _, stderr = lorapre("pretrain", "--resume", run)
    assert code == 2
    assert "the data have changed" in stderr
    assert losses(run) == before

    corpus.write_text(corpus.read_text().rpartition('{"text": "more"}')[0])
    assert lorapre("pretrain", "--resume", run)[0] == 0
    code, _, stderr = lorapre("pretrain", "--resume", run)
    assert code == 2
    assert "nothing to do" in stderr


def test_config_errors_name_their_option() -> None:
    with pytest.raises(UserError, match=r"^--batch-size: "):
        llama_tiny().replace(batch_size=0)
    with pytest.raises(UserError, match=r"^--rank: lorapre-adamw needs a value"):
        llama_tiny().replace(rank=None)


def test_help_and_module() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "lorapre_recipes", "pretrain", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    for option in ("--optimizer", "--rank", "--lr", "--scale", "--variant", "--data", "--out", "--resume"):
        assert option in result.stdout


# Report


def test_the_picture_shows_what_the_steps_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    row = {"step": 1, "tokens": 9, "loss": 2.0, "validation_loss": 2.0, "validation_perplexity": 7.4}
    for stats in ({}, dict.fromkeys(STATS, 0.5)):
        plot_curves([row | stats, row | stats | {"tokens": 18}], llama_tiny(), 10**6, tmp_path / "x.png")
    plain, full = drawn
    assert len(plain.axes) == 1
    assert [line.get_label() for line in full.axes[1].lines] == [name.replace("_", ", ") for name in STATS]


def test_table_fits_80_columns() -> None:
    summary = Summary(
        optimizer="lorapre-adamw",
        parameters=10**12,
        trained_parameters=10**11,
        adapter_bytes=10**13,
        steps=10**6,
        tokens=10**13,
        loss_before=13.8155,
        validation_loss=13.8155,
        validation_perplexity=1e6,
        processes=2,
        state_bytes=10**13,
        matrix_state_bytes=10**13,
        adamw_state_bytes=10**14,
        optimizer_share=0.999,
        tokens_per_second=10**7,
        peak_bytes=10**12,
        step_seconds=1e6,
        wall_seconds=10**6,
        device="NVIDIA H100 80GB HBM3",
        versions={},
    )
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(summary_table(summary, llama_tiny()))
    assert max(len(line.rstrip()) for line in console.export_text().splitlines()) <= 80
