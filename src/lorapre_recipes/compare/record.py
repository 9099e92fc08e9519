"""Ended runs as rows of one JSON file, to which comparisons add: `lorapre compare --record FILE`.

A row is known by its command, which repeats the run: if the same run is recorded again, its new row
takes the place of the old one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import shlex
from pathlib import Path
from typing import Any

from lorapre_recipes.config import PretrainConfig, flag
from lorapre_recipes.files import read_json, write_whole
from lorapre_recipes.presets import PRETRAIN, get_preset
from lorapre_recipes.train.summary import read_metrics

OPTIONS = ("optimizer", "variant", "rank", "rules", "ends", "terms", "seed", "lr", "scale")
ALWAYS = ("rank", "variant", "lr", "scale", "steps", "batch_size", "accumulation")
FIGURES = ("parameters", "matrix_state_bytes", "state_bytes", "peak_bytes", "step_seconds")


def record(run: Path, file: Path) -> None:
    """Merge a run that has ended into a file; several processes may do so at once."""
    ended = (run / "summary.json").is_file() or (run / "ended.json").is_file()
    if not ended or not (run / "config.json").is_file():  # without a config it did not begin
        return
    row = row_of(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(file.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {each["command"]: each for each in (read_json(file) if file.is_file() else [])}
        rows[row["command"]] = row
        lines = ",\n".join(json.dumps(rows[command]) for command in sorted(rows))
        write_whole(file, f"[\n{lines}\n]\n")


def row_of(run: Path) -> dict[str, Any]:
    """A run as a row. `loss` and `curve`, of tokens and loss, are held-out nats per token."""
    config = PretrainConfig.load(run / "config.json")
    metrics = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    evaluated = [each for each in metrics if "validation_loss" in each]
    summary = read_json(run / "summary.json") if (run / "summary.json").is_file() else {}
    loss = summary.get("validation_loss", math.inf)
    return {
        **{name: getattr(config, name) for name in (*OPTIONS, "momentum", "momentum_dtype")},
        "beta1": config.betas[0],
        "precision": config.precision,
        "model": config.preset,
        "data": Path(config.data).name,
        "tokens": config.steps * config.tokens_per_step,
        "batch_tokens": config.tokens_per_step,
        "loss": loss if math.isfinite(loss) else None,
        "curve": [(each["tokens"], each["validation_loss"]) for each in evaluated],
        **{name: summary.get(name) for name in FIGURES},
        "command": command_of(config),
    }


def command_of(config: PretrainConfig) -> str:
    """The command that repeats a run: its preset, and the options that differ from it.

    And those which decide the result most: presets may change.
    """
    usual = dataclasses.asdict(get_preset(PRETRAIN, config.preset)(config.optimizer))
    words = ["lorapre", "pretrain", "--preset", config.preset, "--optimizer", config.optimizer]
    for name, value in dataclasses.asdict(config).items():
        if value == usual[name] and (value is None or name not in ALWAYS):
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif name == "data":
            words += [flag(name), Path(value).name]  # it may lie elsewhere on another machine
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [flag(name), *map(str, values)]
    return shlex.join(words)
