"""From momenta to an update: the Adam rule, the Muon rule, and the averages that correct them.

Pure functions of tensors; the momenta may be dense or the product of two factors, the rules cannot tell.
"""

import math

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

FUSED = frozenset(_get_fused_kernels_supported_devices())  # types of devices with a fused AdamW


def debias(beta: float, t: Tensor) -> Tensor:
    """1 - beta**t: the weight that an EMA from zero has gathered after t steps (exact for beta near one)."""
    return -torch.expm1(t * math.log(max(beta, 1e-300)))


def debiased_rate(beta: float, t: Tensor) -> Tensor:
    """beta_t = beta (1 - beta**(t-1)) / (1 - beta**t): an EMA at this rate estimates the mean at every step.

    Zero at t = 1 and beta in the limit (docs/maths.md, "The subspace tracker").
    """
    return beta * debias(beta, t - 1) / debias(beta, t)


class Adam:
    """The Adam rule for N matrices: w <- w - lr m' / (sqrt(v') + eps) (paper, Algorithm 1).

    m' and v' are the moments after the step, each corrected for its start at zero:

        m' = (beta1 m + (1 - beta1) g) / (1 - beta1**t),   v' = (beta2 v + (1 - beta2) g**2) / c

    Args:
        betas: (beta1, beta2), in [0, 1).
        t: (N,), number of the step.
        lr: learning rate, scale included.
        eps: added to the root.
        correction: c (N,); None is 1 - beta2**t.
        finite: (N,), false where nothing may change; None is true everywhere.
    """

    def __init__(
        self,
        betas: tuple[float, float],
        t: Tensor,
        lr: float | Tensor,
        eps: float,
        correction: Tensor | None = None,
        finite: Tensor | None = None,
    ) -> None:
        self.beta1, self.beta2 = betas
        self.eps = max(eps, 1e-38)  # no gradient is no step, also where eps is zero
        self.fused = t.device.type in FUSED and not torch.compiler.is_compiling()
        if not self.fused:
            self.c1 = debias(self.beta1, t).unbind()
            self.c2 = (debias(self.beta2, t) if correction is None else correction).unbind()
        elif correction is not None:
            # torch's fused kernel divides by 1 - beta**t in both places. It is told the time at which that is
            # right in the second, and lr mends the first.
            c1, t = debias(self.beta1, t), torch.log1p(-correction) / math.log(max(self.beta2, 1e-300))
            lr = lr * debias(self.beta1, t) / c1
        self.times = t.unbind()
        self.lrs = (torch.zeros_like(t) + lr).unbind()
        self.finite = None if finite is None else finite.unbind()
        self.skipped = None if finite is None else (~finite).float().unbind()

    def step_(self, i: int, w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        """Step a tile of matrix i in place: w, its moments m and v; g too contiguous and of their dtype."""
        if self.fused:
            torch._fused_adamw_(
                [w], [g], [m], [v], [], [self.times[i]], lr=self.lrs[i], beta1=self.beta1, beta2=self.beta2,
                weight_decay=0.0, eps=self.eps, amsgrad=False, maximize=False,
                found_inf=None if self.skipped is None else self.skipped[i],
            )  # fmt: skip
            return
        new_m = m.lerp(g, 1 - self.beta1)
        new_v = torch.addcmul(v * self.beta2, g, g, value=1 - self.beta2)
        new_w = w - self.lrs[i] * (new_m / self.c1[i]) / ((new_v / self.c2[i]).sqrt() + self.eps)
        for old, new in ((w, new_w), (m, new_m), (v, new_v)):
            old.copy_(new if self.finite is None else torch.where(self.finite[i], new, old))


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
    single = M.ndim == 3 and len(M) == 1  # products of two matrices are faster than those of batches of one
    X = (M[0] if single else M).to(dtype)
    add_product = torch.addmm if X.ndim == 2 else torch.baddbmm
    tall = M.shape[-2] > M.shape[-1]
    X = X.mT if tall else X
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        G = X @ X.mT
        X = add_product(X, add_product(G, G, G, beta=b, alpha=c), X, beta=a)
    X = X.mT if tall else X
    return X[None] if single else X


def adjusted_scale(adjust_lr_fn: str | None, p: int, q: int) -> float:
    """The factor on Muon's learning rate for a (p, q) matrix, as torch.optim.Muon has it.

    None or "original": sqrt(max(1, p / q)); "match_rms_adamw": 0.2 sqrt(max(p, q)), with which AdamW's
    learning rates carry over.
    """
    return 0.2 * math.sqrt(max(p, q)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1.0, p / q))
