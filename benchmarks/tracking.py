"""How well the factors follow Adam's moments on the gradients of a real run, and what becomes of the update.

    python benchmarks/tracking.py

A Llama is trained with AdamW. Every optimizer in the table sees the same gradients of its matrices, on
weights of its own that are set back to zero after each step: what it leaves there is its update, beside
AdamW's from the same gradients. Figures are means over matrices and over the second half of the run.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import Column, Result, Row
from cyclopts import App
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import get_cosine_with_min_lr_schedule_with_warmup, set_seed

from lorapre import LoRAPreAdamW, param_groups
from lorapre.variants import ADAM
from lorapre_recipes.config import Precision
from lorapre_recipes.console import quieten
from lorapre_recipes.data.stream import load_data
from lorapre_recipes.presets import PRETRAIN, get_preset
from lorapre_recipes.train.pretrain import build_model, collate

COLUMNS = [
    Column("variant", "variant"),
    Column("cosine", "cos m", ".3f"),
    Column("norm", "|m|", ".2f"),
    Column("best", "best", ".3f"),
    Column("update", "RMS", ".2f"),
    Column("update_cosine", "cos u", ".3f"),
    Column("largest", "max", ".1f"),
]

app = App(help=__doc__)


class Shadow:
    """An optimizer on zero weights that see the gradients of the real ones."""

    def __init__(self, weights: dict[str, nn.Parameter], **options: Any) -> None:
        self.weights = {name: nn.Parameter(torch.zeros_like(p)) for name, p in weights.items()}
        groups = [{"params": list(self.weights.items())}]
        self.optimizer = (LoRAPreAdamW if "variant" in options else AdamW)(groups, **options)

    @torch.no_grad()
    def updates(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a step at lr 1 takes off each weight."""
        for name, p in self.weights.items():
            p.zero_()
            p.grad = grads[name].clone()
        self.optimizer.step()
        return {name: -p.detach() for name, p in self.weights.items()}

    def product(self, name: str) -> Tensor:
        """B A of the first moment."""
        state = self.optimizer.state[self.weights[name]]
        product: Tensor = state["m_B"] @ state["m_A"]
        return product


