"""Roots of inverses, norms, bases and Newton-Schulz, at the edges of what float32 holds."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lorapre import linalg
from operands import EPS, TINY, sizes

DTYPES = [torch.float32, torch.float64]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

twice = pytest.mark.usefixtures("arithmetic")


def orth(Y: Tensor) -> Tensor:
    """`linalg.orth_` of a copy of Y (N, p, r), or (p, r)."""
    Q = Y.clone() if Y.ndim == 3 else Y[None].clone()
    assert linalg.orth_(Q, sizes(Q.shape[1], 1, len(Q))) is Q
    return Q.view(Y.shape)


def gram_error(Q: Tensor) -> float:
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max().item()


def outside(Y: Tensor, Q: Tensor) -> float:
    """The share of Y's Frobenius norm that lies outside the columns of Q, computed in float64."""
    Y, Q = Y.double() / max(Y.abs().max().item(), 1e-300), Q.double()
    return ((Y - Q @ (Q.mT @ Y)).norm() / Y.norm().clamp(min=1e-300)).item()


# --- products and roots


@twice
@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize(("a", "b", "c"), [(1, 1, 1), (3, 5, 2), (130, 7, 67), (64, 200, 64)])
def test_matmul_is_the_product(N: int, a: int, b: int, c: int) -> None:
    X, Y = torch.randn(N, a, b), torch.randn(N, b, c)
    found = linalg.matmul(X, Y)
    error = (found.double() - X.double() @ Y.double()).abs()
    assert (error <= b * EPS * (X.abs().double() @ Y.abs().double())).all()


def positive_definite(r: int, condition: float) -> Tensor:
    U = torch.linalg.qr(torch.randn(2, r, r, dtype=torch.float64)).Q
    values = torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)
    return (U * values) @ U.mT


@twice
@pytest.mark.parametrize("condition", [1.0, 1e4])
@pytest.mark.parametrize("r", [1, 2, 3, 8, 64, 128, 129, 256, 300])
def test_inverse_root_is_the_root_of_the_inverse(r: int, condition: float) -> None:
    """A relative change of eps in G, for each of r terms, changes R G R^T by the condition of G."""
    G = positive_definite(r, condition)
    R = linalg.inverse_root(G.float())
    assert not R.triu(1).any()
    error = (R.double() @ G @ R.double().mT - torch.eye(r)).abs().max().item()
    assert error <= 4 * (r + 1) * EPS * condition


