"""From momenta to an update: the Adam rule, the Muon rule, and the averages that correct them.

Pure functions of tensors; the momenta may be dense or the product of two factors, the rules cannot tell.
"""

import math

import torch
from torch import Tensor


def debias(beta: float, t: Tensor) -> Tensor:
    """1 - beta**t: the weight that an EMA from zero has gathered after t steps (exact for beta near one)."""
    return -torch.expm1(t * math.log(max(beta, 1e-300)))


def debiased_rate(beta: float, t: Tensor) -> Tensor:
    """beta_t = beta (1 - beta**(t-1)) / (1 - beta**t): an EMA at this rate estimates the mean at every step.

    Zero at t = 1 and beta in the limit (docs/maths.md, "The subspace tracker").
    """
    return beta * debias(beta, t - 1) / debias(beta, t)


def adam_direction(m: Tensor, v: Tensor, eps: float) -> Tensor:
    """m / (sqrt(v) + eps), with both moments corrected (paper, Algorithm 1). Overwrites v."""
    return m / v.sqrt_().add_(eps)


def newton_schulz(
    M: Tensor,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Orthogonalise each matrix M (..., p, q): about U V^T of its singular value decomposition U S V^T.

    The quintic iteration of Keller Jordan's Muon, X <- a X + (b G + c G G) X with G = X X^T, from X = M /
    ||M||_F, with the operations of torch.optim.Muon, on a batch.

    Args:
        M: (..., p, q).
        coefficients: (a, b, c).
        steps: number of iterations.
        eps: the least norm M is divided by.
        dtype: the type the iteration runs in, and of the result; torch.optim.Muon uses bfloat16.
    """
    a, b, c = coefficients
    X = M.to(dtype)
    tall = M.shape[-2] > M.shape[-1]
    X = X.mT if tall else X
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        G = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(G, G, G, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def adjusted_scale(adjust_lr_fn: str | None, p: int, q: int) -> float:
    """The factor on Muon's learning rate for a (p, q) matrix, as torch.optim.Muon has it.

    None or "original": sqrt(max(1, p / q)); "match_rms_adamw": 0.2 sqrt(max(p, q)), with which AdamW's
    learning rates carry over.
    """
    return 0.2 * math.sqrt(max(p, q)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1.0, p / q))
