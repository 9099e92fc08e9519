"""The parts of factors.py, each at the edges of its domain."""

import math

import pytest
import torch
from torch import Tensor

from lorapre import factors

TRACKERS = {"printed": factors.Printed, "newton": factors.Newton, "subspace": factors.Subspace}


def mean_of_squares(B: Tensor, A: Tensor, dim: int) -> Tensor:
    return (B @ A).square().mean(dim)


# --------------------------------------------------------------------------------------- random, gauge, start


def test_gaussian_is_a_function_of_its_arguments_alone() -> None:
    before = torch.get_rng_state()
    one = factors.gaussian(300, 200, seed=3)
    torch.manual_seed(99)
    assert torch.equal(one, factors.gaussian(300, 200, seed=3))
    assert not torch.equal(one, factors.gaussian(300, 200, seed=4))
    assert one.mean().abs() < 0.02
    assert abs(one.std().item() - 1) < 0.02
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_gauge_brings_A_to_norm_sqrt_r_and_keeps_the_product(size: float) -> None:
    B, A = torch.randn(3, 20, 4), size * torch.randn(3, 4, 30)
    product = B @ (A / size)
    factors.gauge_(B, A)
    torch.testing.assert_close(A.norm(dim=(-2, -1)), torch.full((3,), 2.0))
    torch.testing.assert_close((B @ A) / size, product)


@pytest.mark.parametrize("bad", [0.0, 1e-42])
def test_gauge_gives_A_directions_where_it_has_none_left(bad: float) -> None:
    """Zero, or so small that its entries have lost their digits; matrix by matrix."""
    B, A = torch.randn(2, 20, 4), torch.randn(2, 4, 30)
    A[0] *= bad
    product = B[1] @ A[1]
    factors.gauge_(B, A)
    assert torch.linalg.matrix_rank(A[0]) == 4
    assert A[0].norm().item() == pytest.approx(2, rel=1e-6)
    assert torch.equal(B[0], torch.zeros(20, 4))
    torch.testing.assert_close(B[1] @ A[1], product)


def test_start_is_the_sketch_at_the_scale_of_the_gauge() -> None:
    sketch, fallback = 1e-20 * torch.randn(4, 30), torch.randn(4, 30)
    A = factors.start(sketch, fallback)
    assert A.norm().item() == pytest.approx(2, rel=1e-6)
    torch.testing.assert_close(A / A.norm(), sketch / sketch.norm())


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_start_falls_back_to_the_random_A_matrix_by_matrix(bad: float) -> None:
    sketch, fallback = torch.randn(3, 4, 30), torch.randn(4, 30)
    sketch[1] *= bad
    A = factors.start(sketch, fallback)
    torch.testing.assert_close(A[1] / A[1].norm(), fallback / fallback.norm())
    torch.testing.assert_close(A[2] / A[2].norm(), sketch[2] / sketch[2].norm())
    torch.testing.assert_close(A.norm(dim=(-2, -1)), torch.full((3,), 2.0))


# ------------------------------------------------------------------------------------------------ match_means


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e4])
def test_match_means_gives_a_separable_square_both_its_means(size: float) -> None:
    """Where (B A)**2 is the wanted one but for a factor for each row, both means hold exactly."""
    B, A = torch.randn(2, 20, 4), torch.randn(2, 4, 30)
    row, column = size**2 * mean_of_squares(B, A, -1), size**2 * mean_of_squares(B, A, -2)
    B = B * torch.rand(2, 20, 1)
    rows, columns = factors.match_means(B, A, row, column)
    new = B * rows, A * columns
    torch.testing.assert_close(mean_of_squares(*new, -1), row, rtol=1e-4, atol=0)
    torch.testing.assert_close(mean_of_squares(*new, -2), column, rtol=1e-4, atol=0)


