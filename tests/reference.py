"""Both algorithms in float64, written out from the specification for one weight at a time.

Nothing here is fast, batched or shared with the library: momenta are formed densely, systems are solved with
``torch.linalg.solve``, bases come from ``torch.linalg.qr``. Every test of an optimizer compares with it.

Symbols: weight and gradient ``g`` (p, q), factors ``B`` (p, r) and ``A`` (r, q), target ``T`` (p, q).
Where the specification departs from the paper the letter of docs/maths.md is named.
"""

import math

import torch
from torch import Tensor


def damped_solve(G: Tensor, R: Tensor, damping: float) -> Tensor:
    """(G + damping I)^-1 R."""
    return torch.linalg.solve(G + damping * torch.eye(len(G), dtype=G.dtype), R)


def relative_damping(G: Tensor) -> float:
    """Departure b: 1e-6 of the trace; plus the least positive number, for a Gram matrix of zeros."""
    return 1e-6 * G.trace().item() + torch.finfo(torch.float32).tiny


def gauged(B: Tensor, A: Tensor, A_before: Tensor) -> tuple[Tensor, Tensor]:
    """Departure c: the same product with ||A||_F = sqrt(r). Where A is zero: B zero, A the old one."""
    size = A.norm().item() / math.sqrt(max(1, len(A)))  # rank 0 has no rows
    if size == 0:
        return torch.zeros_like(B), A_before
    return B * size, A / size


