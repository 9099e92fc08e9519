"""The gradient as an operand, and factors that follow it: for tests on one matrix, or on a few."""

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
    """T (N, p, q), or (p, q) for one matrix, as the gradient is handed to a variant."""
    T = T if T.ndim == 3 else T[None]
    return Gradient(list(T), (T.shape[1], T.shape[2]), T.device, dtype=wide(T.dtype))


def sizes(p: int, q: int, N: int = 1) -> Gradient:
    """An operand for functions that ask for its size alone."""
    return operand(torch.zeros(N, p, q))


def follow(name: str, B: Tensor, A: Tensor, T: Tensor, beta: Tensor | float) -> Pair:
    """One step of the factors towards T (..., p, q); the product of the old ones decays by beta."""
    f = Factors(B, A) if B.ndim == 3 else Factors(B[None], A[None])
    new = FOLLOW[name](f, operand(T), beta)  # type: ignore[arg-type]
    return Pair(*new) if B.ndim == 3 else Pair(new.B[0], new.A[0])


def begin(name: str, T: Tensor, r: int, seed: int = 0) -> Pair:
    """The factors, in T's dtype, that the variants start from when their first target is T."""
    variant = "paper" if name == "printed" else name
    A = variants.first_A(variant, operand(T), r, seed).to(T.dtype)
    return Pair(T.new_zeros(*T.shape[:-1], r), A if T.ndim == 3 else A[0])
