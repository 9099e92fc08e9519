"""`lorapre plan`: memory and traffic of a training step of a model, without its weights, as tables."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lorapre import LoRAPreAdamW, LoRAPreMuon, param_groups
from lorapre.groups import is_low_rank, state_shapes
from lorapre_recipes.config import LOW_RANK, UserError, parse_rules
from lorapre_recipes.plan.footprint import (
    DTYPES,
    FLOAT32,
    ONE_GPU,
    Mesh,
    Settings,
    Weight,
    fsdp_traffic,
    gather_traffic,
    memory,
    most_row_shards,
    optimizer_traffic,
)
from lorapre_recipes.plan.shapes import meta_model
from lorapre_recipes.train.optim import freeze
from lorapre_recipes.train.summary import short

# Which dimension of a weight (..., out, in) the styles of a transformers tp_plan divide. Others replicate it.
TP_DIM = {
    "colwise": -2,
    "colwise_rep": -2,
    "colwise_gather_output": -2,
    "packed_colwise": -2,
    "embedding_rowwise": -2,
    "rowwise": -1,
    "rowwise_rep": -1,
    "rowwise_split_input": -1,
    "packed_rowwise": -1,
    "embedding_colwise": -1,
}


def routed(model: PreTrainedModel, settings: Settings) -> list[Weight]:
    """The parameters of a model with the state that the optimizer makes for them.

    Raises:
        UserError: no matrix would be factorised, or a pattern is found nowhere.
    """
    freeze(model, settings.freeze)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            groups = _groups(model, settings)
    except (ValueError, UserWarning) as error:
        option = "--rules" if str(error).startswith("rules:") else f"--rank {settings.rank}"
        raise UserError(f"{option}: {error}") from error
    dims = _tp_dims(model)
    weights = [
        _weight(name, parameter, dims.get(name), index, group, settings)
        for index, group in enumerate(groups)
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]
    order = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    return sorted(weights, key=lambda weight: order[weight.name])


def _groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """The optimizer's groups with all their options; for the dense optimizers, rank 1 marks the matrices."""
    rules = parse_rules(settings.rules)
    if settings.optimizer == "lorapre-adamw":
        adamw = LoRAPreAdamW(
            param_groups(model, rank=settings.rank, rules=rules),
            variant=settings.variant or "",
            compress=settings.compress or "both",
        )
        return adamw.param_groups
    if settings.optimizer == "lorapre-muon":
        groups = param_groups(model, rank=settings.rank, rules=rules)
        return LoRAPreMuon(groups, variant=settings.variant or "").param_groups
    return LoRAPreAdamW(param_groups(model, rank=1 if settings.optimizer == "muon" else None)).param_groups


def _weight(
    name: str,
    parameter: nn.Parameter,
    tp_dim: int | None,
    index: int,
    group: dict[str, Any],
    settings: Settings,
) -> Weight:
    shape = tuple(parameter.shape)
    matrix = is_low_rank(shape, group["rank"], group["flatten"])
    low_rank = matrix and settings.optimizer in LOW_RANK
    if settings.optimizer in LOW_RANK:
        state = state_shapes(group, shape)
    elif matrix:
        state = {"momentum_buffer": shape}
    else:
        state = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    return Weight(
        name=name,
        shape=shape,
        group=index,
        rank=group["rank"] if low_rank else None,
        flatten=group["flatten"],
        matrix=matrix,
        state=state,
        state_item=FLOAT32 if settings.optimizer in LOW_RANK else settings.item,
        tp_dim=tp_dim,
        frozen=not parameter.requires_grad,
    )


def _tp_dims(model: PreTrainedModel) -> dict[str, int]:
    """The dimension that the model's tensor-parallel plan divides, by name of the parameter."""
    styles = {
        re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"(?:\.(?:weight|bias))?"): style
        for pattern, style in (model.tp_plan or {}).items()
    }
    dims = {}
    for name, parameter in model.named_parameters():
        style = next((style for pattern, style in styles.items() if pattern.fullmatch(name)), None)
        dim = TP_DIM.get(style or "")
        if dim is None or parameter.ndim == 0 or (parameter.ndim == 1 and dim == -1):
            continue  # the bias of a rowwise layer is whole everywhere
        dims[name] = dim + parameter.ndim if parameter.ndim > 1 else 0
    return dims


