"""Pre-training through adapters, as Table 1 of the paper has them beside full-rank methods: LoRA and ReLoRA.

The matrices of attention and MLP stay as they were drawn and learn through B A of a rank; embeddings, head
and norms train in full. ReLoRA adds B A to the weights every `refresh` steps and begins anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from lorapre import param_groups
from lorapre_recipes.config import PretrainConfig

ALPHA = 32  # what GaLore's experiments, and with them the paper's, scale B A by, over the rank
NAME = "default"


def insert_adapters(model: nn.Module, config: PretrainConfig) -> None:
    """Give every matrix that LoRA-Pre would factorise an adapter of peft, and freeze the matrix."""
    from peft import LoraConfig, inject_adapter_in_model

    assert config.rank is not None
    matrices = [
        name.removesuffix(".weight")
        for group in param_groups(model, rank=1)
        if group["rank"] is not None
        for name, _ in group["params"]
    ]
    inject_adapter_in_model(
        LoraConfig(r=config.rank, lora_alpha=ALPHA, target_modules=matrices), model, adapter_name=NAME
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".base_layer." not in name)


class Merge(TrainerCallback):
    """ReLoRA's restarts: the product goes into the weight, the adapter and its moments begin anew.

    The learning rate goes on along the schedule; the warm-ups of ReLoRA after each restart are left out.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Merge, every so many steps but not at the end."""
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            optimizer = parts["optimizer"]
            merge_(parts["model"], getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it


@torch.no_grad()
def merge_(model: nn.Module, optimizer: Optimizer) -> None:
    """Add each B A to its weight; draw A anew, set B to zero, forget the moments of both."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.get_base_layer().weight.add_(layer.get_delta_weight(NAME))  # type: ignore[operator]
            layer.reset_lora_parameters(NAME, True)  # type: ignore[no-untyped-call]
            for factors in (layer.lora_A, layer.lora_B):
                optimizer.state.pop(factors[NAME].get_parameter("weight"), None)
