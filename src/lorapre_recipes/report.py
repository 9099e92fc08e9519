"""What a run leaves to look at: the table at its end, the picture of its curves, the summary as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from lorapre_recipes.config import PretrainConfig

Metric = dict[str, Any]  # one line of metrics.jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of a finished run."""

    optimizer: str
    parameters: int
    steps: int
    tokens: int
    validation_loss: float  # nats per token
    validation_perplexity: float
    state_bytes: int
    adamw_state_bytes: int  # what torch.optim.AdamW holds on the same model
    optimizer_share: float  # of the time of a training step, in optimizer.step
    tokens_per_second: float  # while training; evaluation and checkpoints left out
    wall_seconds: float  # of the last session, everything included
    device: str
    versions: dict[str, str]

    def save(self, path: Path) -> None:
        """Write every field as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def describe_optimizer(config: PretrainConfig) -> str:
    """The optimizer and the options that it has, in words."""
    parts: list[str] = [config.optimizer]
    if config.rank is not None:
        parts.append(f"rank {config.rank}")
    if config.variant is not None:
        parts.append(config.variant)
    if config.compress not in (None, "both"):
        parts.append(f"{config.compress} moment only")
    return ", ".join(parts)


def short(number: float) -> str:
    """A count in three digits: 4.21 M."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def megabytes(count: int) -> str:
    """Bytes in decimal megabytes."""
    return f"{count / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def summary_table(summary: Summary, config: PretrainConfig) -> Table:
    """The table that ends a run, at most 80 columns wide."""
    ratio = summary.adamw_state_bytes / summary.state_bytes
    table = Table(title=describe_optimizer(config), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row(
        "validation perplexity",
        f"{summary.validation_perplexity:.2f}",
        f"per token; {summary.validation_loss:.4f} nats",
    )
    table.add_row("optimizer state", megabytes(summary.state_bytes), f"AdamW's divided by {ratio:.2f}")
    table.add_row("AdamW's state, same model", megabytes(summary.adamw_state_bytes), "")
    table.add_row("time in optimizer.step", f"{summary.optimizer_share:.1%}", "of the training steps' time")
    table.add_row("training speed", f"{summary.tokens_per_second:,.0f}", f"tokens/s, {summary.device}")
    table.add_row("wall time", duration(summary.wall_seconds), "data, evaluation, checkpoints too")
    table.add_row("trained on", short(summary.tokens), f"tokens in {summary.steps:,} steps")
    table.add_row("model", short(summary.parameters), "parameters")
    return table


def read_metrics(path: Path) -> list[Metric]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def smooth(values: Iterable[float], window: float = 5.0) -> list[float]:
    """The debiased exponential moving average over about `window` values: no lag at the start."""
    beta, average, weight, result = 1 - 1 / window, 0.0, 0.0, []
    for value in values:
        average = beta * average + (1 - beta) * value
        weight = beta * weight + (1 - beta)
        result.append(average / weight)
    return result


def plot_curves(metrics: list[Metric], config: PretrainConfig, parameters: int, path: Path) -> None:
    """Draw training and validation loss over tokens, with perplexity on the right-hand axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display is needed
    from matplotlib.figure import Figure

    train = [row for row in metrics if "loss" in row]
    validation = [row for row in metrics if "validation_loss" in row]
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    # In thousands or millions, so that the axis needs no power of ten.
    unit, word = (1e6, "millions") if train and train[-1]["tokens"] >= 1e6 else (1e3, "thousands")
    tokens = [row["tokens"] / unit for row in train]
    losses = [row["loss"] for row in train]
    axes.plot(tokens, losses, color="C0", alpha=0.25, linewidth=1)
    axes.plot(tokens, smooth(losses), color="C0", linewidth=1.8, label="training (smoothed; raw behind)")
    axes.plot(
        [row["tokens"] / unit for row in validation],
        [row["validation_loss"] for row in validation],
        color="C1",
        marker="o",
        markersize=4.5,
        linewidth=1.2,
        label="validation (held-out documents)",
    )
    if validation:
        last = validation[-1]
        axes.annotate(
            f"perplexity {last['validation_perplexity']:.1f}",
            (last["tokens"] / unit, last["validation_loss"]),
            xytext=(0, 12),
            textcoords="offset points",
            ha="right",
            color="C1",
        )
    axes.set_xlabel(f"tokens seen ({word})")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    right = axes.secondary_yaxis("right", functions=(lambda y: y, lambda y: y))
    right.set_ylabel("perplexity")
    figure.canvas.draw()  # fixes the ticks of the left axis, which the right one shares
    ticks = [tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    right.set_yticks(ticks, [f"{math.exp(tick):,.0f}" for tick in ticks])
    axes.set_title(
        f"{describe_optimizer(config)}: Llama of {short(parameters)} parameters on {Path(config.data).name}\n"
        f"lr {config.lr:g} (matrices × {config.scale:g}), {config.steps:,} steps of "
        f"{config.sequences_per_step} × {config.sequence_length} tokens, seed {config.seed}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
