"""Which parameter takes which route: low-rank momenta or dense AdamW."""

import math
import numbers
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["Rule", "is_low_rank", "matrix_shape", "param_groups", "state_shapes"]

Rule: TypeAlias = tuple[str, int | Mapping[str, Any] | None]
"""(regular expression, a rank, None for dense, or a dict of group options)."""

OPTIONS = {  # of a group
    "lr", "betas", "eps", "weight_decay", "rank", "scale", "variant", "compress", "maximize",
    "nonfinite", "stochastic_rounding", "seed", "momentum", "nesterov", "ns_coefficients",
    "ns_steps", "adjust_lr_fn", "adamw_lr", "adamw_betas", "adamw_eps", "adamw_weight_decay",
    "flatten",
}  # fmt: skip
_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_PIXEL_CHANNELS = 4  # a convolution with at most so many inputs reads pixels: grey, RGB, RGBA
_NORM = re.compile(r"[Nn]orm(\dd)?$")  # LlamaRMSNorm, BatchNorm2d, but not a fused LayerNormLinear


def matrix_shape(shape: Sequence[int], flatten: bool = False) -> tuple[int, int, int]:
    """Shape (E, p, q) of a parameter seen as a batch of E matrices.

    A scalar is (1, 1, 1), a vector (n,) is (1, 1, n), a matrix (p, q) is (1, p, q). Three
    dimensions are E fused experts, unless `flatten` says that they are a one-dimensional
    convolution (out, in, k), which is the matrix (1, out, in * k). Four and more dimensions are
    always a convolution.
    """
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    if len(shape) == 3 and not flatten:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def is_low_rank(shape: Sequence[int], rank: int | None, flatten: bool = False) -> bool:
    """Whether a weight gets factors: it is a matrix, and rank (p + q) is less than p q."""
    if rank is None or len(shape) < 2:
        return False
    _, p, q = matrix_shape(shape, flatten)
    return rank * (p + q) < p * q


