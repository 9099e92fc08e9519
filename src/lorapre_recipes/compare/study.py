"""What a comparison shows: a table, pictures, Markdown, HTML; `lorapre report` makes them from run folders.

A contender's row is that of its best values on the first seed, over all seeds that were run with them.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorapre_recipes.compare.compare import SWEPT, folder_name
from lorapre_recipes.config import PretrainConfig, UserError
from lorapre_recipes.train.summary import Metric, describe_optimizer, read_metrics

# Figures of a summary that `report.json` keeps.
KEPT = ("state_bytes", "peak_bytes", "optimizer_share", "step_seconds", "device")
LOGARITHMIC = ("lr", "scale", "rank", "eps", "batch_size", "refresh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder that has ended."""

    folder: Path
    contender: str
    config: PretrainConfig
    loss: float  # of the last evaluation, infinite where training broke down
    reason: str | None
    summary: dict[str, Any]

    @property
    def values(self) -> dict[str, float]:
        """The numbers that a sweep may change; those that the optimizer has not are left out."""
        fields = dataclasses.asdict(self.config)
        fields["beta1"], fields["beta2"] = self.config.betas
        return {name: fields[name] for name in SWEPT if fields[name] is not None}

    @property
    def figures(self) -> dict[str, Any]:
        """What `report.json` keeps of it."""
        loss = self.loss if math.isfinite(self.loss) else None  # JSON has no infinity
        return {
            "contender": self.contender,
            "seed": self.config.seed,
            "steps": self.config.steps,
            **self.values,
            "validation_loss": loss,
            "reason": self.reason,
            **{name: self.summary.get(name) for name in KEPT},
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """The runs of an optimizer with its options: `best` are those with its best values, one per seed."""

    name: str
    runs: list[Run]
    best: list[Run]

    @property
    def title(self) -> str:
        """The optimizer in words, with what its own options say beyond that."""
        config = self.runs[0].config
        described = {"variant", "compress", "rank", *SWEPT[:2]}
        _, _, options = self.name.partition(":")
        others = [option for option in options.split(",") if option and option.split("=")[0] not in described]
        several = len({run.config.rank for run in self.runs}) > 1
        words = label(config) if several else describe_optimizer(config)
        return ", ".join([words, *others])

    @property
    def loss(self) -> float:
        """Mean over seeds, in nats per token; infinite where no run ended with a number."""
        return statistics.fmean(run.loss for run in self.best) if self.best else math.inf

    @property
    def spread(self) -> float | None:
        """Standard deviation of the loss over seeds; None of a single one."""
        return statistics.stdev(run.loss for run in self.best) if len(self.best) > 1 else None

    @property
    def at_edge(self) -> list[str]:
        """Which of lr and scale are the lowest or highest value that was tried."""
        names = []
        for name in ("lr", "scale") if self.best else ():
            tried = {run.values[name] for run in self.runs if not run.reason}
            edge = self.best[0].values[name] in (min(tried), max(tried))
            if edge and len({run.values[name] for run in self.runs}) > 1:
                names.append(name)
        return names

    def mean(self, key: str) -> float:
        """Of a figure of the summaries."""
        return statistics.fmean(run.summary[key] for run in self.best)


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write report.md, report.html, report.json and their pictures, and print the table.

    Args:
        folders: of comparisons, or of single runs.
        out: where to write.

    Raises:
        UserError: a folder is neither, or holds no run that has ended.
    """
    runs = [run for folder in folders for run in read_runs(folder)]
    contenders = group(runs)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("report-*.png"):
        old.unlink()
    pictures = [
        (title, path)
        for title, name, draw in drawings(contenders)
        if (path := save(out / f"report-{name}.png", draw)) is not None
    ]
    again = shlex.join(["lorapre", "report", *map(str, folders), "--out", str(out)])
    made = [line for folder in folders for line in commands(folder)]
    markdown = render(contenders, pictures, made, again)
    (out / "report.md").write_text(markdown, encoding="utf-8")
    (out / "report.html").write_text(html(markdown, out), encoding="utf-8")
    figures = [run.figures for run in runs]
    (out / "report.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    console = Console()
    console.print(table(contenders))
    for line in notes(contenders):
        console.print(line, style="dim", highlight=False)
    console.print(f"Report: {out / 'report.md'}, report.html", soft_wrap=True)


# Reading


def read_runs(folder: Path) -> list[Run]:
    """The ended runs of a comparison, or the one of a run folder. Raises UserError where there is none."""
    if (folder / "compare.json").is_file():
        names = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["contenders"]
        found = [
            run
            for name in names
            for path in sorted((folder / folder_name(name)).glob("*seed*"))
            if (run := read_run(path, name)) is not None
        ]
    elif (folder / "config.json").is_file():
        run = read_run(folder, None)
        found = [] if run is None else [run]
    else:
        raise UserError(f"RUNS {folder}: neither a comparison (compare.json) nor a run folder (config.json)")
    if not found:
        raise UserError(f"RUNS {folder}: no run has ended here yet")
    return found


def read_run(folder: Path, contender: str | None) -> Run | None:
    """A run, or None of one that has not ended."""
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        loss, reason = summary["validation_loss"], None
    elif (folder / "ended.json").is_file():
        summary, loss = {}, math.inf
        reason = json.loads((folder / "ended.json").read_text(encoding="utf-8"))["reason"]
    else:
        return None
    file = folder / "config.json"
    if not file.is_file():  # it ended before it began: nothing but the reason is known
        return None
    config = PretrainConfig.load(file)
    return Run(
        folder=folder,
        contender=contender or describe_optimizer(config),
        config=config,
        loss=loss,
        reason=reason,
        summary=summary,
    )


def group(runs: Iterable[Run]) -> list[Contender]:
    """Runs by contender, in the order they come; each with the runs of its best values on the first seed."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.contender, []).append(run)
    contenders = []
    for name, mine in by_name.items():
        seed = min(run.config.seed for run in mine)
        first = [run for run in mine if run.config.seed == seed and math.isfinite(run.loss)]
        best: list[Run] = []
        if first:
            values = min(first, key=lambda run: run.loss).values
            best = [run for run in mine if run.values == values and math.isfinite(run.loss)]
        contenders.append(Contender(name=name, runs=mine, best=best))
    return contenders


def commands(folder: Path) -> list[str]:
    """What was typed to make a folder."""
    file = folder / "command.txt"
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


# The table

COLUMNS = ("optimizer", "ppl", "loss", "seeds", "lr x scale", "state", "peak", "step")


def rows(contenders: Sequence[Contender]) -> list[list[str]]:
    """The table's cells, best first; without a figure, the reason in the place of the loss."""
    cells = []
    for contender in sorted(contenders, key=lambda each: each.loss):
        if not contender.best:
            reason = next((run.reason for run in contender.runs if run.reason), "no run has ended")
            cells.append([contender.title, "-", (reason or "").partition(";")[0], "", "", "", "", ""])
            continue
        config = contender.best[0].config
        spread = "" if contender.spread is None else f" ± {contender.spread:.4f}"
        peak = contender.best[0].summary.get("peak_bytes")
        cells.append(
            [
                contender.title,
                f"{statistics.fmean(math.exp(run.loss) for run in contender.best):.2f}",
                f"{contender.loss:.4f}{spread}",
                str(len(contender.best)),
                f"{config.lr:g} x {config.scale:g}" + "*" * bool(contender.at_edge),
                f"{contender.mean('state_bytes') / 2**20:.2f}",
                "" if peak is None else f"{peak / 2**20:,.0f}",
                f"{contender.mean('optimizer_share'):.1%}",
            ]
        )
    return cells


def notes(contenders: Sequence[Contender]) -> list[str]:
    """What the table does not say by itself."""
    texts = [
        "ppl, loss: validation perplexity and loss (nats per token), mean and standard deviation over "
        "seeds; state, peak: of the optimizer and of the whole process, MiB; step: share of optimizer.step "
        "in the training steps' time."
    ]
    if any(contender.at_edge for contender in contenders):
        texts.append("* the best value tried is at the edge of the sweep: a better one may lie beyond.")
    broken = sum(run.reason is not None for contender in contenders for run in contender.runs)
    if broken:
        texts.append(f"Runs that ended without a figure: {broken}; ended.json in their folders says why.")
    return texts


def table(contenders: Sequence[Contender]) -> Table:
    """The table for a terminal."""
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(COLUMNS):
        made.add_column(column, justify="right" if i else "left", overflow="fold", no_wrap=bool(i))
    for cells in rows(contenders):
        made.add_row(*cells)
    return made


# Pictures

Draw = Callable[[Any], bool]  # on axes; whether there was something to draw


def drawings(contenders: Sequence[Contender]) -> list[tuple[str, str, Draw]]:
    """Title, file name and drawing of every picture that the runs may give."""
    pictures: list[tuple[str, str, Draw]] = [
        ("Validation loss over tokens", "curves", lambda axes: draw_curves(axes, contenders, "tokens")),
        (
            "Training loss over the seconds of training steps",
            "time",
            lambda axes: draw_curves(axes, contenders, "step_seconds"),
        ),
        ("Perplexity against bytes of state", "state", lambda axes: draw_state(axes, contenders)),
        ("Perplexity against rank", "rank", lambda axes: draw_rank(axes, contenders)),
    ]
    for name in SWEPT:
        pictures.append(
            (
                f"Sensitivity to {name}",
                f"sensitivity-{name}",
                lambda axes, name=name: draw_sensitivity(axes, contenders, name),  # type: ignore[misc]
            )
        )
    return pictures


def save(path: Path, draw: Draw) -> Path | None:
    """Draw a picture and write it; None where there is nothing to draw."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    colours = list(colormaps["tab10"].colors)  # type: ignore[attr-defined]
    axes.set_prop_cycle(color=colours * 2, linestyle=["-"] * len(colours) + ["--"] * len(colours))
    if not draw(axes):
        return None
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path


def draw_curves(axes: Any, contenders: Sequence[Contender], x: str) -> bool:
    """Loss of the best runs on the first seed, over tokens (validation) or seconds (training)."""
    y = "validation_loss" if x == "tokens" else "loss"
    ends = []
    for contender in contenders:
        if not contender.best:
            continue
        metrics: list[Metric] = read_metrics(contender.best[0].folder / "metrics.jsonl")
        points = [(row[x], row[y]) for row in metrics if y in row and x in row]
        if y == "loss":
            points = smoothed(points)
        if points:
            axes.plot(*zip(*points, strict=True), label=contender.title, linewidth=1.3)
            ends.append([value for _, value in points])
    if not ends:
        return False
    # The beginning of a run would squeeze what tells the contenders apart.
    low = min(min(values) for values in ends)
    high = max(values[len(values) // 4] for values in ends)
    axes.set_ylim(low - 0.05 * (high - low), high)
    axes.set_xlabel("tokens seen" if x == "tokens" else "seconds in training steps")
    axes.set_ylabel(f"{'validation' if x == 'tokens' else 'training'} loss (nats per token)")
    return True


def smoothed(points: list[tuple[float, float]], reach: int = 4) -> list[tuple[float, float]]:
    """Means of each value and its neighbours, at its place."""
    values = [value for _, value in points]
    return [
        (x, statistics.fmean(values[max(0, i - reach) : i + reach + 1])) for i, (x, _) in enumerate(points)
    ]


def draw_state(axes: Any, contenders: Sequence[Contender]) -> bool:
    """A point for each contender: what its state costs, what it reaches."""
    drawn = False
    for contender in contenders:
        if contender.best:
            perplexities = [math.exp(run.loss) for run in contender.best]
            middle = statistics.fmean(perplexities)
            axes.errorbar(
                contender.mean("state_bytes") / 2**20,
                middle,
                yerr=[[middle - min(perplexities)], [max(perplexities) - middle]],
                marker="o",
                linestyle="",
                capsize=3,
                label=contender.title,
            )
            drawn = True
    axes.set_xlabel("optimizer state (MiB)")
    axes.set_ylabel("validation perplexity")
    return drawn


def draw_rank(axes: Any, contenders: Sequence[Contender]) -> bool:
    """The best of each rank on the first seed, a line for each optimizer with several; AdamW beside."""
    lines: dict[str, dict[float, float]] = {}
    adamw = math.inf
    for contender in contenders:
        seed = min(run.config.seed for run in contender.runs)
        for run in contender.runs:
            if run.config.seed != seed or not math.isfinite(run.loss):
                continue
            if "rank" in run.values:
                best = lines.setdefault(label(run.config), {})
                best[run.values["rank"]] = min(best.get(run.values["rank"], math.inf), math.exp(run.loss))
            elif run.config.optimizer == "adamw":
                adamw = min(adamw, math.exp(run.loss))
    lines = {name: best for name, best in lines.items() if len(best) > 1}
    for name, best in lines.items():
        axes.plot(*zip(*sorted(best.items()), strict=True), marker="o", label=name)
    if lines and math.isfinite(adamw):
        axes.axhline(adamw, color="black", linewidth=1, linestyle="--", label="adamw")
    axes.set_xscale("log", base=2)
    ranks = sorted({rank for best in lines.values() for rank in best})
    axes.set_xticks(ranks, [f"{rank:g}" for rank in ranks])
    axes.set_xlabel("rank")
    axes.set_ylabel("validation perplexity, best values of each rank")
    return bool(lines)


def label(config: PretrainConfig) -> str:
    """An optimizer's name with its variant, without its numbers."""
    parts = [config.optimizer, config.variant, None if config.compress == "both" else config.compress]
    return ", ".join(part for part in parts if part)


def draw_sensitivity(axes: Any, contenders: Sequence[Contender], name: str) -> bool:
    """Loss on the first seed over one number, at the best of the others, where several were run."""
    drawn = False
    for contender in contenders:
        seed = min(run.config.seed for run in contender.runs)
        best: dict[float, float] = {}
        for run in contender.runs:
            if run.config.seed == seed and name in run.values:
                best[run.values[name]] = min(best.get(run.values[name], math.inf), run.loss)
        points = sorted((value, loss) for value, loss in best.items() if math.isfinite(loss))
        if len(best) > 1 and points:
            axes.plot(*zip(*points, strict=True), marker="o", label=contender.title)
            drawn = True
    if name in LOGARITHMIC and drawn:
        axes.set_xscale("log")
        tried = sorted({run.values[name] for each in contenders for run in each.runs if name in run.values})
        axes.set_xticks(tried, [f"{value:g}" for value in tried])
        axes.minorticks_off()
    axes.set_xlabel(name)
    axes.set_ylabel("validation loss (nats per token)")
    return drawn


# Markdown and HTML


def render(
    contenders: Sequence[Contender], pictures: Sequence[tuple[str, Path]], made: Sequence[str], again: str
) -> str:
    """The report."""
    config = next(run.config for contender in contenders for run in contender.runs)
    cells = rows(contenders)
    lines = [
        "# Comparison of optimizers",
        "",
        f"{config.preset} on {Path(config.data).name}: {config.steps:,} steps of "
        f"{config.sequences_per_step} × {config.sequence_length} tokens.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "|".join("---" if i == 0 else "---:" for i in range(len(COLUMNS))) + "|",
        *("| " + " | ".join(row) + " |" for row in cells),
        "",
        *(line for note in notes(contenders) for line in (note, "")),
        "Made with",
        "",
        *(f"    {line}" for line in made),
        "",
    ]
    for title, path in pictures:
        lines += [f"## {title}", "", f"![{title}]({path.name})", "", f"`{again}`", ""]
    return "\n".join(lines)


def html(markdown: str, folder: Path) -> str:
    """The report as one file, its pictures inside."""
    from markdown import markdown as convert  # type: ignore[import-untyped]

    body: str = convert(markdown, extensions=["tables"])

    def inside(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^":]+\.png)"', inside, body)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Comparison of optimizers</title>\n'
        f"<style>{STYLE}</style>\n{body}\n</html>\n"
    )


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}"
    "th,td{padding:.3rem .7rem;border-bottom:1px solid #ccc}"
    "img{max-width:100%}code,pre{background:#f3f3f3;padding:.1rem .3rem;white-space:pre-wrap}"
)
