"""The parts of the algorithms at the edges of their domains. test_reference.py tests the whole."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lorapre import variants
from lorapre.gradient import Factors, Moments
from operands import EPS, FOLLOW, begin, follow, operand, sizes
from reference import debiased, in_row_space, rank_one

followers = pytest.mark.parametrize("name", FOLLOW)


# --- rates and corrections


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.999, 0.9999])
def test_debias_is_exact(beta: float) -> None:
    t = torch.tensor([0, 1, 2, 3, 10, 100, 1000, 100_000], dtype=torch.float32)
    expected = torch.tensor([1 - beta**n for n in t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(variants.debias(beta, t).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.999])
def test_the_debiased_rate_makes_an_ema_the_bias_corrected_one(beta: float) -> None:
    plain = ema = 0.0
    for t, g in enumerate(torch.randn(50).tolist(), start=1):
        rate = variants.debiased(beta, torch.tensor(float(t))).item()
        ema = rate * ema + (1 - rate) * g
        plain = beta * plain + (1 - beta) * g
        assert ema == pytest.approx(plain / (1 - beta**t), rel=1e-5, abs=1e-6)
    assert variants.debiased(beta, torch.tensor(1.0)) == 0
    assert variants.debiased(beta, torch.tensor(1e6)).item() == pytest.approx(beta)


def test_the_means_of_squares_are_emas_and_never_infinite() -> None:
    s = variants.State(v_row=torch.rand(2, 5, 1), v_col=torch.rand(2, 1, 7))
    row, col = torch.rand(2, 5, 1), torch.rand(2, 1, 7)
    new = variants.with_means(s, (row, col), 0.9)
    assert s.v_row is not None
    assert s.v_col is not None
    torch.testing.assert_close(new.v_row, 0.9 * s.v_row + 0.1 * row)
    torch.testing.assert_close(new.v_col, 0.9 * s.v_col + 0.1 * col)
    row[0, 0], col[1, 0, 3] = math.inf, math.inf
    new = variants.with_means(new, (row, col), 0.9)
    assert new.v_row is not None
    assert new.v_col is not None
    assert new.v_row.isfinite().all()
    assert new.v_col.isfinite().all()
    assert variants.with_means(variants.State(), (row, col), 0.9) == variants.State()


# --- the start


def test_gaussian_is_a_function_of_its_arguments_alone() -> None:
    before = torch.get_rng_state()
    one = variants.gaussian(300, 200, seed=3)
    torch.manual_seed(99)
    assert torch.equal(one, variants.gaussian(300, 200, seed=3))
    assert not torch.equal(one, variants.gaussian(300, 200, seed=4))
    assert one.mean().abs() < 0.02
    assert abs(one.std().item() - 1) < 0.02
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())


def test_printed_factors_start_small() -> None:
    A = variants.first_A("paper", sizes(20, 30, 3), 4, seed=5)
    assert torch.equal(A, (0.02 * variants.gaussian(4, 30, seed=5)).expand(3, 4, 30))


@pytest.mark.parametrize("variant", ["split", "subspace"])
def test_others_start_at_the_scale_of_the_gauge(variant: str) -> None:
    A = variants.first_A(variant, sizes(20, 30, 3), 4, seed=5)
    wanted = variants.gaussian(4, 30, seed=5).expand(3, 4, 30)
    torch.testing.assert_close(A.norm(dim=(-2, -1)), torch.full((3,), 2.0))
    torch.testing.assert_close(A, 2 * wanted / wanted.norm(dim=(-2, -1), keepdim=True))


# --- what a variant tells `apply`


class Told:
    """An `apply` that keeps the moments it gets, in float64, and returns the means of g**2."""

    def __init__(self, g: Tensor) -> None:
        self.g = g
        self.calls = 0

    def __call__(self, M: Moments) -> tuple[Tensor, Tensor]:
        self.calls += 1
        g = self.g.double()
        self.m, self.v, self.rest = M.b * g, M.d * g.square(), torch.zeros_like(g)
        for f, a, c in zip(M.products, M.a, M.c, strict=True):
            if f is not None:
                P = f.B.double() @ f.A.double()
                self.m, self.v = self.m + a * P, self.v + c * P.square()
        if M.row is not None and M.column is not None:
            self.rest = M.row.double() * M.column.double()
            self.v = self.v + self.rest
        return g.square().mean(-1, keepdim=True).float(), g.square().mean(-2, keepdim=True).float()


def random_state(variant: str, N: int, p: int, q: int, r: int) -> variants.State:
    """A state such as a run has after some steps."""
    s = variants.State()
    g = torch.randn(N, p, 3) @ torch.randn(N, 3, q)
    m = begin("subspace", g, r)
    s = s._replace(m=Factors(*follow("subspace", *m, g + torch.randn(N, p, q), 0.5)))
    if variant == "paper":
        return s._replace(v=Factors(*follow("subspace", *begin("subspace", g, r, 1), g.abs(), 0.5)))
    square = g.square() + 1
    return s._replace(v_row=square.mean(-1, keepdim=True), v_col=square.mean(-2, keepdim=True))


@pytest.mark.parametrize("variant", variants.ADAM)
def test_a_variant_applies_once_and_leaves_the_state_before_the_step_alone(variant: str) -> None:
    s = random_state(variant, 2, 12, 20, 3)
    tensors = [x for y in s if y is not None for x in (y if isinstance(y, Factors) else [y])]
    before = [x.clone() for x in tensors]
    g = torch.randn(2, 12, 20)
    told, t = Told(g), torch.tensor([3.0, 7.0]).view(2, 1, 1)
    new = variants.ADAM[variant](s, operand(g), t, 0.9, 0.95, told)
    assert told.calls == 1
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    later = [x for y in new if y is not None for x in (y if isinstance(y, Factors) else [y])]
    assert [x.shape for x in later] == [x.shape for x in tensors]
    assert not any(torch.equal(x, y) for x, y in zip(later, before, strict=True))


@pytest.mark.parametrize("t", [1, 2, 10, 1000])
def test_split_keeps_momentum_in_the_rows_of_A_and_leaves_no_mean_of_squares_out(t: int) -> None:
    """m = g + beta (M - H); v from M**2, H**2 and a rest that has the means which M**2 leaves."""
    beta1, beta2 = 0.9, 0.95
    s, g = random_state("split", 1, 12, 20, 3), torch.randn(1, 12, 20)
    told = Told(g)
    variants.split(s, operand(g), torch.full((1, 1, 1), float(t)), beta1, beta2, told)
    assert s.m is not None
    assert s.v_row is not None
    assert s.v_col is not None
    B, A, G = s.m.B[0].double(), s.m.A[0].double(), g[0].double()
    M, H, beta = B @ A, in_row_space(G, A), debiased(beta1, t)
    keep, c2 = 1 - beta2 ** (t - 1), 1 - beta2**t
    row = s.v_row[0, :, 0].double() - keep * M.square().mean(1)
    rest = rank_one(row, s.v_col[0, 0].double() - keep * M.square().mean(0))
    v = beta2 * (beta2 * keep * M**2 + (1 - beta2) * keep * H**2 + rest) + (1 - beta2) * G**2
    # W has orthonormal rows but for the damping; W^T W G A^T changes by the condition of A A^T.
    close: dict[str, Any] = {"rtol": 0, "atol": 200 * EPS * G.abs().max().item()}
    torch.testing.assert_close(told.m[0], G + beta * (M - H), **close)
    torch.testing.assert_close(told.rest[0], rest * beta2 / c2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told.v[0] * c2, v, rtol=1e-4, atol=1e-5)


def test_the_rest_of_split_is_nothing_where_squares_are_infinite_or_all_taken() -> None:
    s, g = random_state("split", 1, 12, 20, 3), torch.randn(1, 12, 20)
    for row, col in ((torch.zeros(1, 12, 1), torch.zeros(1, 1, 20)), (s.v_row, s.v_col)):
        assert row is not None
        assert col is not None
        assert s.m is not None
        taken = s._replace(v_row=row, v_col=col, m=Factors(s.m.B * (1e25 if row.any() else 1), s.m.A))
        told = Told(g)
        variants.split(taken, operand(g), torch.full((1, 1, 1), 9.0), 0.9, 0.95, told)
        assert told.rest.isfinite().all()
        assert not told.rest.any()


# --- how factors follow a target


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("r", [1, 2, 8, 32, 256])
@followers
def test_rank_one_targets_are_followed_at_any_rank(name: str, r: int) -> None:
    """The Gram of a rank-one matrix has negative eigenvalues after rounding; Cholesky fails on it.

    At every step, since factors that have lost a target find it again.
    """
    count = 16 if r < 128 else 2
    T = torch.randn(count, 150 + r, 1) @ torch.randn(count, 1, 200 + r)
    B, A = begin(name, T, r)
    errors = []
    for _ in range(40):
        B, A = follow(name, B, A, T, 0.5 if name == "subspace" else 0.25)
        assert B.isfinite().all()
        assert A.isfinite().all()
        errors.append((B @ A - T).norm(dim=(-2, -1)) / T.norm(dim=(-2, -1)))
    assert torch.stack(errors)[20:].max() < (1e-2 if name == "printed" else 1e-3)


@pytest.mark.parametrize("kind", ["noise", "rank 1", "one entry", "one row", "one column", "ones"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e10, 1e20])
@followers
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
    B, A = begin(name, size * T, 16)
    beta = 0.05 if name == "subspace" else 0.95**2
    for target in [T, T, T, torch.zeros_like(T), T, torch.randn(48, 64), T, T, T, T]:
        B, A = follow(name, B, A, size * target, beta)
        assert B.isfinite().all()
        assert A.isfinite().all()
        assert (B @ A).isfinite().all()


@pytest.mark.parametrize("zeros", [1500, 2000])
@followers
def test_factors_stay_finite_through_thousands_of_zero_targets_and_after(name: str, zeros: int) -> None:
    """On their way to zero the factors pass through the numbers whose inverse is infinite."""
    T = torch.randn(12, 16)
    B, A = begin(name, T, 4)
    for t in range(zeros + 10):
        B, A = follow(name, B, A, T if t < 5 or t >= zeros else torch.zeros_like(T), 0.9)
        assert B.isfinite().all()
        assert A.isfinite().all()


@followers
def test_a_batch_is_followed_as_its_matrices_one_by_one(name: str) -> None:
    """Sizes twelve orders of magnitude apart, one matrix always zero: none disturbs others."""
    magnitudes = torch.tensor([1.0, 1e-6, 1e6, 0.0])[:, None, None]
    targets = torch.randn(6, 4, 20, 30) * magnitudes
    beta = 0.3 if name == "subspace" else 0.49
    B, A = begin(name, targets[0], 5)
    alone = [(B[i], A[i]) for i in range(4)]
    for T in targets:
        B, A = follow(name, B, A, T, beta)
        alone = [follow(name, b, a, T[i], beta) for i, (b, a) in enumerate(alone)]
    for i, (b, a) in enumerate(alone):
        size = (b @ a).abs().max().item()
        torch.testing.assert_close(B[i] @ A[i], b @ a, rtol=1e-3, atol=1e-4 * size)


def test_a_rate_for_each_matrix_is_the_rate_of_that_matrix() -> None:
    """Debiasing gives each weight of a batch its own rate."""
    B, A, T = torch.randn(2, 20, 5), torch.randn(2, 5, 30), torch.randn(2, 20, 30)
    both = follow("subspace", B, A, T, torch.tensor([0.0, 0.9]).view(2, 1, 1)).product
    for i, rate in enumerate((0.0, 0.9)):
        one = follow("subspace", B[i], A[i], T[i], rate).product
        torch.testing.assert_close(both[i], one, rtol=1e-4, atol=1e-4)