def check_mesh(model: PreTrainedModel, weights: Iterable[Weight], mesh: Mesh) -> None:
    """Refuse a tensor parallelism that does not fit the model. FSDP2 pads, and fits any. Raises UserError."""
    if mesh.tp == 1:
        return
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    assert isinstance(heads, int)
    if all(weight.tp_dim is None for weight in weights):
        raise UserError(
            f"--mesh tp={mesh.tp}: transformers has no tensor-parallel plan for {config.model_type}"
        )
    if heads % mesh.tp:
        raise UserError(f"--mesh tp={mesh.tp}: does not divide the model's {heads} key-value heads")
    for weight in weights:
        if weight.tp_dim is not None and weight.shape[weight.tp_dim] % mesh.tp:
            shape = "x".join(map(str, weight.shape))
            raise UserError(
                f"--mesh tp={mesh.tp}: does not divide dimension {weight.tp_dim} of {weight.name}, {shape}"
            )


# Tables

WIDTH = 80  # columns
MOST_MESHES = 3  # that fit
NAME = 18  # characters of a name


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
    head = f"{name}, {short(numel)} parameters in {settings.dtype}\n{settings}"
    sections = [head, memory_table(weights, settings, meshes)]
    if meshes:
        sections.append(traffic_table(weights, settings, meshes))
    if meshes and settings.optimizer in LOW_RANK:
        sections.append(share_table(trained(weights), settings, meshes))
    if meshes:
        sections.append(notes(settings, meshes))
    return "\n\n".join(sections)


def trained(weights: Iterable[Weight]) -> list[Weight]:
    """Those that are not frozen."""
    return [weight for weight in weights if not weight.frozen]


def memory_table(weights: Sequence[Weight], settings: Settings, meshes: Sequence[Mesh]) -> str:
    """Bytes of weights, gradients, state and what a step adds, whole and per GPU."""
    columns = [memory(weights, settings, mesh) for mesh in (ONE_GPU, *meshes)]
    matrices = sum(weight.matrix for weight in trained(weights))
    route = "low rank" if settings.optimizer in LOW_RANK else "Muon's"
    state: list[Row] = [("optimizer state", *(size(m.state) for m in columns))]
    if settings.optimizer != "adamw":
        state += [
            (f"  {route}, {matrices} weights", *(size(m.matrices) for m in columns)),
            (f"  dense, {len(trained(weights)) - matrices} weights", *(size(m.dense) for m in columns)),
        ]
    body: list[Row] = [
        ("weights", *(size(m.weights) for m in columns)),
        ("largest gradient" if settings.release else "gradients", *(size(m.gradients) for m in columns)),
        *state,
        ("transient, at most", *(size(m.transient) for m in columns)),
        ("peak, no activations", *(size(m.peak) for m in columns)),
        ("torch.optim.AdamW's state", *(size(m.adamw) for m in columns)),
        ("state / AdamW's", *(f"{m.state / m.adamw:.2f}" for m in columns)),
    ]
    return table("Memory of a GPU", ["one GPU", *map(str, meshes)], body)


def traffic_table(weights: Sequence[Weight], settings: Settings, meshes: Sequence[Mesh]) -> str:
    """Bytes that each GPU sends in a step, for one weight of each kind and in all."""
    item = settings.item
    own: Row = ("FSDP2's own", *(size(fsdp_traffic(weights, mesh, item)) for mesh in meshes))
    if settings.optimizer == "adamw":  # elementwise
        nothing: Row = ("AdamW", *("0 B" for _ in meshes))
        return table("Sent in a step", [*map(str, meshes)], [nothing, own])
    weights = trained(weights)
    sent = [optimizer_traffic(weights, settings, mesh) for mesh in meshes]
    matrices = [weight for weight in weights if weight.matrix]
    body: list[Row] = [
        (name, shape_of(one), size(math.prod(one.shape) * item), *(size(sends[one.name]) for sends in sent))
        for name, (one, *_) in kinds_of(weights, meshes)
    ]
    total = (size(sum(sends.values())) for sends in sent)
    gathered = (size(sum(gather_traffic(weight, item, mesh) for weight in matrices)) for mesh in meshes)
    totals: list[Row] = [(f"optimizer, all {len(matrices)}", "", "", *total)]
    if settings.optimizer != "muon":
        totals.append(("gathered instead", "", "", *gathered))
    totals.append((own[0], "", "", *own[1:]))
    header = ["shape", "p q", *map(str, meshes)]
    return table("Sent in a step", header, [*body, *totals], rule=len(body))


