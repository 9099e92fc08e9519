r"""Draw the picture of memory on the start page: python docs/pictures.py.

It shows what this command computes, and the same without --release:

    lorapre plan llama-3.1-8b --rank 128 --ends low-rank --release --dtype bf16 --gradient-checkpointing \
        --batch-size 1 --sequence-length 2048 --budget 24GiB --against
"""

import dataclasses
from pathlib import Path

from matplotlib.figure import Figure

from lorapre_recipes.plan.against import contenders
from lorapre_recipes.plan.settings import Settings

SETTINGS = Settings(
    rank=128, ends="low-rank", release=True, dtype="bf16", gradient_checkpointing=True, batch_size=1,
    sequence_length=2048,
)  # fmt: skip
CARD = 24  # GiB
# Adjacent categories differ in lightness as well as in hue, for readers who see no colours.
COLOURS = {
    "weights": "#4c566a",
    "gradients": "#a3be8c",
    "state": "#c0392b",
    "activations": "#88c0d0",
    "logits": "#5e81ac",
    "transient": "#d8a657",
}
OUT = Path(__file__).parent / "assets" / "memory-8b.png"


def draw(columns: dict[str, dict[str, int]]) -> Figure:
    """Bars of memory in GiB, one for each optimizer, and a line at the size of a card."""
    figure = Figure(figsize=(7, 3.4), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    labels = list(columns)
    left = [0.0] * len(labels)
    for kind, colour in COLOURS.items():
        sizes = [column[kind] / 2**30 for column in columns.values()]
        axes.barh(labels, sizes, left=left, color=colour, label=kind, height=0.65)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.text(
            (CARD if CARD - 6 < total < CARD else total) + 0.8, place, f"{total:.1f}", va="center", fontsize=9
        )
    axes.axvline(CARD, color="0.3", linewidth=1, linestyle="--")
    axes.text(CARD + 0.5, -0.5, "a 24 GB card", fontsize=8, va="center", color="0.3")
    axes.invert_yaxis()
    axes.set_xlim(0, max(left) * 1.09)
    axes.set_xlabel("GiB at the peak of a training step of Llama-3.1-8B (computed)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="lower right", frameon=False)
    return figure


def columns() -> dict[str, dict[str, int]]:
    """Bytes by category of each optimizer, and of LoRA-Pre where gradients are kept."""
    released = dict(contenders("llama-3.1-8b", SETTINGS))
    kept = dict(contenders("llama-3.1-8b", dataclasses.replace(SETTINGS, release=False)))
    first, *others = released
    return {first: released[first], f"{first}, no release": kept[first]} | {x: released[x] for x in others}


if __name__ == "__main__":
    draw(columns()).savefig(OUT)
