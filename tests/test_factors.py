"""The parts of factors.py, each at the edges of its domain."""

import math

import pytest
import torch
from torch import Tensor

from lorapre import factors

TRACKERS = {"printed": factors.Printed, "newton": factors.Newton, "subspace": factors.Subspace}
DTYPES = [torch.float32, torch.float64]


def gram_error(Q: Tensor) -> float:
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max().item()


def outside(Y: Tensor, Q: Tensor) -> float:
    """The share of Y's Frobenius norm that lies outside the columns of Q, computed in float64."""
    Y, Q = Y.double() / max(Y.abs().max().item(), 1e-300), Q.double()
    return ((Y - Q @ (Q.mT @ Y)).norm() / Y.norm().clamp(min=1e-300)).item()


def mean_of_squares(B: Tensor, A: Tensor, dim: int) -> Tensor:
    return (B @ A).square().mean(dim)


# ---------------------------------------------------------------------------------------- random, norm, start


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


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1e30, 1e37])
def test_norm_is_exact_where_the_squares_leave_the_range_of_float32(size: float) -> None:
    X = torch.randn(3, 4, 5) * size
    expected = X.double().norm(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(factors.norm(X).double(), expected, rtol=1e-6, atol=2e-45)


def test_norm_and_unit_of_zero_are_zero() -> None:
    assert torch.equal(factors.norm(torch.zeros(2, 4, 5)), torch.zeros(2, 1, 1))
    assert torch.equal(factors.unit(torch.zeros(2, 4, 5)), torch.zeros(2, 4, 5))


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


# ------------------------------------------------------------------------------------------------------- orth


def difficult(dtype: torch.dtype) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    p, r = 60, 16
    row, column = torch.arange(p, dtype=dtype)[:, None], torch.arange(r, dtype=dtype)
    return {
        "full rank": normal(p, r),
        "square": normal(r, r),
        "one column": normal(p, 1),
        "rank 1": normal(p, 1) @ normal(1, r),
        "rank 1 of 256": normal(512, 1) @ normal(1, 256),
        "rank 64 of 256": normal(512, 64) @ normal(64, 256),
        "rank 1, square": normal(r, 1) @ normal(1, r),
        "zero": torch.zeros(p, r, dtype=dtype),
        "zero, p a power of two": torch.zeros(128, 100, dtype=dtype),
        "zero, hardly any room": torch.zeros(129, 128, dtype=dtype),
        "equal columns": torch.ones(p, r, dtype=dtype),
        "duplicated columns": normal(p, r // 2).repeat(1, 2),
        "nearly equal columns": normal(p, 1) + 1e-6 * normal(p, r),
        "zero columns": torch.where(column < 3, normal(p, r), 0),
        "few nonzero rows": torch.where(row < 5, normal(p, r), 0),
        "one nonzero row": torch.where(row < 1, normal(p, r), 0),
        "graded columns": normal(p, r) * 10**-column,
        "graded directions": normal(p, r) * 10 ** (-column / 2) @ normal(r, r),
        "tiny": 1e-30 * normal(p, r),
        "subnormal": 1e-40 * normal(p, r),
        "huge": 1e30 * normal(p, r),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", difficult(torch.float64))
def test_orth_is_orthonormal_and_keeps_the_range(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    Y = difficult(dtype)[name]
    Q = factors.orth(Y)
    assert gram_error(Q) < 1e-5
    assert outside(Y, Q) < 1e-6


@pytest.mark.parametrize("r", [1, 2, 3, 4, 6, 8, 12, 16, 32, 64])
def test_orth_survives_columns_at_any_small_angle(r: int) -> None:
    """A matrix that rounding has made of rank one or almost, with and without room for other columns."""
    for p in (r + 1, 150 + r):
        gaps = 10.0 ** -torch.arange(10)[:, None, None]
        for Y in (
            torch.randn(40, p, 1) @ torch.randn(40, 1, r),
            torch.randn(10, p, 1) + gaps * torch.randn(10, p, r),
        ):
            Q = factors.orth(Y)
            assert gram_error(Q) < 1e-4
            assert max(outside(y, q) for y, q in zip(Y, Q, strict=True)) < 1e-5


@pytest.mark.parametrize("kind", ["ones", "unit vectors", "normal"])
def test_orth_completes_a_basis_of_few_rows(kind: str) -> None:
    """Saw teeth did not: all-ones gradients of a (4, 36) weight at rank 3 made a NaN."""
    for p in range(3, 25):
        for r in range(1, p - 1):
            for k in (1, (r + 1) // 2):
                C = {
                    "ones": torch.ones(p, k),
                    "unit vectors": torch.eye(p)[:, :k],
                    "normal": torch.randn(p, k),
                }
                Y = C[kind] @ torch.randn(k, r)
                assert gram_error(factors.orth(Y)) < 1e-2, (p, r, k)


def test_orth_of_a_batch_is_orth_of_each_matrix() -> None:
    kinds = [Y for Y in difficult(torch.float32).values() if Y.shape == (60, 16)]
    together = factors.orth(torch.stack(kinds))
    for Y, Q in zip(kinds, together, strict=True):
        alone = factors.orth(Y)
        assert gram_error(Q) < 1e-5
        assert outside(Y, Q) < 1e-6
        # Where rounding decides which completion it is, both are bases of the range all the same.
        assert outside(Y, alone) < 1e-6
    torch.testing.assert_close(together[0], factors.orth(kinds[0]))


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
