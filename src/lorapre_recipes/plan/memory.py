"""The memory of a training step: arithmetic on the shapes of weights, which the tests count.

"A GPU" is the one that holds the most: the first, where a mesh does not divide a weight evenly.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from lorapre import LoRAPreAdamW, LoRAPreMuon, param_groups
from lorapre.batch import transient_bytes
from lorapre.gradient import state_dtype
from lorapre.groups import is_low_rank, matrix_shape, state_shapes
from lorapre_recipes.config import UserError, parse_rules
from lorapre_recipes.plan.settings import ONE_GPU, Mesh, Settings
from lorapre_recipes.plan.trace import Trace
from lorapre_recipes.train.optim import freeze, word

BF16, FLOAT32 = 2, 4  # bytes

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
    state: dict[str, int]  # the state tensors: bytes of an element
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
        sizes = {"": 1, "B": E * p * r, "A": E * r * q, "row": E * p, "col": E * q}
        held = self.held(mesh)
        return sum(
            sizes.get(name.partition("_")[2], held) * item for name, item in self.state.items()
        )


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
            if settings.low_rank:
                names = state_shapes(group, shape)
                state = {each: state_dtype(group, parameter, each).itemsize for each in names}
            elif matrix:
                state = {"momentum_buffer": settings.item}
            else:
                state = {"step": FLOAT32, "exp_avg": settings.item, "exp_avg_sq": settings.item}
            weights[name] = Weight(
                name=name,
                shape=shape,
                rank=group["rank"] if matrix and settings.low_rank else None,
                flatten=group["flatten"],
                matrix=matrix,
                state=state,
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
    options["momentum_dtype"] = word(settings.momentum_dtype)
    rules = parse_rules(settings.rules)
    groups = param_groups(model, rank=settings.rank, ends=settings.ends, rules=rules)
    if settings.optimizer == "lorapre-muon":
        return LoRAPreMuon(groups, **options).param_groups
    return LoRAPreAdamW(groups, **options).param_groups


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


class Memory(NamedTuple):
    """Bytes on a GPU."""

    weights: int
    gradients: int
    matrices: int  # optimizer state of the matrices: low rank or, for muon, its momentum
    dense: int  # optimizer state of all else
    transient: int  # what the step allocates for its own use, at most
    adamw: int  # what torch.optim.AdamW would hold as state
    activations: int = 0  # of a forward and backward pass that was traced, the logits aside
    logits: int = 0

    @property
    def state(self) -> int:
        """All optimizer state."""
        return self.matrices + self.dense

    @property
    def peak(self) -> int:
        """All that is held at once, buffers of collectives aside."""
        passing = self.activations + self.logits
        return self.weights + self.gradients + self.state + self.transient + passing


def memory(weights: Iterable[Weight], settings: Settings, mesh: Mesh = ONE_GPU) -> Memory:
    """The memory of a GPU of `mesh` in a training step."""
    weights, item = list(weights), settings.item
    trained = [weight for weight in weights if not weight.frozen]
    gradients = sum(weight.held(mesh) for weight in trained) * item
    transient = step_bytes(settings, trained, mesh)
    if settings.release:  # one gradient at a time, until its weight is updated
        each = [(x.held(mesh) * item, step_bytes(settings, [x], mesh)) for x in trained]
        gradients, transient = max(each, key=sum)
    return Memory(
        weights=sum(weight.held(mesh) for weight in weights) * item,
        gradients=gradients,
        matrices=sum(weight.state_bytes(mesh) for weight in trained if weight.matrix),
        dense=sum(weight.state_bytes(mesh) for weight in trained if not weight.matrix),
        transient=transient,
        # two moments in the weight's dtype, and a step
        adamw=sum(2 * weight.held(mesh) * item + FLOAT32 for weight in trained),
    )


def moments(weights: Iterable[Weight], settings: Settings, trace: Trace) -> list[Memory]:
    """One GPU where the backward pass, or the forward pass before it, and the step hold most.

    With gradient release the steps are within the backward pass, which is then the only moment.
    """
    weights = list(weights)
    base, named = memory(weights, settings), {weight.name: weight for weight in weights}
    if settings.release:
        pulses = {name: step_bytes(settings, [x], ONE_GPU) for name, x in named.items()}
        return [max((base._replace(**x) for x in trace.moments(pulses)), key=lambda x: x.peak)]
    if settings.accumulation > 1:  # each new gradient is added to the one that is there
        added = trace.moments(dict.fromkeys(named, 0))
        found = [base._replace(**x | {"gradients": base.gradients + x["gradients"]}) for x in added]
    else:
        found = [base._replace(**x) for x in trace.moments()]
    return [max(found, key=lambda x: x.peak), found[-1]._replace(transient=base.transient)]


def step_bytes(settings: Settings, weights: Sequence[Weight], mesh: Mesh) -> int:
    """Bytes that optimizer.step allocates beside weights, gradients and state, at most."""
    if settings.optimizer == "adamw":  # foreach, as on a GPU: the denominators of all weights
        return sum(weight.held(mesh) for weight in weights) * settings.item
    if settings.optimizer == "muon":
        dense = sum(weight.held(mesh) for weight in weights if not weight.matrix) * settings.item
        matrices = [weight for weight in weights if weight.matrix]
        return max(dense, *(newton_schulz_bytes(weight, settings.item) for weight in matrices))
    alike = Counter(weight.shape for weight in weights)
    taken = []
    for weight in weights:
        E, p, q = matrix_shape(weight.part(mesh), weight.flatten)
        bound = transient_bytes(E * alike[weight.shape], p, q, weight.rank or 0)
        if weight.matrix and settings.optimizer == "lorapre-muon":
            bound += newton_schulz_bytes(weight, FLOAT32)
        taken.append(bound)
    return max(taken)


def newton_schulz_bytes(weight: Weight, item: int) -> int:
    """Bytes that Muon needs for whole matrices.

    It holds the momentum and either two iterates in bfloat16 with their Gram matrices, or the last
    iterate and the update.
    """
    E, p, q = matrix_shape(weight.shape, weight.flatten)
    return E * (p * q * (item + 2 * BF16) + BF16 * max(2 * min(p, q) ** 2, p * q))
