"""Tables and pictures of recorded runs: `lorapre compare --tables FILE`.

tables.md     a table for each model, terms, batch and horizon
state.png     loss against bytes of state of the matrices, with the frontier
tokens.png    the places of the contenders against tokens per parameter
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorapre_recipes.config import BETAS, UserError, user_errors
from lorapre_recipes.console import short
from lorapre_recipes.files import read_json, write_whole

Row = dict[str, Any]  # see `compare/record.py`
SERIES = ("model", "data", "terms", "batch_tokens")
COLUMNS = ("optimizer", "rank", "matrix", "whole", "peak", "lr x scale", "loss", "spread")
MIB = 2**20
# Of Student's t for differences of two, three, ... seeds: 5 % lie beyond.
T = (12.71, 4.30, 3.18, 2.78, 2.57)


class Standing(NamedTuple):
    """A contender in a table, with the settings that are best on the first seed."""

    name: str
    first: Row  # the run on the first seed; one without a loss where none has any
    losses: dict[int, float]  # with the same settings, of each seed
    at_edge: bool  # whether the best rate is the lowest or highest that was tried

    @property
    def loss(self) -> float:
        """The mean over seeds; infinite where no run has ended with a number."""
        return statistics.fmean(self.losses.values()) if self.losses else math.inf

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; None of one."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None

    def tied(self, other: Standing) -> bool:
        """Whether the seeds that both have do not tell them apart: a paired t test at 5 %."""
        shared = self.losses.keys() & other.losses.keys()
        differences = [self.losses[seed] - other.losses[seed] for seed in shared]
        if (n := len(differences)) < 2:
            return False
        error: float = statistics.stdev(differences) / n**0.5
        return abs(statistics.fmean(differences)) <= T[min(n, len(T) + 1) - 2] * error


Table = list[Standing]  # best first
Series = dict[int, Table]  # by tokens
Key = tuple[Any, ...]  # what the runs of a series share: the values of SERIES


def write_tables(file: Path, out: Path) -> None:
    """Print the tables of a file of rows; write them and the pictures to a folder.

    Raises UserError where the file holds no rows.
    """
    kinds = (OSError, ValueError, KeyError, TypeError)
    with user_errors(f"--tables {file}: not a file of recorded runs", *kinds):
        series = series_of(read_json(file))
    if not series:
        raise UserError(f"--tables {file}: holds no run")
    tables = [(key, tokens, each[tokens]) for key, each in series.items() for tokens in each]
    text = "\n".join(table_text(*each) for each in tables) + NOTES
    print(text, flush=True)
    out.mkdir(parents=True, exist_ok=True)

    def seeds_and_rows(x: tuple[Key, int, Table]) -> tuple[int, int, int]:
        return sum(len(each.losses) > 1 for each in x[2]), len(x[2]), x[1]

    key, tokens, table = max(tables, key=seeds_and_rows)
    if picture(out / "state.png", draw_state, title(key, tokens, table), table):
        text += "\n![loss against state](state.png)\n"
    # Of the series with several horizons, the one with most rows.
    key = max(series, key=lambda key: (len(series[key]) > 1, sum(map(len, series[key].values()))))
    if picture(out / "tokens.png", draw_tokens, title(key), series[key]):
        text += "\n![places against tokens](tokens.png)\n"
    write_whole(out / "tables.md", text)


def series_of(rows: Iterable[Row]) -> dict[Key, Series]:
    """The tables, by what their runs share and by tokens."""
    runs: dict[Key, dict[str, list[Row]]] = {}
    for row in rows:
        key = tuple(row[name] for name in SERIES)
        runs.setdefault(key, {}).setdefault(contender(row), []).append(row)
    series: dict[Key, Series] = {}
    for key, contenders in sorted(runs.items()):
        tables: Series = {}
        for mine in contenders.values():
            for tokens in {row["tokens"] for row in mine}:
                tables.setdefault(tokens, []).append(standing(mine, tokens))
        series[key] = {n: sorted(tables[n], key=lambda each: each.loss) for n in sorted(tables)}
    return series


def standing(rows: Sequence[Row], tokens: int) -> Standing:
    """Where its runs put a contender at a horizon. Rates may have been found at another one."""
    here = [row for row in rows if row["tokens"] == tokens]
    ended = [row for row in here if row["loss"] is not None]
    seed = min(row["seed"] for row in here)
    on_first_seed = [row for row in ended if row["seed"] == seed]
    if not on_first_seed:
        return Standing(contender(here[0]), here[0], {}, False)
    first = min(on_first_seed, key=lambda row: row["loss"])
    losses = {row["seed"]: row["loss"] for row in ended if settings(row) == settings(first)}
    tried = {name: {row[name] for row in rows} for name in ("lr", "scale")}
    swept = [name for name in tried if len(tried[name]) > 1]
    edges = [first[name] in (min(tried[name]), max(tried[name])) for name in swept]
    name = contender(first)
    if first["beta1"] != BETAS[0]:
        name += f" b1={first['beta1']:g}"
    if first["momentum"] != 0.95:
        name += f" m={first['momentum']:g}"
    return Standing(name, first, losses, at_edge=any(edges) or not swept)


def contender(row: Row) -> str:
    """An optimizer with the options that make it another one, in words."""
    rank = "" if row["rank"] is None else f"r{row['rank']}"
    ends = "low-rank ends" if row.get("ends") == "low-rank" else ""
    half = "bf16" if row.get("momentum_dtype") == "bf16" else ""
    words = (row["optimizer"], row["variant"], half, ends, *row.get("rules", ()), rank)
    return " ".join(word for word in words if word)


def settings(row: Row) -> str:
    """All that decides a run but its seed."""
    return re.sub(r" --seed \d+", "", row["command"])


def title(key: Key, tokens: int = 0, table: Sequence[Standing] = ()) -> str:
    """What the runs of a table share, in words."""
    *words, batch = key
    shared = ", ".join(words)
    if each := per_parameter(tokens, table):
        return f"{shared}: {short(tokens)} tokens ({each:.2g} a parameter), {batch:,} a step"
    return f"{shared}: {batch:,} tokens a step"


def per_parameter(tokens: int, table: Sequence[Standing]) -> float:
    """Tokens per parameter of the model; 0 where no run has said how many it has."""
    return tokens / next((n for each in table if (n := each.first["parameters"])), math.inf)


NOTES = """
Sorted by loss: validation, nats per token, the mean over seeds and its standard
deviation; none where no run has ended with a number, no spread of one seed.
matrix, whole, peak: MiB of state of the attention and MLP matrices, of all
parameters, and the peak of the process.
= : the seeds do not tell it apart from the row above (paired t test, 5 %).
* : the best rate is the lowest or the highest tried, or the only one.
"""


def table_text(key: Key, tokens: int, table: Table) -> str:
    """A table in Markdown, padded so that it reads as text too."""
    above = [None, *table]
    cells = [COLUMNS, *(row_cells(each, last) for each, last in zip(table, above, strict=False))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left, *right = widths
    cells.insert(1, ("-" * left, *("-" * (width - 1) + ":" for width in right)))
    form = f"|{{:<{left}}}|" + "".join(f"{{:>{width}}}|" for width in right)
    lines = [form.format(*row) for row in cells]
    swept = all(len(each.losses) < 2 for each in table)
    note = ["Only swept: every optimizer has one seed here.", ""] if swept else []
    return "\n".join([f"## {title(key, tokens, table)}", "", *note, *lines, ""])


def row_cells(each: Standing, above: Standing | None) -> tuple[str, ...]:
    """A row of a table."""
    row, rank = each.first, each.first["rank"]
    sizes = [row[name] for name in ("matrix_state_bytes", "state_bytes", "peak_bytes")]
    rates, loss = "", "none"
    if each.losses:
        rates = f"{row['lr']:g} x {row['scale']:g}" + "*" * each.at_edge
        loss = "= " * (above is not None and each.tied(above)) + f"{each.loss:.4f}"
    return (
        each.name.replace(f" r{rank}", ""),
        "" if rank is None else str(rank),
        *("" if size is None else figure(size / MIB) for size in sizes),
        rates,
        loss,
        "" if each.spread is None else f"{each.spread:.4f}",
    )


def figure(number: float) -> str:
    """Three digits."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