@app.default
def main(
    *,
    preset: str = "llama-1m",
    steps: int = 200,
    batch_size: int = 64,
    lr: float = 0.02,
    scale: float = 0.1,
    rank: int = 16,
    beta2: float = 0.95,
    precision: Precision = "bf16",
    every: int = 10,
    data: str | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Train once and measure.

    Args:
        preset: model, data and schedule.
        steps: of the run.
        batch_size: sequences in a step.
        lr: AdamW's for the real weights.
        scale: on that of the matrices.
        rank: of the factors.
        beta2: of all.
        precision: of matrix products.
        every: steps between two measurements.
        data: another text.
        seed: of weights, data order and factors.
        out: folder of the results. Default: benchmarks/results/DATE_HARDWARE.
    """
    quieten()
    changes = {"steps": steps, "seed": seed, "lr": lr, "scale": scale, "precision": precision}
    changes |= {"batch_size": batch_size, "accumulation": 1}
    changes |= {"data": data} if data else {}
    config = get_preset(PRETRAIN, preset)("adamw").replace(**changes)
    packed = load_data(config)
    set_seed(seed)
    model = build_model(config, 0)
    groups = param_groups(model, rank=1)
    matrices = {n: p for group in groups if group["rank"] is not None for n, p in group["params"]}
    rest = [p for group in groups if group["rank"] is None for _, p in group["params"]]
    betas = (config.betas[0], beta2)
    optimizer = AdamW(
        [{"params": rest, "lr": lr}, {"params": list(matrices.values()), "lr": lr * scale}],
        betas=betas,
        weight_decay=0,
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, round(config.warmup * steps), steps, min_lr_rate=config.final_lr
    )
    same: dict[str, Any] = dict(lr=1.0, betas=betas, weight_decay=0.0)
    adamw = Shadow(matrices, **same)
    shadows = {variant: Shadow(matrices, variant=variant, rank=rank, seed=seed, **same) for variant in ADAM}
    order = torch.randperm(len(packed.train), generator=torch.Generator().manual_seed(seed)).tolist()
    average = {name: torch.zeros_like(p) for name, p in matrices.items()}
    seen: dict[str, list[tuple[int, str, dict[str, float]]]] = defaultdict(list)
    noise: list[tuple[int, float]] = []
    for step in range(1, steps + 1):
        first = (step - 1) * config.batch_size % (len(order) - config.batch_size)
        batch = collate([packed.train[i] for i in order[first : first + config.batch_size]])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        grads = {name: p.grad.detach() for name, p in matrices.items() if p.grad is not None}
        for name, g in grads.items():
            average[name].lerp_(g, 1 - betas[0])
        theirs = adamw.updates(grads)
        for name, shadow in shadows.items():
            updates = shadow.updates(grads)
            if step % every == 0:
                for matrix, update in updates.items():
                    figures = compare(update, theirs[matrix])
                    figures |= follow(shadow.product(matrix), average[matrix], rank)
                    seen[name].append((step, matrix, figures))
        if step % every == 0:
            ratios = [float(grads[n].norm() / average[n].norm()) for n in grads]
            noise.append((step, sum(ratios) / len(ratios)))
            print(f"step {step}  loss {loss.item():.3f}  |g| / |EMA| {noise[-1][1]:.2f}", flush=True)
        optimizer.step()
        schedule.step()

    tokens = config.tokens_per_step
    late = [ratio for step, ratio in noise if step > steps / 2]
    Result(
        benchmark="tracking",
        title=f"{preset}, {steps} steps of {tokens:,} tokens, rank {rank}, beta2 {beta2:g}: moments",
        device="cpu",
        settings={
            "name": [preset, f"{tokens}", f"beta2-{beta2:g}"],
            "curves": {name: curve(rows, "cosine") for name, rows in seen.items()},
            "best": curve(seen["split"], "best"),
            "noise": noise,
            "matrices": {name: by_matrix(rows, steps / 2) for name, rows in seen.items()},
        },
        columns=COLUMNS,
        rows=[row(name, rows, steps / 2) for name, rows in seen.items()],
        notes=[
            f"|g| / |EMA| is {sum(late) / len(late):.2f}; the loss ended at {loss.item():.3f}.",
            "cos m and |m|: B A beside the dense EMA; best: the cosine of "
            "the EMA's own truncation to the rank. RMS, cos u: the update beside AdamW's from the same "
            "gradients; max: its largest entry over the RMS of AdamW's.",
        ],
    ).save(out, draw)


def compare(update: Tensor, theirs: Tensor) -> dict[str, float]:
    """An update beside AdamW's."""
    rms = theirs.square().mean().sqrt()
    return {
        "update": float(update.square().mean().sqrt() / rms),
        "update_cosine": float(torch.cosine_similarity(update.flatten(), theirs.flatten(), dim=0)),
        "largest": float(update.abs().max() / rms),
    }


def follow(product: Tensor, average: Tensor, rank: int) -> dict[str, float]:
    """B A beside the dense EMA and what rank r can have of it."""
    energies = torch.linalg.svdvals(average).square()
    return {
        "cosine": float(torch.cosine_similarity(product.flatten(), average.flatten(), dim=0)),
        "norm": float(product.norm() / average.norm()),
        "best": math.sqrt(float(energies[:rank].sum() / energies.sum())),
    }


Rows = list[tuple[int, str, dict[str, float]]]


def row(name: str, rows: Rows, after: float) -> Row:
    """Means over the matrices and the steps after one."""
    late = [figures for step, _, figures in rows if step > after]
    return {"variant": name, **{key: sum(f[key] for f in late) / len(late) for key in late[0]}}


def curve(rows: Rows, key: str) -> list[tuple[int, float]]:
    """Means over matrices at each step."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for step, _, figures in rows:
        by_step[step].append(figures[key])
    return [(step, sum(values) / len(values)) for step, values in by_step.items()]


def by_matrix(rows: Rows, after: float) -> dict[str, dict[str, float]]:
    """Means over the steps after one, of each matrix."""
    matrices: dict[str, list[dict[str, float]]] = defaultdict(list)
    for step, matrix, figures in rows:
        if step > after:
            matrices[matrix].append(figures)
    return {
        matrix: {key: sum(f[key] for f in late) / len(late) for key in late[0]}
        for matrix, late in matrices.items()
    }


def draw(figure: Any, result: Result) -> None:
    """The cosine of B A to the EMA over steps, and below it the size of a gradient against the EMA."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, points in result.settings["curves"].items():
        above.plot(*zip(*points, strict=True), label=name)
    above.plot(
        *zip(*result.settings["best"], strict=True), color="black", linewidth=1, label="best of rank r"
    )
    below.plot(*zip(*result.settings["noise"], strict=True), color="black")
    above.set_ylabel("cosine of B A to the EMA")
    below.set_ylabel("|g| / |EMA|")
    below.set_xlabel("steps")
    for axes in (above, below):
        axes.grid(alpha=0.25)
    above.legend(frameon=False, fontsize=8)
    above.set_title(result.title, fontsize=10)


if __name__ == "__main__":
    app()
