"""MLorc, momentum low-rank compression, arXiv 2506.01897, Algorithm 1.

Adam whose moments of a matrix (p, q) are stored at rank r between steps, and compressed at each:

    M = b1 Qm Bm + (1 - b1) G
    V = b2 R(Qv Bv) + (1 - b2) G**2      R: each negative entry becomes the mean size of them all
    Qm, Bm = compress(M)                 Qv, Bv = compress(V)
    W <- W - lr (M / (1 - b1**t)) / (sqrt(V / (1 - b2**t)) + eps)

compress(X) is a randomised singular value decomposition without oversampling: Q (p, r) is an
orthonormal basis of X Omega, Omega (q, r) Gaussian, and B = Q^T X. The authors decompose B further
into U S V^T; the next step takes only the product, which is the same. Recommended: rank 4 for
fine-tuning, betas (0.9, 0.999).
"""

from typing import Any

import torch
from torch import Tensor

from lorapre_recipes.compare.peers import MatrixOptimizer, gaussian


class MLorc(MatrixOptimizer):
    """State: 2 r (p + q) numbers for a matrix."""

    def update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Adam's update from the compressed moments."""
        b1, b2 = group["betas"]
        t = state["step"] = state.get("step", 0) + 1
        M, V = (1 - b1) * G, (1 - b2) * G.square()
        if t > 1:
            M += b1 * (state["m_Q"] @ state["m_B"])
            V += b2 * without_negatives(state["v_Q"] @ state["v_B"])
        for name, X in (("m", M), ("v", V)):
            r = min(group["rank"], *X.shape)
            Q = torch.linalg.qr(X @ gaussian(X.shape[1], r, t, X)).Q
            state |= {f"{name}_Q": Q, f"{name}_B": Q.mT @ X}
        update: Tensor = M / (1 - b1**t) / ((V / (1 - b2**t)).sqrt() + group["eps"])
        return update


def without_negatives(V: Tensor) -> Tensor:
    """V with the mean size of its negative entries in their place."""
    negative = V < 0
    size = -V.clamp_max(0).sum() / negative.sum().clamp_min(1)
    return torch.where(negative, size, V)
