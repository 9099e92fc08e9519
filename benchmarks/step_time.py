"""Time of optimizer.step, side by side: LoRA-Pre, torch's optimizers and low-rank peers.

    python benchmarks/step_time.py --model llama-60m --ranks 16 128

All optimizers step the same weights with the same gradients in one process, in interleaved rounds. GaLore,
Fira and APOLLO compute their projections anew every 200 steps: that step is timed by itself and shared out.
For comparison, torch.mm makes the products of gradients and factors, and nothing else, that a step of GaLore
(two) or LoRA-Pre (four) cannot do without.
"""

import statistics
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from common import (
    DTYPES,
    SVD,
    Build,
    Column,
    Contender,
    NotMeasured,
    Ranks,
    Result,
    Row,
    Weights,
    contenders,
    device_of,
    interleaved,
    make_weights,
    quiet,
    reason,
    shapes_of,
    spread,
)
from cyclopts import App, Parameter
from torch.optim import Optimizer

COLUMNS = [
    Column("optimizer", "optimizer"),
    Column("rank", "r"),
    Column("ms", "ms", ".1f"),
    Column("min_ms", "min", ".1f"),
    Column("spread", "spread", ".0%"),
    Column("ratio", "x foreach", ".2f"),
    Column("ratio_fused", "x fused", ".2f"),
    Column("ratio_muon", "x Muon", ".2f"),
]
PRODUCTS = "torch.mm: products of gradients and factors alone; GaLore has 2 p q r, LoRA-Pre, split 4 p q r."
AGAINST = {"ratio": "AdamW (foreach)", "ratio_fused": "AdamW (fused)", "ratio_muon": "Muon"}

app = App(help=__doc__)


@app.default
def main(
    *,
    model: str = "llama-60m",
    ranks: Ranks = [16, 128],  # noqa: B006
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str = "cpu",
    layers: int | None = None,
    rounds: int = 9,
    warmup: int = 2,
    only: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    out: Path | None = None,
) -> None:
    """Time optimizer.step.

    Args:
        model: all matrices of what `lorapre plan` takes, or of one that is ROWSxCOLUMNS.
        ranks: of the low-rank optimizers.
        dtype: of weights and gradients.
        device: cpu or cuda.
        layers: take only the first ones of the model: the state of all optimizers is held at once.
        rounds: timed steps of each.
        warmup: steps of each before those.
        only: take those whose names begin with one of these, as in 'AdamW (' Muon LoRA-Pre.
        out: folder of the results. Default: benchmarks/results/DATE_HARDWARE.
    """
    shapes = shapes_of(model, layers)
    listed = list(contenders(ranks, DTYPES[dtype]))
    listed += [Contender(f"torch.mm, {n} p q r", rank, products(rank, n)) for rank in ranks for n in (2, 4)]
    listed = [c for c in listed if only is None or c.name.startswith(tuple(only))]
    if not listed:
        raise SystemExit(f"step_time.py: --only {' '.join(only or [])}: no name begins so")
    rows: list[Row] = [{"optimizer": c.name, "rank": c.rank} for c in listed]
    svd_seconds: dict[str, float] = {}
    try:
        place = device_of(device)
        weights = make_weights(shapes, place, DTYPES[dtype])
        svd = SVD(place)
        ready: dict[int, Optimizer] = {}
        for index, contender in enumerate(listed):
            try:
                with quiet(), svd.once():
                    optimizer = contender.build(weights, [])
                    for _ in range(warmup):
                        optimizer.step()
                ready[index] = optimizer
            except Exception as error:  # a peer that fails is a row that says so
                rows[index]["reason"] = reason(error)
        steps = {index: optimizer.step for index, optimizer in ready.items()}
        times = interleaved(steps, rounds, place)
        for index, optimizer in ready.items():
            refresh = svd.refresh(optimizer) if listed[index].gap else None
            rows[index] |= figures(times[index], refresh, listed[index].gap)
        svd_seconds = {"x".join(map(str, shape)): cost for shape, cost in svd.cost.items()}
    except NotMeasured as error:
        for row in rows:
            row["reason"] = str(error)
    for key, name in AGAINST.items():
        base = next((row["ms"] for row in rows if row["optimizer"] == name and "ms" in row), None)
        for row in rows:
            compared = key != "ratio_muon" or "Muon" in row["optimizer"]
            row[key] = row["ms"] / base if base and compared and "ms" in row else None
    elements = sum(p * q for p, q in shapes)
    Result(
        benchmark="step_time",
        title=f"optimizer.step: {model}, {len(shapes)} matrices, {elements / 1e6:.1f} M weights, {dtype}",
        device=device,
        settings={
            "name": [model, dtype],
            "ranks": ranks,
            "layers": layers,
            "rounds": rounds,
            "svd_seconds": svd_seconds,
        },
        columns=COLUMNS,
        rows=rows,
        notes=[
            f"r: rank; ms: median of {rounds} interleaved rounds; spread: interquartile range / median.",
            "GaLore, Fira, APOLLO: (t with new projections + 199 t without) / 200; their SVD was timed once "
            "for each shape.",
            *([PRODUCTS] if any(row["optimizer"].startswith("torch.mm") for row in rows) else []),
            *([f"Layers of the model taken: the first {layers}."] if layers else []),
        ],
    ).save(out, draw)


