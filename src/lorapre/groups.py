"""Which parameter takes which route: low-rank momenta or dense AdamW."""

import math
import numbers
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["Rule", "is_low_rank", "matrix_shape", "param_groups", "state_shapes"]

Rule: TypeAlias = tuple[str, int | Mapping[str, Any] | None]
"""(regular expression, a rank, None for dense, or a dict of group options)."""

OPTIONS = {  # of a group
    "lr", "betas", "eps", "weight_decay", "rank", "scale", "variant", "maximize",
    "nonfinite", "stochastic_rounding", "momentum_dtype", "seed", "momentum", "nesterov",
    "ns_coefficients", "ns_steps", "adjust_lr_fn", "adamw_lr", "adamw_betas", "adamw_eps",
    "adamw_weight_decay", "flatten",
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
    m_factors = {"m_B": (*batch, p, rank), "m_A": (*batch, rank, q)} if rank else {}
    if group.get("algorithm") == "muon":  # Muon has no second moment
        return shapes | m_factors
    if group.get("variant") == "paper":
        return shapes | m_factors | {"v_B": (*batch, p, rank), "v_A": (*batch, rank, q)}
    return shapes | m_factors | {"v_row": (*batch, p), "v_col": (*batch, q)}


def names_of(group: Mapping[str, Any]) -> list[str]:
    """What messages call the parameters of a group: names, or positions where they do not fit."""
    names, count = group.get("param_names") or (), len(group["params"])
    if len(names) != count:  # a parameter has been taken out, or put in
        return [f"parameter {index} of its group" for index in range(count)]
    return [f"parameter {name!r}" for name in names]


def param_groups(
    model: nn.Module, *, rank: int | None = 128, ends: Literal["dense", "low-rank"] = "dense",
    rules: Sequence[Rule] = (), strict: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
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

    Scripted, traced and exported models take the routes of the eager model as far as their modules
    or graphs still name its classes. A matrix whose use is not known any more goes dense with a
    warning, and so does the last `nn.Linear` if it has not the shape of an embedding table.

    Frozen parameters are routed like the others, so that they can be unfrozen later; they hold no
    state until then. Shared parameters appear once, under their first name.

    Args:
        model: the model, wrapped (DDP, FSDP2, torch.compile, PEFT) or not.
        rank: of the momenta; 0 keeps no momentum, None is dense AdamW everywhere.
        ends: "low-rank" gives factors to embedding tables and the output head too, tied or not,
            unless these were larger than the table. The other ends are small and stay dense.
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
        ValueError: a rank that is no integer >= 0, unknown `ends`, a malformed rule or one that
            no parameter reaches, a lazy parameter without a shape, or what `strict` forbids.

    Warns:
        UserWarning: no trainable parameter becomes low rank, or a matrix goes dense because its use
            is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_rank(rank, "rank")
    if ends not in ("dense", "low-rank"):
        raise ValueError(f"ends must be 'dense' or 'low-rank', got {ends!r}")
    parsed = [_parse_rule(pattern, options) for pattern, options in rules]
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run the model once before this")
    routed = list(_route(model, rank, rank if ends == "low-rank" else None, parsed))
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
    unknown: bool  # whether it would have factors, but goes dense because its use is not known
    rule: int | None  # index of the rule that matched

    @property
    def low_rank(self) -> bool:
        flatten = self.options.get("flatten", False)
        return is_low_rank(self.parameter.shape, self.options["rank"], flatten)


_ParsedRule: TypeAlias = tuple[re.Pattern[str], dict[str, Any]]


def _check_rank(rank: object, argument: str) -> None:
    natural = isinstance(rank, numbers.Integral) and not isinstance(rank, bool) and int(rank) >= 0
    if rank is not None and not natural:
        raise ValueError(f"{argument} must be an integer >= 0 or None, got {rank!r}")


def _parse_rule(pattern: str, options: int | Mapping[str, Any] | None) -> _ParsedRule:
    override = dict(options) if isinstance(options, Mapping) else {"rank": options}
    _check_rank(override.get("rank"), f"rules: rank for {pattern!r}")
    if unknown := sorted(map(str, override.keys() - OPTIONS)):
        raise ValueError(f"rules: there is no option {unknown[0]!r}, which {pattern!r} sets")
    try:
        return re.compile(pattern), override
    except re.error as error:
        raise ValueError(f"rules: {pattern!r} is not a regular expression: {error}") from None


def _route(
    model: nn.Module, rank: int | None, ends_rank: int | None, rules: Sequence[_ParsedRule]
) -> Iterator[_Routed]:
    modules = dict(model.named_modules())
    classes = _classes(modules)
    ends, doubtful = _ends(classes, ends_rank)
    ends |= _routers(classes)
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        # Script modules have no get_submodule, and some wrappers leave themselves out of the path.
        owner = modules[path] if path in modules else model.get_submodule(path)
        use = _use(owner, classes[owner], attribute, parameter)
        if use != "vector" and parameter in ends:
            use = "dense"
        elif use == "matrix" and parameter in doubtful:
            use = "unknown"
        options: dict[str, Any] = {"rank": rank if use == "matrix" else None}
        if use == "vector":
            options["weight_decay"] = 0.0
        rule = next((i for i, (pattern, _) in enumerate(rules) if pattern.search(name)), None)
        if rule is not None:
            options |= rules[rule][1]
        if parameter.ndim < 2:
            options["rank"] = None
        flatten = parameter.ndim == 3 and issubclass(classes[owner], _CONVOLUTIONS)
        if options["rank"] is not None and flatten:
            options["flatten"] = True
        unknown = use == "unknown" and rule is None and is_low_rank(parameter.shape, rank, flatten)
        yield _Routed(name, parameter, options, unknown, rule)


def _problems(routed: Sequence[_Routed], rank: int | None, strict: bool) -> Iterator[str]:
    """Messages about matrices that stay dense although nobody asked for it."""
    trainable = [item for item in routed if item.parameter.requires_grad]
    ranked = [item for item in trainable if item.options["rank"] is not None]
    if strict and (names := [item.name for item in ranked if not item.low_rank]):
        yield f"rank: factors would not be smaller than the matrix for {_listed(names)}"
    if names := [item.name for item in trainable if item.unknown]:
        yield (
            "matrices of unknown use go dense (the use is often not known after scripting, tracing "
            f"or export), give a rule for them: {_listed(names)}"
        )
    if rank is not None and trainable and not any(item.low_rank for item in ranked):
        yield (
            f"no trainable parameter gets low-rank momenta at rank {rank}: all state is AdamW's. A "
            "matrix (p, q) needs rank (p + q) < p q; the factors of a LoRA adapter, for one, are "
            "too thin for it"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class _Lost(nn.Module):
    """Base of the stand-ins for classes that scripting, tracing or export has removed."""


def _classes(modules: Mapping[str, nn.Module]) -> dict[nn.Module, type[nn.Module]]:
    """The class that every module had in the eager model; a subclass of `_Lost` if it is unknown.

    A script module knows the name of its former class. The modules of an exported model are plain
    `nn.Module`s, but each node of its graph records the path and class of the module that it comes
    from.
    """
    recorded: dict[str, Any] = {}
    root = None  # path of the outermost module with a graph, and a dot: its graphs count from there
    classes = {}
    for path, module in modules.items():
        cls: Any = type(module)
        scripted = isinstance(module, torch.jit.ScriptModule)  # whose graph is of another kind
        graph = None if scripted else getattr(module, "graph", None)
        if isinstance(graph, fx.Graph):
            if root is None or not path.startswith(root):
                root = f"{path}.".lstrip(".")
            for node in graph.nodes:
                for inner, name in node.meta.get("nn_module_stack", {}).values():
                    recorded[f"{root}{inner}".rstrip(".")] = name
        if scripted:
            cls = f"torch.nn.{module.original_name}"
        elif isinstance(graph, fx.Graph) or (root is not None and cls is nn.Module):
            # No node comes from a ModuleList, because it is never called.
            numbered = [name.isdigit() for name, _ in module.named_children()]
            cls = recorded.get(path, nn.ModuleList if numbered and all(numbered) else "")
        if isinstance(cls, str):  # not imported: a file can name any module
            where, _, name = cls.rpartition(".")
            cls = getattr(sys.modules.get(where), name, None)
            if cls is nn.Module or not isinstance(cls, type) or not issubclass(cls, nn.Module):
                cls = type(name, (_Lost,), {})
        classes[module] = cls
    return classes


def _use(owner: Any, cls: type[nn.Module], attribute: str, parameter: nn.Parameter) -> str:
    """What a module does with a parameter: "matrix", "vector", "dense" or "unknown"."""
    if parameter.ndim < 2 or _NORM.search(cls.__name__) or attribute.endswith("bias"):
        return "vector"
    convolution = issubclass(cls, _CONVOLUTIONS)
    token = parameter.shape[0] == 1  # class tokens (1, 1, d), position embeddings (1, n, d)
    thin = 1 in matrix_shape(parameter.shape, flatten=convolution)[1:]
    depthwise = False
    if convolution:  # traced and exported ones have lost their attributes
        one = parameter.shape[1] == 1
        depthwise = 1 < owner.groups == owner.in_channels if hasattr(owner, "groups") else one
    if token or thin or depthwise:
        return "dense"
    weight = attribute.startswith("weight") or attribute.endswith("weight")
    experts = parameter.ndim == 3 and not issubclass(cls, ParametrizationList)
    return "matrix" if (weight or experts) and not issubclass(cls, _Lost) else "unknown"


def _ends(
    classes: Mapping[Any, type[nn.Module]], rank: int | None
) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """Parameters of the ends of the network that stay dense, and those that may be ends.

    Ends read the input or write the output. Some cannot be told in a model that has lost its
    classes: its head, and a convolution of which only the channels of a group are known. With a
    rank, tables get factors, and so does a head with as many rows as a table.
    """

    def layers(*kinds: type[nn.Module]) -> list[Any]:
        return [module for module, cls in classes.items() if issubclass(cls, kinds)]

    tables, linears = layers(nn.Embedding, nn.EmbeddingBag), layers(nn.Linear)
    convolutions = layers(*_CONVOLUTIONS)
    ends: list[nn.Module] = [*tables]
    doubtful: list[nn.Module] = []
    for layer in convolutions:
        known = hasattr(layer, "in_channels")  # shape[1] is less where there are groups
        if (layer.in_channels if known else layer.weight.shape[1]) <= _PIXEL_CHANNELS:
            (ends if known or layer is convolutions[0] else doubtful).append(layer)
    for module in classes:  # all of them: the root may be a wrapper
        ends += _transformers_ends(module)
    # A hidden layer of a small model can have the shape of a table by chance, but lies in a list.
    listed = {layer for container in layers(nn.ModuleList) for layer in container.modules()}
    shapes = {parameter.shape for table in tables for parameter in table.parameters()}
    lost = any(type(module) is not cls for module, cls in classes.items())
    for layer in linears:
        last, alike = layer is linears[-1], any(p.shape in shapes for p in layer.parameters())
        if layer not in listed and (last or alike) and (lost or (last and alike)):
            (ends if last and alike else doubtful).append(layer)
    found, rows = _parameters(ends), {shape[0] for shape in shapes}
    wide = {p for p in found if p.ndim == 2 and p.shape[0] in rows and is_low_rank(p.shape, rank)}
    return found - wide, _parameters(doubtful) - found


def _parameters(modules: Sequence[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters()}


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


def _routers(classes: Mapping[nn.Module, type[nn.Module]]) -> set[nn.Parameter]:
    """Layers beside the experts of a block that hold one matrix with one row per expert.

    A shared expert can have as many rows by chance, but it holds several matrices.
    """
    routers = set()
    for block in classes:
        counts = set()  # of experts, in a list or fused (E, p, q)
        for child in block.children():
            if issubclass(classes[child], nn.ModuleList):
                counts.add(len(list(child.children())))
            elif not issubclass(classes[child], _CONVOLUTIONS):
                counts.update(p.shape[0] for p in child.parameters(recurse=False) if p.ndim == 3)
        for child in block.children() if counts else ():
            matrices = [parameter for parameter in child.parameters() if parameter.ndim > 1]
            if len(matrices) == 1 and matrices[0].ndim == 2 and matrices[0].shape[0] in counts:
                routers.add(matrices[0])
    return routers
