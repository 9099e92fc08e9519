"""APOLLO, arXiv 2412.05270, Algorithm 1: gradients scaled by Adam's gain in a random projection.

    R = P G                             G (m, n) with m the shorter side, P (r, m) of N(0, 1/r)
    M <- b1 M + (1 - b1) R              V <- b2 V + (1 - b2) R**2
    A = (M / (1 - b1**t)) / (sqrt(V / (1 - b2**t)) + eps)
    s = |A| / |R|                       of each column; for APOLLO-mini of the whole matrix
    W <- W - lr L(sqrt(scale) G diag(s))

L lets the norm of the update grow by 1 % a step at most. P is drawn anew every `refresh` steps,
from a seed, and not stored. Recommended: refresh 200 and scale 1; for APOLLO-mini rank 1 and scale
128; Adam for embeddings, head and norms. pytorch_optimizer scales P G instead and projects it back:
its updates have rank r.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lorapre_recipes.compare.peers import MatrixOptimizer, gaussian, limited


class Apollo(MatrixOptimizer):
    """State: 2 r n + 1 numbers for a matrix. `mini` is APOLLO-mini, whatever `rank` says."""

    OPTIONS: ClassVar[dict[str, Any]] = {"mini": False}

    def update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The scaled gradient."""
        if G.shape[0] > G.shape[1]:
            return self.update(G.mT, state, group).mT
        b1, b2 = group["betas"]
        rank, scale, dim = (1, 128.0, None) if group["mini"] else (group["rank"], 1.0, 0)
        t = state["step"] = state.get("step", 0) + 1
        r, seed = min(rank, len(G)), (t - 1) // group["refresh"]
        R = gaussian(r, len(G), seed, G) @ G / r**0.5
        M = state.setdefault("M", torch.zeros_like(R)).lerp_(R, 1 - b1)
        V = state.setdefault("V", torch.zeros_like(R)).lerp_(R.square(), 1 - b2)
        A = M / (1 - b1**t) / ((V / (1 - b2**t)).sqrt() + group["eps"])
        length = torch.linalg.vector_norm(R, dim=dim).clamp_min(1e-30)
        s = torch.linalg.vector_norm(A, dim=dim) / length
        return limited(scale**0.5 * s * G, state)
