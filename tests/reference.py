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
    """Departure a: 1e-6 of the trace, and just enough for the all-zero Gram of the first step."""
    return 1e-6 * G.trace().item() + torch.finfo(torch.float32).tiny


def gauged(B: Tensor, A: Tensor, A_before: Tensor) -> tuple[Tensor, Tensor]:
    """Departure d: the same product with ||A||_F = sqrt(r); where A is zero, product zero and the old A."""
    size = A.norm().item() / math.sqrt(len(A))
    if size == 0:
        return torch.zeros_like(B), A_before
    return B * size, A / size


def track_printed(B: Tensor, A: Tensor, T: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Theorem 3.1: both factors from the old ones, absolute damping."""
    new_B = (1 - gamma) * B + gamma * damped_solve(A @ A.T, (T @ A.T).T, 1e-6).T
    new_A = (1 - gamma) * A + gamma * damped_solve(B.T @ B, B.T @ T, 1e-6)
    return new_B, new_A


def track_calibrated(B: Tensor, A: Tensor, T: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Departures a, d and f: A after B and from the new B, relative damping, gauge."""
    G = A @ A.T
    new_B = (1 - gamma) * B + gamma * damped_solve(G, (T @ A.T).T, relative_damping(G)).T
    G = new_B.T @ new_B
    new_A = (1 - gamma) * A + gamma * damped_solve(G, new_B.T @ T, relative_damping(G))
    return gauged(new_B, new_A, A)


def track_subspace(B: Tensor, A: Tensor, T: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The EMA beta B A + (1 - beta) T, projected on the columns that the rows of A see of it."""
    ema = beta * (B @ A) + (1 - beta) * T
    Q = torch.linalg.qr(ema @ A.T).Q
    return gauged(Q, Q.T @ ema, A)


def in_row_space(g: Tensor, A: Tensor) -> Tensor:
    """g A^+ A, the part of g that B A can hold, with the damping of departure a."""
    G = A @ A.T
    return damped_solve(G, (g @ A.T).T, relative_damping(G)).T @ A


def unit_scale(A: Tensor) -> Tensor:
    """A at the scale of the gauge."""
    return A * (math.sqrt(len(A)) / A.norm().item())


def first_A(variant: str, random: Tensor, omega: Tensor, T: Tensor) -> Tensor:
    """The A (r, q) a momentum starts from (departure b), for the first target T (p, q).

    ``random`` (r, q) and ``omega`` (p, r) are standard normal draws.
    """
    if variant == "paper":
        return 0.02 * random.double()
    sketch = omega.double().T @ T.double()
    if variant == "calibrated" and sketch.norm() > 0:
        return unit_scale(sketch)
    return unit_scale(random.double())


def debiased(beta: float, t: int) -> float:
    """beta_t, with which an EMA estimates the mean from its first step."""
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def scaled_square(S: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """S**2 (p, q) rescaled to row means ``row`` (p,), then to column means ``column`` (q,)."""
    S = S.square()
    for wanted, dim in ((row[:, None], 1), (column[None, :], 0)):
        mean = S.mean(dim, keepdim=True)
        S = S * torch.where(mean > 0, wanted / torch.where(mean > 0, mean, 1), 0)
    return S


def rank_one(rows: Tensor, columns: Tensor) -> Tensor:
    """The outer product with these means over rows and columns, what is negative of them taken as zero."""
    rows, columns = rows.clamp(min=0), columns.clamp(min=0)
    return torch.outer(rows, columns) / rows.mean() if rows.any() else torch.outer(rows, columns)


class AdamReference:
    """LoRA-Pre Adam (Algorithm 1) on one matrix.

    After each ``step(g)``: ``weight``; ``m`` and ``v``, the moments of the update; ``m_hat`` and ``v_hat``,
    the same after bias correction (``m_hat is m`` for the subspace tracker, whose rate is debiased); ``m_B``,
    ``m_A``, ``v_B``, ``v_A``, ``v_row``, ``v_col``, ``exp_avg``, ``exp_avg_sq``, the state after the step.

    Args:
        weight: (p, q).
        A_m: (r, q), where the first moment's A starts.
        A_v: (r, q), where the second moment's A starts.
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
        variant: str = "calibrated",
        compress: str = "both",
        maximize: bool = False,
    ) -> None:
        self.weight = weight.detach().double().clone()
        self.t = 0
        self.m_A, self.v_A = A_m.double(), A_v.double()
        p, r = len(weight), len(A_m)
        self.m_B = self.v_B = torch.zeros(p, r, dtype=torch.float64)
        self.v_row = torch.zeros(p, dtype=torch.float64)
        self.v_col = torch.zeros(weight.shape[1], dtype=torch.float64)
        self.exp_avg = self.exp_avg_sq = torch.zeros_like(self.weight)
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.scale = weight_decay, scale
        self.variant, self.compress, self.maximize = variant, compress, maximize

    def step(self, g: Tensor) -> None:
        g = g.double()
        if self.maximize:
            g = -g
        self.t += 1
        self.m_old, self.m_A_old = self.m_B @ self.m_A, self.m_A
        if self.compress == "second":
            self.dense_first_moment(g)
        else:
            self.factored_first_moment(g)
        if self.compress == "first":
            self.dense_second_moment(g)
        else:
            self.factored_second_moment(g)
        update = self.m_hat / (self.v_hat.sqrt() + self.eps)
        self.weight = self.weight - self.lr * self.scale * update - self.lr * self.weight_decay * self.weight

    def dense_first_moment(self, g: Tensor) -> None:
        beta1 = self.betas[0]
        self.m = self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * g
        self.m_hat = self.m / (1 - beta1**self.t)

    def dense_second_moment(self, g: Tensor) -> None:
        beta2 = self.betas[1]
        self.v = self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * g.square()
        self.v_hat = self.v / (1 - beta2**self.t)

    def factored_first_moment(self, g: Tensor) -> None:
        beta1, t = self.betas[0], self.t
        old = self.m_B @ self.m_A
        if self.variant in ("subspace", "split"):
            beta = debiased(beta1, t)
            self.m = self.m_hat = beta * old + (1 - beta) * g
            if self.variant == "split":
                self.m = self.m_hat = g + beta * (old - in_row_space(g, self.m_A))
            self.m_B, self.m_A = track_subspace(self.m_B, self.m_A, g, beta)
            return
        self.m = beta1 * old + (1 - beta1) * g
        gamma1 = 1 - beta1**0.5
        if self.variant == "paper":
            self.m_hat = self.m / (1 - beta1**t)
            self.m_B, self.m_A = track_printed(self.m_B, self.m_A, g, gamma1)
        else:
            ramp = 1 - (1 - gamma1) ** (2 * (t - 1))  # departure c
            self.m_hat = self.m / (beta1 * ramp + (1 - beta1))
            self.m_B, self.m_A = track_calibrated(self.m_B, self.m_A, g, gamma1)

    def factored_second_moment(self, g: Tensor) -> None:
        beta2, t = self.betas[1], self.t
        old = self.v_B @ self.v_A
        if self.variant == "split":
            keep = 1 - beta2 ** (t - 1)
            square = keep * self.m_old.square()
            rest = rank_one(self.v_row - square.mean(1), self.v_col - square.mean(0))
            held = keep * in_row_space(g, self.m_A_old).square()
            self.v = beta2 * (beta2 * square + (1 - beta2) * held + rest) + (1 - beta2) * g.square()
            self.v_hat = self.v / (1 - beta2**t)
            self.v_row = beta2 * self.v_row + (1 - beta2) * g.square().mean(1)
            self.v_col = beta2 * self.v_col + (1 - beta2) * g.square().mean(0)
            return
        if self.variant == "subspace":
            S = scaled_square(old, self.v_row, self.v_col)
            self.v = beta2 * S + (1 - beta2) * g.square()
            self.v_hat = self.v / (1 - beta2**t)
            self.v_B, self.v_A = track_subspace(self.v_B, self.v_A, g.abs(), debiased(beta2**0.5, t))
            self.v_row = beta2 * self.v_row + (1 - beta2) * g.square().mean(1)
            self.v_col = beta2 * self.v_col + (1 - beta2) * g.square().mean(0)
            return
        self.v = beta2 * old.square() + (1 - beta2) * g.square()
        gamma2 = 1 - beta2**0.25
        if self.variant == "paper":
            self.v_hat = self.v / (1 - beta2**t)
            self.v_B, self.v_A = track_printed(self.v_B, self.v_A, g.abs(), gamma2)
        else:
            ramp = 1 - (1 - gamma2) ** (2 * (t - 1))  # departure c
            self.v_hat = self.v / (beta2 * ramp**2 + (1 - beta2))
            self.v_B, self.v_A = track_calibrated(self.v_B, self.v_A, g.abs(), gamma2)


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
        nesterov: bool = False,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        variant: str = "calibrated",
        maximize: bool = False,
    ) -> None:
        self.weight = weight.detach().double().clone()
        self.m_A = A_m.double()
        self.m_B = torch.zeros(len(weight), len(A_m), dtype=torch.float64)
        self.lr, self.weight_decay, self.momentum, self.nesterov = lr, weight_decay, momentum, nesterov
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
            track = track_printed if self.variant == "paper" else track_calibrated
            self.m_B, self.m_A = track(self.m_B, self.m_A, target, 1 - mu**0.5)
        self.matrix = g + mu * m if self.nesterov else m
        self.update = newton_schulz(self.matrix, *self.ns)
        self.weight = (
            self.weight - self.lr * self.adjust * self.update - self.lr * self.weight_decay * self.weight
        )
