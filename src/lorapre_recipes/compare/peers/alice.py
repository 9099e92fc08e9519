"""Alice, adaptive low-dimensional subspace estimation, arXiv 2502.07752, Algorithms 2 to 4.

Adam without bias corrections in r directions U (m, r) of the shorter side of a gradient G (m, n).
The part of G outside of them is added with its columns normalised:

    S <- b3 S + (1 - b3) (U^T G) (U^T G)^T                             tracking, (r, r)
    M <- b1 M + (1 - b1) U^T G       V <- b2 V + (1 - b2) (U^T G)**2
    v <- b1 v + (1 - b1) (column sums of G**2 - those of (U^T G)**2)   compensation, (n,)
    C  = sqrt(m - r) (G - U U^T G) diag(v)^(-1/2)
    W <- W - lr (U (M / sqrt(V)) + compensation L(C))

L lets the norm grow by 1 % a step at most. Every `refresh` steps U becomes the `leading`
eigenvectors of b3 U S U^T + (1 - b3) G G^T after one subspace iteration, and r - `leading`
directions drawn from the complement (switching). The iteration starts from zero and does not define
the first U: here it is the leading eigenvectors of G G^T. Recommended: betas 0.9, 0.9, 0.999;
refresh 200; 40 of 128 directions leading; compensation 0.4; Adam for embeddings, head and norms.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lorapre_recipes.compare.peers import MatrixOptimizer, limited


class Alice(MatrixOptimizer):
    """State: r (m + 2 n + r) + n + 1 numbers for a matrix, where m is the shorter side."""

    OPTIONS: ClassVar[dict[str, Any]] = dict(
        betas=(0.9, 0.9, 0.999), refresh=200, compensation=0.4, leading=40 / 128
    )

    def update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The low-rank update and its compensation."""
        if G.shape[0] > G.shape[1]:
            return self.update(G.mT, state, group).mT
        m, n = G.shape
        r, (b1, b2, b3) = min(group["rank"], m), group["betas"]
        if not state:
            state |= {"step": 0, "S": G.new_zeros(r, r), "v": G.new_zeros(n), "limit": {}}
            state |= {"M": G.new_zeros(r, n), "V": G.new_zeros(r, n)}
        state["step"] += 1
        if state["step"] == 1:
            state["U"] = switched(eigenvectors(G @ G.mT)[:, :r], group["leading"], seed=1)
        elif state["step"] % group["refresh"] == 0:
            total = b3 * state["U"] @ state["S"] @ state["U"].mT + (1 - b3) * G @ G.mT
            basis, _ = torch.linalg.qr(total @ state["U"])  # one subspace iteration
            ordered = basis @ eigenvectors(basis.mT @ total @ basis)
            state["U"] = switched(ordered, group["leading"], seed=state["step"])
        U, M, V = state["U"], state["M"], state["V"]
        low = U.mT @ G
        state["S"].lerp_(low @ low.mT, 1 - b3)
        M.lerp_(low, 1 - b1)
        V.lerp_(low.square(), 1 - b2)
        missed = (G.square().sum(0) - low.square().sum(0)).clamp_min(0.0)
        v = state["v"].lerp_(missed, 1 - b1)
        C = limited((m - r) ** 0.5 * (G - U @ low) / v.sqrt().clamp_min(1e-30), state["limit"])
        update: Tensor = U @ (M / (V.sqrt() + 1e-8)) + group["compensation"] * C
        return update


def eigenvectors(symmetric: Tensor) -> Tensor:
    """The eigenvectors as columns; that of the largest eigenvalue comes first."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors.flip(1)
    return vectors


def switched(ordered: Tensor, leading: float, *, seed: int) -> Tensor:
    """Keep a share `leading` of the directions (m, r); draw the others from the complement."""
    m, r = ordered.shape
    kept = round(leading * r)
    complement = torch.linalg.qr(ordered, mode="complete").Q[:, r:]
    drawn = torch.randperm(m - r, generator=torch.Generator().manual_seed(seed))[: r - kept]
    # If the complement has too few directions, the next of the old ones fill the gap.
    parts = [ordered[:, :kept], complement[:, drawn.to(ordered.device)], ordered[:, kept:]]
    directions: Tensor = torch.cat(parts, dim=1)[:, :r].clone()  # else more would stay in memory
    return directions
