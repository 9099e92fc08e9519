"""Tables and pictures of recorded runs: `lorapre compare --tables FILE`.

tables.md     a table for each model, terms, batch and horizon
state.png     loss against bytes of state of the matrices, with the frontier
tokens.png    the places of the contenders against tokens per parameter
"""

from __future__ import annotations

import itertools
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
SERIES = ("model", "data", "precision", "terms", "batch_tokens")
COLUMNS = ("optimizer", "rank", "matrix", "whole", "peak", "lr x scale", "loss", "spread")
MIB = 2**20
# Of Student's t for differences of two, three, ... seeds: 5 % lie beyond.
T = (12.71, 4.30, 3.18, 2.78, 2.57)


class Standing(NamedTuple):
    """A contender with the settings that are best on the first seed, in one table."""

    name: str
    first: Row  # the run on the first seed; one without a loss where none has any
    losses: dict[int, float]  # with the same settings, of each seed
    at_edge: bool  # whether the best rate is the lowest or the highest that was tried

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


def write_tables(file: Path, out: Path) -> None:
    """Print every table of a file of rows; write them and the pictures to a folder. Raises UserError."""
    kinds = (OSError, ValueError, KeyError, TypeError)
    with user_errors(f"--tables {file}: not a file of recorded runs", *kinds):
        series = series_of(read_json(file))
    if not series:
        raise UserError(f"--tables {file}: holds no run")
    tables = [
        (key, tokens, table) for key, each in series.items() for tokens, table in each.items()
    ]
    text = "\n".join(table_text(*each) for each in tables) + NOTES
    print(text, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    # The table with most seeds, and what has most horizons.
    key, tokens, table = max(
        tables, key=lambda x: (sum(len(y.losses) > 1 for y in x[2]), len(x[2]), x[1])
    )
    if picture(out / "state.png", draw_state, title(key, tokens, table), table):
        text += "\n![loss against state](state.png)\n"
    key = max(series, key=lambda key: (len(series[key]) > 1, sum(map(len, series[key].values()))))
    if picture(out / "tokens.png", draw_tokens, title(key), series[key]):
        text += "\n![places against tokens](tokens.png)\n"
    write_whole(out / "tables.md", text)


def series_of(rows: Iterable[Row]) -> dict[tuple[Any, ...], Series]:
    """The tables, by what their runs share and by tokens."""
    runs: dict[tuple[Any, ...], dict[str, dict[int, list[Row]]]] = {}
    for row in rows:
        of_contender = runs.setdefault(tuple(row[name] for name in SERIES), {}).setdefault(
            contender(row), {}
        )
        of_contender.setdefault(row["tokens"], []).append(row)
    series: dict[tuple[Any, ...], Series] = {}
    for key, contenders in sorted(runs.items()):
        tables: Series = {}
        for by_tokens in contenders.values():
            everywhere = [row for mine in by_tokens.values() for row in mine]
            for tokens, mine in by_tokens.items():
                tables.setdefault(tokens, []).append(standing(mine, everywhere))
        series[key] = {n: sorted(tables[n], key=lambda each: each.loss) for n in sorted(tables)}
    return series


def standing(rows: Sequence[Row], everywhere: Sequence[Row]) -> Standing:
    """Where runs put a contender. `everywhere` are those of other horizons too, where rates may be found."""
    ended = [row for row in rows if row["loss"] is not None]
    seed = min(row["seed"] for row in rows)
    first = min(
        (row for row in ended if row["seed"] == seed), key=lambda row: row["loss"], default=None
    )
    if first is None:
        return Standing(contender(rows[0]), rows[0], {}, False)
    losses = {row["seed"]: row["loss"] for row in ended if settings(row) == settings(first)}
    tried = {name: {row[name] for row in everywhere} for name in ("lr", "scale")}
    several = [name for name in tried if len(tried[name]) > 1]
    at_edge = (
        any(first[name] in (min(tried[name]), max(tried[name])) for name in several) or not several
    )
    beta1, momentum = first["beta1"], first["momentum"]
    name = (
        contender(first)
        + f" b1={beta1:g}" * (beta1 != BETAS[0])
        + f" m={momentum:g}" * (momentum != 0.95)
    )
    return Standing(name, first, losses, at_edge)


def contender(row: Row) -> str:
    """An optimizer with the options that make it another one, in words."""
    compress = (row.get("compress") or "both").replace("both", "")
    rank = "" if row["rank"] is None else f"r{row['rank']}"
    words = (row["optimizer"], row["variant"], compress, *row.get("rules", ()), rank)
    return " ".join(word for word in words if word)


def settings(row: Row) -> str:
    """All that decides a run but its seed."""
    return re.sub(r" --seed \d+", "", row["command"])


def title(key: tuple[Any, ...], tokens: int = 0, table: Sequence[Standing] = ()) -> str:
    """What the runs of a table share, in words."""
    *words, batch = key
    if each := per_parameter(tokens, table):
        return (
            f"{', '.join(words)}: {short(tokens)} tokens ({each:.2g} a parameter), {batch:,} a step"
        )
    return f"{', '.join(words)}: {batch:,} tokens a step"


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


def table_text(key: tuple[Any, ...], tokens: int, table: Table) -> str:
    """A table in Markdown, padded so that it reads as text too."""
    above = [None, *table]
    cells = [COLUMNS, *(row_cells(each, last) for each, last in zip(table, above, strict=False))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    cells.insert(1, tuple("-" * (n - 1) + ("-" if i == 0 else ":") for i, n in enumerate(widths)))
    form = "|" + "|".join(f"{{:{'>' if i else '<'}{n}}}" for i, n in enumerate(widths)) + "|"
    lines = [form.format(*row) for row in cells]
    swept = all(len(each.losses) < 2 for each in table)
    note = ["Only swept: every optimizer has one seed here.", ""] if swept else []
    return "\n".join([f"## {title(key, tokens, table)}", "", *note, *lines, ""])


def row_cells(each: Standing, above: Standing | None) -> tuple[str, ...]:
    """A row of a table."""
    row, rank = each.first, each.first["rank"]
    sizes = [row[name] for name in ("matrix_state_bytes", "state_bytes", "peak_bytes")]
    loss = (
        ("= " if above and each.tied(above) else "") + f"{each.loss:.4f}" if each.losses else "none"
    )
    return (
        each.name.replace(f" r{rank}", ""),
        "" if rank is None else str(rank),
        *("" if size is None else figure(size / MIB) for size in sizes),
        f"{row['lr']:g} x {row['scale']:g}" + "*" * each.at_edge if each.losses else "",
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
    """A point for each contender, and the frontier: who has no better one beside or left of it."""
    points = [
        (each.first["matrix_state_bytes"] / MIB, each.loss, each)
        for each in table
        if each.losses and each.first["matrix_state_bytes"] is not None
    ]
    if not points:
        return False
    # A contender far behind would squeeze all others: it is named in the corner.
    losses = [loss for _, loss, _ in points]
    roof = min(losses) + 6 * max(statistics.median(losses) - min(losses), 1e-3)
    beyond = [f"{each.name} {loss:.3f}" for _, loss, each in points if loss > roof]
    points = [point for point in points if point[1] <= roof]
    if beyond:
        corner = "\n".join(["above the picture:", *beyond])
        axes.text(0.01, 0.02, corner, transform=axes.transAxes, fontsize=7.5)
    frontier: list[tuple[float, float]] = []
    for size, loss, _ in sorted(points, key=lambda point: point[:2]):
        if not frontier or loss < frontier[-1][1]:
            frontier.append((size, loss))
    largest = max(size for size, _, _ in points)
    smallest = min((size for size, _, _ in points if size), default=1.0)
    x, y = zip(*frontier, (largest, frontier[-1][1]), strict=True)
    axes.step(x, y, where="post", color="0.7", linewidth=1.2, zorder=0)
    for size, loss, each in points:
        axes.errorbar(size, loss, yerr=each.spread, fmt="o", capsize=3, color=colour(each.name))
    axes.set_xscale("symlog", linthresh=smallest, linscale=0.3)  # some have no state at all
    axes.set_xlim(-smallest / 2, largest * 1.6)
    decades = [10.0**n for n in range(-9, 9) if smallest * 1.5 < 10.0**n < largest * 1.6]
    axes.set_xticks([0, *decades], ["0", *(f"{x:g}" for x in decades)])
    axes.minorticks_off()
    axes.set_xlabel("state of the matrices (MiB)")
    axes.set_ylabel("validation loss (nats per token)")
    write_names(axes, [(size, loss, each.name) for size, loss, each in points])
    return True


def draw_tokens(axes: Any, series: Series) -> bool:
    """The places of the contenders that ended at each of the three horizons with most of them."""
    tables = {n: [each for each in table if each.losses] for n, table in series.items()}
    fullest = sorted(tables, key=lambda n: len(tables[n]))[-3:]
    losses = {n: {contender(each.first): each.loss for each in tables[n]} for n in sorted(fullest)}
    everywhere = set.intersection(*(set(each) for each in losses.values()))
    if len(losses) < 2 or len(everywhere) < 2:
        return False
    places = {n: [name for name in losses[n] if name in everywhere] for n in losses}
    x = [per_parameter(n, tables[n]) for n in places]
    last = losses[max(losses)]
    for place, name in enumerate(places[max(places)]):
        y = [names.index(name) + 1 for names in places.values()]
        axes.plot(x, y, marker="o", linewidth=1.5, color=colour(name))
        beside = last[name] - last.get("adamw", last[places[max(places)][0]])
        axes.text(
            x[-1] * (x[-1] / x[0]) ** 0.03,
            place + 1,
            f"{name} {beside:+.3f}",
            va="center",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{each:.2g}" for each in x])
    axes.minorticks_off()
    axes.set_xlim(
        x[0] * (x[0] / x[-1]) ** 0.05, x[-1] * (x[-1] / x[0]) ** 0.5
    )  # room for the names
    axes.set_yticks(range(1, len(everywhere) + 1))
    axes.invert_yaxis()
    axes.set_xlabel(
        "tokens per parameter; the numbers are losses less AdamW's, or else the best one's"
    )
    axes.set_ylabel("place by validation loss")
    return True


def colour(name: str) -> str:
    """Of a contender: by family, and AdamW's own."""
    if name.startswith("lorapre"):
        return "C3"
    return "black" if name == "adamw" else "C1" if name.startswith("muon") else "C0"


def write_names(axes: Any, names: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside their points, where neither a point nor another name is."""
    axes.figure.canvas.draw()  # settles the layout
    point = axes.figure.dpi / 72
    window = axes.get_window_extent()
    middles = [axes.transData.transform((x, y)) for x, y, _ in names]
    taken = [(x - 4 * point, x + 4 * point, y) for x, y in middles]
    for (x, y, name), (at, height) in sorted(
        zip(names, middles, strict=True), key=lambda each: each[0][1]
    ):
        width = (4.8 * len(name) + 8) * point
        for shift, side in itertools.product(sorted(range(-200, 200, 5), key=abs), (1, -1)):
            begin, end = sorted((at + 6 * side * point, at + width * side))
            level = height + shift * point
            inside = window.x0 < begin and end < window.x1 and window.y0 + 6 * point < level
            if inside and not any(
                a < end and begin < b and abs(level - c) < 10 * point for a, b, c in taken
            ):
                break
        taken.append((begin, end, level))
        axes.annotate(
            name,
            (x, y),
            xytext=(7 * side, shift),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "0.5"}
            if abs(shift) > 5
            else None,
        )
