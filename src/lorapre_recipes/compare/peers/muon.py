"""Muon whose momentum is stored in few bits, or not at all. No package has it.

    M <- momentum M + (1 - momentum) G          read from the store, written back rounded
    W <- W - lr 0.2 sqrt(max(p, q)) NewtonSchulz((1 - momentum) G + momentum M)

With a float32 store it is torch.optim.Muon with its Nesterov step, in the size of AdamW's updates.
The other stores are bfloat16, torchao's blockwise dynamic 8 or 4 bits (blocks of 256 and 128
numbers, as in its AdamW8bit and AdamW4bit), and none.
"""

from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorapre.linalg import newton_schulz
from lorapre_recipes.compare.peers import MatrixOptimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon


class StoredMuon(MatrixOptimizer):
    """`store` is "fp32", "bf16", "8bit" or "4bit"; with momentum 0 nothing is stored."""

    OPTIONS: ClassVar[dict[str, Any]] = {"momentum": 0.95, "store": "fp32"}

    def update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The orthogonalised momentum."""
        momentum, M = group["momentum"], G
        if momentum:
            stored = state.setdefault("m", zeros(G, group["store"]))
            m = stored.dequantize() if group["store"].endswith("bit") else stored.float()
            m = m.lerp(G, 1 - momentum)
            stored.copy_(m)
            M = G.lerp(m, momentum)
        size: float = 0.2 * max(G.shape) ** 0.5
        return size * newton_schulz(M, COEFFICIENTS, steps=5, eps=1e-7).float()


def zeros(like: Tensor, store: str) -> Tensor:
    """A store of zeros."""
    if store.endswith("bit"):
        kind = getattr(import_module(f"torchao.optim.subclass_{store}"), f"OptimState{store}")
        quantised: Tensor = kind.zeros(like.shape, device=like.device)
        return quantised
    return torch.zeros_like(like, dtype=torch.bfloat16 if store == "bf16" else torch.float32)
