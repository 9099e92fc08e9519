"""The theory behind the trackers, as code: each claim of docs/maths.md that can be computed."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorapre import linalg, variants
from operands import FOLLOW, begin, follow
from reference import track_printed

BETA = 0.9
GAMMA = 0.3  # of a Newton step, where the product decays by DECAY
DECAY = (1 - GAMMA) ** 2


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the relative error in Frobenius norm is within ``tolerance``."""
    return ((actual - expected).norm() <= tolerance * expected.norm()).item()


def error(B: Tensor, A: Tensor, T: Tensor) -> float:
    return ((B @ A - T).norm() / T.norm()).item()


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def regression(B: Tensor, A: Tensor, T: Tensor) -> Tensor:
    """1/2 ||B A - T||_F^2."""
    return 0.5 * (B @ A - T).square().sum()


def newton_step(X: Tensor, loss: Callable[[Tensor], Tensor], gamma: float) -> Tensor:
    """X - gamma H^-1 grad for a scalar function of the matrix X, by autograd."""
    gradient = torch.autograd.functional.jacobian(loss, X).flatten()
    hessian = torch.autograd.functional.hessian(loss, X).reshape(X.numel(), X.numel())
    return X - gamma * torch.linalg.solve(hessian, gradient).view_as(X)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the resolution of float64 instead of float32's, for claims that are exact but for rounding."""
    monkeypatch.setattr(linalg, "EPS", torch.finfo(torch.float64).eps)


