"""APOLLO, gradients scaled by what Adam does to a random projection of them, arXiv 2412.05270, Algorithm 1.

    R = P G                             G (m, n) with m the shorter side, P (r, m) of N(0, 1/r)
    M <- b1 M + (1 - b1) R              V <- b2 V + (1 - b2) R**2
    A = (M / (1 - b1**t)) / (sqrt(V / (1 - b2**t)) + eps)
    s = |A| / |R|                       of each column, or of all of it
    W <- W - lr L(sqrt(scale) G diag(s))

L lets the norm of the update grow by 1 % a step at most. P is drawn anew every `refresh` steps, from a seed,
and not stored. Recommended: refresh 200, scale 1; APOLLO-mini has rank 1, one s, and scale 128; Adam
elsewhere. pytorch_optimizer scales P G instead and projects it back: its updates have rank r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorapre_recipes.compare.peers import MatrixOptimizer, limited


class Apollo(MatrixOptimizer):
    """State: 2 r n + 1 numbers of a matrix; `mini` has rank 1 and one factor for a matrix."""

    def __init__(
        self, params: Any, *, rank: int, refresh: int, mini: bool = False, **options: Any
    ) -> None:
        super().__init__(params, rank=1 if mini else rank, refresh=refresh, mini=mini, **options)

    def update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The gradient, scaled."""
        if G.shape[0] > G.shape[1]:
            return self.update(G.mT, state, group).mT
        b1, b2 = group["betas"]
        t = state["step"] = state.get("step", 0) + 1
        R = projection(G, group["rank"], (t - 1) // group["refresh"]) @ G
        M = state.setdefault("M", torch.zeros_like(R)).lerp_(R, 1 - b1)
        V = state.setdefault("V", torch.zeros_like(R)).lerp_(R.square(), 1 - b2)
        A = M / (1 - b1**t) / ((V / (1 - b2**t)).sqrt() + group["eps"])
        dim = None if group["mini"] else 0
        s = torch.linalg.vector_norm(A, dim=dim) / torch.linalg.vector_norm(R, dim=dim).clamp_min(
            1e-30
        )
        scale = 128.0 if group["mini"] else 1.0
        return limited(scale**0.5 * s * G, state)


def projection(G: Tensor, rank: int, number: int) -> Tensor:
    """P (r, m), the same for the same number."""
    r = min(rank, len(G))
    P: Tensor = torch.randn(r, len(G), generator=torch.Generator().manual_seed(number)) / r**0.5
    return P.to(G)
