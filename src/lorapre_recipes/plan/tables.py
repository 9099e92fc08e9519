"""`lorapre plan`: memory of a training step of a model, without its weights, as a table."""

import math
from collections.abc import Sequence

from lorapre_recipes.config import UserError
from lorapre_recipes.console import binary, short
from lorapre_recipes.plan.memory import check_mesh, memory, routed
from lorapre_recipes.plan.settings import ONE_GPU, Mesh, Settings
from lorapre_recipes.plan.shapes import meta_model
from lorapre_recipes.train.optim import DTYPES

MOST_MESHES = 3  # that fit into 80 columns

Row = tuple[str, ...]


def render(name: str, settings: Settings, meshes: Sequence[Mesh] = ()) -> str:
    """The text that `lorapre plan` prints. Raises UserError for a plan that cannot be made."""
    if meshes and settings.release:
        sharded = "gradients of sharded weights are not released"
        raise UserError(f"--release: {sharded}; leave out --mesh")
    if len(meshes) > MOST_MESHES:
        most = f"{MOST_MESHES} fit into a table, not {len(meshes)}"
        raise UserError(f"--mesh: {most}; run the command again")
    model = meta_model(name, DTYPES[settings.dtype])
    weights = routed(model, settings)
    for mesh in meshes:
        check_mesh(model, weights, mesh)
    numel = short(sum(math.prod(weight.shape) for weight in weights))
    meshes = (ONE_GPU, *meshes)
    columns = [memory(weights, settings, mesh) for mesh in meshes]

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
    return f"{head}\n\n{table(('Memory of a GPU', *(mesh.name for mesh in meshes)), body)}"


def table(header: Row, body: Sequence[Row]) -> str:
    """Rows under a header, aligned. A header with a comma is broken behind it."""
    heads = [header]
    if any("," in name for name in header):
        parts = [name.rpartition(",") for name in header]
        heads = [tuple(x + y for x, y, _ in parts), tuple(last for *_, last in parts)]
    first, *others = [max(map(len, column)) for column in zip(*heads, *body, strict=True)]
    form = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
    line = "-" * (first + sum(width + 2 for width in others))
    rows = [form.format(*row).rstrip() for row in (*heads, *body)]
    return "\n".join([*rows[: len(heads)], line, *rows[len(heads) :]])
