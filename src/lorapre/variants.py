"""The algorithms: the paper's and ours, on whole matrices, in the symbols of docs/maths.md.

    variant(s, T, t, beta1, beta2, apply) -> the state after the step     Adam, Algorithm 1
    muon(s, T, mu, nesterov, follow, apply) -> the state after the step   Muon, Algorithm 2

`s` is the state before the step. `T` is the gradient as an operand: a variant takes `T @ X`,
`L @ T`, `abs(T)`, `T / x` and sums over processes. `T.onto(W)` is `T @ W.mT`, which `stats` report
on. `t` (N, 1, 1) is the number of the step. `apply` moves the weights by the moments that it is
told, and returns the means of g**2 over rows and columns where the state keeps them. These moments
are made of the factors before the step.

Shapes, of N matrices at a time: B (N, p, r), A (N, r, q), T (N, p, q), v_row (N, p, 1),
v_col (N, 1, q).
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lorapre.gradient import Factors, Gradient, Moments
from lorapre.linalg import (
    DAMPING,
    TINY,
    damped_root,
    debias,
    gauge_,
    local,
    matmul,
    norm,
    orth_,
    probe,
)

Means: TypeAlias = tuple[Tensor, Tensor] | None
Apply: TypeAlias = Callable[[Moments], Means]
Adam: TypeAlias = "Callable[[State, Gradient, Tensor, float, float, Apply], State]"
Follow: TypeAlias = Callable[[Factors, Gradient, float], Factors]  # towards T; P decays by beta


class State(NamedTuple):
    """Factors of the moments, and EMAs of the means of g**2."""

    m: Factors | None = None
    v: Factors | None = None
    v_row: Tensor | None = None
    v_col: Tensor | None = None


def paper(s: State, T: Gradient, t: Tensor, beta1: float, beta2: float, apply: Apply) -> State:
    """Algorithm 1 as printed."""
    assert s.m is not None and s.v is not None
    c1, c2 = debias(beta1, t), debias(beta2, t)
    apply(Moments(
        [s.m, s.v], a=[beta1 / c1, 0.0], b=(1 - beta1) / c1, c=[0.0, beta2 / c2], d=(1 - beta2) / c2
    ))  # fmt: skip
    return s._replace(m=printed(s.m, T, beta1), v=printed(s.v, abs(T), beta2**0.5))


def split(s: State, T: Gradient, t: Tensor, beta1: float, beta2: float, apply: Apply) -> State:
    """m = g + beta (M - H), with M = B A and H = T W^T W: momentum in the rows of A alone.

    v is made of M**2, H**2, g**2 and a rest of rank one, which has the means that M**2 leaves of
    those of g**2 ("The split variant").
    """
    assert s.m is not None and s.v_row is not None and s.v_col is not None
    beta, k, c2 = debiased(beta1, t), debias(beta2, t - 1), debias(beta2, t)
    B, A = s.m
    W, AWt = row_space(A, T)
    TWt, BAWt = T.onto(W), matmul(B, AWt)
    BtB = T.sum_p(B[..., :1].square().sum((-2, -1), keepdim=True))  # times I: columns of one length
    row = positive(s.v_row - k / T.q * BAWt.square().sum(-1, keepdim=True))
    col = positive(s.v_col - k / T.p * BtB * A.square().sum(-2, keepdim=True))
    mean = T.sum_p(row.sum(-2, keepdim=True)) / T.p
    means = apply(Moments(
        [s.m, Factors(TWt, W)], a=[beta, -beta], b=1.0,
        c=[k * beta2**2 / c2, k * beta2 * (1 - beta2) / c2], d=(1 - beta2) / c2,
        row=row * (beta2 / c2), column=finite_or_zero(col / mean),
    ))  # fmt: skip
    del W
    m = project(s.m, T, beta, BAWt.lerp_(TWt, 1 - beta))
    return with_means(s._replace(m=m), means, beta2)


def muon(s: State, T: Gradient, mu: float, nesterov: bool, follow: Follow, apply: Apply) -> State:
    """Algorithm 2: `apply` orthogonalises m = mu B A + g, which is the EMA of g / (1 - mu)."""
    assert s.m is not None
    a, b = (mu * mu, 1 + mu) if nesterov else (mu, 1.0)
    apply(Moments([s.m], [a], b))
    return s._replace(m=follow(s.m, T / (1 - mu), mu))


def printed(f: Factors, T: Gradient, beta: float) -> Factors:
    """Theorem 3.1, Eq. 11-12: a Newton step of length gamma in each factor, both from the old ones.

    Where a product decays by beta, each of its factors decays by the root.
    """
    (B, A), gamma = f, 1 - beta**0.5
    R = damped_root(T.sum_q(matmul(A, A.mT)), least=DAMPING)
    new_B = B.lerp(matmul(T.onto(matmul(R, A)), R), gamma)
    size = norm_p(B, T).clamp(min=1e-18)  # in units of which no square leaves the range of float32
    L = B / size
    R = damped_root(T.sum_p(matmul(L.mT, L)), least=DAMPING / size**2)
    return Factors(new_B, A.lerp(matmul(R.mT, (matmul(R, L.mT) @ T).div_(size)), gamma))


def row_space(A: Tensor, T: Gradient) -> tuple[Tensor, Tensor]:
    """W (N, r, q), an orthonormal basis of A's rows but for the damping, and A W^T (N, r, r)."""
    G = T.sum_q(matmul(A, A.mT))
    R = damped_root(G)
    return matmul(R, probe(A, T)), matmul(G, R.mT)