def test_match_means_rows_first_then_columns() -> None:
    B, A, row, column = torch.randn(20, 4), torch.randn(4, 30), torch.rand(20), torch.rand(30)
    S = (B @ A).square()
    S = S * (row / S.mean(1))[:, None]
    S = S * (column / S.mean(0))
    rows, columns = factors.match_means(B, A, row, column)
    new_B, new_A = B * rows, A * columns
    torch.testing.assert_close((new_B @ new_A).square(), S, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(mean_of_squares(new_B, new_A, 0), column)


def test_match_means_is_zero_where_a_row_or_column_of_either_side_is_zero() -> None:
    B, A, row, column = torch.randn(20, 4), torch.randn(4, 30), torch.rand(20), torch.rand(30)
    B[1], A[:, 2], row[3], column[4] = 0, 0, 0, 0
    rows, columns = factors.match_means(B, A, row, column)
    S = factors.product(B * rows, A * columns)
    assert S.isfinite().all()
    assert not S[1].any()
    assert not S[:, 2].any()
    assert not S[3].any()
    assert not S[:, 4].any()
    assert S[0, 0] != 0


# ------------------------------------------------------------------------------------------------------ track


def begin(T: Tensor, r: int, *, sketch: bool) -> tuple[Tensor, Tensor]:
    random = factors.gaussian(r, T.shape[-1], seed=0).to(T.dtype)
    omega = factors.gaussian(T.shape[-2], r, seed=1).to(T.dtype)
    A = factors.start(omega.mT @ T if sketch else random.expand(*T.shape[:-2], -1, -1), random)
    return T.new_zeros(*T.shape[:-1], r), A


@pytest.mark.parametrize("r", [1, 2, 4, 8, 12, 16, 32, 128, 256])
@pytest.mark.parametrize("name", TRACKERS)
def test_rank_one_targets_are_tracked_at_any_rank(name: str, r: int) -> None:
    """The Gram of a rank-one matrix has negative eigenvalues after rounding, and Cholesky fails on it.

    At every step, since a tracker that has lost a target finds it again.
    """
    count = 16 if r < 128 else 2
    T = torch.randn(count, 150 + r, 1) @ torch.randn(count, 1, 200 + r)
    B, A = begin(T, r, sketch=name == "newton")
    if name == "printed":
        A = 0.02 * A
    errors = []
    for _ in range(40):
        B, A = factors.track(TRACKERS[name], B, A, T, 0.5)
        assert B.isfinite().all()
        assert A.isfinite().all()
        errors.append((B @ A - T).norm(dim=(-2, -1)) / T.norm(dim=(-2, -1)))
    assert torch.stack(errors)[20:].max() < (1e-2 if name == "printed" else 1e-3)


@pytest.mark.parametrize("kind", ["noise", "rank 1", "one entry", "one row", "one column", "ones"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e10, 1e20])
@pytest.mark.parametrize("name", TRACKERS)
def test_factors_stay_finite_for_targets_of_any_size_and_rank(name: str, size: float, kind: str) -> None:
    """Ten steps, a zero and a sudden change to noise included."""
    T = torch.randn(48, 64)
    if kind == "rank 1":
        T = torch.outer(torch.randn(48), torch.randn(64))
    elif kind == "one entry":
        T = torch.zeros(48, 64).index_put_((torch.tensor(3), torch.tensor(5)), torch.tensor(1.0))
    elif kind == "one row":
        T[1:] = 0
    elif kind == "one column":
        T[:, 1:] = 0
    elif kind == "ones":
        T = torch.ones(48, 64)
    B, A = begin(size * T, 16, sketch=name == "newton")
    if name == "printed":
        A = 0.02 * A
    for target in [T, T, T, torch.zeros_like(T), T, torch.randn(48, 64), T, T, T, T]:
        B, A = factors.track(TRACKERS[name], B, A, size * target, 0.05)
        assert B.isfinite().all()
        assert A.isfinite().all()
        assert (B @ A).isfinite().all()


@pytest.mark.parametrize("zeros", [1500, 2000, 3000])
@pytest.mark.parametrize("name", TRACKERS)
def test_factors_stay_finite_through_thousands_of_zero_targets_and_after(name: str, zeros: int) -> None:
    """On their way to zero the factors pass through the numbers whose inverse is infinite."""
    T = torch.randn(12, 16)
    B, A = begin(T, 4, sketch=name == "newton")
    rate = 0.9 if name == "subspace" else 1 - 0.9**0.5
    for t in range(zeros + 10):
        B, A = factors.track(TRACKERS[name], B, A, T if t < 5 or t >= zeros else torch.zeros_like(T), rate)
        assert B.isfinite().all()
        assert A.isfinite().all()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_batch_is_tracked_as_its_matrices_one_by_one(name: str) -> None:
    """Sizes twelve orders of magnitude apart, one matrix always zero: none disturbs its neighbours."""
    sizes = torch.tensor([1.0, 1e-6, 1e6, 0.0])[:, None, None]
    targets = torch.randn(6, 4, 20, 30) * sizes
    B, A = begin(targets[0], 5, sketch=name == "newton")
    alone = [(B[i], A[i]) for i in range(4)]
    for T in targets:
        B, A = factors.track(TRACKERS[name], B, A, T, 0.3)
        alone = [factors.track(TRACKERS[name], b, a, T[i], 0.3) for i, (b, a) in enumerate(alone)]
    for i, (b, a) in enumerate(alone):
        torch.testing.assert_close(B[i] @ A[i], b @ a, rtol=1e-3, atol=1e-4 * (b @ a).abs().max().item())


def test_rate_per_matrix_is_the_rate_of_that_matrix() -> None:
    """Debiasing gives each weight of a batch its own rate."""
    B, A, T = torch.randn(2, 20, 5), torch.randn(2, 5, 30), torch.randn(2, 20, 30)
    both = factors.product(*factors.track(factors.Subspace, B, A, T, torch.tensor([0.0, 0.9]).view(2, 1, 1)))
    for i, rate in enumerate((0.0, 0.9)):
        one = factors.product(*factors.track(factors.Subspace, B[i], A[i], T[i], rate))
        torch.testing.assert_close(both[i], one, rtol=1e-4, atol=1e-4)
