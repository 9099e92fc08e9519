"""How the time of a LoRA-Pre step grows with p q and with r.

    python benchmarks/scaling.py

Time is fitted by a power of p q at one rank, and by a power of r at one size, least squares of logarithms,
from where the fixed costs of a step are small.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from common import (
    DTYPES,
    Column,
    NotMeasured,
    Ranks,
    Result,
    Row,
    device_of,
    interleaved,
    lorapre_adamw,
    lorapre_muon,
    make_weights,
    reason,
    spread,
)
from cyclopts import App, Parameter
from matplotlib.ticker import LogLocator, NullLocator

from lorapre_recipes.config import Variant

COLUMNS = [
    Column("series", "varied"),
    Column("shape", "shape"),
    Column("rank", "r"),
    Column("ms", "ms", ".2f"),
    Column("spread", "spread", ".0%"),
    Column("fit_ms", "fitted", ".2f"),
]

app = App(help=__doc__)


@app.default
def main(
    *,
    sizes: Annotated[list[int], Parameter(consume_multiple=True)] = [512, 1024, 2000, 4096, 8000],  # noqa: B006
    ranks: Ranks = [8, 16, 32, 64, 128, 256, 512],  # noqa: B006
    size: int = 2000,
    rank: int = 64,
    optimizer: Literal["adamw", "muon"] = "adamw",
    variant: Variant = "split",
    dtype: Literal["fp32", "bf16"] = "fp32",
    device: str = "cpu",
    fit_from: Annotated[tuple[int, int], Parameter(show_default=True)] = (2000, 64),
    rounds: int = 9,
    out: Path | None = None,
) -> None:
    """Time one matrix over sizes and over ranks.

    Args:
        sizes: q of the matrices (q, q) that are stepped with `rank`.
        ranks: with which the matrix (size, size) is stepped.
        size: of the matrix whose rank varies.
        rank: of the factors where the size varies.
        optimizer: LoRAPreAdamW or LoRAPreMuon.
        variant: of LoRAPreAdamW.
        dtype: of weights and gradients.
        device: cpu or cuda.
        fit_from: the least q and the least r that the fits take.
        rounds: timed steps of each.
        out: folder of the results. Default: benchmarks/results/DATE_HARDWARE.
    """
    build = lorapre_muon if optimizer == "muon" else lambda r: lorapre_adamw(r, variant=variant)
    cases = [("p q", q, rank) for q in sizes] + [("r", size, r) for r in ranks]
    rows: list[Row] = [{"series": s, "shape": f"{q}x{q}", "rank": r, "q": q} for s, q, r in cases]
    try:
        place = device_of(device)
        steps: dict[int, Callable[[], Any]] = {}
        for index, row in enumerate(rows):
            try:
                weights = make_weights([(row["q"], row["q"])], place, DTYPES[dtype])
                steps[index] = build(row["rank"])(weights, []).step
                for _ in range(2):
                    steps[index]()
            except Exception as error:
                steps.pop(index, None)
                row["reason"] = reason(error)
        for index, times in interleaved(steps, rounds, place).items():
            rows[index] |= {"ms": 1e3 * statistics.median(times), "spread": spread(times)}
    except NotMeasured as error:
        for row in rows:
            row["reason"] = str(error)
    exponents = {
        "p q": fit(rows, "p q", lambda row: row["q"] ** 2, fit_from[0] ** 2),
        "r": fit(rows, "r", lambda row: row["rank"], fit_from[1]),
    }
    name = "LoRA-Pre Muon" if optimizer == "muon" else f"LoRA-Pre Adam, {variant}"
    Result(
        benchmark="scaling",
        title=f"Scaling of a step: {name}, {dtype}",
        device=device,
        settings={
            "name": [optimizer, *([variant] if optimizer == "adamw" else []), dtype],
            "exponents": exponents,
            "fit_from": fit_from,
            "rounds": rounds,
        },
        columns=COLUMNS,
        rows=rows,
        notes=[
            f"Time grows as (p q)^{power(exponents['p q'])} from q = {fit_from[0]} and as "
            f"r^{power(exponents['r'])} from r = {fit_from[1]}.",
        ],
    ).save(out, draw)


def power(exponent: float | None) -> str:
    return "?" if exponent is None else f"{exponent:.2f}"


def fit(rows: Sequence[Row], series: str, of: Callable[[Row], float], least: float) -> float | None:
    """The exponent of ms ~ of(row)^exponent from `least` on; puts the fitted times into the rows."""
    used = [row for row in rows if row["series"] == series and "ms" in row and of(row) >= least]
    if len(used) < 2:
        return None
    x, y = ([math.log(f(row)) for row in used] for f in (of, lambda row: row["ms"]))
    slope, intercept = statistics.linear_regression(x, y)
    for row in used:
        row["fit_ms"] = math.exp(intercept) * of(row) ** slope
    return slope


def draw(figure: Any, result: Result) -> None:
    """Time over p q and over r."""
    panels = figure.subplots(1, 2)
    exponents = result.settings["exponents"]
    for axes, series, key in ((panels[0], "p q", "q"), (panels[1], "r", "rank")):
        rows = [row for row in result.rows if row["series"] == series and "ms" in row]
        x = [row[key] ** (2 if key == "q" else 1) for row in rows]
        axes.plot(x, [row["ms"] for row in rows], "o", label="measured")
        fitted = [(a, row["fit_ms"]) for a, row in zip(x, rows, strict=True) if row.get("fit_ms")]
        if fitted:
            label = f"fit, exponent {exponents[series]:.2f}"
            axes.plot(*zip(*fitted, strict=True), label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(series)
        axes.set_ylabel("ms")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.set_size_inches(8, 4)
    figure.suptitle(result.title, fontsize=10)


if __name__ == "__main__":
    app()
