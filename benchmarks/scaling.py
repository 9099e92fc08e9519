"""How the time of a LoRA-Pre step grows with p q and with r, and what share of it the r x r solves take.

    python benchmarks/scaling.py

Time is fitted by a power of p q at one rank, and by a power of r at one size, least squares of logarithms,
from where the fixed costs of a step are small. Shares are of the time of operations, by torch's profiler.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
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
from torch.profiler import ProfilerActivity, profile, record_function

from lorapre.backends import library
from lorapre.backends.c import CGradient
from lorapre_recipes.config import Variant

COLUMNS = [
    Column("series", "varied"),
    Column("shape", "shape"),
    Column("rank", "r"),
    Column("ms", "ms", ".2f"),
    Column("spread", "spread", ".0%"),
    Column("fit_ms", "fitted", ".2f"),
    Column("factor", "solves", ".1%"),
    Column("gram", "Grams", ".1%"),
    Column("small", "by r x r", ".1%"),
]
FACTOR = ("cholesky", "triangular", "linalg_inv", "linalg_lu", "linalg_solve", "linalg_qr", "linalg_eigh")
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
OURS = "lorapre::"  # kernels for CPUs, which the profiler does not see by itself, by what they count for

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
    """Time one matrix over sizes and over ranks, and profile the solves.

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
        for index, step in steps.items():
            rows[index] |= shares(step, rows[index]["rank"], place)
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
            "Shares of the operations' time. solves: Cholesky, triangular solves, inverses; Grams: products "
            "whose result is r x r; by r x r: those with an r x r factor.",
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


def shares(step: Callable[[], Any], r: int, device: torch.device) -> dict[str, float]:
    """What part of a step's operations, by time, is spent on r x r matrices."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with labelled(r), profile(activities=activities, record_shapes=True) as recorded:
        for _ in range(2):
            step()
    total, parts = 0.0, dict.fromkeys(("factor", "gram", "small"), 0.0)
    for event in recorded.key_averages(group_by_input_shape=True):
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if event.key.startswith(("aten::", OURS)):
            total += spent
        if kind := kind_of(event.key, event.input_shapes, r):
            parts[kind] += spent
    return {name: spent / total for name, spent in parts.items()} if total else {}


def kind_of(name: str, inputs: Sequence[Sequence[int]], r: int) -> str | None:
    """Which share an operation counts for."""
    if name.startswith(OURS):
        return name.removeprefix(OURS) or None
    if any(part in name for part in FACTOR):
        return "factor"
    if name in PRODUCTS:
        first = name.startswith(("aten::addmm", "aten::baddbmm"))  # what is added comes before the factors
        return kind_of_product(*(list(shape[-2:]) for shape in inputs[first : first + 2]), r)
    return None


def kind_of_product(left: list[int], right: list[int], r: int) -> str | None:
    """Which share a product of two such matrices counts for."""
    if left[0] == right[1] == r:
        return "gram"
    return "small" if [r, r] in (left, right) else None


@contextmanager
def labelled(r: int) -> Iterator[None]:
    """Within it, calls of kernels for CPUs are ranges of the profiler."""
    places: list[tuple[Any, str]] = [
        (CGradient, "_product"), (CGradient, "_step_"), (library, "products"), (library, "inverse_roots"),
    ]  # fmt: skip
    kernels = {place: getattr(*place) for place in places}

    def label(name: str, args: Sequence[Any]) -> str:
        if name == "products":
            return OURS + (kind_of_product(*(list(x.shape[-2:]) for x in args[:2]), r) or "")
        return OURS + ("factor" if name == "inverse_roots" else "")

    def labelled_call(owner: Any, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with record_function(label(name, args)):
                return kernels[owner, name](*args, **options)

        return call

    try:
        for owner, name in places:
            setattr(owner, name, labelled_call(owner, name))
        yield
    finally:
        for (owner, name), kernel in kernels.items():
            setattr(owner, name, kernel)


def draw(figure: Any, result: Result) -> None:
    """Time over p q, time over r, shares over r."""
    panels = figure.subplots(1, 3)
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
    rows = [row for row in result.rows if row["series"] == "r" and "factor" in row]
    ranks = [row["rank"] for row in rows]
    names = {"factor": "solves", "gram": "Grams", "small": "products by r x r"}
    stacked = [[100 * row[key] for row in rows] for key in names]
    panels[2].stackplot(range(len(ranks)), stacked, labels=names.values(), alpha=0.8)
    panels[2].set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    panels[2].set_xlabel("r")
    panels[2].set_ylabel("% of the operations' time")
    panels[2].set_ylim(bottom=0)
    panels[2].legend(frameon=False, fontsize=8, loc="upper left")
    figure.set_size_inches(11, 4)
    figure.suptitle(result.title, fontsize=10)


if __name__ == "__main__":
    app()
