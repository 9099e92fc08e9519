"""Published optimizers that no package has, or not as published; and what they share.

Each is written from its paper's equations, one matrix (p, q) at a time, as (out, in) of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class MatrixOptimizer(Optimizer):
    """W <- W - lr (update + weight_decay W), where a subclass says what the update of one matrix is.

    Args:
        params: matrices, or groups of them.
        **options: of the subclass; a group may have its own.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 1e-3, "weight_decay": 0.0} | options)

    def update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """What a gradient (p, q) in float32 becomes. `state` is empty at the first step."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for W in group["params"]:
                if W.grad is not None:
                    update = self.update(W.grad.float(), self.state[W], group)
                    W.mul_(1 - group["lr"] * group["weight_decay"])
                    W.add_(update, alpha=-group["lr"])


def limited(update: Tensor, state: dict[str, Any], growth: float = 1.01) -> Tensor:
    """Fira's limiter: an update whose norm is at most `growth` times that of the step before."""
    norm = update.norm()
    if state.get("norm", 0.0) > 0:
        norm = norm.minimum(growth * state["norm"])
        update = update * (norm / update.norm().clamp_min(1e-30))
    state["norm"] = norm
    return update
