"""The parameters of a model as a plan sees them: shape, state, and how a mesh of GPUs divides them.

"A GPU" is the one that holds the most: the first, where a mesh does not divide a weight evenly.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lorapre import LoRAPreAdamW, LoRAPreMuon, param_groups
from lorapre.groups import is_low_rank, matrix_shape, state_shapes
from lorapre_recipes.config import UserError, parse_rules
from lorapre_recipes.plan.settings import Mesh, Settings
from lorapre_recipes.train.optim import freeze

FLOAT32 = 4  # bytes

# The styles of a transformers tp_plan that divide a weight (..., out, in). Others replicate it.
OUT = ("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise", "embedding_rowwise")
IN = ("rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise", "embedding_colwise")
TP_DIM = dict.fromkeys(OUT, -2) | dict.fromkeys(IN, -1)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter: its shape, the state that an optimizer makes for it, and where it is cut."""

    name: str
    shape: tuple[int, ...]  # of the whole
    rank: int | None  # of its factors
    flatten: bool  # whether three dimensions are one matrix, a convolution
    matrix: bool  # whether it takes the route of the matrices, low rank or torch.optim.Muon's
    state: Mapping[str, tuple[int, ...]]  # names and shapes of the state tensors of the whole
    state_item: int  # bytes of an element of the state, steps aside
    tp_dim: int | None  # the dimension that tensor parallelism divides; else it is replicated
    frozen: bool  # whether it has neither gradient nor state

    def part(self, mesh: Mesh) -> tuple[int, ...]:
        """Shape of the largest shard: FSDP2 cuts rows, after tensor parallelism if both do."""
        shape = list(self.shape)
        if self.tp_dim is not None:
            shape[self.tp_dim] = math.ceil(shape[self.tp_dim] / mesh.tp)
        if shape:
            shape[0] = math.ceil(shape[0] / mesh.shards)
        return tuple(shape)

    def held(self, mesh: Mesh) -> int:
        """Elements of the largest shard."""
        return math.prod(self.part(mesh))

    def state_bytes(self, mesh: Mesh) -> int:
        """Bytes of state on a GPU: B is divided like rows, A like columns, the others are whole."""
        E, p, q = matrix_shape(self.part(mesh), self.flatten)
        r = self.rank or 0
        sizes = {"B": E * p * r, "A": E * r * q, "row": E * p, "col": E * q}
        total = 0
        for name, shape in self.state.items():
            is_step = not shape and name in ("step", "skipped")
            size = sizes.get(name.partition("_")[2], self.held(mesh))
            total += FLOAT32 if is_step else size * self.state_item
        return total

    def adamw_bytes(self, mesh: Mesh, item: int) -> int:
        """Bytes of the state of torch.optim.AdamW: two moments in the weight's dtype and a step."""
        return 2 * self.held(mesh) * item + FLOAT32


def routed(model: PreTrainedModel, settings: Settings) -> list[Weight]:
    """The parameters of a model with the state that the optimizer makes for them.

    Raises UserError for a rank or a rule that does not fit.
    """
    freeze(model, settings.freeze)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            groups = groups_of(model, settings)
    except (ValueError, UserWarning) as error:
        option = "--rules" if str(error).startswith("rules:") else f"--rank {settings.rank}"
        raise UserError(f"{option}: {error}") from error
    dims = tp_dims(model)
    weights: dict[str, Weight] = {}
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            shape = tuple(parameter.shape)
            matrix = is_low_rank(shape, group["rank"], group["flatten"])
            state = {"momentum_buffer": shape}
            if settings.low_rank:
                state = state_shapes(group, shape)
            elif not matrix:
                state = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
            weights[name] = Weight(
                name=name,
                shape=shape,
                rank=group["rank"] if matrix and settings.low_rank else None,
                flatten=group["flatten"],
                matrix=matrix,
                state=state,
                state_item=FLOAT32 if settings.low_rank else settings.item,
                tp_dim=dims.get(name),
                frozen=not parameter.requires_grad,
            )
    return [weights[name] for name, _ in model.named_parameters()]


def groups_of(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """The optimizer's groups with all their options. For muon, rank 1 marks the matrices."""
    if not settings.low_rank:
        rank = 1 if settings.optimizer == "muon" else None
        return LoRAPreAdamW(param_groups(model, rank=rank)).param_groups
    options: dict[str, Any] = {"variant": settings.variant}
    groups = param_groups(model, rank=settings.rank, rules=parse_rules(settings.rules))
    if settings.optimizer == "lorapre-muon":
        return LoRAPreMuon(groups, **options).param_groups
    return LoRAPreAdamW(groups, compress=settings.compress or "both", **options).param_groups


def tp_dims(model: PreTrainedModel) -> dict[str, int]:
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
    """Refuse a tensor parallelism that does not fit the model. FSDP2 pads, so that any fits.

    Raises UserError.
    """
    if mesh.tp == 1:
        return
    config, option = model.config.get_text_config(), f"--mesh tp={mesh.tp}"
    attention_heads: int = getattr(config, "num_attention_heads", 1)
    heads: int = getattr(config, "num_key_value_heads", None) or attention_heads
    if all(weight.tp_dim is None for weight in weights):
        missing = f"transformers has no tensor-parallel plan for {config.model_type}"
        raise UserError(f"{option}: {missing}")
    if heads % mesh.tp:
        raise UserError(f"{option}: does not divide the model's {heads} key-value heads")
    for weight in weights:
        if weight.tp_dim is not None and weight.shape[weight.tp_dim] % mesh.tp:
            dimension = f"dimension {weight.tp_dim} of {weight.name}"
            shape = "x".join(map(str, weight.shape))
            raise UserError(f"{option}: does not divide {dimension}, {shape}")
