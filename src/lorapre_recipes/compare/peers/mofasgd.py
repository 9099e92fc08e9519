"""MoFaSGD, momentum factorised SGD, arXiv 2507.08091, Algorithm 1.

A momentum M = U diag(s) V^T of rank r, U (p, r) and V (q, r) orthonormal, takes what a gradient G (p, q)
has in its tangent space, and is brought back to rank r, all through matrices of 2 r columns:

    M <- SVD_r(beta M + U U^T G + G V V^T - U U^T G V V^T)
       = SVD_r([U, G V] [[beta diag(s) - U^T G V, I], [I, 0]] [V, G^T U]^T)
    W <- W - lr U V^T

The first factors are here those of the first gradient, SVD_r(G). U V^T has r singular values of one, and
is scaled by 0.2 sqrt(max(p, q)) as Muon's update is, so that rates mean the same. Elsewhere AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorapre_recipes.compare.peers import MatrixOptimizer


class MoFaSGD(MatrixOptimizer):
    """State: r (p + q + 1) numbers of a matrix."""

    def __init__(self, params: Any, *, rank: int, momentum: float = 0.95, **options: Any) -> None:
        super().__init__(params, rank=rank, momentum=momentum, **options)

    def update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The momentum with its singular values made one."""
        r = min(group["rank"], *G.shape)
        if not state:
            P, s, Qt = torch.linalg.svd(G, full_matrices=False)
            U, V = P[:, :r].clone(), Qt[:r].mT.clone()
        else:
            U, V = state["U"], state["V"]
            GV, one = G @ V, torch.eye(r).to(G)
            corner = group["momentum"] * state["s"].diag() - U.mT @ GV
            block = torch.cat(
                [torch.cat([corner, one], 1), torch.cat([one, torch.zeros_like(one)], 1)]
            )
            left, R = torch.linalg.qr(torch.cat([U, GV], 1))
            right, L = torch.linalg.qr(torch.cat([V, G.mT @ U], 1))
            P, s, Qt = torch.linalg.svd(R @ block @ L.mT)
            U, V = left @ P[:, :r], right @ Qt[:r].mT
        state |= {"U": U, "s": s[:r].clone(), "V": V}
        size: float = 0.2 * max(G.shape) ** 0.5
        update: Tensor = size * U @ V.mT
        return update
