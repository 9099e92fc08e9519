"""One optimizer for the whole model, from a config: LoRA-Pre's two, and their peers.

All take the same matrices for matrices (`lorapre.param_groups` decides), at `lr * scale`. The rest
trains at `lr`, with the same dense AdamW for all or, by `terms="whole"`, with what the authors of
an optimizer take.
"""

import importlib
from collections.abc import Sequence
from functools import partial
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

# Newton-Schulz makes updates of one size whatever the gradient. With this adjustment it is AdamW's
# size: a learning rate means the same for Adam and Muon.
ADJUST_LR = "match_rms_adamw"

# Optimizers of other packages: module, class, and what to install.
PACKAGED = {
    "adam8bit": ("torchao.optim", "AdamW8bit", "torchao"),
    "adam4bit": ("torchao.optim", "AdamW4bit", "torchao"),
    "adam-mini": ("pytorch_optimizer", "AdamMini", "pytorch_optimizer"),
    "galore": ("pytorch_optimizer", "GaLore", "pytorch_optimizer"),
    "fira": ("pytorch_optimizer", "Fira", "pytorch_optimizer"),
    "conda": ("pytorch_optimizer", "Conda", "pytorch_optimizer"),
    "smmf": ("adv_optm", "AdamW_adv", "adv-optm"),
    "muon-8bit": ("torchao.optim.subclass_8bit", "OptimState8bit", "torchao"),  # for the momentum
    "muon-4bit": ("torchao.optim.subclass_4bit", "OptimState4bit", "torchao"),
}
# By their authors for all weights, embeddings and norms too.
FOR_ALL = ("adam8bit", "adam4bit", "adafactor", "adam-mini", "smmf")


