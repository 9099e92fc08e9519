"""Ended runs as rows of one JSON file, to which comparisons add: `lorapre compare --record FILE`.

A row is known by its command, which repeats the run: the same run recorded again takes the place of the old.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import shlex
from pathlib import Path
from typing import Any

from lorapre_recipes.compare.cells import Ending, ending_of
from lorapre_recipes.config import PretrainConfig, flag
from lorapre_recipes.files import read_json, write_whole
from lorapre_recipes.presets import PRETRAIN, get_preset
from lorapre_recipes.train.summary import read_metrics


def record(folder: Path, file: Path) -> None:
    """Merge a run that has ended into a file; several processes may do so at once."""
    ending = ending_of(folder)
    if ending is None or not (folder / "config.json").is_file():  # it did not begin
        return
    row = row_of(folder, PretrainConfig.load(folder / "config.json"), ending)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(file.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {each["command"]: each for each in (read_json(file) if file.is_file() else [])}
        rows[row["command"]] = row
        lines = ",\n".join(json.dumps(rows[command]) for command in sorted(rows))
        write_whole(file, f"[\n{lines}\n]\n")


def row_of(folder: Path, config: PretrainConfig, ending: Ending) -> dict[str, Any]:
    """A run as a row. `loss` and `curve`, of tokens and validation loss, are held-out nats per token."""
    own = (
        "optimizer",
        "variant",
        "compress",
        "rank",
        "rules",
        "terms",
        "seed",
        "lr",
        "scale",
        "momentum",
    )
    metrics = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    return {
        **{name: getattr(config, name) for name in own},
        "beta1": config.betas[0],
        "precision": config.precision,
        "model": config.preset,
        "data": Path(config.data).name,
        "tokens": config.steps * config.tokens_per_step,
        "batch_tokens": config.tokens_per_step,
        "loss": ending.loss if math.isfinite(ending.loss) else None,
        "curve": [
            (each["tokens"], each["validation_loss"])
            for each in metrics
            if "validation_loss" in each
        ],
        **{name: ending.summary.get(name) for name in FIGURES},
        "command": command_of(config),
    }


FIGURES = ("parameters", "matrix_state_bytes", "state_bytes", "peak_bytes", "step_seconds")


def command_of(config: PretrainConfig) -> str:
    """The command that repeats a run: its preset, and what differs from that."""
    usual = dataclasses.asdict(get_preset(PRETRAIN, config.preset)(config.optimizer))
    words = ["lorapre", "pretrain", "--preset", config.preset, "--optimizer", config.optimizer]
    for name, value in dataclasses.asdict(config).items():
        if value == usual[name]:
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif name == "data":
            words += [flag(name), Path(value).name]  # where it lies is another matter elsewhere
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [flag(name), *map(str, values)]
    return shlex.join(words)