class Products(Optimizer):
    """No optimizer: its step makes products of the gradients (p, q) with factors of a rank."""

    def __init__(self, matrices: Weights, rank: int, count: int) -> None:
        """`count` products of each matrix; even, as many into factors as out of them."""
        super().__init__(matrices, {})
        self.count = count
        with torch.no_grad():
            self.factors = [(p[:, :1].repeat(1, rank), p[:1].repeat(rank, 1)) for p in matrices]
            self.results = [
                tuple(map(torch.empty_like, (*x, p))) for x, p in zip(self.factors, matrices, strict=True)
            ]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """T A^T, B A and, of four, B^T T, B A, in memory that is reused."""
        weights = self.param_groups[0]["params"]
        for p, (B, A), (like_B, like_A, like_p) in zip(weights, self.factors, self.results, strict=True):
            torch.mm(p.grad, A.mT, out=like_B)
            torch.mm(B, A, out=like_p)
            if self.count == 4:
                torch.mm(B.mT, p.grad, out=like_A)
                torch.mm(B, A, out=like_p)


def products(rank: int, count: int) -> Build:
    return lambda matrices, rest: Products(matrices, rank, count)


def figures(times: list[float], refresh: float | None, gap: int) -> Row:
    """Milliseconds of a step, over a whole gap where there is one."""

    def amortised(t: float) -> float:
        return 1e3 * (t if refresh is None else (refresh + (gap - 1) * t) / gap)

    plain = statistics.median(times)
    return {
        "ms": amortised(plain),
        "min_ms": amortised(min(times)),
        "spread": spread(times),
        "plain_ms": 1e3 * plain,
        "refresh_ms": None if refresh is None else 1e3 * refresh,
        "all_ms": [1e3 * t for t in times],
    }


def draw(figure: Any, result: Result) -> None:
    """Time over rank, in units of AdamW's."""
    axes = figure.add_subplot()
    measured = [row for row in result.rows if "ms" in row]
    ranks = sorted({row["rank"] for row in measured if row["rank"]})
    names = dict.fromkeys(row["optimizer"] for row in measured)
    for index, name in enumerate(names):
        own = [row for row in measured if row["optimizer"] == name]
        ours = name.startswith("LoRA-Pre")
        style: dict[str, Any] = {"color": f"C{index % 10}", "label": name, "linewidth": 2.2 if ours else 1.2}
        if own[0]["rank"] is None:
            axes.axhline(own[0]["ratio"], linestyle="--", **style)
        else:
            axes.plot(
                [row["rank"] for row in own],
                [row["ratio"] for row in own],
                marker="o" if ours else "s",
                markersize=6 if ours else 4,
                **style,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    low, high = axes.get_ylim()
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)
    axes.set_xlabel("rank")
    axes.set_ylabel("time of a step / AdamW (foreach)")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    axes.set_title(result.title, fontsize=10)


if __name__ == "__main__":
    app()
