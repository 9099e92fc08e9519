"""`lorapre plan`: memory of a training step of a model, without its weights, as a table."""

import math
import re
from collections.abc import Sequence

from lorapre_recipes.config import UserError
from lorapre_recipes.console import binary, short
from lorapre_recipes.plan.memory import memory
from lorapre_recipes.plan.settings import ONE_GPU, Mesh, Settings
from lorapre_recipes.plan.shapes import meta_model
from lorapre_recipes.plan.weights import check_mesh, routed
from lorapre_recipes.train.optim import DTYPES

MOST_MESHES = 3  # that fit into 80 columns

Row = tuple[str, ...]


def render(name: str, settings: Settings, meshes: Sequence[Mesh] = ()) -> str:
    """The text that `lorapre plan` prints. Raises UserError where that cannot be."""
    if meshes and settings.release:
        raise UserError(
            "--release: gradients of sharded weights are not released; leave out --mesh"
        )
    if len(meshes) > MOST_MESHES:
        raise UserError(
            f"--mesh: {MOST_MESHES} fit into a table, not {len(meshes)}; run the command again"
        )
    model = meta_model(name, DTYPES[settings.dtype])
    weights = routed(model, settings)
    for mesh in meshes:
        check_mesh(model, weights, mesh)
    numel = short(sum(math.prod(weight.shape) for weight in weights))
    columns = [memory(weights, settings, mesh) for mesh in (ONE_GPU, *meshes)]

    def row(label: str, field: str) -> Row:
        return (label, *(binary(getattr(column, field)) for column in columns))

    trained = [weight for weight in weights if not weight.frozen]
    matrices = sum(weight.matrix for weight in trained)
    route = "low rank" if settings.low_rank else "Muon's"
    body = [
        row("weights", "weights"),
        row("largest gradient" if settings.release else "gradients", "gradients"),
        row("optimizer state", "state"),
    ]
    if settings.optimizer != "adamw":
        body.append(row(f"  {route}, {matrices} weights", "matrices"))
        body.append(row(f"  dense, {len(trained) - matrices} weights", "dense"))
    body += [
        row("transient, at most", "transient"),
        row("peak, no activations", "peak"),
        row("torch.optim.AdamW's state", "adamw"),
        ("state / AdamW's", *(f"{column.state / column.adamw:.2f}" for column in columns)),
    ]
    head = f"{name}, {numel} parameters in {settings.dtype}\n{settings}"
    return f"{head}\n\n{table('Memory of a GPU', ['one GPU', *map(str, meshes)], body)}"


def table(title: str, header: Sequence[str], body: Sequence[Row]) -> str:
    """Rows under a header, aligned. The header of a mesh of two kinds takes two lines."""
    lines = max(cell.count(",") for cell in header) + 1
    split = [[*[""] * (lines - 1 - cell.count(",")), *re.split("(?<=,)", cell)] for cell in header]
    heads = [(title if i == lines - 1 else "", *(cell[i] for cell in split)) for i in range(lines)]
    widths = [max(map(len, column)) for column in zip(*heads, *body, strict=True)]
    text = []
    for name, *cells in (*heads, *body):
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([name.ljust(widths[0]), *right]))
    text.insert(lines, "-" * len(text[0]))
    return "\n".join(row.rstrip() for row in text)
