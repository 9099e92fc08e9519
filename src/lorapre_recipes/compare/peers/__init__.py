"""Published optimizers that no package has, or not as published; and what they share.

Each is written from its paper's equations, for one matrix (p, q) at a time: the weight (out, in)
of a linear layer.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer


class MatrixOptimizer(Optimizer):
    """W <- W - lr (update + weight_decay W); a subclass gives the update of one matrix.

    Args:
        params: matrices, or groups of them.
        **options: those of the subclass; a group may have its own.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {}  # the defaults of a subclass

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 1e-3, "weight_decay": 0.0} | self.OPTIONS | options)

    def update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The update (p, q) for a float32 gradient (p, q); `state` is empty at the first step."""
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


def gaussian(p: int, q: int, seed: int, like: Tensor) -> Tensor:
    """Normal numbers (p, q), the same for the same seed."""
    return torch.randn(p, q, generator=torch.Generator().manual_seed(seed)).to(like)


def limited(update: Tensor, state: dict[str, Any]) -> Tensor:
    """Fira's limiter: the norm of the update grows by at most 1 % from step to step."""
    norm = update.norm()
    if state.get("norm", 0.0) > 0:
        norm = norm.minimum(1.01 * state["norm"])
        update = update * (norm / update.norm().clamp_min(1e-30))
    state["norm"] = norm
    return update
