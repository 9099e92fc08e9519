"""A preset that trains in seconds on a corpus of its own, and what tests of runs share."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lorapre_recipes.config import OptimizerName, PretrainConfig
from lorapre_recipes.presets import llama_tiny
from lorapre_recipes.train.summary import STATS, read_metrics

TEXTS = [f"Document {i}: the {i * i} quick brown foxes jump over {i} lazy dogs. " * 4 for i in range(40)]


def write_corpus(folder: Path) -> Path:
    """corpus.jsonl, in `folder`."""
    file = folder / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return file


def tiny_config(optimizer: OptimizerName = "lorapre-adamw", **changes: Any) -> PretrainConfig:
    """12 steps of a Llama of 37 thousand parameters."""
    config = llama_tiny(optimizer)
    fields: dict[str, Any] = {
        "preset": "tiny",
        "vocab_size": 300,
        "sequence_length": 16,
        "hidden_size": 32,
        "intermediate_size": 48,
        "layers": 2,
        "heads": 2,
        "rank": None if config.rank is None else 4,
        "steps": 12,
        "batch_size": 4,
        "eval_sequences": 8,
        "log_points": 12,
        "evaluations": 3,
        "checkpoints": 3,
    }
    return config.replace(**(fields | changes))


def losses(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times, and without averages that a resumed run begins anew."""
    return [
        {name: value for name, value in row.items() if not name.endswith("seconds") and name not in STATS}
        for row in read_metrics(run / "metrics.jsonl")
    ]


class Interrupt(TrainerCallback):
    """Ctrl-C at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
