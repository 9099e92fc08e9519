"""SCALE, "A Minimalist Optimizer Design for LLM Pretraining", arXiv 2506.16659, Algorithm 1.

Normalised gradients everywhere, momentum in the output head alone:

    M <- momentum M + (1 - momentum) G      in the head; elsewhere M = G
    W <- W - lr C(M)

C divides every column of a matrix as the paper has it, (in, out), by its norm. torch's weights are (out, in):
there it is every row, and of an embedding table (tokens, hidden) every column. As in the authors' code it
is the root mean square that becomes one, so that rates are those of Adam. Vectors train with Adam.
Recommended: momentum 0.9 in the head. Without any it is column-normalised SGD, which has no state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorapre_recipes.compare.peers import MatrixOptimizer


class Scale(MatrixOptimizer):
    """The options of a group are `momentum`, 0 in all but the head, and `dim`, 0 in an embedding table."""

    def __init__(self, params: Any, *, momentum: float = 0.0, dim: int = 1, **options: Any) -> None:
        super().__init__(params, momentum=momentum, dim=dim, **options)

    def update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """C(M)."""
        M = G
        if group["momentum"]:
            M = state.setdefault("m", torch.zeros_like(G)).lerp_(G, 1 - group["momentum"])
        return M / M.square().mean(group["dim"], keepdim=True).sqrt().clamp_min(1e-8)