def state_shapes(group: Mapping[str, Any], shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state tensors of a weight under the options of `group`.

    Factors are (p, r) and (r, q), with E in front for fused experts. `exp_avg` and `exp_avg_sq`
    have the shape of the weight, counters none.
    """
    rank, flatten = group.get("rank"), group.get("flatten", False)
    names = ["step", "skipped"] if group.get("nonfinite") == "skip" else ["step"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, ())
    moment = tuple(shape)
    if rank is None or not is_low_rank(shape, rank, flatten):
        return shapes | {"exp_avg": moment, "exp_avg_sq": moment}
    experts, p, q = matrix_shape(shape, flatten)
    batch = (experts,) if len(shape) == 3 and not flatten else ()
    m_factors = {"m_B": (*batch, p, rank), "m_A": (*batch, rank, q)}
    if group.get("algorithm") == "muon":  # Muon has no second moment
        return shapes | m_factors
    v_factors = {"v_B": (*batch, p, rank), "v_A": (*batch, rank, q)}
    means = {"v_row": (*batch, p), "v_col": (*batch, q)}
    by_variant = {"subspace": v_factors | means, "split": means}
    second = by_variant.get(group.get("variant", ""), v_factors)
    compress = group.get("compress")
    shapes |= {"exp_avg": moment} if compress == "second" else m_factors
    return shapes | ({"exp_avg_sq": moment} if compress == "first" else second)


def names_of(group: Mapping[str, Any]) -> list[str]:
    """What messages call the parameters of a group: names, or positions where they do not fit."""
    names, count = group.get("param_names") or (), len(group["params"])
    if len(names) != count:  # a parameter has been taken out, or put in
        return [f"parameter {index} of its group" for index in range(count)]
    return [f"parameter {name!r}" for name in names]


def param_groups(
    model: nn.Module, *, rank: int | None = 128, rules: Sequence[Rule] = (), strict: bool = False
) -> list[dict[str, Any]]:
    """Sort a model's parameters into groups for `LoRAPreAdamW` or `LoRAPreMuon`.

    Low rank are the matrices inside the network: attention and MLP weights (of `nn.Linear`, of
    transformers' `Conv1D`, of any module that keeps a matrix under a name with "weight"), fused
    experts (E, p, q) and convolutions.

    Dense (`rank=None` in the group) are

    * the ends of the network: embedding tables (tokens, positions), patch embeddings and
      convolutions that read pixels, the output head, tied or not, and the classification head of a
      transformers model. In a plain PyTorch model the last `nn.Linear` is the head if it has the
      shape of an embedding table and lies in no `nn.ModuleList`. Another head cannot be told from
      a hidden matrix and goes low rank: give a rule.
    * routers (beside the experts, one row per expert) and depthwise convolutions (filters, not a
      matrix product);
    * class tokens and other parameters that are not applied as a matrix;
    * norms, biases and all else with fewer than two dimensions. These also get `weight_decay=0.0`,
      as transformers' Trainer does; every other group keeps the optimizer's.

    Frozen parameters are routed like the others, so that they can be unfrozen later; they hold no
    state until then. Shared parameters appear once, under their first name.

    Args:
        model: the model, wrapped (DDP, FSDP2, torch.compile, PEFT) or not.
        rank: rank of the momenta, a positive integer, or None for dense AdamW everywhere.
        rules: (regular expression, options) pairs that override the above. The expression is
            searched in the name of the parameter; the first match wins. Options are a rank, None
            (dense) or a dict of group options, as in `("lm_head", {"rank": 64, "lr": 1e-4})`; what
            a rule leaves open keeps its default.
        strict: raise where the default only warns, and where a trainable matrix has a rank but
            stays dense because its factors would not be smaller, rank (p + q) >= p q.

    Returns:
        Groups `{"params": [(name, parameter), ...], "rank": ..., ...}`. Parameters with equal
        options share one.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: a rank that is neither None nor a positive integer, a malformed rule, a rule
            that no parameter reaches, or what `strict` forbids.

    Warns:
        UserWarning: no trainable parameter becomes low rank, or a matrix goes dense because its use
            is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_rank(rank, "rank")
    parsed = [_parse_rule(pattern, options) for pattern, options in rules]
    routed = list(_route(model, rank, parsed))
    for index, (pattern, options) in enumerate(parsed):
        matched = [item.parameter for item in routed if item.rule == index]
        if not matched:
            raise ValueError(f"rules: no parameter is left for {pattern.pattern!r}")
        if options.get("rank") is not None and all(parameter.ndim < 2 for parameter in matched):
            raise ValueError(f"rules: {pattern.pattern!r} sets a rank and finds no matrix")
    for problem in _problems(routed, rank, strict):
        if strict:
            raise ValueError(problem)
        warnings.warn(problem, stacklevel=2)

    distinct: list[dict[str, Any]] = []
    for item in routed:
        if item.options not in distinct:
            distinct.append(item.options)
    return [
        {"params": [(i.name, i.parameter) for i in routed if i.options == options], **options}
        for options in distinct
    ]


class _Routed(NamedTuple):
    name: str
    parameter: nn.Parameter
    options: dict[str, Any]  # of its group
    known: bool  # a rule names it, or its use was recognised
    rule: int | None  # index of the rule that matched


_ParsedRule: TypeAlias = tuple[re.Pattern[str], dict[str, Any]]


def _check_rank(rank: object, argument: str) -> None:
    positive = isinstance(rank, numbers.Integral) and not isinstance(rank, bool) and int(rank) > 0
    if rank is not None and not positive:
        raise ValueError(f"{argument} must be a positive integer or None, got {rank!r}")


def _parse_rule(pattern: str, options: int | Mapping[str, Any] | None) -> _ParsedRule:
    override = dict(options) if isinstance(options, Mapping) else {"rank": options}
    _check_rank(override.get("rank"), f"rules: rank for {pattern!r}")
    if unknown := sorted(map(str, override.keys() - OPTIONS)):
        raise ValueError(f"rules: there is no option {unknown[0]!r}, which {pattern!r} sets")
    try:
        return re.compile(pattern), override
    except re.error as error:
        raise ValueError(f"rules: {pattern!r} is not a regular expression: {error}") from None


def _route(model: nn.Module, rank: int | None, rules: Sequence[_ParsedRule]) -> Iterator[_Routed]:
    ends_and_routers = _ends(model) | _routers(model)
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        use = _use(owner, attribute, parameter)
        if use != "vector" and parameter in ends_and_routers:
            use = "dense"
        options: dict[str, Any] = {"rank": rank if use == "matrix" else None}
        if use == "vector":
            options["weight_decay"] = 0.0
        rule = next((i for i, (pattern, _) in enumerate(rules) if pattern.search(name)), None)
        if rule is not None:
            options |= rules[rule][1]
        if parameter.ndim < 2:
            options["rank"] = None
        if options["rank"] is not None and parameter.ndim == 3 and isinstance(owner, _CONVOLUTIONS):
            options["flatten"] = True
        yield _Routed(name, parameter, options, use != "unknown" or rule is not None, rule)


def _problems(routed: Sequence[_Routed], rank: int | None, strict: bool) -> Iterator[str]:
    """What stays dense although nobody asked for it."""
    low_rank, not_smaller, unknown = [], [], []
    trainable = [item for item in routed if item.parameter.requires_grad]
    for name, parameter, options, known, _ in trainable:
        if is_low_rank(parameter.shape, options["rank"], options.get("flatten", False)):
            low_rank.append(name)
        elif options["rank"] is not None:
            not_smaller.append(name)
        elif not known and is_low_rank(parameter.shape, rank):
            unknown.append(name)
    if strict and not_smaller:
        yield f"rank: factors would not be smaller than the matrix for {_listed(not_smaller)}"
    if unknown:
        yield f"matrices of unknown use go dense, give a rule for them: {_listed(unknown)}"
    if rank is not None and trainable and not low_rank:
        yield (
            f"no trainable parameter gets low-rank momenta at rank {rank}: all state is AdamW's. A "
            "matrix (p, q) needs rank (p + q) < p q; the factors of a LoRA adapter, for one, are "
            "too thin for it"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _use(owner: nn.Module, attribute: str, parameter: nn.Parameter) -> str:
    """What a module does with a parameter: "matrix", "vector", "dense" or "unknown"."""
    if parameter.ndim < 2 or _NORM.search(type(owner).__name__) or attribute.endswith("bias"):
        return "vector"
    token = parameter.shape[0] == 1  # class tokens (1, 1, d), position embeddings (1, n, d)
    thin = 1 in matrix_shape(parameter.shape, flatten=isinstance(owner, _CONVOLUTIONS))[1:]
    depthwise = isinstance(owner, _CONVOLUTIONS) and 1 < owner.groups == owner.in_channels
    if token or thin or depthwise:
        return "dense"
    weight = attribute.startswith("weight") or attribute.endswith("weight")
    experts = parameter.ndim == 3 and not isinstance(owner, ParametrizationList)
    return "matrix" if weight or experts else "unknown"


def _ends(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of the layers that read the input or write the output."""
    modules = list(model.modules())
    tables = [module for module in modules if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    convolutions = [module for module in modules if isinstance(module, _CONVOLUTIONS)]
    ends: list[nn.Module] = [*tables]
    ends += [layer for layer in convolutions if layer.in_channels <= _PIXEL_CHANNELS]
    for module in modules:  # not the root alone, which may be a wrapper
        ends += _transformers_ends(module)
    # A hidden layer of a small model can have the shape of a table by chance, but lies in a list.
    lists = [module for module in modules if isinstance(module, nn.ModuleList)]
    listed = {layer for layers in lists for layer in layers.modules()}
    shapes = {table.weight.shape for table in tables}
    last = [module for module in modules if isinstance(module, nn.Linear)][-1:]
    ends += [layer for layer in last if layer.weight.shape in shapes and layer not in listed]
    return {parameter for end in ends for parameter in end.parameters()}


def _transformers_ends(module: nn.Module) -> Iterator[nn.Module]:
    """Input and output layers that a transformers model names, and its classification head."""
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            end = getattr(module, getter)()
        except (AttributeError, NotImplementedError, TypeError):  # absent, abstract, not this one
            continue
        if isinstance(end, nn.Module):
            yield end
    backbone = getattr(module, "base_model", None)
    labels = getattr(getattr(module, "config", None), "num_labels", None)
    if isinstance(backbone, nn.Module) and labels is not None:
        for layer in set(module.modules()) - set(backbone.modules()):
            if isinstance(layer, nn.Linear) and layer.out_features == labels:
                yield layer


def _routers(model: nn.Module) -> set[nn.Parameter]:
    """Layers beside the experts of a block that hold one matrix with one row per expert.

    One matrix, because a shared expert can be as wide as there are experts, but it holds several.
    """
    routers = set()
    for block in model.modules():
        counts = set()  # of experts, in a list or fused (E, p, q)
        for child in block.children():
            if isinstance(child, nn.ModuleList):
                counts.add(len(child))
            elif not isinstance(child, _CONVOLUTIONS):
                counts.update(p.shape[0] for p in child.parameters(recurse=False) if p.ndim == 3)
        for child in block.children() if counts else ():
            matrices = [parameter for parameter in child.parameters() if parameter.ndim > 1]
            if len(matrices) == 1 and matrices[0].ndim == 2 and matrices[0].shape[0] in counts:
                routers.add(matrices[0])
    return routers