@twice
@pytest.mark.parametrize("size", [1e-18, 1.0, 1e18])
@pytest.mark.parametrize("r", [4, 150])
def test_damped_root_adds_a_millionth_of_the_trace(r: int, size: float) -> None:
    G = positive_definite(r, 1e3) * size
    damped = G + 1e-6 * G.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None] * torch.eye(r)
    given = G.float()
    R = linalg.damped_root(given).double()
    assert torch.equal(given, G.float())
    assert (R @ damped @ R.mT - torch.eye(r)).abs().max() <= 4 * r * EPS * 1e3
    # Where almost nothing is seen of G beside the damping, lambda is R^-2.
    G = torch.zeros(1, r, r)
    G[0, 0, 0] = size
    R = linalg.damped_root(G)
    torch.testing.assert_close(R[0, 1, 1].item(), (1e-6 * size) ** -0.5, rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("least", [1e-5, torch.tensor([1e-5, 1e-7]).view(2, 1, 1)], ids=["one", "each"])
def test_damped_root_damps_by_the_least_that_is_given_where_that_is_more(least: Any) -> None:
    """G is the identity, with a lambda of 5e-6, and a thousandth of it."""
    R = linalg.damped_root(torch.stack([torch.eye(5), 1e-3 * torch.eye(5)]), least)
    second = 1e-5 if isinstance(least, float) else 1e-7
    for root, value in zip(R, (1 + 1e-5, 1e-3 + second), strict=True):
        torch.testing.assert_close(root, value**-0.5 * torch.eye(5), rtol=8 * EPS, atol=0)


def test_damped_root_of_zero_is_finite() -> None:
    R = linalg.damped_root(torch.zeros(2, 6, 6))
    torch.testing.assert_close(R, TINY**-0.5 * torch.eye(6).expand(2, 6, 6), rtol=8 * EPS, atol=0)


# --- norm


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1e30, 1e37])
def test_norm_is_exact_where_the_squares_leave_the_range_of_float32(size: float) -> None:
    X = torch.randn(3, 4, 5) * size
    expected = X.double().norm(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(linalg.norm(X).double(), expected, rtol=20 / 2 * EPS, atol=2e-45)


def test_norm_of_zero_and_of_nothing_is_zero() -> None:
    assert torch.equal(linalg.norm(torch.zeros(2, 4, 5)), torch.zeros(2, 1, 1))
    assert torch.equal(linalg.norm(torch.zeros(2, 0, 5)), torch.zeros(2, 1, 1))
    assert linalg.norm(torch.zeros(0, 4, 5)).shape == (0, 1, 1)


# --- gauge


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_gauge_brings_A_to_norm_sqrt_r_and_keeps_the_product(size: float) -> None:
    B, A = torch.randn(3, 20, 4), size * torch.randn(3, 4, 30)
    product = B @ (A / size)
    new_B, new_A = linalg.gauge_(B, A, sizes(20, 30, 3))
    assert new_B is B
    assert new_A is A
    torch.testing.assert_close(A.norm(dim=(-2, -1)), torch.full((3,), 2.0))
    torch.testing.assert_close((B @ A) / size, product)


@pytest.mark.parametrize("given", [False, True], ids=["unit vectors", "before"])
@pytest.mark.parametrize("bad", [0.0, 1e-42])
def test_gauge_gives_A_directions_where_it_has_none_left(bad: float, given: bool) -> None:
    """Zero, or so small that its entries have lost their digits; matrix by matrix."""
    B, A = torch.randn(2, 20, 4), torch.randn(2, 4, 30)
    before = torch.randn(2, 4, 30) if given else None
    A[0] *= bad
    product = B[1] @ A[1]
    linalg.gauge_(B, A, sizes(20, 30, 2), before)
    assert torch.linalg.matrix_rank(A[0]) == 4
    if before is not None:
        assert torch.equal(A[0], before[0])
    else:
        assert A[0].norm().item() == pytest.approx(2, rel=1e-6)
    assert torch.equal(B[0], torch.zeros(20, 4))
    torch.testing.assert_close(B[1] @ A[1], product)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gauge_goes_back_to_the_A_before_where_it_has_left_the_range_of_float32(bad: float) -> None:
    B, A, before = torch.randn(2, 20, 4), torch.randn(2, 4, 30), torch.randn(2, 4, 30)
    A[0, 1, 2] = bad
    linalg.gauge_(B, A, sizes(20, 30, 2), before)
    assert torch.equal(A[0], before[0])
    assert torch.equal(B[0], torch.zeros(20, 4))
    assert A[1].isfinite().all()


# --- bases


def allowed_outside(Y: Tensor) -> float:
    """How much of Y rounding may put outside the basis.

    Where Y has lost rank, the first pass divides by the root of its shift, (r + 16) eps, and
    magnifies rounding errors as much; they have random signs.
    """
    r = Y.shape[-1]
    lost = torch.linalg.matrix_rank(Y.double(), rtol=1e-4) < r
    return 0.25 * math.sqrt(EPS / (r + 16)) if lost else 1e-6


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
        "in parts": normal(5000, 64),
        "rank 3, in parts": normal(5000, 3) @ normal(3, 64),
    }