def share_table(weights: Sequence[Weight], settings: Settings, meshes: Sequence[Mesh]) -> str:
    """State of one weight on a GPU as a share of AdamW's, and how many row shards keep it below one."""
    body: list[Row] = []
    for name, kind in kinds_of(weights, meshes):
        one = kind[0]
        shares = [one.state_bytes(mesh) / one.adamw_bytes(mesh, settings.item) for mesh in (ONE_GPU, *meshes)]
        pays = str(most_row_shards(one, settings))
        body.append((name, f"{len(kind)}", pays, *(f"{share:.2f}" for share in shares)))
    header = ["weights", "pays to", "one GPU", *map(str, meshes)]
    return table("State / AdamW's", header, body)


def notes(settings: Settings, meshes: Sequence[Mesh]) -> str:
    """What the figures mean, under the tables."""
    lines = [
        "Sent: rings of N, an all-reduce of n bytes 2 (N-1)/N n, a gather (N-1)/N n.",
        "FSDP2's own: weights gathered twice, gradients scattered, HSDP's all-reduce.",
    ]
    if any(mesh.tp > 1 for mesh in meshes):
        lines.append("Activations, which tensor parallelism sends, are not counted.")
    if settings.optimizer == "muon":
        lines.append("torch.optim.Muon needs whole matrices: one gather of each is counted.")
    if settings.optimizer in LOW_RANK:
        lines.insert(1, "Gathered instead: the gradients of these weights, p q elements each.")
        lines.append("Pays to: the most row shards on which a weight has less state than AdamW's.")
    return "\n".join(lines)


def kinds_of(weights: Iterable[Weight], meshes: Iterable[Mesh]) -> list[tuple[str, list[Weight]]]:
    """Matrices that share a line of a table: shape, group and, where there is any, tensor parallelism."""
    tp = any(mesh.tp > 1 for mesh in meshes)
    alike: dict[Any, list[Weight]] = {}
    for weight in weights:
        if weight.matrix:
            alike.setdefault((weight.group, weight.shape, weight.tp_dim if tp else None), []).append(weight)
    return [(leaves(kind), kind) for kind in alike.values()]


def leaves(kind: Iterable[Weight]) -> str:
    """The last parts of the names: q_proj,o_proj."""
    last = dict.fromkeys(weight.name.removesuffix(".weight").rpartition(".")[2] for weight in kind)
    name = ",".join(last)
    return shortened(name, NAME)


Row = tuple[str, ...]


def table(title: str, header: Sequence[str], body: Sequence[Row], rule: int = 0) -> str:
    """Rows under a header, aligned; `rule` rows are followed by a line. Names give way to the width.

    The header of a mesh of two kinds takes two lines.
    """
    lines = max(cell.count(",") for cell in header) + 1
    split = [[*[""] * (lines - 1 - cell.count(",")), *re.split("(?<=,)", cell)] for cell in header]
    heads = [(title if i == lines - 1 else "", *(cell[i] for cell in split)) for i in range(lines)]
    widths = [max(map(len, column)) for column in zip(*heads, *body, strict=True)]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(header))
    text = [
        "  ".join(
            [
                shortened(row[0], widths[0]).ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in (*heads, *body)
    ]
    line = "-" * len(text[0])
    text.insert(lines, line)
    if rule:
        text.insert(lines + 1 + rule, line)
    return "\n".join(row.rstrip() for row in text)


def shortened(name: str, width: int) -> str:
    """A name that is too long ends in two dots."""
    return name if len(name) <= width else f"{name[: width - 2]}.."


def shape_of(weight: Weight) -> str:
    """4096x14336."""
    return "x".join(map(str, weight.shape))


def size(count: float) -> str:
    """Bytes in three digits or fewer: 12.5 MiB."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count < 1000:
            break
        count, unit = count / 1024, larger
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