def follow_ema(f: Factors, T: Gradient, beta: Tensor | float) -> Factors:
    """One subspace iteration on the EMA beta B A + (1 - beta) T, seen from the rows of A."""
    W, AWt = row_space(f.A, T)
    Y = matmul(f.B, AWt).lerp_(T.onto(W), 1 - beta)
    del W  # of the size of A, of which `project` makes two
    return project(f, T, beta, Y)


def project(f: Factors, T: Gradient, beta: Tensor | float, Y: Tensor) -> Factors:
    """beta B A + (1 - beta) T, projected on the columns of Y (N, p, r), which is overwritten."""
    T.notes["kept"] = torch.linalg.vector_norm(Y, dim=(-2, -1), keepdim=True)
    Q = orth_(Y, T)
    A = matmul(T.sum_p(matmul(Q.mT, f.B)), f.A).lerp_(Q.mT @ T, 1 - beta)
    return Factors(*gauge_(Q, A, T, before=f.A))


def with_means(s: State, means: Means, beta2: float) -> State:
    """The EMAs of the means of g**2; one infinite square would make them infinite for ever."""
    if means is None or s.v_row is None or s.v_col is None:
        return s
    row, col = (x.clamp(max=torch.finfo(x.dtype).max) for x in means)
    return s._replace(v_row=s.v_row.lerp(row, 1 - beta2), v_col=s.v_col.lerp(col, 1 - beta2))


def debiased(beta: float, t: Tensor) -> Tensor:
    """beta_t = beta (1 - beta**(t-1)) / (1 - beta**t): at this rate an EMA is never biased."""
    return beta * debias(beta, t - 1) / debias(beta, t)


def norm_p(B: Tensor, T: Gradient) -> Tensor:
    """||B||_F (N, 1, 1) of all rows, at least the smallest number whose inverse float32 has."""
    return T.sum_p(norm(B).double().square()).sqrt().float().clamp(min=TINY)


def positive(x: Tensor) -> Tensor:
    """x, and zero where x is below zero or NaN (infinity minus infinity)."""
    return x.clamp(min=0).nan_to_num(nan=0.0)


def finite_or_zero(x: Tensor) -> Tensor:
    """x, and zero where it is not finite."""
    return torch.where(x.isfinite(), x, 0)


def first_A(variant: str, T: Gradient, r: int, seed: int) -> Tensor:
    """Where A (N, r, q) starts: N(0, 0.02**2) as printed, else a normal matrix in the gauge.

    B starts at zero.
    """
    random = local(gaussian(r, T.q, seed=seed), 1, T.columns).to(T.device).expand(len(T), -1, -1)
    if variant == "paper":
        return 0.02 * random
    return gauge_(random.new_zeros(len(T), 0, r), random.clone(), T)[1]


def gaussian(rows: int, columns: int, *, seed: int) -> Tensor:
    """A (rows, columns) standard normal matrix on the CPU, a function of its arguments alone.

    Neither the global random state nor the order of the parameters, the device or the sharding of
    the weight plays a part in it, so a run starts the same way everywhere.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")


ADAM: dict[str, Adam] = {"split": split, "paper": paper}
FOLLOW: dict[str, Follow] = {"subspace": follow_ema, "paper": printed}  # how Muon's factors move
