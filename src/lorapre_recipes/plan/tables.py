"""`lorapre plan`: memory of a training step of a model, without its weights, as a table."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch

from lorapre_recipes.config import RunConfig, UserError
from lorapre_recipes.console import binary, short
from lorapre_recipes.plan.memory import Memory, Weight, check_mesh, memory, moments, routed
from lorapre_recipes.plan.settings import ONE_GPU, Mesh, Model, Settings
from lorapre_recipes.plan.shapes import meta_model
from lorapre_recipes.plan.trace import Trace, trace
from lorapre_recipes.train.optim import DTYPES

GIB = 2**30
MOST_MESHES = 3  # that fit into 80 columns

Row = tuple[str, ...]
Passes = tuple[bool, bool]  # `Settings.passes`


def render(name: Model, settings: Settings, meshes: Sequence[Mesh] = ()) -> tuple[str, bool]:
    """The text that `lorapre plan` prints, and whether the plan fits into the budget.

    On one GPU a training step is traced. With meshes, and for models that cannot be traced,
    activations are left out. Raises UserError for a plan that cannot be made.
    """
    if meshes and (settings.release or settings.budget):
        option, reason = "--budget", "activations of sharded weights are not known"
        if settings.release:
            option, reason = "--release", "gradients of sharded weights are not released"
        raise UserError(f"{option}: {reason}; leave out --mesh")
    if len(meshes) > MOST_MESHES:
        most = f"{MOST_MESHES} fit into a table, not {len(meshes)}"
        raise UserError(f"--mesh: {most}; run the command again")
    model = meta_model(name, DTYPES[settings.dtype])
    weights = routed(model, settings)
    for mesh in meshes:
        check_mesh(model, weights, mesh)
    numel = short(sum(math.prod(weight.shape) for weight in weights))
    text = f"{name}, {numel} parameters in {settings.dtype}\n{settings}\n"
    traces: dict[Passes, Trace] = {}
    settings.length(model.config)  # a wrong --sequence-length is no fault of the model
    if not meshes:
        try:
            traces[settings.passes] = found = trace(model, settings)
            text += f"a batch of {found.batch}, attention: {found.attention}\n"
        except UserError as error:
            if settings.budget:
                raise
            text += f"activations are not counted: {error}\n"
    if not traces:
        columns = [memory(weights, settings, mesh) for mesh in (ONE_GPU, *meshes)]
        names = [mesh.name for mesh in (ONE_GPU, *meshes)]
        body = rows(columns, weights, settings, "peak, no activations")
        return f"{text}\n{table(('Memory of a GPU', *names), body)}", True
    columns = moments(weights, settings, found)
    names = ["in backward", "in the step"][: len(columns)]
    body = rows(columns, weights, settings, "all of it")
    peak, budget = max(column.peak for column in columns), settings.budget_bytes() or gpu_bytes()
    text += f"\n{table(('Memory of one GPU', *names), body)}\n\npeak: {binary(peak)}"
    if budget is None:
        return text, True
    if peak <= budget:
        return f"{text}\nfits: {peak / GIB:.1f} of {budget / GIB:.4g} GiB", True
    much = f"does not fit: {(peak - budget) / GIB:.1f} GiB too much for {budget / GIB:.4g} GiB"
    return "\n".join([text, much, *advice(name, settings, peak, traces)]), False


def rows(
    columns: Sequence[Memory], weights: Sequence[Weight], settings: Settings, total: str
) -> list[Row]:
    """The lines of the table; `total` is the label of their sum."""
    trained = [weight for weight in weights if not weight.frozen]
    matrices = sum(weight.matrix for weight in trained)
    lines = {"weights": "weights", "gradients": "gradients", "optimizer state": "state"}
    if settings.optimizer != "adamw":
        route = "low rank" if settings.low_rank else "Muon's"
        lines[f"  {route}, {matrices} weights"] = "matrices"
        lines[f"  dense, {len(trained) - matrices} weights"] = "dense"
    if any(column.activations for column in columns):
        lines |= {"activations": "activations", "logits": "logits"}
    lines |= {
        "transient, at most": "transient",
        total: "peak",
        "torch.optim.AdamW's state": "adamw",
    }
    body = [
        (label, *(binary(getattr(column, field)) for column in columns))
        for label, field in lines.items()
    ]
    ratios = (f"{column.state / column.adamw:.2f}" for column in columns)
    return [*body, ("state / AdamW's", *ratios)]


def gpu_bytes() -> int | None:
    """The memory of the GPU that is there."""
    if not torch.cuda.is_available():
        return None
    total: int = torch.cuda.get_device_properties(0).total_memory
    return total


def render_run(model: Model, config: RunConfig, budget: str) -> tuple[str, bool]:
    """`render` of a run: does it fit into the GPU, or a budget where there is none?"""
    try:
        own = {x.name: vars(config)[x.name] for x in fields(Settings) if x.name in vars(config)}
        return render(model, Settings(**own, budget=None if gpu_bytes() else budget))
    except UserError as error:
        return f"memory is not planned: {error}", True


def advice(
    name: Model, settings: Settings, peak: int, traces: dict[Passes, Trace]
) -> Iterator[str]:
    """What options that are not given would save, each and all together: planned again with them.

    `traces` are those at hand, by what the passes depend on.
    """
    ways: dict[str, dict[str, Any]] = {
        "--gradient-checkpointing": {"gradient_checkpointing": True},
        "--chunked-loss": {"chunked_loss": True},
    }
    if settings.low_rank:
        ways |= {"--release": {"release": True}, "--ends low-rank": {"ends": "low-rank"}}

    def saved(changes: dict[str, Any]) -> int:
        model, changed = meta_model(name, DTYPES[settings.dtype]), settings.replace(**changes)
        weights, key = routed(model, changed), changed.passes
        if key not in traces:
            traces[key] = trace(model, changed)
        return peak - max(each.peak for each in moments(weights, changed, traces[key]))

    possible: dict[str, dict[str, Any]] = {}
    for option, changes in ways.items():
        with contextlib.suppress(UserError):  # the model has no such part
            alone = saved(changes)
            if settings != settings.replace(**changes):
                possible[option] = changes
                yield f"  {option} saves {binary(max(0, alone))}"
    if len(possible) > 1:
        together = saved({key: value for way in possible.values() for key, value in way.items()})
        yield f"  all together save {binary(max(0, together))}"


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
