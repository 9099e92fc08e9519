"""Peak memory of a training step by category: LoRA-Pre, with and without gradient release, and peers.

    python benchmarks/memory.py --model llama-60m --ranks 128

Every optimizer trains the same model on the same batch. Between marks at each gradient and around the step
the counter keeps the peak, so that what is alive at the peak is known by category. On the CPU it counts every
call of the allocator, with the growth of the resident set beside it; on CUDA the caching allocator counts.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from allocations import Mark, peak_resident_bytes, segments
from common import (
    DTYPES,
    SVD,
    Column,
    Contender,
    NotMeasured,
    Ranks,
    Result,
    Row,
    contenders,
    device_of,
    galore_8bit,
    lorapre_adamw,
    matrices_of,
    quiet,
    reason,
)
from cyclopts import App
from torch import Tensor, nn
from torch.optim import Optimizer

from lorapre_recipes.plan.shapes import config_of
from lorapre_recipes.train.optim import storage_bytes, tensors_in

COLUMNS = [
    Column("optimizer", "optimizer"),
    Column("rank", "r"),
    Column("weights", "weights", "MiB"),
    Column("gradients", "grads", "MiB"),
    Column("state", "state", "MiB"),
    Column("activations", "activ.", "MiB"),
    Column("transient", "in step", "MiB"),
    Column("peak", "peak", "MiB"),
]
CATEGORIES = ("weights", "state", "gradients", "activations", "transient")

app = App(help=__doc__)


@app.default
def main(
    *,
    model: str = "llama-60m",
    ranks: Ranks = [128],  # noqa: B006
    dtype: Literal["fp32", "bf16"] = "fp32",
    device: str = "cpu",
    layers: int | None = None,
    batch: int = 1,
    length: int = 128,
    out: Path | None = None,
) -> None:
    """Measure the peak memory of a training step.

    Args:
        model: what `lorapre plan` takes; its weights are random.
        ranks: of the low-rank optimizers.
        dtype: of weights and gradients.
        device: cpu or cuda.
        layers: make the model with so many.
        batch: sequences.
        length: tokens of each.
        out: folder of the results. Default: benchmarks/results/DATE_HARDWARE.
    """
    listed = compared(ranks, DTYPES[dtype])
    rows: list[Row] = [{"optimizer": c.name, "rank": c.rank} for c in listed]
    for contender, row in zip(listed, rows, strict=True):
        try:
            place = device_of(device)
            with quiet(), SVD(place).once():
                row |= measure(contender, model, layers, DTYPES[dtype], place, (batch, length))
        except Exception as error:  # a peer that fails is a row that says so
            row["reason"] = reason(error)
    depth = f", layers: {layers}" if layers else ""
    Result(
        benchmark="memory",
        title=f"Memory of a training step: {model}{depth}, {dtype}, {batch} x {length} tokens, MiB",
        device=device,
        settings={"name": [model, dtype], "ranks": ranks, "layers": layers, "batch": [batch, length]},
        columns=COLUMNS,
        rows=rows,
        notes=[
            "Each category at its largest; they are not at the same time, so that the peak is less than the "
            "sum. in step: what optimizer.step allocates for its own use; activ.: whatever else is held.",
            *resident(rows),
        ],
    ).save(out, draw)


def compared(ranks: list[int], dtype: torch.dtype) -> list[Contender]:
    """The contenders, GaLore in 8 bit, and LoRA-Pre with release."""
    found = [c for c in contenders(ranks, dtype) if not c.name.endswith("rounding")]
    for rank in ranks:
        found.append(Contender("GaLore 8bit", rank, galore_8bit(rank)))
        found.append(Contender("LoRA-Pre, release", rank, lorapre_adamw(rank), release=True))
    return found


class Label(NamedTuple):
    """What is known of a segment: bytes of gradients, and whether it is one of optimizer.step."""

    gradients: int
    stepping: bool


def measure(
    contender: Contender,
    name: str,
    layers: int | None,
    dtype: torch.dtype,
    device: torch.device,
    tokens: tuple[int, int],
) -> Row:
    """The figures of a row, in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    model = build_model(name, layers, dtype, device)
    matrices = [p for _, p in matrices_of(model)]
    chosen = set(matrices)
    optimizer = contender.build(matrices, [p for p in model.parameters() if p not in chosen])
    ids = torch.randint(model.config.vocab_size, tokens, device=device)
    step = training_step(model, optimizer, ids, release=contender.release)
    for _ in range(2):  # the first makes the state, or compiles
        step(lambda _: None)
    found = segments(step, device)
    weights = storage_bytes(*model.parameters(), *model.buffers())
    state = storage_bytes(*(x for own in optimizer.state.values() for x in tensors_in(own)))
    at = max(found, key=lambda segment: segment.peak)
    alive = breakdown(at)
    parts = [breakdown(segment) for segment in found]
    figures: Row = {
        "weights": weights,
        "state": state,
        "gradients": max(segment.label.gradients for segment in found if segment.label),
        "activations": max(part["activations"] for part in parts),
        "transient": max(part["transient"] for part in parts),
        "peak": weights + state + at.peak,
        "at_peak": {"weights": weights, "state": state, **alive},
    }
    if device.type == "cpu":
        figures["resident"] = peak_resident_bytes(lambda: step(lambda _: None))
        figures["counted"] = at.peak
    return figures


