"""One optimizer for the whole model, from a config: LoRA-Pre's two, and the dense two they stand beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from lorapre import LoRAPreAdamW, LoRAPreMuon, param_groups
from lorapre_recipes.config import PretrainConfig, UserError

Groups = list[dict[str, Any]]

# Newton-Schulz makes updates of one size whatever the gradient. With this adjustment it is AdamW's size: a
# learning rate means the same for all four optimizers.
ADJUST_LR = "match_rms_adamw"


class MuonWithAdamW(Optimizer):
    """torch.optim.Muon for matrices and torch.optim.AdamW for the rest, as one optimizer.

    torch.optim.Muon takes nothing but matrices; a trainer takes one optimizer, scheduler and checkpoint. This
    class owns all groups and all state and lends them to the two for each step.

    Args:
        matrices: groups for Muon, with a learning rate each.
        rest: groups for AdamW, with a learning rate each.
        momentum: of Muon.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of both, decoupled.
    """

    def __init__(
        self,
        matrices: Groups,
        rest: Groups,
        *,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self._muon = Muon(matrices, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn=ADJUST_LR)
        self._adamw = AdamW(rest, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__([*self._adamw.param_groups, *self._muon.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each, with its own rule on its own groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Lent anew at every step: load_state_dict replaces the groups and the state.
        dense = len(self._adamw.param_groups)
        self._adamw.param_groups, self._muon.param_groups = (
            self.param_groups[:dense],
            self.param_groups[dense:],
        )
        self._adamw.state = self._muon.state = self.state
        self._adamw.step()
        self._muon.step()  # type: ignore[no-untyped-call]
        return loss


def build_optimizer(model: nn.Module, config: PretrainConfig) -> Optimizer:
    """The optimizer that `config` describes, on all of the model's parameters.

    All four take the same matrices for matrices (`lorapre.param_groups` decides): a comparison compares what
    they do with them. Groups at the full learning rate come first: loggers report the first group's.

    Raises:
        UserError: the rank is so large that factors would not be smaller than some matrix.
    """
    groups = param_groups(model, rank=1, strict=True)
    matrices = [group for group in groups if group["rank"] is not None]
    rest = [group for group in groups if group["rank"] is None]
    if config.rank is not None:
        # A larger rank would leave some matrices dense: no run of the rank that it is named after.
        weights = (weight for group in matrices for _, weight in group["params"])
        largest = min((weight.numel() - 1) // sum(weight.shape) for weight in weights)
        if config.rank > largest:
            raise UserError(
                f"--rank {config.rank}: factors would not be smaller than this model's smallest matrix; "
                f"give at most {largest}"
            )
        for group in matrices:
            group["rank"] = config.rank
    matrix_lr = config.lr * config.scale

    if config.optimizer == "lorapre-adamw":
        assert config.rank is not None
        assert config.variant is not None
        assert config.compress is not None
        return LoRAPreAdamW(
            [*rest, *matrices],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            rank=config.rank,
            scale=config.scale,
            variant=config.variant,
            compress=config.compress,
            seed=config.seed,
            stochastic_rounding=config.stochastic_rounding,
        )
    if config.optimizer == "lorapre-muon":
        assert config.rank is not None
        assert config.variant is not None
        return LoRAPreMuon(
            [*rest, *matrices],
            lr=matrix_lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn=ADJUST_LR,
            rank=config.rank,
            variant=config.variant,
            adamw_lr=config.lr,
            adamw_betas=config.betas,
            adamw_eps=config.eps,
            adamw_weight_decay=config.weight_decay,
            seed=config.seed,
            stochastic_rounding=config.stochastic_rounding,
        )

    matrices = [{"params": group["params"], "lr": matrix_lr} for group in matrices]
    rest = [{"params": group["params"], "lr": config.lr} for group in rest]
    if config.optimizer == "adamw":
        return AdamW([*rest, *matrices], betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    return MuonWithAdamW(
        matrices,
        rest,
        momentum=config.momentum,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