@twice
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", difficult(torch.float64))
def test_orth_is_orthonormal_and_keeps_the_range(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    Y = difficult(dtype)[name]
    Q = orth(Y)
    # "graded directions" are beyond float32: the last pass still meets a condition above 1.
    assert gram_error(Q) < (1e-4 if name == "graded directions" else 1e-5)
    assert outside(Y, Q) < allowed_outside(Y)


@pytest.mark.parametrize("r", [1, 2, 3, 4, 6, 8, 12, 16, 32, 64])
def test_orth_survives_columns_at_any_small_angle(r: int) -> None:
    """A matrix that rounding has made of rank one or almost, with and without room for others."""
    for p in (r + 1, 150 + r):
        gaps = 10.0 ** -torch.arange(10)[:, None, None]
        for Y in (
            torch.randn(40, p, 1) @ torch.randn(40, 1, r),
            torch.randn(10, p, 1) + gaps * torch.randn(10, p, r),
        ):
            Q = orth(Y)
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
                assert gram_error(orth(Y)) < 1e-2, (p, r, k)


def test_orth_of_a_batch_is_orth_of_each_matrix() -> None:
    kinds = [Y for Y in difficult(torch.float32).values() if Y.shape == (60, 16)]
    together = orth(torch.stack(kinds))
    for Y, Q in zip(kinds, together, strict=True):
        alone = orth(Y)
        assert gram_error(Q) < 1e-4
        # Where rounding decides which completion it is, both are bases of the range all the same.
        assert max(outside(Y, Q), outside(Y, alone)) < allowed_outside(Y)
    torch.testing.assert_close(together[0], orth(kinds[0]))


@pytest.mark.parametrize("name", ["full rank", "square", "rank 1", "zero", "graded columns", "tiny"])
def test_orth_without_a_look_at_the_condition_is_a_basis_of_the_same_columns(name: str) -> None:
    """It takes a pass more: where rows are spread, on GPUs and in compiled graphs."""
    Y = difficult(torch.float32)[name]
    T = sizes(len(Y), 1)
    T.spread = True
    Q = linalg.orth_(Y[None].clone(), T)[0]
    assert gram_error(Q) < 1e-5
    assert outside(Y, Q) < allowed_outside(Y)


# --- directions in general position


@pytest.mark.parametrize(("r", "total"), [(1, 1), (3, 5), (7, 64), (16, 65), (5, 10_000)])
def test_waves_are_sines_of_incommensurable_frequencies(r: int, total: int) -> None:
    """The angle is exact; a product and a sum of sines and cosines in float32 follow."""
    found = linalg.waves(torch.zeros(1, r, total), range(total), total)
    turns = (torch.arange(1, r + 1, dtype=torch.float64) * math.sqrt(2)).frac()
    angle = torch.outer(turns, torch.arange(1, total + 1, dtype=torch.float64))
    expected = (2 * math.pi * angle.frac()).sin() * math.sqrt(2 / total)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 4 * EPS * math.sqrt(2 / total)


def test_waves_of_some_places_are_those_of_the_whole() -> None:
    like = torch.zeros(1, 6, 300)
    whole = linalg.waves(like, range(300), 300)
    close = {"rtol": 0, "atol": 4 * EPS * math.sqrt(2 / 300)}
    for places in (range(0, 10), range(37, 205), range(299, 300), range(5, 5)):
        part = linalg.waves(like, places, 300)
        torch.testing.assert_close(part, whole[:, places.start : places.stop], **close)
    places = torch.tensor([4, 5, 190, 299])
    assert torch.equal(linalg.waves(like, places, 300), whole[:, places])


@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_waves_are_independent_even_over_as_many_places(r: int) -> None:
    assert torch.linalg.matrix_rank(linalg.waves(torch.zeros(1, r, r), range(r), r).double()) == r


def test_probe_adds_waves_of_the_size_of_rounding_errors() -> None:
    A = torch.zeros(2, 4, 30)
    A[0] = torch.randn(4, 30)
    before = A.clone()
    probed = linalg.probe(A, sizes(20, 30, 2))
    assert torch.equal(A, before)
    waves = EPS * linalg.waves(A, range(30), 30)
    assert torch.equal(probed, A + waves)
    assert torch.linalg.matrix_rank(probed[1].double() / EPS) == 4


# --- Newton-Schulz


def torch_muon(gradient: Tensor, **options: Any) -> Tensor:
    """The update of torch.optim.Muon from this gradient alone, without its learning rate."""
    weight = torch.zeros_like(gradient, requires_grad=True)
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, **options).step()
    return -weight.detach()


@pytest.mark.parametrize("shape", [(32, 32), (32, 80), (80, 32), (1, 40), (40, 1)])
def test_newton_schulz_is_that_of_torch_optim_muon(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape)
    got = linalg.newton_schulz(gradient[None], COEFFICIENTS, 5, 1e-7)[0]
    assert got.dtype == torch.bfloat16
    expected = torch_muon(gradient) / math.sqrt(max(1, shape[0] / shape[1]))
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-3)  # a few units of bfloat16


def test_newton_schulz_takes_coefficients_steps_and_eps() -> None:
    gradient = 1e-4 * torch.randn(20, 30)
    options = {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 1.0}
    got = linalg.newton_schulz(gradient[None], (2.0, -1.5, 0.5), 3, 1.0)[0].float()
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
    X = linalg.newton_schulz(M[None], COEFFICIENTS, 5, 1e-7, dtype)[0].float()
    values = torch.linalg.svdvals(X)
    assert values.max() < 1.25
    assert values.min() > 0.6
    alignment = (X * (U @ V)).sum() / (X.norm() * (U @ V).norm())
    assert alignment > 0.98


def test_newton_schulz_of_a_batch_is_that_of_each_matrix() -> None:
    M = torch.randn(3, 20, 30) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    together = linalg.newton_schulz(M, COEFFICIENTS, 5, 1e-7, torch.float32)
    for i in range(3):
        for one in (M[i], M[i : i + 1]):
            alone = linalg.newton_schulz(one, COEFFICIENTS, 5, 1e-7, torch.float32)
            assert alone.shape == one.shape
            torch.testing.assert_close(together[i], alone.view(20, 30), rtol=1e-4, atol=1e-5)


def test_newton_schulz_of_zero_is_zero_and_leaves_its_argument_alone() -> None:
    assert not linalg.newton_schulz(torch.zeros(1, 6, 5), COEFFICIENTS, 5, 1e-7).any()
    M = torch.randn(1, 5, 6, dtype=torch.bfloat16)
    before = M.clone()
    linalg.newton_schulz(M, COEFFICIENTS, 5, 1e-7)
    assert torch.equal(M, before)