class WithAdamW(Optimizer):
    """One optimizer for matrices and torch.optim.AdamW for the rest, as one.

    torch.optim.Muon takes nothing but matrices; a trainer takes one optimizer, scheduler and
    checkpoint. This class owns all groups, those of the rest first, and all state, and lends them
    to the two for each step.
    """

    def __init__(self, matrices: Optimizer, rest: AdamW) -> None:
        self._matrices, self._rest = matrices, rest
        super().__init__([*rest.param_groups, *matrices.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of each on its own groups. No closure: it would run under no_grad."""
        # Lent anew at every step: load_state_dict replaces the groups and the state.
        dense = len(self._rest.param_groups)
        self._rest.param_groups = self.param_groups[:dense]
        self._matrices.param_groups = self.param_groups[dense:]
        self._rest.state = self._matrices.state = self.state
        self._rest.step()
        self._matrices.step()


def build_optimizer(model: nn.Module, config: RunConfig, rules: Sequence[Rule] = ()) -> Optimizer:
    """The optimizer that `config` describes, on all of the model's parameters that train.

    Groups at the full learning rate come first: loggers report the first group's. `rules` are
    those of `lorapre.param_groups`, for lorapre-*. Raises UserError where no matrix can be
    factorised, the rank or a rule does not fit, or a package is not installed.
    """
    ours = config.optimizer in LOW_RANK
    matrices, rest = grouped(model, 1, strict=ours)
    # Where only the matrices are compared, no sweep changes the betas of the rest.
    betas = BETAS if config.terms == "matrices" else config.betas
    if not ours:
        rate, own = config.lr * config.scale, {"lr": config.lr, "betas": betas}
        matrices = [{"params": group["params"], "lr": rate} for group in matrices]
        rest = [{"params": group["params"]} | own for group in rest]
        return peer(model, matrices, rest, config)
    assert config.rank is not None
    known = {weight for group in matrices for _, weight in group["params"]}
    # Not strict, a large rank would leave some matrices dense: no run of the rank in its name.
    routes: dict[str, Any] = {"rules": rules, "ends": config.ends}
    matrices, rest = grouped(model, config.rank, strict=True, **routes)
    # Embeddings and head may have a rank: their rate is that of the rest.
    adam = config.optimizer == "lorapre-adamw"
    full_rate: dict[str, Any] = {"scale": 1.0} if adam else {"lr": config.lr}
    ends, inner = Groups(), Groups()
    for group in matrices:
        for part, own, wanted in ((ends, full_rate, False), (inner, {}, True)):
            if params := [pair for pair in group["params"] if (pair[1] in known) == wanted]:
                part.append(group | own | {"params": params})
    if ends and config.terms == "matrices":
        option = "--rules" if config.ends == "dense" else "--ends"
        raise UserError(f"{option}: embeddings and head are dense for all; give --terms whole")
    names = ["rank", "variant", "weight_decay", "seed", "stochastic_rounding"]
    names += ["lr", "betas", "eps", "scale"] if adam else ["momentum"]
    options = {name: getattr(config, name) for name in names}
    options["momentum_dtype"] = word(config.momentum_dtype)
    if adam:
        rest = [{"betas": betas} | group for group in rest]
        return LoRAPreAdamW([*rest, *ends, *inner], **options)
    options |= {"lr": config.lr * config.scale, "adjust_lr_fn": ADJUST_LR}
    options |= {"adamw_lr": config.lr, "adamw_betas": betas, "adamw_eps": config.eps}
    options |= {"adamw_weight_decay": config.weight_decay}
    return LoRAPreMuon([*rest, *ends, *inner], **options)


def word(precision: Precision) -> str:
    """A dtype as LoRA-Pre's options name it."""
    return str(DTYPES[precision]).removeprefix("torch.")


def peer(model: nn.Module, matrices: Groups, rest: Groups, config: RunConfig) -> Optimizer:
    """An optimizer beside LoRA-Pre's. Raises UserError where its package is not installed."""
    name, whole = config.optimizer, config.terms == "whole"
    decay: dict[str, Any] = {"weight_decay": config.weight_decay}
    adam = decay | {"betas": config.betas, "eps": config.eps}
    momentum = decay | {"momentum": config.momentum}
    rank = {"rank": config.rank or 0}
    projected = rank | {"refresh": config.refresh or 0}
    if name == "adamw":
        return AdamW([*rest, *matrices], **adam)
    if whole and name in FOR_ALL:
        matrices, rest = [*rest, *matrices], []
    if whole and name in ("scale", "column-sgd"):
        head = config.momentum if name == "scale" else 0.0
        matrices, rest = with_ends(model, matrices, rest, head)
    make: Any = None
    if name in PACKAGED:
        module, called, package = PACKAGED[name]
        missing = f"{called} is in the package {package}, which is not installed here"
        install = "pip install 'lorapre[bench]'"
        with user_errors(f"--optimizer: {missing}: {install}", ModuleNotFoundError):
            make = getattr(importlib.import_module(module), called)
    if name in ("adam8bit", "adam4bit"):  # torchao takes no names
        for group in (*matrices, *rest):
            group["params"] = [p for _, p in group["params"]]
    if name in ("galore", "fira", "conda"):
        # Their state holds objects of this class, and torch.load refuses what it does not know.
        projector = importlib.import_module(make.__module__).GaLoreProjector
        torch.serialization.add_safe_globals([projector])
        own = {"update_proj_gap": config.refresh or 0, "scale": 1.0, "projection_type": "std"}
        matrices = [group | rank | own for group in matrices]
    factored = {"state_precision": "factored", "stochastic_rounding": False}
    table: dict[str, tuple[Any, dict[str, Any]]] = {
        "smmf": (make, adam | factored),
        "apollo": (Apollo, adam | projected),
        "apollo-mini": (Apollo, adam | projected | {"mini": True}),
        "mlorc": (MLorc, adam | rank),
        "mofasgd": (MoFaSGD, momentum | rank),
        "muon": (Muon, momentum | {"adjust_lr_fn": ADJUST_LR}),
        "muon-8bit": (StoredMuon, momentum | {"store": "8bit"}),
        "muon-4bit": (StoredMuon, momentum | {"store": "4bit"}),
        "muon-bf16": (StoredMuon, momentum | {"store": "bf16"}),
        "muon-no-momentum": (StoredMuon, decay | {"momentum": 0.0}),
        "alice": (Alice, decay | projected),
        "racs": (Racs, decay),
        "scale": (Scale, decay),
        "column-sgd": (Scale, decay),
        "adafactor": (Adafactor, decay),
        "sgd": (SGD, momentum),
        "adam-mini": (partial(adam_mini, make, model), adam),
    }
    make, options = table.get(name, (make, adam))
    chosen = make(matrices, **options)
    return WithAdamW(chosen, AdamW(rest, **adam)) if rest else chosen


def adam_mini(make: Any, model: nn.Module, groups: Groups, **adam: Any) -> Optimizer:
    """Adam-mini, which makes its own groups: the names say how second moments are shared."""
    named = [pair for group in groups for pair in group["params"]]
    rates = {name: group["lr"] for group in groups for name, _ in group["params"]}
    shape: Any = model.config
    source = SimpleNamespace(named_parameters=lambda: named)
    width, heads = shape.hidden_size, shape.num_attention_heads
    made: Optimizer = make(source, num_embeds=width, num_heads=heads, **adam)
    for group in made.param_groups:
        group |= {"lr": rates[group["name"]], "param_names": [group["name"]]}
    return made


def with_ends(model: Any, matrices: Groups, rest: Groups, momentum: float) -> tuple[Groups, Groups]:
    """Groups of SCALE: matrices with embeddings and head, the latter with momentum; and vectors."""
    table, lr = model.get_input_embeddings().weight, matrices[0]["lr"]
    ends, vectors = Groups(), Groups()
    for group in rest:
        for name, p in group["params"]:
            own = {"dim": 0} if p is table else {"momentum": momentum}
            if p.ndim == 2:
                ends.append({"params": [(name, p)], "lr": lr} | own)
        if params := [(name, p) for name, p in group["params"] if p.ndim < 2]:
            vectors.append(group | {"params": params})
    return [*matrices, *ends], vectors


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters in whose names a pattern is found.

    Raises UserError where one is found in no name, or where nothing is left to train.
    """
    for pattern in parse_patterns("freeze", patterns):
        found = [parameter for name, parameter in model.named_parameters() if pattern.search(name)]
        if not found:
            raise UserError(f"--freeze {pattern.pattern!r}: found in the name of no parameter")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("--freeze: leaves nothing to train")


def grouped(model: nn.Module, rank: int, **routes: Any) -> tuple[Groups, Groups]:
    """Groups with a rank, and those without. Raises UserError naming the option at fault."""
    try:
        groups = param_groups(model, rank=rank, **routes)
    except ValueError as error:
        option = "--rules" if str(error).startswith("rules:") else "--rank"
        raise UserError(f"{option}: {error}") from error
    matrices = [group for group in groups if group["rank"] is not None]
    return matrices, [group for group in groups if group["rank"] is None]


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """The attention and MLP matrices that train."""
    matrices, _ = grouped(model, 1)
    return [p for group in matrices for _, p in group["params"]]


def state_bytes(optimizer: Optimizer, parameters: Sequence[nn.Parameter] | None = None) -> int:
    """Bytes of state that an optimizer has in this process, of some parameters or of all."""
    states = optimizer.state
    chosen = states if parameters is None else [p for p in parameters if p in states]
    return storage_bytes(*tensors_in([states[p] for p in chosen]))


def storage_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of the storages of tensors, each once; a wrapper counts what it wraps."""
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
    """All tensors in an optimizer's state: in dicts, lists, and objects that peers keep there."""
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "__dict__") and not isinstance(value, type | dict):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]