@pytest.fixture
def undamped(double: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solve exactly, as the theory does: the damping goes far below 1e-9."""
    monkeypatch.setattr(linalg, "DAMPING", 0.0)
    monkeypatch.setattr(variants, "DAMPING", 0.0)


# --- what a step is


def test_ema_is_one_gradient_step_on_the_regression_objective() -> None:
    m, g = torch.randn(2, 5, 7, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(lambda m: 0.5 * (m - g).square().sum(), m)
    torch.testing.assert_close(m - (1 - BETA) * gradient, BETA * m + (1 - BETA) * g)


@pytest.mark.usefixtures("undamped")
def test_printed_step_is_a_newton_step_in_each_factor_with_the_other_at_its_old_value() -> None:
    B, A, T = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 3), (3, 8), (6, 8)))
    new_B, new_A = follow("printed", B, A, T, DECAY)
    assert close(new_B, newton_step(B, lambda B: regression(B, A, T), GAMMA), 1e-9)
    assert close(new_A, newton_step(A, lambda A: regression(B, A, T), GAMMA), 1e-9)


def test_damping_changes_a_printed_step_from_well_conditioned_factors_by_less_than_1e_5(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    B, A, T = (torch.randn(shape, dtype=torch.float64) for shape in ((30, 4), (4, 40), (30, 40)))
    damped = follow("printed", B, A, T, DECAY).product
    for module in (linalg, variants):
        monkeypatch.setattr(module, "DAMPING", 0.0)
    exact = follow("printed", B, A, T, DECAY).product
    assert close(damped, exact, 1e-5)
    assert not close(damped, exact, 1e-12)


@pytest.mark.usefixtures("undamped")
def test_subspace_product_is_the_ema_projected_on_what_the_old_rows_see_of_it() -> None:
    B, A, T = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 3), (3, 8), (6, 8)))
    ema = 0.9 * B @ A + 0.1 * T
    Y = ema @ A.T
    got = follow("subspace", B, A, T, 0.9).product
    assert close(got, Y @ torch.linalg.pinv(Y) @ ema, 1e-9)


# --- symmetries


@pytest.mark.usefixtures("undamped")
@pytest.mark.parametrize("name", FOLLOW)
def test_product_does_not_depend_on_the_gauge_of_the_factors(name: str) -> None:
    B, A, T = (torch.randn(shape, dtype=torch.float64) for shape in ((20, 4), (4, 30), (20, 30)))
    S = orthonormal(4, 4) @ torch.diag(torch.tensor([0.5, 1, 2, 3], dtype=torch.float64)) @ orthonormal(4, 4)
    one = follow(name, B, A, T, DECAY)
    other = follow(name, B @ S, torch.linalg.solve(S, A), T, DECAY)
    assert close(other.product, one.product, 1e-9)
    if name == "printed":  # here the factors change with the gauge too, not their product alone
        assert close(other[0], one[0] @ S, 1e-9)
        assert close(S @ other[1], one[1], 1e-9)


def transposed(name: str) -> tuple[Tensor, Tensor]:
    """The product after a step, and after a step of the transposed problem, transposed back."""
    B, A, T = (torch.randn(shape, dtype=torch.float64) for shape in ((20, 4), (4, 30), (20, 30)))
    straight = follow(name, B, A, T, DECAY).product
    across = follow(name, A.T, B.T, T.T, DECAY).product.T
    return straight, across


def test_printed_tracker_commutes_with_transposition() -> None:
    straight, across = transposed("printed")
    assert close(across, straight, 1e-9)


def test_subspace_iteration_does_not_commute_with_transposition() -> None:
    """It projects on columns: the right factor is made from the new left one."""
    straight, across = transposed("subspace")
    assert not close(across, straight, 1e-2)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-12, 1e-7, 1e-3, 1e4, 1e17, 1e20, 1e25])
def test_product_scales_with_the_gradients(size: float) -> None:
    """25 steps in float32. The sizes are no powers of two, so that rounding errors differ."""
    targets = torch.randn(40, 5) @ torch.randn(5, 60) + torch.randn(25, 40, 60)
    B, A = begin("subspace", targets[0], 8)
    b, a = B, A
    for T in targets:
        B, A = follow("subspace", B, A, T, BETA)
        b, a = follow("subspace", b, a, size * T, BETA)
    assert close(b / size @ a, B @ A, 1e-4)


def test_printed_tracker_loses_small_gradients() -> None:
    """Why departure b: absolute damping of 1e-6 is a threshold on the size of the gradient."""
    signal = torch.randn(40, 5) @ torch.randn(5, 60)
    found = []
    for size in (1.0, 1e-8):
        B, A = begin("printed", signal, 8)
        for _ in range(150):
            B, A = follow("printed", B, A, size * signal, BETA)
        found.append(((B @ A).norm() / (size * signal).norm()).item())
    assert found[0] == pytest.approx(1, abs=1e-3)
    assert found[1] < 0.7


# --- ramp


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999])
def test_ramp_is_the_scalar_recursion(beta: float) -> None:
    """The recursion is the tracker on 1 x 1 matrices with target one, for any start of A."""
    gamma = 1 - beta**0.5
    a, b = 0.37, 0.0
    assert variants.debias(beta, torch.tensor(0.0)) == 0
    for t in range(1, 200):
        b = (1 - gamma) * b + gamma / a
        a = (1 - gamma) * a + gamma / b
        assert variants.debias(beta, torch.tensor(float(t))).item() == pytest.approx(a * b, rel=2e-6)
        assert variants.debias(beta, torch.tensor(float(t))).item() == pytest.approx(1 - beta**t, rel=2e-6)


# --- tracking


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 5, 8])
@pytest.mark.parametrize("beta", [0.9, 0.99])
def test_subspace_equals_the_dense_ema_while_the_gradients_share_r_columns(
    beta: float, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients C X_t, C (p, k) fixed and X_t anything: no information is lost for k up to r.

    Rounding counts by the condition of what the old rows see of the EMA, and adds up over steps.
    """
    eps, steps, condition = torch.finfo(dtype).eps, 30, 1.0
    monkeypatch.setattr(linalg, "EPS", eps)
    C = torch.randn(40, k, dtype=dtype)
    ema = torch.zeros(40, 60, dtype=dtype)
    B, A = begin("subspace", ema, 8)
    for t in range(1, steps + 1):
        T = C @ torch.randn(k, 60, dtype=dtype)
        rate = beta * (1 - beta ** (t - 1)) / (1 - beta**t)
        ema = rate * ema + (1 - rate) * T
        values = torch.linalg.svdvals((ema @ torch.linalg.qr(A.T).Q).double())
        condition = max(condition, (values[0] / values[k - 1]).item())
        B, A = follow("subspace", B, A, T, rate)
        assert close(B @ A, ema, 2 * steps * eps * condition)


@pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
def test_subspace_is_within_twice_the_best_rank_r_approximation_of_a_turning_signal(
    noise: float,
) -> None:
    """Twelve directions of falling strength, followed with eight, turn by a radian in 200 steps.

    The first step sees the signal from random rows alone.
    """
    p, q, k, r = 60, 90, 12, 8
    left, right = orthonormal(p, 2 * k).float(), orthonormal(q, 2 * k).float()
    strength = torch.diag(0.8 ** torch.arange(k))
    ema = torch.zeros(p, q)
    B, A = begin("subspace", ema, r)
    for t in range(200):
        c, s = math.cos(t / 200), math.sin(t / 200)
        U, V = c * left[:, :k] + s * left[:, k:], c * right[:, :k] + s * right[:, k:]
        T = U @ strength @ V.T + noise * torch.randn(p, q) / math.sqrt(p)
        ema = BETA * ema + (1 - BETA) * T
        B, A = follow("subspace", B, A, T, BETA)
        best = torch.linalg.svdvals(ema)[r:].norm()
        assert (B @ A - ema).norm() <= (2 if t else 4) * best, t


@pytest.mark.parametrize(("k", "r"), [(4, 8), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_switch_to_gradients_orthogonal_to_all_before_is_followed(
    dtype: torch.dtype, k: int, r: int
) -> None:
    """Orthogonal in rows and columns, rank k: followed to 2 % in 100 steps, without overshoot.

    It starts from rounding errors, and where k is below r the Gram matrices are singular but for the damping.
    """
    U, V = orthonormal(48, 2 * k), orthonormal(64, 2 * k)
    strength = torch.diag(torch.linspace(1, 2, k, dtype=torch.float64))
    before = (U[:, :k] @ strength @ V[:, :k].T).to(dtype)
    after = (U[:, k:] @ strength @ V[:, k:].T).to(dtype)
    B, A = begin("subspace", before, r)
    for _ in range(200):
        B, A = follow("subspace", B, A, before, BETA)
    assert error(B, A, before) < 1e-3
    for _ in range(100):
        B, A = follow("subspace", B, A, after, BETA)
        assert error(B, A, after) < 1.5
    assert error(B, A, after) < 0.02


def test_a_switch_to_gradients_in_rows_and_columns_that_were_exactly_zero_is_followed() -> None:
    """No rounding error leads there: T A^T is zero to the last bit for an A of the past."""
    before, after = torch.zeros(2, 48, 64)
    before[:24, :32] = torch.randn(24, 4) @ torch.randn(4, 32)
    after[24:, 32:] = torch.randn(24, 4) @ torch.randn(4, 32)
    B, A = begin("subspace", before, 8)
    for _ in range(200):
        B, A = follow("subspace", B, A, before, BETA)
    for _ in range(100):
        B, A = follow("subspace", B, A, after, BETA)
    assert error(B, A, after) < 0.01


@pytest.mark.parametrize("zeros", [50, 2000])
def test_zero_gradients_are_recovered_from_without_overshoot(zeros: int) -> None:
    """A layer is frozen, or an expert not routed to, for thousands of steps: directions survive."""
    signal = torch.randn(40, 4) @ torch.randn(4, 60)
    B, A = begin("subspace", signal, 8)
    for _ in range(30):
        B, A = follow("subspace", B, A, signal + torch.randn(40, 60), BETA)
    rows = torch.linalg.qr(A.T).Q.T
    for _ in range(zeros):
        B, A = follow("subspace", B, A, torch.zeros(40, 60), BETA)
    assert (B @ A).norm() <= 2 * BETA**zeros * signal.norm()
    singular_values = torch.linalg.svdvals(rows @ torch.linalg.qr(A.T).Q)
    assert singular_values.min() > 0.99  # the same r directions as before the zeros
    for _ in range(100):
        T = signal + torch.randn(40, 60)
        B, A = follow("subspace", B, A, T, BETA)
        assert (B @ A).norm() <= 2 * T.norm()
    for _ in range(100):
        B, A = follow("subspace", B, A, signal, BETA)
    assert error(B, A, signal) < 0.01


def printed_after_zeros(dtype: torch.dtype, zeros: int) -> tuple[float, float]:
    """The largest ||B A|| / ||T|| in the 100 steps after so many zeros; the error after them."""
    signal = torch.randn(40, 4, dtype=dtype) @ torch.randn(4, 60, dtype=dtype)
    B, A = begin("printed", signal, 8)
    largest = 0.0
    for t in range(30 + zeros + 100):
        T = signal + torch.randn_like(signal) if not 30 <= t < 30 + zeros else torch.zeros_like(signal)
        B, A = follow("printed", B, A, T, BETA)
        if t >= 30 + zeros:
            largest = max(largest, ((B @ A).norm() / T.norm()).item())
    return largest, error(B, A, signal)


@pytest.mark.usefixtures("undamped")
def test_printed_tracker_without_its_damping_overshoots_a_million_fold_after_300_zeros() -> None:
    """Why departure a: both new factors' product holds gamma^2 T (B A)^+ T, quadratic in T."""
    largest, _ = printed_after_zeros(torch.float64, 300)
    assert largest > 1e6


@pytest.mark.parametrize("zeros", [200, 3000])
def test_printed_tracker_overshoots_with_its_damping_too(zeros: int) -> None:
    """How far depends on where the factors meet the damping: after 300 zeros not at all."""
    largest, left = printed_after_zeros(torch.float32, zeros)
    assert largest > 10
    assert left < 1  # but it comes back


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-20, 1e-12, 1.0])
def test_printed_damping_is_a_millionth_at_any_size_of_the_factors(size: float) -> None:
    B, A, T = size * torch.randn(20, 4), size * torch.randn(4, 30), torch.randn(20, 30)
    found = follow("printed", B, A, T, DECAY)
    expected = track_printed(*(X.double() for X in (B, A, T)), GAMMA)
    for X, wanted in zip(found, expected, strict=True):
        assert close(X.double(), wanted, 1e-5)
