"""What a run leaves to look at: the table at its end, the picture of its curves, the summary."""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from lorapre_recipes.config import OptimizerConfig, RunConfig
from lorapre_recipes.console import binary, duration, short

Metric = dict[str, Any]  # one line of metrics.jsonl
STATS = ("captured_mean", "captured_min", "update_mean", "update_max")  # of `optimizer.stats()`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of a finished run."""

    optimizer: str
    parameters: int
    trained_parameters: int
    adapter_bytes: int  # of weights beside the model's own
    steps: int
    tokens: int
    loss_before: float | None  # of a model that is fine-tuned, before its first step
    validation_loss: float  # nats per token
    validation_perplexity: float
    processes: int
    state_bytes: int  # of the first process, which holds most
    matrix_state_bytes: int  # that of attention and MLP matrices, in this process
    adamw_state_bytes: int  # what torch.optim.AdamW would hold there
    optimizer_share: float | None  # of a step's time, in optimizer.step; None in the backward pass
    tokens_per_second: float  # while training; evaluation and checkpoints left out
    peak_bytes: int  # of the process: allocated on its GPU, or else resident
    step_seconds: float  # all training steps together, without evaluation and checkpoints
    wall_seconds: float  # of the last session, everything included
    device: str
    versions: dict[str, str]


def describe_optimizer(config: OptimizerConfig) -> str:
    """The optimizer and the options that it has, in words."""
    parts = {
        f"rank {config.rank}": config.rank is not None,
        f"{config.variant}": config.variant is not None,
        "low-rank ends": config.ends == "low-rank",
        "gradients released": config.release,
        f"{config.momentum_dtype} momentum": config.momentum_dtype != "fp32",
        f"{config.dtype} weights": config.dtype != "fp32",
        "stochastic rounding": getattr(config, "stochastic_rounding", False),
    }
    return ", ".join([config.method, *(words for words, shown in parts.items() if shown)])


def summary_table(summary: Summary, config: RunConfig) -> Table:
    """The table that ends a run, at most 80 columns wide."""
    ratio = summary.adamw_state_bytes / summary.state_bytes
    beside = "per process, AdamW's /" if summary.processes > 1 else "AdamW's divided by"
    loss, perplexity = summary.validation_loss, summary.validation_perplexity
    rows = [("validation perplexity", f"{perplexity:.2f}", f"per token; {loss:.4f} nats")]
    if summary.loss_before is not None:
        before = f"{summary.loss_before:.4f} nats"
        rows.append(("before the first step", f"{math.exp(summary.loss_before):.2f}", before))
    rows += [
        ("optimizer state", binary(summary.state_bytes), f"{beside} {ratio:.2f}"),
        ("AdamW's state, same model", binary(summary.adamw_state_bytes), ""),
    ]
    if summary.adapter_bytes:
        rows.append(("adapters", binary(summary.adapter_bytes), "beside the model's weights"))
    if summary.optimizer_share is not None:
        share = f"{summary.optimizer_share:.1%}"
        rows.append(("time in optimizer.step", share, "of the training steps' time"))
    frozen = summary.trained_parameters < summary.parameters
    trained = f", {short(summary.trained_parameters)} train" if frozen else ""
    rows += [
        ("training speed", f"{summary.tokens_per_second:,.0f}", f"tokens/s, {summary.device}"),
        ("wall time", duration(summary.wall_seconds), "with data and evaluation"),
        ("trained on", short(summary.tokens), f"tokens in {summary.steps:,} steps"),
        ("model", short(summary.parameters), f"parameters{trained}"),
    ]
    return figures(describe_optimizer(config), rows)


def figures(title: str, rows: Iterable[tuple[str, str, str]]) -> Table:
    """A table of names, figures and what they mean."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    return table


def read_metrics(path: Path) -> list[Metric]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_curves(metrics: list[Metric], config: RunConfig, parameters: int, path: Path) -> None:
    """Draw the losses over tokens, and below what the steps did."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    known = [name for name in STATS if any(name in row for row in metrics)]
    figure = Figure(figsize=(8, 7.2 if known else 4.8), layout="constrained")
    axes, *below = figure.subplots(2 if known else 1, squeeze=False, sharex=True)[:, 0]
    last = [row for row in metrics if "validation_loss" in row][-1]
    # In thousands or millions, so that the axis needs no power of ten.
    unit, word = (1e6, "millions") if last["tokens"] >= 1e6 else (1e3, "thousands")

    def series(name: str) -> tuple[list[float], list[float]]:
        rows = [row for row in metrics if name in row]
        return [row["tokens"] / unit for row in rows], [row[name] for row in rows]

    tokens, losses = series("loss")
    axes.plot(tokens, losses, color="C0", label="training")
    tokens, losses = series("validation_loss")
    axes.plot(tokens, losses, "o-", color="C1", markersize=4.5, label="validation, held out")
    place: dict[str, Any] = {"xytext": (0, -16), "textcoords": "offset points", "ha": "right"}
    perplexity = f"perplexity {last['validation_perplexity']:.1f}"
    axes.annotate(perplexity, (tokens[-1], losses[-1]), color="C1", **place)
    axes.margins(y=0.08)  # room for the line above
    axes.set_xlim(left=0)
    for name in known:
        color, style = f"C{2 + name.startswith('update')}", "-" if "mean" in name else ":"
        below[0].plot(*series(name), style, color=color, label=name.replace("_", ", "))
    for lower in below:
        lower.set(ylim=(0, None), ylabel="of the gradient; of lr × scale")
        lower.legend(frameon=False)
    (below or [axes])[0].set_xlabel(f"tokens seen ({word})")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    batch = f"{config.sequences_per_step} × {config.sequence_length} tokens"
    axes.set_title(
        f"{describe_optimizer(config)}: {short(parameters)} parameters on "
        f"{Path(config.data).name}\nlr {config.lr:g} (matrices × {config.scale:g}), "
        f"{config.steps:,} steps of {batch}, seed {config.seed}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
