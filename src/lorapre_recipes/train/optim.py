"""One optimizer for the whole model, from a config: LoRA-Pre's two, and the peers they stand beside.

All take the same matrices for matrices (`lorapre.param_groups` decides), at `lr * scale`. The rest trains at
`lr`, with the same dense AdamW for all or, by `terms="whole"`, with what the authors of an optimizer take.
"""

import importlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer

from lorapre import LoRAPreAdamW, LoRAPreMuon, param_groups
from lorapre.groups import Rule
from lorapre_recipes.compare.peers.alice import Alice
from lorapre_recipes.compare.peers.apollo import Apollo
from lorapre_recipes.compare.peers.mlorc import MLorc
from lorapre_recipes.compare.peers.mofasgd import MoFaSGD
from lorapre_recipes.compare.peers.muon import StoredMuon
from lorapre_recipes.compare.peers.racs import Racs
from lorapre_recipes.compare.peers.scale import Scale
from lorapre_recipes.config import (
    BETAS,
    LOW_RANK,
    Precision,
    RunConfig,
    UserError,
    parse_patterns,
    user_errors,
)

Groups = list[dict[str, Any]]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Newton-Schulz makes updates of one size whatever the gradient. With this adjustment it is AdamW's size: a
# learning rate means the same for Adam and Muon.
ADJUST_LR = "match_rms_adamw"