def track_printed(B: Tensor, A: Tensor, T: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Theorem 3.1: both new factors are made of the old ones, with absolute damping."""
    new_B = (1 - gamma) * B + gamma * damped_solve(A @ A.T, (T @ A.T).T, 1e-6).T
    new_A = (1 - gamma) * A + gamma * damped_solve(B.T @ B, B.T @ T, 1e-6)
    return new_B, new_A


def track_subspace(B: Tensor, A: Tensor, T: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The EMA E = beta B A + (1 - beta) T, projected on the columns of E A^T."""
    ema = beta * (B @ A) + (1 - beta) * T
    Q = torch.linalg.qr(ema @ A.T).Q
    return gauged(Q, Q.T @ ema, A)


def in_row_space(g: Tensor, A: Tensor) -> Tensor:
    """g A^+ A, the part of g that B A can hold, with the damping of departure b."""
    G = A @ A.T
    return damped_solve(G, (g @ A.T).T, relative_damping(G)).T @ A


def unit_scale(A: Tensor) -> Tensor:
    """A, scaled to ||A||_F = sqrt(r)."""
    return A * (math.sqrt(len(A)) / A.norm().item()) if len(A) else A


def first_A(variant: str, random: Tensor) -> Tensor:
    """The A (r, q) with which a momentum starts, made of a standard normal draw."""
    return 0.02 * random.double() if variant == "paper" else unit_scale(random.double())


def debiased(beta: float, t: int) -> float:
    """beta_t: an EMA with this rate has no bias, from its first step on."""
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def rank_one(rows: Tensor, columns: Tensor) -> Tensor:
    """The outer product that has these means over rows and columns; negative means count as zero."""
    rows, columns = rows.clamp(min=0), columns.clamp(min=0)
    return torch.outer(rows, columns) / rows.mean() if rows.any() else torch.outer(rows, columns)


class AdamReference:
    """LoRA-Pre Adam (Algorithm 1) on one matrix.

    After each ``step(g)``: ``weight``; ``m`` and ``v``, the moments of the update; ``m_hat`` and ``v_hat``,
    the same after bias correction (``m_hat is m`` for "split", whose rate is debiased); ``m_B``, ``m_A``,
    ``v_B``, ``v_A``, ``v_row``, ``v_col``, the state after the step.

    Args:
        weight: (p, q).
        A_m: (r, q), where the first moment's A starts.
        A_v: (r, q), where the second moment's A starts, of "paper".
    """

    def __init__(
        self,
        weight: Tensor,
        A_m: Tensor,
        A_v: Tensor,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scale: float = 1.0,
        variant: str = "split",
        maximize: bool = False,
    ) -> None:
        self.weight = weight.detach().double().clone()
        self.t = 0
        self.m_A, self.v_A = A_m.double(), A_v.double()
        p, r = len(weight), len(A_m)
        self.m_B = self.v_B = torch.zeros(p, r, dtype=torch.float64)
        self.v_row = torch.zeros(p, dtype=torch.float64)
        self.v_col = torch.zeros(weight.shape[1], dtype=torch.float64)
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.scale = weight_decay, scale
        self.variant, self.maximize = variant, maximize

    def step(self, g: Tensor) -> None:
        g = g.double()
        if self.maximize:
            g = -g
        self.t += 1
        if self.variant == "paper":
            self.printed(g)
        else:
            self.split(g)
        update = self.m_hat / (self.v_hat.sqrt() + self.eps)
        self.weight = self.weight - self.lr * self.scale * update - self.lr * self.weight_decay * self.weight

    def printed(self, g: Tensor) -> None:
        (beta1, beta2), t = self.betas, self.t
        self.m = beta1 * (self.m_B @ self.m_A) + (1 - beta1) * g
        self.v = beta2 * (self.v_B @ self.v_A).square() + (1 - beta2) * g.square()
        self.m_hat, self.v_hat = self.m / (1 - beta1**t), self.v / (1 - beta2**t)
        self.m_B, self.m_A = track_printed(self.m_B, self.m_A, g, 1 - beta1**0.5)
        self.v_B, self.v_A = track_printed(self.v_B, self.v_A, g.abs(), 1 - beta2**0.25)

    def split(self, g: Tensor) -> None:
        (beta1, beta2), t = self.betas, self.t
        beta, old, held = debiased(beta1, t), self.m_B @ self.m_A, in_row_space(g, self.m_A)
        self.m = self.m_hat = g + beta * (old - held)
        keep = 1 - beta2 ** (t - 1)
        square = keep * old.square()
        rest = rank_one(self.v_row - square.mean(1), self.v_col - square.mean(0))
        known = beta2 * square + (1 - beta2) * keep * held.square() + rest
        self.v = beta2 * known + (1 - beta2) * g.square()
        self.v_hat = self.v / (1 - beta2**t)
        self.v_row = beta2 * self.v_row + (1 - beta2) * g.square().mean(1)
        self.v_col = beta2 * self.v_col + (1 - beta2) * g.square().mean(0)
        self.m_B, self.m_A = track_subspace(self.m_B, self.m_A, g, beta)


def newton_schulz(M: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The quintic iteration of Keller Jordan's Muon on one matrix."""
    a, b, c = coefficients
    X = M / max(M.norm().item(), eps)
    for _ in range(steps):
        G = X @ X.T
        X = a * X + (b * G + c * G @ G) @ X
    return X


class MuonReference:
    """LoRA-Pre Muon (Algorithm 2) on one matrix.

    After each ``step(g)``: ``weight``; ``matrix``, what Newton-Schulz was given; ``update``, what it made of
    it; ``m_B`` and ``m_A``, the factors after the step.

    Args:
        weight: (p, q).
        A_m: (r, q), where A starts.
    """

    def __init__(
        self,
        weight: Tensor,
        A_m: Tensor,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool | None = None,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        variant: str = "subspace",
        maximize: bool = False,
    ) -> None:
        self.weight = weight.detach().double().clone()
        self.m_A = A_m.double()
        self.m_B = torch.zeros(len(weight), len(A_m), dtype=torch.float64)
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.nesterov = variant != "paper" if nesterov is None else nesterov
        self.ns = (ns_coefficients, ns_steps, eps)
        p, q = weight.shape
        if adjust_lr_fn == "match_rms_adamw":
            self.adjust = 0.2 * max(p, q) ** 0.5
        else:
            self.adjust = max(1, p / q) ** 0.5
        self.variant, self.maximize = variant, maximize

    def step(self, g: Tensor) -> None:
        g = g.double()
        if self.maximize:
            g = -g
        mu = self.momentum
        m = mu * (self.m_B @ self.m_A) + g
        target = g / (1 - mu)
        if self.variant == "subspace":
            self.m_B, self.m_A = track_subspace(self.m_B, self.m_A, target, mu)
        else:
            self.m_B, self.m_A = track_printed(self.m_B, self.m_A, target, 1 - mu**0.5)
        self.matrix = g + mu * m if self.nesterov else m
        self.update = newton_schulz(self.matrix, *self.ns)
        self.weight = (
            self.weight - self.lr * self.adjust * self.update - self.lr * self.weight_decay * self.weight
        )
