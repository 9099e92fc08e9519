"""Options that are made of the fields of configs: each field has one, with its help, and is checked."""

import dataclasses
import json
import re
from typing import Annotated, Any

import pytest
from cyclopts import App, Parameter

from lorapre_recipes.cli.options import options, parameters
from lorapre_recipes.config import (
    ONLY_FOR,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    UserError,
    flag,
)
from lorapre_recipes.plan.settings import Settings
from lorapre_recipes.presets import PRETRAIN, llama_tiny, own

CONFIGS = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "plan": Settings,
    "evaluate": EvaluateConfig,
}
# `method` stands for these two; a fine-tuning runs on one process.
WITHOUT = {"finetune": {"optimizer", "adapter", "fsdp"}}


@pytest.mark.parametrize("command", CONFIGS)
def test_every_field_has_its_option_and_says_which_optimizers_have_it(
    command: str, lorapre: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, stdout, _ = lorapre(command, "--help")
    assert code == 0
    assert max(map(len, stdout.splitlines())) <= 80
    words = " ".join(stdout.replace("│", " ").split())
    config = CONFIGS[command]
    for field in dataclasses.fields(config):
        shown = f"{flag(field.name)} " in words
        assert shown == (field.name not in WITHOUT.get(command, ())), field.name
        if shown and field.name in ONLY_FOR:
            assert f"Only for {next(m for m in config.METHODS if m in ONLY_FOR[field.name])}" in words


def test_help_shows_the_values_of_the_preset(lorapre: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def words(*arguments: str) -> str:
        return " ".join(lorapre(*arguments, "--help")[1].replace("│", " ").split())

    monkeypatch.setenv("COLUMNS", "200")
    usual = words("pretrain")
    for config, shown in ((llama_tiny(), usual), (own(), words("finetune"))):
        for name in ("lr", "scale", "steps", "batch_size", "rank", "variant", "warmup", "betas"):
            value = getattr(config, name)
            typed = "0.9 0.95" if name == "betas" else "none" if value is None else value
            assert re.search(rf"{flag(name)} .*?\[default: {typed}\]", shown), (config.preset, name)
    assert usual.count("[default: ") >= len(dataclasses.fields(PretrainConfig)) - 1  # but the preset


def test_a_dry_run_prints_the_config(lorapre: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = lorapre("pretrain", "--preset", "llama-1m", "--lr", "0.5", "--dry-run")
    assert (code, stderr) == (0, "")
    (tmp_path / "config.json").write_text(stdout)
    assert PretrainConfig.load(tmp_path / "config.json") == PRETRAIN["llama-1m"]("lorapre-adamw").replace(
        lr=0.5
    )
    code, stdout, _ = lorapre("finetune", "--preset", "arithmetic", "--method", "dora", "--dry-run")
    assert json.loads(stdout)["adapter"] == "dora"
    assert code == 0
    for given, preset in (([], "smollm2"), (["--data", "x.jsonl"], "own")):
        _, stdout, _ = lorapre("finetune", *given, "--dry-run")
        assert json.loads(stdout)["preset"] == preset
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert "leave out --dry-run" in lorapre("pretrain", "--resume", "x", "--dry-run")[2]


def test_a_new_field_is_a_new_option() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Longer(PretrainConfig):
        dropout: Annotated[float, "share of activations that are set to zero."] = 0.0
        shuffled: Annotated[bool, "whether the data are shuffled."] = True
        hidden: int = 3

    app = App(default_parameter=Parameter(negative=()), result_action="return_value")

    @app.default
    @options(Longer, without=("lr",), preset=True)
    def command(out: str = "", *, changes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return out, changes

    given = ["--dropout", "0.5", "--no-shuffled", "--betas", "0.8", "0.9", "--rules", "a=1", "--rules", "b=2"]
    changes = {"dropout": 0.5, "shuffled": False, "betas": (0.8, 0.9), "rules": ("a=1", "b=2")}
    assert app([*given, "x"], exit_on_error=False) == ("x", changes)
    assert app([]) == ("", {})
    names = [parameter.name for parameter in parameters(Longer, preset=True)]
    assert {"dropout", "shuffled"} < {*names}
    assert "hidden" not in names  # it has no help
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "--layers: must be at least 1, not 0"),
        ({"vocab_size": 256}, "--vocab-size: must be at least 257, not 256"),
        ({"betas": (0.9, 1.0)}, "--betas: must be at least 0 and less than 1, not 1.0"),
        ({"warmup": 1.5}, "--warmup: must be between 0 and 1, not 1.5"),
        ({"weight_decay": float("inf")}, "--weight-decay: must be a number that is not negative, not inf"),
        ({"heads": 3}, "--heads 3: a head must have an even share of --hidden-size 256"),
        ({"ends": "low-rank", "variant": "paper"}, "--ends: variant paper moves rows of an embedding"),
        ({"ends": "all"}, "--ends: there is no 'all'; choose from dense, low-rank"),
        ({"dtype": "fp64"}, "--dtype: there is no 'fp64'; choose from fp32, bf16"),
        ({"rules": ("lm_head",)}, "--rules 'lm_head': write PATTERN=RANK"),
        ({"release": True, "accumulation": 2}, "--release: gradients cannot be accumulated"),
    ],
)
def test_values_that_no_run_can_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        llama_tiny().replace(**changes)
    assert str(caught.value).startswith(message)


def test_rules_and_freeze_of_pretrain(lorapre: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorapre_recipes import presets
    from tiny_runs import tiny_config, write_corpus

    data = str(write_corpus(tmp_path))
    monkeypatch.setitem(presets.PRETRAIN, "tiny", lambda _: tiny_config(data=data, steps=2, layers=1))
    options = ("--rules", "lm_head=4", "--freeze", "embed_tokens")
    assert lorapre("pretrain", "--preset", "tiny", *options, "--out", tmp_path / "a")[0] == 0
    coverage = (tmp_path / "a" / "coverage.txt").read_text()
    routes = {line.split()[0]: line.split()[2] for line in coverage.splitlines() if line.count("x") == 1}
    assert routes["model.embed_tokens"] == "frozen"
    assert routes["lm_head"] == "4"
    options = ("--ends", "low-rank", "--rules", "lm_head=2")
    assert lorapre("pretrain", "--preset", "tiny", *options, "--out", tmp_path / "b")[0] == 0
    coverage = (tmp_path / "b" / "coverage.txt").read_text()
    routes = {line.split()[0]: line.split()[2] for line in coverage.splitlines() if line.count("x") == 1}
    assert routes["model.embed_tokens"] == routes["model.layers.0.mlp.up_proj"] == "4"
    assert routes["lm_head"] == "2"