# Pictures


def picture(path: Path, draw: Any, words: str, what: Any) -> bool:
    """Draw and write; False where there is nothing to draw."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    canvas = Figure(figsize=(8, 5.2), layout="constrained", dpi=130)
    axes = canvas.add_subplot()
    axes.set_title(words, fontsize=10)
    axes.grid(alpha=0.25)
    if drawn := draw(axes, what):
        canvas.savefig(path)
    return bool(drawn)


def draw_state(axes: Any, table: Table) -> bool:
    """A point for each contender, and the frontier: those with no better one at the same state."""
    known = [each for each in table if each.losses and each.first["matrix_state_bytes"] is not None]
    if not known:
        return False
    # A contender far behind would squeeze all others: it is named in the corner.
    losses = [each.loss for each in known]
    roof = min(losses) + 5 * max(statistics.median(losses) - min(losses), 1e-3)
    if beyond := [f"{each.name} {each.loss:.3f}" for each in known if each.loss > roof]:
        corner = "\n".join(["above the picture:", *beyond])
        axes.text(0.01, 0.02, corner, transform=axes.transAxes, fontsize=7.5)
    known = [each for each in known if each.loss <= roof]
    points = [(each.first["matrix_state_bytes"] / MIB, each.loss) for each in known]
    frontier: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not frontier or loss < frontier[-1][1]:
            frontier.append((size, loss))
    largest = max(size for size, _ in points)
    smallest = min((size for size, _ in points if size), default=1.0)
    x, y = zip(*frontier, (largest, frontier[-1][1]), strict=True)
    axes.step(x, y, where="post", color="0.7", linewidth=1.2, zorder=0)
    axes.set_xscale("symlog", linthresh=smallest, linscale=0.3)  # some have no state at all
    axes.set_xlim(-smallest / 2, largest * 1.6)
    decades = [10.0**n for n in range(-9, 9) if smallest * 1.5 < 10.0**n < largest * 1.6]
    axes.set_xticks([0, *decades], ["0", *(f"{x:g}" for x in decades)])
    axes.minorticks_off()
    axes.set_xlabel("state of the matrices (MiB)")
    axes.set_ylabel("validation loss (nats per token)")
    # The names stand beside the picture, the best at the bottom, each with a line to its point.
    for place, (each, point) in enumerate(zip(known, points, strict=True)):
        hue = colour(each.name)
        axes.errorbar(*point, yerr=each.spread, fmt="o", capsize=3, color=hue)
        height = (place + 0.5) / len(points)
        line = {"arrowstyle": "-", "relpos": (0, 0.5), "linewidth": 0.4, "color": "0.5"}
        beside: dict[str, Any] = dict(textcoords="axes fraction", va="center", arrowprops=line)
        axes.annotate(each.name, point, (1.02, height), color=hue, fontsize=8, **beside)
    return True


def draw_tokens(axes: Any, series: Series) -> bool:
    """The places of the contenders that ended at each of the three horizons with most of them."""
    tables = {n: [each for each in table if each.losses] for n, table in series.items()}
    fullest = sorted(sorted(tables, key=lambda n: len(tables[n]))[-3:])
    losses = [{contender(each.first): each.loss for each in tables[n]} for n in fullest]
    everywhere = set.intersection(*map(set, losses))
    if len(losses) < 2 or len(everywhere) < 2:
        return False
    places = [[name for name in each if name in everywhere] for each in losses]
    x = [per_parameter(n, tables[n]) for n in fullest]
    reference = losses[-1].get("adamw", losses[-1][places[-1][0]])
    for name in places[-1]:
        y = [names.index(name) + 1 for names in places]
        axes.plot(x, y, marker="o", linewidth=1.5, color=colour(name))
        words, beside = f"{name} {losses[-1][name] - reference:+.3f}", axes.get_yaxis_transform()
        axes.text(1.01, y[-1], words, transform=beside, va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{each:.2g}" for each in x])
    axes.minorticks_off()
    axes.set_yticks(range(1, len(everywhere) + 1))
    axes.invert_yaxis()
    meaning = "the numbers are losses less AdamW's, or else the best one's"
    axes.set_xlabel(f"tokens per parameter; {meaning}")
    axes.set_ylabel("place by validation loss")
    return True


def colour(name: str) -> str:
    """The colour of a contender: by family, and AdamW's own."""
    if name.startswith("lorapre"):
        return "C3"
    return "black" if name == "adamw" else "C1" if name.startswith("muon") else "C0"
