"""RACS, row and column scaled SGD, arXiv 2502.07752, Algorithm 1 and equation 16.

Two diagonals, the scales of rows and of columns, approximate the Fisher information of a gradient
G (p, q):

    five times, from row = 1:   col = (G**2)^T row / |row|**2     row = G**2 col / |col|**2
    a <- beta a + (1 - beta) row      b <- beta b + (1 - beta) col      from a = b = 0
    W <- W - lr L(diag(a)^(-1/2) G diag(b)^(-1/2))

L lets the norm of the update grow by 1 % a step at most. Recommended: beta 0.9, and Adam for
embeddings, head and norms. pytorch_optimizer has another algorithm under this name: without the
iteration both scales are mean squares, and the update grows as gradients shrink.
"""

from typing import Any, ClassVar

from torch import Tensor

from lorapre_recipes.compare.peers import MatrixOptimizer, limited

TINY = 1e-30


class Racs(MatrixOptimizer):
    """State: p + q + 1 numbers for a matrix."""

    OPTIONS: ClassVar[dict[str, Any]] = {"beta": 0.9}

    def update(self, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The gradient with rows and columns scaled, and its norm's growth limited."""
        p, q = G.shape
        size = G.square().mean().clamp_min(TINY)  # else squares of squares would leave float32
        squares = G.square() / size
        row = G.new_ones(p)
        for _ in range(5):
            col = squares.mT @ row / row.dot(row).clamp_min(TINY)
            row = squares @ col / col.dot(col).clamp_min(TINY)
        a = state.setdefault("row", G.new_zeros(p)).lerp_(row, 1 - group["beta"])
        b = state.setdefault("col", G.new_zeros(q)).lerp_(col * size, 1 - group["beta"])
        return limited(G / (a[:, None] * b).clamp_min(TINY).sqrt(), state)
