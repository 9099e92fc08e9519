"""The pictures of a report: curves, loss against state and rank, sensitivity to every number swept."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lorapre_recipes.compare.cells import SWEPT
from lorapre_recipes.compare.results import Standing, label
from lorapre_recipes.train.summary import read_metrics, smooth

LOGARITHMIC = ("lr", "scale", "rank", "eps", "batch_size", "refresh")

Draw = Callable[[Any, Sequence[Standing]], bool]  # on axes; whether there was something to draw


def drawings() -> list[tuple[str, str, Draw]]:
    """Title, file name and drawing of every picture that runs may give."""
    return [
        ("Validation loss over tokens", "curves", partial(draw_curves, x="tokens")),
        (
            "Training loss over the seconds of training steps",
            "time",
            partial(draw_curves, x="step_seconds"),
        ),
        ("Perplexity against bytes of state", "state", draw_state),
        ("Perplexity against rank", "rank", draw_rank),
        *(
            (f"Sensitivity to {name}", f"sensitivity-{name}", partial(draw_sensitivity, name=name))
            for name in SWEPT
        ),
    ]


def save(path: Path, draw: Draw, standings: Sequence[Standing]) -> bool:
    """Draw a picture and write it; False where there is nothing to draw."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    colours = list(colormaps["tab10"].colors)  # type: ignore[attr-defined]
    axes.set_prop_cycle(color=colours * 2, linestyle=["-"] * len(colours) + ["--"] * len(colours))
    if not draw(axes, standings):
        return False
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return True


def draw_curves(axes: Any, standings: Sequence[Standing], x: str) -> bool:
    """Loss of the best runs on the first seed, over tokens (validation) or seconds (training)."""
    y = "validation_loss" if x == "tokens" else "loss"
    curves = []
    for standing in standings:
        metrics = read_metrics(standing.best[0].folder / "metrics.jsonl") if standing.best else []
        rows = [row for row in metrics if y in row and x in row]
        losses = [row[y] for row in rows]
        if y == "loss":
            losses = smooth(losses, reach=4)
        if rows:
            axes.plot([row[x] for row in rows], losses, label=standing.title, linewidth=1.3)
            curves.append(losses)
    if not curves:
        return False
    # The beginning of a run would squeeze what tells the contenders apart.
    low = min(min(losses) for losses in curves)
    high = max(losses[len(losses) // 4] for losses in curves)
    axes.set_ylim(low - 0.05 * (high - low), high)
    axes.set_xlabel("tokens seen" if x == "tokens" else "seconds in training steps")
    axes.set_ylabel(f"{'validation' if x == 'tokens' else 'training'} loss (nats per token)")
    return True


def draw_state(axes: Any, standings: Sequence[Standing]) -> bool:
    """A point for each contender: what its state costs, what it reaches."""
    drawn = [standing for standing in standings if standing.best]
    for standing in drawn:
        perplexities = [math.exp(run.loss) for run in standing.best]
        middle = statistics.fmean(perplexities)
        axes.errorbar(
            standing.mean("state_bytes") / 2**20,
            middle,
            yerr=[[middle - min(perplexities)], [max(perplexities) - middle]],
            marker="o",
            linestyle="",
            capsize=3,
            label=standing.title,
        )
    axes.set_xlabel("optimizer state (MiB)")
    axes.set_ylabel("validation perplexity")
    return bool(drawn)


def draw_rank(axes: Any, standings: Sequence[Standing]) -> bool:
    """The best of each rank on the first seed, a line for each optimizer with several; AdamW beside."""
    lines: dict[str, dict[float, float]] = {}
    adamw = math.inf
    for standing in standings:
        config = standing.runs[0].config
        if config.optimizer == "adamw":
            adamw = min(adamw, *standing.lowest("lr").values())
        best = lines.setdefault(label(config), {})
        for rank, loss in standing.lowest("rank").items():
            best[rank] = min(best.get(rank, math.inf), loss)
    drawn = False
    ranks: set[float] = set()
    for name, best in lines.items():
        points = sorted((rank, math.exp(loss)) for rank, loss in best.items() if math.isfinite(loss))
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
            ranks |= {rank for rank, _ in points}
            drawn = True
    if drawn and math.isfinite(adamw):
        axes.axhline(math.exp(adamw), color="black", linewidth=1, linestyle="--", label="adamw")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ranks), [f"{rank:g}" for rank in sorted(ranks)])
    axes.set_xlabel("rank")
    axes.set_ylabel("validation perplexity, best values of each rank")
    return drawn


def draw_sensitivity(axes: Any, standings: Sequence[Standing], name: str) -> bool:
    """Loss on the first seed over one number, at the best of the others, where several were run."""
    drawn = False
    for standing in standings:
        best = standing.lowest(name)
        points = sorted((value, loss) for value, loss in best.items() if math.isfinite(loss))
        if len(best) > 1 and points:
            axes.plot(*zip(*points, strict=True), marker="o", label=standing.title)
            drawn = True
    if name in LOGARITHMIC and drawn:
        axes.set_xscale("log")
        tried = sorted({run.values[name] for each in standings for run in each.runs if name in run.values})
        axes.set_xticks(tried, [f"{value:g}" for value in tried])
        axes.minorticks_off()
    axes.set_xlabel(name)
    axes.set_ylabel("validation loss (nats per token)")
    return drawn
