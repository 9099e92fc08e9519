"""`lorapre plan`: memory and traffic of a training step of a model, without its weights, as tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lorapre_recipes.config import UserError
from lorapre_recipes.console import binary, short
from lorapre_recipes.plan.memory import memory
from lorapre_recipes.plan.settings import ONE_GPU, Mesh, Settings
from lorapre_recipes.plan.shapes import meta_model
from lorapre_recipes.plan.traffic import (
    fsdp_traffic,
    gather_traffic,
    most_row_shards,
    optimizer_traffic,
)
from lorapre_recipes.plan.weights import Weight, check_mesh, routed
from lorapre_recipes.train.optim import DTYPES

WIDTH = 80  # columns
MOST_MESHES = 3  # that fit
NAME = 18  # characters of a name

Row = tuple[str, ...]


def render(name: str, settings: Settings, meshes: Sequence[Mesh] = ()) -> str:
    """The text that `lorapre plan` prints: memory and, where there are meshes, traffic of a step."""
    if meshes and settings.release:
        raise UserError("--release: gradients of sharded weights are not released; leave out --mesh")
    if len(meshes) > MOST_MESHES:
        raise UserError(f"--mesh: {MOST_MESHES} fit into a table, not {len(meshes)}; run the command again")
    model = meta_model(name, DTYPES[settings.dtype])
    weights = routed(model, settings)
    for mesh in meshes:
        check_mesh(model, weights, mesh)
    numel = sum(math.prod(weight.shape) for weight in weights)
    sections = [
        f"{name}, {short(numel)} parameters in {settings.dtype}\n{settings}",
        memory_table(weights, settings, meshes),
    ]
    if meshes:
        sections.append(traffic_table(weights, settings, meshes))
        if settings.low_rank:
            sections.append(share_table(weights, settings, meshes))
        sections.append(notes(settings, meshes))
    return "\n\n".join(sections)


def memory_table(weights: Sequence[Weight], settings: Settings, meshes: Sequence[Mesh]) -> str:
    """Bytes of weights, gradients, state and what a step adds, whole and per GPU."""
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
    return table("Memory of a GPU", ["one GPU", *map(str, meshes)], body)


def traffic_table(weights: Sequence[Weight], settings: Settings, meshes: Sequence[Mesh]) -> str:
    """Bytes that each GPU sends in a step, for one weight of each kind and in all."""
    item = settings.item
    own = [binary(fsdp_traffic(weights, mesh, item)) for mesh in meshes]
    if settings.optimizer == "adamw":  # elementwise
        body: list[Row] = [("AdamW", *("0 B" for _ in meshes)), ("FSDP2's own", *own)]
        return table("Sent in a step", [*map(str, meshes)], body)
    matrices = [weight for weight in weights if weight.matrix and not weight.frozen]
    sent = [optimizer_traffic(matrices, settings, mesh) for mesh in meshes]
    body = []
    for name, (one, *_) in kinds_of(matrices, meshes):
        shape, numel = "x".join(map(str, one.shape)), math.prod(one.shape)
        body.append((name, shape, binary(numel * item), *(binary(each[one.name]) for each in sent)))
    kinds = len(body)
    total = [binary(sum(each.values())) for each in sent]
    body.append((f"optimizer, all {len(matrices)}", "", "", *total))
    if settings.optimizer != "muon":
        gathered = (sum(gather_traffic(weight, item, mesh) for weight in matrices) for mesh in meshes)
        body.append(("gathered instead", "", "", *map(binary, gathered)))
    body.append(("FSDP2's own", "", "", *own))
    return table("Sent in a step", ["shape", "p q", *map(str, meshes)], body, rule=kinds)


def share_table(weights: Sequence[Weight], settings: Settings, meshes: Sequence[Mesh]) -> str:
    """State of one weight on a GPU as a share of AdamW's, and how many row shards keep it below one."""
    body: list[Row] = []
    for name, kind in kinds_of((weight for weight in weights if not weight.frozen), meshes):
        one = kind[0]
        shares = [one.state_bytes(mesh) / one.adamw_bytes(mesh, settings.item) for mesh in (ONE_GPU, *meshes)]
        pays = str(most_row_shards(one, settings))
        body.append((name, f"{len(kind)}", pays, *(f"{share:.2f}" for share in shares)))
    header = ["weights", "pays to", "one GPU", *map(str, meshes)]
    return table("State / AdamW's", header, body)


def notes(settings: Settings, meshes: Sequence[Mesh]) -> str:
    """What the figures mean, under the tables."""
    lines = ["Sent: rings of N, an all-reduce of n bytes 2 (N-1)/N n, a gather (N-1)/N n."]
    if settings.low_rank:
        lines.append("Gathered instead: the gradients of these weights, p q elements each.")
    lines.append("FSDP2's own: weights gathered twice, gradients scattered, HSDP's all-reduce.")
    if any(mesh.tp > 1 for mesh in meshes):
        lines.append("Activations, which tensor parallelism sends, are not counted.")
    if settings.optimizer == "muon":
        lines.append("torch.optim.Muon needs whole matrices: one gather of each is counted.")
    if settings.low_rank:
        lines.append("Pays to: the most row shards on which a weight has less state than AdamW's.")
    return "\n".join(lines)


def kinds_of(weights: Iterable[Weight], meshes: Iterable[Mesh]) -> list[tuple[str, list[Weight]]]:
    """Matrices that share a line of a table: shape, group and, where there is any, tensor parallelism.

    The line is named after the last parts of their names: q_proj,o_proj.
    """
    tp = any(mesh.tp > 1 for mesh in meshes)
    alike: dict[Any, list[Weight]] = {}
    for weight in weights:
        if weight.matrix:
            alike.setdefault((weight.group, weight.shape, weight.tp_dim if tp else None), []).append(weight)
    kinds = []
    for kind in alike.values():
        last = dict.fromkeys(weight.name.removesuffix(".weight").rpartition(".")[2] for weight in kind)
        kinds.append((shortened(",".join(last), NAME), kind))
    return kinds


def table(title: str, header: Sequence[str], body: Sequence[Row], rule: int = 0) -> str:
    """Rows under a header, aligned; `rule` rows are followed by a line. Names give way to the width.

    The header of a mesh of two kinds takes two lines.
    """
    lines = max(cell.count(",") for cell in header) + 1
    split = [[*[""] * (lines - 1 - cell.count(",")), *re.split("(?<=,)", cell)] for cell in header]
    heads = [(title if i == lines - 1 else "", *(cell[i] for cell in split)) for i in range(lines)]
    widths = [max(map(len, column)) for column in zip(*heads, *body, strict=True)]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(header))
    text = []
    for name, *cells in (*heads, *body):
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([shortened(name, widths[0]).ljust(widths[0]), *right]))
    line = "-" * len(text[0])
    text.insert(lines, line)
    if rule:
        text.insert(lines + 1 + rule, line)
    return "\n".join(row.rstrip() for row in text)


def shortened(name: str, width: int) -> str:
    """A name that is too long ends in two dots."""
    return name if len(name) <= width else f"{name[: width - 2]}.."
