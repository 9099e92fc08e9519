"""What a comparison shows: a table, pictures, Markdown and HTML, made from run folders."""

from __future__ import annotations

import base64
import math
import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lorapre_recipes.compare.pictures import drawings, save
from lorapre_recipes.compare.results import Standing, read_runs, standings_of
from lorapre_recipes.files import write_json

COLUMNS = ("optimizer", "ppl", "loss", "seeds", "lr x scale", "state", "peak", "step")


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Write report.md, report.html, report.json and their pictures, and print the table.

    Args:
        folders: of comparisons, or of single runs.
        out: where to write.

    Raises:
        UserError: a folder is neither, or holds no run that has ended.
    """
    runs = [run for folder in folders for run in read_runs(folder)]
    standings = standings_of(runs)
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("report-*.png"):
        old.unlink()
    pictures = [
        (title, f"report-{name}.png")
        for title, name, draw in drawings()
        if save(out / f"report-{name}.png", draw, standings)
    ]
    again = shlex.join(["lorapre", "report", *map(str, folders), "--out", str(out)])
    files = [folder / "command.txt" for folder in folders]
    made = [line for file in files if file.is_file() for line in file.read_text("utf-8").splitlines()]
    markdown = render(standings, pictures, made, again)
    (out / "report.md").write_text(markdown, encoding="utf-8")
    (out / "report.html").write_text(html(markdown, out), encoding="utf-8")
    write_json(out / "report.json", [run.figures for run in runs])

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left", overflow="fold", no_wrap=bool(i))
    for cells in rows(standings):
        table.add_row(*cells)
    console = Console()
    console.print(table)
    for line in notes(standings):
        console.print(line, style="dim", highlight=False)
    console.print(f"Report: {out / 'report.md'}, report.html", soft_wrap=True)


def rows(standings: Sequence[Standing]) -> list[list[str]]:
    """The table's cells, best first; without a figure, the reason in the place of the loss."""
    cells = []
    for standing in sorted(standings, key=lambda each: each.loss):
        if not standing.best:
            reasons = (run.ending.reason for run in standing.runs if run.ending.reason)
            reason = next(reasons, "no run has ended").partition(";")[0]
            cells.append([standing.title, "-", reason, *[""] * (len(COLUMNS) - 3)])
            continue
        first = standing.best[0]
        spread = "" if standing.spread is None else f" ± {standing.spread:.4f}"
        peak = first.ending.summary.get("peak_bytes")
        cells.append(
            [
                standing.title,
                f"{statistics.fmean(math.exp(run.loss) for run in standing.best):.2f}",
                f"{standing.loss:.4f}{spread}",
                str(len(standing.best)),
                f"{first.config.lr:g} x {first.config.scale:g}" + "*" * standing.at_edge,
                f"{standing.mean('state_bytes') / 2**20:.2f}",
                "" if peak is None else f"{peak / 2**20:,.0f}",
                f"{standing.mean('optimizer_share'):.1%}",
            ]
        )
    return cells


def notes(standings: Sequence[Standing]) -> list[str]:
    """What the table does not say by itself."""
    texts = [
        "ppl, loss: validation perplexity and loss (nats per token), mean and standard deviation over "
        "seeds; state, peak: of the optimizer and of the whole process, MiB; step: share of optimizer.step "
        "in the training steps' time."
    ]
    if any(standing.at_edge for standing in standings):
        texts.append("* the best value tried is at the edge of the sweep: a better one may lie beyond.")
    broken = sum(run.ending.reason is not None for standing in standings for run in standing.runs)
    if broken:
        texts.append(f"Runs that ended without a figure: {broken}; ended.json in their folders says why.")
    return texts


def render(
    standings: Sequence[Standing], pictures: Sequence[tuple[str, str]], made: Sequence[str], again: str
) -> str:
    """The report in Markdown."""
    config = standings[0].runs[0].config
    lines = [
        "# Comparison of optimizers",
        "",
        f"{config.preset} on {Path(config.data).name}: {config.steps:,} steps of "
        f"{config.sequences_per_step} × {config.sequence_length} tokens.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(row) + " |" for row in rows(standings)),
        "",
        *(line for note in notes(standings) for line in (note, "")),
        "Made with",
        "",
        *(f"    {line}" for line in made),
        "",
    ]
    for title, name in pictures:
        lines += [f"## {title}", "", f"![{title}]({name})", "", f"`{again}`", ""]
    return "\n".join(lines)


def html(markdown: str, folder: Path) -> str:
    """The report as one file, its pictures inside."""
    from markdown import markdown as convert  # type: ignore[import-untyped]

    def inside(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^":]+\.png)"', inside, convert(markdown, extensions=["tables"]))
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
