"""What a run leaves to look at: the table at its end, the picture of its curves, the summary as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lorapre_recipes.config import RunConfig
from lorapre_recipes.console import duration, mebibytes, short

Metric = dict[str, Any]  # one line of metrics.jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of a finished run."""

    optimizer: str
    parameters: int
    trained_parameters: int
    adapter_bytes: int  # of weights beside the model's own
    steps: int
    tokens: int
    validation_loss: float  # nats per token
    validation_perplexity: float
    processes: int
    state_bytes: int  # of the process that holds most
    adamw_state_bytes: int  # what torch.optim.AdamW would hold there
    optimizer_share: float | None  # of a training step's time, in optimizer.step; None in the backward pass
    tokens_per_second: float  # while training; evaluation and checkpoints left out
    peak_bytes: int  # of the process: allocated on its GPU, or else resident
    step_seconds: float  # all training steps together, without evaluation and checkpoints
    wall_seconds: float  # of the last session, everything included
    device: str
    versions: dict[str, str]


def describe_optimizer(config: RunConfig) -> str:
    """The optimizer and the options that it has, in words."""
    parts: list[str] = [config.method]
    if config.rank is not None:
        parts.append(f"rank {config.rank}")
    if config.variant is not None:
        parts.append(config.variant)
    if config.compress not in (None, "both"):
        parts.append(f"{config.compress} moment only")
    if config.release:
        parts.append("gradients released")
    if config.dtype != "fp32":
        parts.append(f"{config.dtype} weights" + ", stochastic rounding" * config.stochastic_rounding)
    return ", ".join(parts)


def summary_table(summary: Summary, config: RunConfig) -> Table:
    """The table that ends a run, at most 80 columns wide."""
    ratio = summary.adamw_state_bytes / summary.state_bytes
    frozen = summary.trained_parameters < summary.parameters
    trained = f", {short(summary.trained_parameters)} train" if frozen else ""
    table = Table(title=describe_optimizer(config), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row(
        "validation perplexity",
        f"{summary.validation_perplexity:.2f}",
        f"per token; {summary.validation_loss:.4f} nats",
    )
    beside = "per process, AdamW's /" if summary.processes > 1 else "AdamW's divided by"
    table.add_row("optimizer state", mebibytes(summary.state_bytes), f"{beside} {ratio:.2f}")
    table.add_row("AdamW's state, same model", mebibytes(summary.adamw_state_bytes), "")
    if summary.adapter_bytes:
        table.add_row("adapters", mebibytes(summary.adapter_bytes), "beside the model's weights")
    if summary.optimizer_share is not None:
        table.add_row(
            "time in optimizer.step", f"{summary.optimizer_share:.1%}", "of the training steps' time"
        )
    table.add_row("training speed", f"{summary.tokens_per_second:,.0f}", f"tokens/s, {summary.device}")
    table.add_row("wall time", duration(summary.wall_seconds), "with data and evaluation")
    table.add_row("trained on", short(summary.tokens), f"tokens in {summary.steps:,} steps")
    table.add_row("model", short(summary.parameters), f"parameters{trained}")
    return table


def read_metrics(path: Path) -> list[Metric]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def smooth(values: Sequence[float], reach: int = 2) -> list[float]:
    """The mean of each value and of `reach` neighbours on either side: centred, so that it does not lag."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def round_perplexities(low: float, high: float) -> list[int]:
    """1, 2, 5, 10, 20, ... as far as their logarithms, the losses, lie in [low, high]."""
    candidates = (digit * 10**power for power in range(10) for digit in (1, 2, 5))
    return [candidate for candidate in candidates if low <= math.log(candidate) <= high]


def plot_curves(metrics: list[Metric], config: RunConfig, parameters: int, path: Path) -> None:
    """Draw training and validation loss over tokens, with perplexity on the right-hand axis."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    train = [row for row in metrics if "loss" in row]
    validation = [row for row in metrics if "validation_loss" in row]
    last = validation[-1]
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()

    # In thousands or millions, so that the axis needs no power of ten.
    unit, word = (1e6, "millions") if last["tokens"] >= 1e6 else (1e3, "thousands")
    tokens = [row["tokens"] / unit for row in train]
    losses = [row["loss"] for row in train]
    axes.plot(tokens, losses, color="C0", alpha=0.3, linewidth=1, label="training")
    axes.plot(tokens, smooth(losses), color="C0", linewidth=1.8, label="training, smoothed")
    axes.plot(
        [row["tokens"] / unit for row in validation],
        [row["validation_loss"] for row in validation],
        color="C1",
        marker="o",
        markersize=4.5,
        linewidth=1.2,
        label="validation, held out",
    )
    axes.annotate(
        f"perplexity {last['validation_perplexity']:.1f}",
        (last["tokens"] / unit, last["validation_loss"]),
        xytext=(0, -16),
        textcoords="offset points",
        ha="right",
        color="C1",
    )
    axes.margins(y=0.08)  # room for the line above
    axes.set_xlim(left=0)
    axes.set_xlabel(f"tokens seen ({word})")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    ticks = round_perplexities(*axes.get_ylim())
    right = axes.secondary_yaxis("right")
    right.set_yticks([math.log(tick) for tick in ticks], [f"{tick:,}" for tick in ticks])
    right.set_ylabel("perplexity")
    axes.set_title(
        f"{describe_optimizer(config)}: {short(parameters)} parameters on {Path(config.data).name}\n"
        f"lr {config.lr:g} (matrices × {config.scale:g}), {config.steps:,} steps of "
        f"{config.sequences_per_step} × {config.sequence_length} tokens, seed {config.seed}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
