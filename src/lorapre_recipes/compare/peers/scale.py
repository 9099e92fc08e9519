"""SCALE, "A Minimalist Optimizer Design for LLM Pretraining", arXiv 2506.16659, Algorithm 1.

Normalised gradients everywhere, momentum in the output head alone:

    M <- momentum M + (1 - momentum) G      in the head; elsewhere M = G
    W <- W - lr C(M)

C divides every column of a matrix by its norm. The paper's weights are (in, out) and torch's are
(out, in): there C divides every row, and every column of an embedding table (tokens, hidden). As
in the authors' code C makes the root mean square one, so that rates are those of Adam. Vectors
train with Adam. Recommended: momentum 0.9 in the head. Without any it is column-normalised SGD,
which has no state.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lorapre_recipes.compare.peers import MatrixOptimizer


class Scale(MatrixOptimizer):
    """Options of a group: `momentum`, 0 except in the head; `dim`, 0 in an embedding table."""

    OPTIONS: ClassVar[dict[str, Any]] = {"momentum": 0.0, "dim": 1}

    def update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """C(M)."""
        M = G
        if group["momentum"]:
            M = state.setdefault("m", torch.zeros_like(G)).lerp_(G, 1 - group["momentum"])
        return M / M.square().mean(group["dim"], keepdim=True).sqrt().clamp_min(1e-8)
