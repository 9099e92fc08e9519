"""MoFaSGD, momentum factorised SGD, arXiv 2507.08091, Algorithm 1.

A momentum M = U diag(s) V^T of rank r, with U (p, r) and V (q, r) orthonormal, takes the part of
a gradient G (p, q) in its tangent space. Matrices of 2 r columns bring it back to rank r:

    M <- SVD_r(beta M + U U^T G + G V V^T - U U^T G V V^T)
       = SVD_r([U, G V] [[beta diag(s) - U^T G V, I], [I, 0]] [V, G^T U]^T)
    W <- W - lr U V^T

The first factors are here those of the first gradient, SVD_r(G). U V^T has r singular values of
one. It is scaled by 0.2 sqrt(max(p, q)) like Muon's update, so that rates mean the same. AdamW
trains embeddings, head and norms.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lorapre_recipes.compare.peers import MatrixOptimizer


class MoFaSGD(MatrixOptimizer):
    """State: r (p + q + 1) numbers for a matrix."""

    OPTIONS: ClassVar[dict[str, Any]] = {"momentum": 0.95}

    def update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The momentum with singular values of one."""
        r = min(group["rank"], *G.shape)
        if not state:
            P, s, Qt = torch.linalg.svd(G, full_matrices=False)
            U, V = P[:, :r].clone(), Qt[:r].mT.clone()
        else:
            U, V = state["U"], state["V"]
            GV, one = G @ V, torch.eye(r).to(G)
            upper = torch.cat([group["momentum"] * state["s"].diag() - U.mT @ GV, one], 1)
            lower = torch.cat([one, torch.zeros_like(one)], 1)
            left, R = torch.linalg.qr(torch.cat([U, GV], 1))
            right, L = torch.linalg.qr(torch.cat([V, G.mT @ U], 1))
            P, s, Qt = torch.linalg.svd(R @ torch.cat([upper, lower]) @ L.mT)
            U, V = left @ P[:, :r], right @ Qt[:r].mT
        state |= {"U": U, "s": s[:r].clone(), "V": V}
        update: Tensor = 0.2 * max(G.shape) ** 0.5 * U @ V.mT
        return update
