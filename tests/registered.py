"""Checks that every factory of a registry of optimizers must pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorapre import LoRAPreAdamW, LoRAPreMuon, param_groups

NAMES = {"lorapreadamw": LoRAPreAdamW, "lorapremuon": LoRAPreMuon}


def check_routes(optimizer: Any, model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Every trainable parameter is in the optimizer once, under its name and on the route of `groups`."""
    rank_of = {name: group["rank"] for group in groups for name, _ in group["params"]}
    held = {
        name: (p, group["rank"])
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    assert held.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(held)
    for name, (p, rank) in held.items():
        assert p is model.get_parameter(name)
        assert rank == rank_of[name]
    assert {rank for _, rank in held.values()} > {None}


def check_equals_own(
    made: Any, model: nn.Module, own: nn.Module, loss: Callable[[nn.Module], Tensor], **options: Any
) -> None:
    """`made` takes the same steps as the class itself does on a copy of the model."""
    cls = next(cls for cls in NAMES.values() if isinstance(made, cls))
    optimizer = cls(param_groups(own, rank=3), **options)
    losses = []
    for _ in range(4):
        for net, stepped in ((model, made), (own, optimizer)):
            value = loss(net)
            value.backward()
            stepped.step()
            stepped.zero_grad()
            losses.append(value.item())
    assert losses[-1] < losses[0]
    for (name, p), q in zip(model.named_parameters(), own.parameters(), strict=True):
        assert torch.equal(p, q), name
