"""Weights in bfloat16 with and without stochastic rounding, against float32, on the quickstart's task.

    python benchmarks/bf16.py

Three runs of `lorapre pretrain` that differ in nothing but the weights' type and how they are rounded.
"""

import contextlib
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Column, Result, Row, quiet, reason
from cyclopts import App

from lorapre_recipes.config import OptimizerName
from lorapre_recipes.console import quieten
from lorapre_recipes.presets import PRETRAIN, get_preset
from lorapre_recipes.train.pretrain import pretrain
from lorapre_recipes.train.summary import read_metrics

COLUMNS = [
    Column("run", "weights"),
    Column("loss", "loss", ".4f"),
    Column("perplexity", "perplexity", ".2f"),
    Column("gap", "above float32", "+.2%"),
    Column("minutes", "minutes", ".1f"),
]
RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, stochastic rounding": {"dtype": "bf16", "stochastic_rounding": True},
    "bfloat16": {"dtype": "bf16"},
}

app = App(help=__doc__)


@app.default
def main(
    *,
    preset: str = "llama-tiny",
    optimizer: OptimizerName = "lorapre-adamw",
    steps: int | None = None,
    data: str | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Train three times.

    Args:
        preset: model, data and schedule.
        optimizer: lorapre-adamw or lorapre-muon.
        steps: fewer than the preset has, to try it out.
        data: another text.
        seed: of the runs.
        out: folder of the results. Default: benchmarks/results/DATE_HARDWARE.
    """
    changes = {"steps": steps, "data": data, "seed": seed}
    config = get_preset(PRETRAIN, preset)(optimizer).replace(
        **{k: v for k, v in changes.items() if v is not None}
    )
    rows: list[Row] = []
    curves: dict[str, list[tuple[int, float]]] = {}
    quieten()
    for name, options in RUNS.items():
        row: Row = {"run": name}
        folder = Path(tempfile.mkdtemp(prefix="lorapre-bf16-"))
        try:
            with quiet(), contextlib.redirect_stdout(io.StringIO()):  # the bar is on stderr
                summary = pretrain(config.replace(**options), folder / "run")
            row |= {
                "loss": summary.validation_loss,
                "perplexity": summary.validation_perplexity,
                "minutes": summary.wall_seconds / 60,
                "gap": summary.validation_loss / rows[0]["loss"] - 1 if rows else 0.0,
            }
            metrics = read_metrics(folder / "run" / "metrics.jsonl")
            curves[name] = [(m["step"], m["validation_loss"]) for m in metrics if "validation_loss" in m]
        except Exception as error:
            row["reason"] = reason(error)
        finally:
            shutil.rmtree(folder)
        rows.append(row)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    Result(
        benchmark="bf16",
        title=f"{preset}, {optimizer}, {config.steps} steps: weights in bfloat16",
        device=device,
        settings={"name": [preset, optimizer], "steps": config.steps, "seed": seed, "curves": curves},
        columns=COLUMNS,
        rows=rows,
        notes=[
            "loss: validation, nats per token, one seed. Weights, gradients and activations are of the type; "
            "factors are float32."
        ],
    ).save(out, draw)


def draw(figure: Any, result: Result) -> None:
    """Validation loss over steps, and what it is above that of float32."""
    loss, gap = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    curves = result.settings["curves"]
    for name, points in curves.items():
        steps, losses = zip(*points, strict=True)
        above = [100 * (y / y0 - 1) for y, (_, y0) in zip(losses, curves["float32"], strict=False)]
        loss.plot(steps, losses, marker="o", markersize=3, label=name)
        gap.plot(steps[: len(above)], above, marker="o", markersize=3)
    loss.set_ylabel("validation loss (nats per token)")
    gap.set_ylabel("% above float32")
    gap.set_xlabel("steps")
    for axes in (loss, gap):
        axes.grid(alpha=0.25)
    loss.legend(frameon=False)
    loss.set_title(result.title, fontsize=10)


if __name__ == "__main__":
    app()