def breakdown(segment: Any) -> dict[str, int]:
    """What is alive at the peak of a segment."""
    label = segment.label or Label(0, False)
    transient = segment.peak - segment.start if label.stepping else 0
    return {
        "gradients": label.gradients,
        "activations": segment.peak - transient - label.gradients,
        "transient": transient,
    }


def build_model(name: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights."""
    from transformers import AutoModelForCausalLM

    config = config_of(name)
    if layers:
        config.num_hidden_layers = layers
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def training_step(
    model: nn.Module, optimizer: Optimizer, ids: Tensor, *, release: bool
) -> Callable[[Mark], None]:
    """A step of training that marks what it does. Gradients are gone at its start and at its end."""
    alive, marks = 0, list[Mark]()

    def mark(change: int, stepping: bool) -> None:
        nonlocal alive
        alive += change
        marks[-1](Label(alive, stepping))

    def hook(sign: int, stepping: bool) -> Callable[[Tensor], None]:
        return lambda p: mark(sign * p.nbytes, stepping)

    # Hooks run in the order in which they are registered: a gradient is there, is released, is gone.
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook(+1, release))
    if release:
        try:
            from lorapre import gradient_release
        except ImportError as error:
            raise NotMeasured("no gradient_release in this version") from error
        gradient_release(model, optimizer)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook(-1, False))

    def step(new_mark: Mark) -> None:
        marks.append(new_mark)
        mark(0, False)
        model(input_ids=ids, labels=ids).loss.backward()
        if not release:
            mark(0, True)
            optimizer.step()
            mark(0, False)
        optimizer.zero_grad()
        mark(-alive, False)

    return step


def resident(rows: list[Row]) -> list[str]:
    """The counter against the kernel."""
    both = [(row["counted"], row["resident"]) for row in rows if row.get("resident")]
    if not both:
        return []
    ratios = [seen / counted for counted, seen in both]
    return [
        "Above weights and state, the resident set grew by "
        f"{min(ratios):.2f} to {max(ratios):.2f} times what was counted."
    ]


def draw(figure: Any, result: Result) -> None:
    """What is alive at the peak."""
    axes = figure.add_subplot()
    measured = [row for row in result.rows if "peak" in row]
    highest = max(row["peak"] for row in measured)
    unit, word = (2**30, "GiB") if highest >= 2**30 else (2**20, "MiB")
    names = [row["optimizer"] + (f", r = {row['rank']}" if row["rank"] else "") for row in measured]
    left = [0.0] * len(measured)
    for index, category in enumerate(CATEGORIES):
        widths = [row["at_peak"][category] / unit for row in measured]
        axes.barh(names, widths, left=left, color=f"C{index}", label=category)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, row in enumerate(measured):
        value = row["peak"] / unit
        axes.text(left[y], y, f" {value:.2f}" if value < 10 else f" {value:,.0f}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"alive at the peak of a training step ({word})")
    axes.legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    axes.tick_params(axis="y", labelsize=8)
    figure.suptitle(result.title, fontsize=10)


if __name__ == "__main__":
    app()
