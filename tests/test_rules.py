"""The rules of Adam and Muon against float64 and against torch.optim."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lorapre import rules

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.999, 0.9999])
def test_debias_is_exact(beta: float) -> None:
    t = torch.tensor([0, 1, 2, 3, 10, 100, 1000, 100_000], dtype=torch.float32)
    expected = torch.tensor([1 - beta**n for n in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(rules.debias(beta, t).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.999])
def test_debiased_rate_makes_an_ema_the_bias_corrected_one(beta: float) -> None:
    plain = debiased = 0.0
    for t, g in enumerate(torch.randn(50).tolist(), start=1):
        rate = rules.debiased_rate(beta, torch.tensor(float(t))).item()
        debiased = rate * debiased + (1 - rate) * g
        plain = beta * plain + (1 - beta) * g
        assert debiased == pytest.approx(plain / (1 - beta**t), rel=1e-5, abs=1e-6)
    assert rules.debiased_rate(beta, torch.tensor(1.0)) == 0
    assert rules.debiased_rate(beta, torch.tensor(1e6)).item() == pytest.approx(beta)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.0), (0.95, 0.3)])
def test_adam_rule_is_the_formula(
    betas: tuple[float, float], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the second correction is no power of beta2, as in the calibrated variant."""
    if not fused:
        monkeypatch.setattr(rules, "FUSED", frozenset())
    (beta1, beta2), t = betas, 3.0
    for c2 in (None, 1 - 0.4 * beta2, 1.0):
        w, g, m = torch.randn(3, 4, 5)
        v = torch.rand(4, 5)
        new_m, new_v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.square()
        root = (new_v / (1 - beta2**t if c2 is None else c2)).sqrt()
        new_w = w - 0.3 * (new_m / (1 - beta1**t)) / (root + 0.1)
        correction = None if c2 is None else torch.tensor([0.5, c2])
        rule = rules.Adam(betas, torch.tensor([1.0, t]), 0.3, 0.1, correction)
        assert rule.fused == fused
        rule.step_(1, w, g, m, v)
        for found, expected in ((w, new_w), (m, new_m), (v, new_v)):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("fused", [True, False])
def test_adam_rule_changes_nothing_where_the_gradient_was_not_finite(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr(rules, "FUSED", frozenset())
    ones = torch.ones(2)
    rule = rules.Adam((0.9, 0.95), ones, 0.3, 0.0, finite=torch.tensor([False, True]))
    for i in range(2):
        w, g, m, v = torch.rand(4, 4, 5)
        before = w.clone(), m.clone(), v.clone()
        rule.step_(i, w, g, m, v)
        assert [torch.equal(x, y) for x, y in zip((w, m, v), before, strict=True)] == [i == 0] * 3


def torch_muon(gradient: Tensor, **options: Any) -> Tensor:
    """The update of torch.optim.Muon from this gradient alone, without its learning rate."""
    weight = torch.zeros_like(gradient, requires_grad=True)
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, **options).step()
    return -weight.detach()


@pytest.mark.parametrize("shape", [(32, 32), (32, 80), (80, 32), (1, 40), (40, 1)])
def test_newton_schulz_is_that_of_torch_optim_muon(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape)
    got = rules.newton_schulz(gradient[None], COEFFICIENTS, 5, 1e-7)[0]
    assert got.dtype == torch.bfloat16
    expected = torch_muon(gradient) / math.sqrt(max(1, shape[0] / shape[1]))
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-3)  # a few units of bfloat16


def test_newton_schulz_takes_coefficients_steps_and_eps() -> None:
    gradient = 1e-4 * torch.randn(20, 30)
    options = {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 1.0}
    got = rules.newton_schulz(gradient[None], (2.0, -1.5, 0.5), 3, 1.0)[0].float()
    torch.testing.assert_close(got, torch_muon(gradient, **options), rtol=2e-2, atol=1e-5)
    assert got.norm() < 0.1  # eps, not the norm, has divided


@pytest.mark.parametrize("shape", [(40, 40), (30, 70), (70, 30)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_newton_schulz_brings_singular_values_near_one(
    shape: tuple[int, int], dtype: torch.dtype, size: float
) -> None:
    """Those above a hundredth of the norm; 0.7 to 1.2 is what the coefficients aim at."""
    U, S, V = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    M = size * U @ torch.diag(torch.linspace(0.05, 1, len(S))) @ V
    X = rules.newton_schulz(M[None], COEFFICIENTS, 5, 1e-7, dtype)[0].float()
    values = torch.linalg.svdvals(X)
    assert values.max() < 1.25
    assert values.min() > 0.6
    alignment = (X * (U @ V)).sum() / (X.norm() * (U @ V).norm())
    assert alignment > 0.98


def test_newton_schulz_of_a_batch_is_that_of_each_matrix() -> None:
    M = torch.randn(3, 20, 30) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    together = rules.newton_schulz(M, COEFFICIENTS, 5, 1e-7, torch.float32)
    for i in range(3):
        alone = rules.newton_schulz(M[i : i + 1], COEFFICIENTS, 5, 1e-7, torch.float32)[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-5)


def test_newton_schulz_of_zero_is_zero_and_leaves_its_argument_alone() -> None:
    assert not rules.newton_schulz(torch.zeros(1, 6, 5), COEFFICIENTS, 5, 1e-7).any()
    M = torch.randn(1, 5, 6, dtype=torch.bfloat16)
    before = M.clone()
    rules.newton_schulz(M, COEFFICIENTS, 5, 1e-7)
    assert torch.equal(M, before)


@pytest.mark.parametrize("shape", [(20, 20), (20, 50), (50, 20)])
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
def test_adjusted_scale_is_that_of_torch_optim_muon(adjust_lr_fn: str | None, shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape)
    one = rules.newton_schulz(gradient[None], COEFFICIENTS, 5, 1e-7)[0].float()
    ratio = torch_muon(gradient, adjust_lr_fn=adjust_lr_fn).norm() / one.norm()
    assert rules.adjusted_scale(adjust_lr_fn, *shape) == pytest.approx(ratio.item(), rel=1e-2)
