"""Helpers for tests of one matrix or a few: gradients as operands, and factors that follow them."""

from typing import NamedTuple

import torch
from torch import Tensor

from lorapre import variants
from lorapre.gradient import Factors, Gradient, wide

EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny

# How factors follow a target; see `lorapre.variants`.
FOLLOW = {
    "printed": variants.printed,
    "subspace": variants.follow_ema,
}


class Pair(NamedTuple):
    """Factors of one matrix, or of N."""

    B: Tensor  # (..., p, r)
    A: Tensor  # (..., r, q)

    @property
    def product(self) -> Tensor:
        """B A (..., p, q)."""
        return self.B @ self.A


def operand(T: Tensor) -> Gradient:
    """T (N, p, q), or (p, q) for one matrix, in the form in which a variant gets the gradient."""
    T = T if T.ndim == 3 else T[None]
    return Gradient(list(T), (T.shape[1], T.shape[2]), T.device, dtype=wide(T.dtype))


def sizes(p: int, q: int, N: int = 1) -> Gradient:
    """An operand for functions that use only its size."""
    return operand(torch.zeros(N, p, q))


def follow(name: str, B: Tensor, A: Tensor, T: Tensor, beta: Tensor | float) -> Pair:
    """Move the factors one step towards T (..., p, q). The product of the old ones decays by beta."""
    f = Factors(B, A) if B.ndim == 3 else Factors(B[None], A[None])
    new = FOLLOW[name](f, operand(T), beta)  # type: ignore[arg-type]
    return Pair(*new) if B.ndim == 3 else Pair(new.B[0], new.A[0])


def begin(name: str, T: Tensor, r: int, seed: int = 0) -> Pair:
    """The factors with which a variant starts when its first target is T, in T's dtype."""
    variant = "paper" if name == "printed" else name
    A = variants.first_A(variant, operand(T), r, seed).to(T.dtype)
    return Pair(T.new_zeros(*T.shape[:-1], r), A if T.ndim == 3 else A[0])
