"""Norms and orthonormal bases, at the edges of what float32 holds."""

import pytest
import torch
from torch import Tensor

from lorapre import linalg

DTYPES = [torch.float32, torch.float64]


def gram_error(Q: Tensor) -> float:
    return (Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max().item()


def outside(Y: Tensor, Q: Tensor) -> float:
    """The share of Y's Frobenius norm that lies outside the columns of Q, computed in float64."""
    Y, Q = Y.double() / max(Y.abs().max().item(), 1e-300), Q.double()
    return ((Y - Q @ (Q.mT @ Y)).norm() / Y.norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1e30, 1e37])
def test_norm_is_exact_where_the_squares_leave_the_range_of_float32(size: float) -> None:
    X = torch.randn(3, 4, 5) * size
    expected = X.double().norm(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(linalg.norm(X).double(), expected, rtol=1e-6, atol=2e-45)


def test_norm_of_zero_is_zero() -> None:
    assert torch.equal(linalg.norm(torch.zeros(2, 4, 5)), torch.zeros(2, 1, 1))


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", difficult(torch.float64))
def test_orth_is_orthonormal_and_keeps_the_range(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    Y = difficult(dtype)[name]
    Q = linalg.orth(Y)
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
            Q = linalg.orth(Y)
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
                assert gram_error(linalg.orth(Y)) < 1e-2, (p, r, k)


def test_orth_of_a_batch_is_orth_of_each_matrix() -> None:
    kinds = [Y for Y in difficult(torch.float32).values() if Y.shape == (60, 16)]
    together = linalg.orth(torch.stack(kinds))
    for Y, Q in zip(kinds, together, strict=True):
        alone = linalg.orth(Y)
        assert gram_error(Q) < 1e-5
        assert outside(Y, Q) < 1e-6
        # Where rounding decides which completion it is, both are bases of the range all the same.
        assert outside(Y, alone) < 1e-6
    torch.testing.assert_close(together[0], linalg.orth(kinds[0]))