class WithAdamW(Optimizer):
    """One optimizer for matrices and torch.optim.AdamW for the rest, as one.

    torch.optim.Muon takes nothing but matrices; a trainer takes one optimizer, scheduler and checkpoint. This
    class owns all groups, those of the rest first, and all state, and lends them to the two for each step.
    """

    def __init__(self, matrices: Optimizer, rest: AdamW) -> None:
        self._matrices, self._rest = matrices, rest
        super().__init__([*rest.param_groups, *matrices.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of each, with its own rule on its own groups. No closure: it would run under no_grad."""
        # Lent anew at every step: load_state_dict replaces the groups and the state.
        dense = len(self._rest.param_groups)
        self._rest.param_groups = self.param_groups[:dense]
        self._matrices.param_groups = self.param_groups[dense:]
        self._rest.state = self._matrices.state = self.state
        self._rest.step()
        self._matrices.step()


def build_optimizer(model: nn.Module, config: RunConfig, rules: Sequence[Rule] = ()) -> Optimizer:
    """The optimizer that `config` describes, on all of the model's parameters that train.

    Groups at the full learning rate come first: loggers report the first group's. `rules` are those of
    `lorapre.param_groups`, for lorapre-*. Raises UserError where no matrix can be factorised, the rank or a
    rule does not fit, or a package is not installed.
    """
    low_rank = config.optimizer in LOW_RANK
    matrices, rest = grouped(model, 1, (), option="--rank", strict=low_rank)
    if not low_rank:
        matrices = [
            {"params": group["params"], "lr": config.lr * config.scale} for group in matrices
        ]
        rest = [
            {"params": group["params"], "lr": config.lr, "betas": ends_betas(config)}
            for group in rest
        ]
        return peer(model, matrices, rest, config)
    assert config.rank is not None
    assert config.variant is not None
    # A larger rank would leave some matrices dense: no run of the rank that it is named after.
    weights = (weight for group in matrices for _, weight in group["params"])
    largest = min((weight.numel() - 1) // sum(weight.shape) for weight in weights)
    if config.rank > largest:
        larger = "factors would not be smaller than this model's smallest matrix"
        raise UserError(f"--rank {config.rank}: {larger}; give at most {largest}")
    known = {weight for group in matrices for _, weight in group["params"]}
    matrices, rest = grouped(model, config.rank, rules, option="--rules", strict=True)
    # Rules may give embeddings and head a rank: their rate is that of the rest.
    full_rate = {"scale": 1.0} if config.optimizer == "lorapre-adamw" else {"lr": config.lr}
    ends = [
        group | full_rate | {"params": [(name, p) for name, p in group["params"] if p not in known]}
        for group in matrices
    ]
    if any(group["params"] for group in ends):
        if config.terms == "matrices":
            raise UserError("--rules: embeddings and head are dense for all; give --terms whole")
        inner = [
            group | {"params": [x for x in group["params"] if x[1] in known]} for group in matrices
        ]
        matrices = [group for group in (*ends, *inner) if group["params"]]
    names = ("rank", "variant", "weight_decay", "seed", "stochastic_rounding")
    shared: dict[str, Any] = {name: getattr(config, name) for name in names}
    if config.optimizer == "lorapre-muon":
        shared |= {
            "lr": config.lr * config.scale,
            "momentum": config.momentum,
            "adjust_lr_fn": ADJUST_LR,
        }
        adamw = {"lr": config.lr, "betas": ends_betas(config), "eps": config.eps}
        adamw |= {"weight_decay": config.weight_decay}
        shared |= {f"adamw_{name}": value for name, value in adamw.items()}
        return LoRAPreMuon([*rest, *matrices], **shared)
    shared |= {name: getattr(config, name) for name in ("lr", "betas", "eps", "scale", "compress")}
    rest = [{"betas": ends_betas(config)} | group for group in rest]
    return LoRAPreAdamW([*rest, *matrices], **shared)


def peer(model: nn.Module, matrices: Groups, rest: Groups, config: RunConfig) -> Optimizer:
    """The optimizer that LoRA-Pre stands beside. Raises UserError where its package is not installed."""
    decay: dict[str, Any] = {"weight_decay": config.weight_decay}
    adam = decay | {"betas": config.betas, "eps": config.eps}
    name, momentum, whole = config.optimizer, config.momentum, config.terms == "whole"
    rank, refresh = config.rank or 0, config.refresh or 0
    if name == "adamw":
        return AdamW([*rest, *matrices], **adam)
    if whole and name in ("adam8bit", "adam4bit", "adafactor", "adam-mini", "smmf"):
        matrices, rest = [*rest, *matrices], []
    if whole and name in ("scale", "column-sgd"):
        matrices, rest = with_ends(model, matrices, rest, momentum if name == "scale" else 0.0)
    if name in ("adam8bit", "adam4bit"):
        for group in (*matrices, *rest):  # torchao takes no names
            group["params"] = [p for _, p in group["params"]]
        make = package("torchao.optim", f"AdamW{name[4:]}", "torchao")
        chosen: Optimizer = make(matrices, **adam)
    elif name in (packages := {"galore": "GaLore", "fira": "Fira", "conda": "Conda"}):
        make = package("pytorch_optimizer", packages[name], "pytorch_optimizer")
        # Their state holds objects of this class, and torch.load refuses what it does not know.
        torch.serialization.add_safe_globals(
            [importlib.import_module(make.__module__).GaLoreProjector]
        )
        options = {"rank": rank, "update_proj_gap": refresh, "scale": 1.0, "projection_type": "std"}
        chosen = make([group | options for group in matrices], **adam)
    elif name == "adam-mini":
        chosen = adam_mini(model, matrices, adam)
    elif name == "smmf":
        make = package("adv_optm", "AdamW_adv", "adv-optm")
        chosen = make(matrices, state_precision="factored", stochastic_rounding=False, **adam)
    elif name in ("apollo", "apollo-mini"):
        chosen = Apollo(matrices, rank=rank, refresh=refresh, mini=name == "apollo-mini", **adam)
    elif name == "mlorc":
        chosen = MLorc(matrices, rank=rank, **adam)
    elif name == "mofasgd":
        chosen = MoFaSGD(matrices, rank=rank, momentum=momentum, **decay)
    else:
        own: dict[str, tuple[Any, dict[str, Any]]] = {
            "muon": (Muon, {"momentum": momentum, "adjust_lr_fn": ADJUST_LR}),
            "muon-8bit": (StoredMuon, {"momentum": momentum, "store": "8bit"}),
            "muon-bf16": (StoredMuon, {"momentum": momentum, "store": "bf16"}),
            "muon-no-momentum": (StoredMuon, {"momentum": 0.0}),
            "alice": (Alice, {"rank": rank, "refresh": refresh}),
            "racs": (Racs, {}),
            "scale": (Scale, {}),
            "column-sgd": (Scale, {}),
            "adafactor": (Adafactor, {}),
            "sgd": (SGD, {"momentum": momentum}),
        }
        if name == "muon-8bit":  # it holds its momentum in a type of torchao's
            package("torchao.optim.subclass_8bit", "OptimState8bit", "torchao")
        make, options = own[name]
        chosen = make(matrices, **options, **decay)
    return WithAdamW(chosen, AdamW(rest, **adam)) if rest else chosen


def adam_mini(model: nn.Module, groups: Groups, adam: dict[str, Any]) -> Optimizer:
    """Adam-mini, which makes its own groups: the names say how second moments are shared."""
    named = [pair for group in groups for pair in group["params"]]
    rates = {name: group["lr"] for group in groups for name, _ in group["params"]}
    heads, width = model.config.num_attention_heads, model.config.hidden_size  # type: ignore[union-attr]
    source = SimpleNamespace(named_parameters=lambda: named)
    make = package("pytorch_optimizer", "AdamMini", "pytorch_optimizer")
    made: Optimizer = make(source, num_embeds=width, num_heads=heads, **adam)
    for group in made.param_groups:
        group |= {"lr": rates[group["name"]], "param_names": [group["name"]]}
    return made


def ends_betas(config: RunConfig) -> tuple[float, float]:
    """Those of embeddings, head and norms: where only the matrices are compared, no sweep changes them."""
    return BETAS if config.terms == "matrices" else config.betas


def with_ends(
    model: nn.Module, matrices: Groups, rest: Groups, momentum: float
) -> tuple[Groups, Groups]:
    """Groups of SCALE: matrices with embeddings and head, the latter with momentum; and vectors."""
    table, lr = model.get_input_embeddings().weight, matrices[0]["lr"]  # type: ignore[operator]
    ends = [(name, p) for group in rest for name, p in group["params"] if p.ndim == 2]
    vectors = [[(name, p) for name, p in group["params"] if p.ndim < 2] for group in rest]
    own = [{"dim": 0} if p is table else {"momentum": momentum} for _, p in ends]
    matrices = [
        *matrices,
        *({"params": [end], "lr": lr} | own for end, own in zip(ends, own, strict=True)),
    ]
    rest = [
        group | {"params": params} for group, params in zip(rest, vectors, strict=True) if params
    ]
    return matrices, rest


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters in whose names a pattern is found. Raises UserError where none is, or all are."""
    for pattern in parse_patterns("freeze", patterns):
        found = [parameter for name, parameter in model.named_parameters() if pattern.search(name)]
        if not found:
            raise UserError(f"--freeze {pattern.pattern!r}: found in the name of no parameter")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("--freeze: leaves nothing to train")


def grouped(
    model: nn.Module, rank: int, rules: Sequence[Rule], *, option: str, strict: bool
) -> tuple[Groups, Groups]:
    """Groups with a rank, and those without. Raises UserError naming the option where that cannot be."""
    try:
        groups = param_groups(model, rank=rank, rules=rules, strict=strict)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error
    matrices = [group for group in groups if group["rank"] is not None]
    return matrices, [group for group in groups if group["rank"] is None]


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """The attention and MLP matrices that train."""
    matrices, _ = grouped(model, 1, (), option="--rank", strict=False)
    return [p for group in matrices for _, p in group["params"]]


def state_bytes(optimizer: Optimizer, parameters: Sequence[nn.Parameter] | None = None) -> int:
    """Bytes of state that an optimizer holds now in this process, of some parameters or of all."""
    states = optimizer.state
    held = states.values() if parameters is None else [states[p] for p in parameters if p in states]
    return storage_bytes(*tensors_in(list(held)))


def storage_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of the storages of tensors, each once, with those inside of tensors that wrap others."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            parts = [getattr(tensor, name) for name in names]  # of a DTensor its mesh, too
            storages[id(tensor)] = storage_bytes(*(x for x in parts if isinstance(x, torch.Tensor)))
        else:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in an optimizer's state: in dicts and lists, and in the objects that peers keep there."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return (
        tensors_in(vars(value))
        if hasattr(value, "__dict__") and not isinstance(value, type)
        else []
    )


def package(module: str, name: str, package: str) -> Any:
    """A class of a package. Raises UserError where that is not installed."""
    missing = f"{name} is in the package {package}, which is not installed here: pip install 'lorapre[bench]'"
    with user_errors(f"--optimizer: {missing}", ModuleNotFoundError):
        return getattr(importlib.import_module(module), name)
