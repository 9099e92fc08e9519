"""The gradient as an operand: products, the update and its rounding, against float64.

The specification of the backends: test_backends_*.py compare theirs with this one, of plain torch.
Errors are bounded entry by entry, by the number of terms of a sum and the size of each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lorapre import gradient, rounding
from lorapre.gradient import Factors, Full, Gradient, Moments, wide
from operands import EPS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CPU = torch.device("cpu")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (7, 1), (13, 17), (3, 200), (200, 3), (97, 61)], ids=str
)


@pytest.fixture(params=["small", "tiles"], autouse=True)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with whole matrices, and with tiles of a few rows that do not divide them."""
    if request.param == "tiles":
        monkeypatch.setattr(gradient, "SMALL", 6)
        monkeypatch.setattr(gradient, "TILE", 150)


def normal(*shape: int, dtype: torch.dtype = torch.float32, padding: int = 0) -> Tensor:
    """A standard normal tensor, or the first columns of a wider one."""
    wider = torch.randn(*shape[:-1], shape[-1] + padding).to(dtype)
    return wider[..., : shape[-1]]


def operand(
    grads: Sequence[Tensor],
    shape: tuple[int, int],
    *,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Gradient:
    dtype = dtype or (grads[0].dtype if grads else torch.float32)
    return Gradient(grads, shape, CPU, dtype=wide(dtype), **options)


def stacked(tensors: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """(N, p, q) in float64."""
    return torch.stack([x.double() for x in tensors]) if tensors else torch.zeros(0, *shape).double()


# --- products


def check_products(T: Gradient, exact: Tensor, r: int = 5, dtype: torch.dtype = torch.float32) -> None:
    """`T @ X` and `L @ T` of what T stands for, (N, p, q) in float64."""
    N, p, q = exact.shape
    X, L = normal(N, q, r, dtype=dtype), normal(N, r, p, dtype=dtype)
    before = X.clone(), L.clone()
    right, left = T @ X, L @ T
    assert torch.equal(X, before[0])
    assert torch.equal(L, before[1])
    assert right.dtype == left.dtype == dtype
    eps = torch.finfo(dtype).eps
    for found, x, y in ((right, exact, X.double()), (left, L.double(), exact)):
        terms = x.shape[-1] + 2  # the scale is one more product
        assert found.shape == (x @ y).shape
        assert ((found - x @ y).abs() <= terms * eps * (x.abs() @ y.abs()) + 1e-300).all()


@shapes
@every_dtype
@pytest.mark.parametrize("N", [1, 3])
def test_products_of_any_shape_and_type(shape: tuple[int, int], dtype: torch.dtype, N: int) -> None:
    grads = [normal(*shape, dtype=dtype) for _ in range(N)]
    T = operand(grads, shape)
    assert (T.p, T.q, len(T)) == (*shape, N)
    check_products(T, stacked(grads, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_with_float64_are_float64(dtype: torch.dtype) -> None:
    grads = [normal(40, 30, dtype=dtype) for _ in range(2)]
    check_products(operand(grads, (40, 30)), stacked(grads, (40, 30)), dtype=torch.float64)


@every_dtype
def test_gradients_may_be_rows_of_wider_matrices(dtype: torch.dtype) -> None:
    grads = [
        normal(13, 17, dtype=dtype, padding=5),
        normal(13, 17, dtype=dtype),
        normal(13, 17, dtype=dtype),
    ]
    check_products(operand(grads, (13, 17)), stacked(grads, (13, 17)))


@every_dtype
@pytest.mark.parametrize("scale", [-1.0, 3.0])
def test_sign_absolute_value_and_quotient_are_those_of_T(dtype: torch.dtype, scale: float) -> None:
    grads = [normal(13, 17, dtype=dtype) for _ in range(2)]
    T, exact = operand(grads, (13, 17), scale=scale), scale * stacked(grads, (13, 17))
    check_products(abs(T), exact.abs())
    check_products(T / 0.05, exact / 0.05)
    check_products(abs(T / -0.05), exact.abs() / 0.05)
    check_products(abs(T) / 0.05, exact.abs() / 0.05)
    check_products(T, exact)  # as it was


@every_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_masked_gradient_is_zero(dtype: torch.dtype, bad: float) -> None:
    grads = [normal(13, 17, dtype=dtype) for _ in range(3)]
    grads[1][3, 4] = bad
    T = operand(grads, (13, 17), finite=torch.tensor([True, False, True]), scale=-1.0)
    exact = -stacked(grads, (13, 17))
    exact[1] = 0
    check_products(T, exact)
    check_products(abs(T), exact.abs())


@pytest.mark.parametrize("shape", [(13, 17), (0, 17), (13, 0)], ids=str)
def test_no_member_and_no_element_give_products_of_the_right_shape(shape: tuple[int, int]) -> None:
    check_products(operand([], shape), torch.zeros(0, *shape).double())
    if 0 in shape:
        check_products(operand([torch.zeros(shape)] * 2, shape), torch.zeros(2, *shape).double())


# --- the update


@dataclass
class Problem:
    """An update, and what it does in float64.

    Args:
        shape: of a matrix.
        N: members.
        dtype: of weights and gradients.
        rank: of the factors.
        products: how many there are; of a negative number the first is None.
        a, c: their shares in m and v.
        b, d: the shares of g and g**2.
        rest: whether v has a row and a column besides.
        dense: whether AdamW takes the step instead, with both moments in full.
        each: whether lr, decay and shares are one for each matrix.
        options: of the operand.
    """

    shape: tuple[int, int]
    N: int = 2
    dtype: torch.dtype = torch.float32
    rank: int = 4
    products: int = 1
    a: tuple[float, ...] = (0.9, -0.3)
    b: float = 0.7
    c: tuple[float, ...] = (0.5, 0.2)
    d: float = 0.1
    rest: bool = False
    dense: bool = False
    each: bool = False
    padding: int = 0
    lr: float = 0.125
    decay: float = 0.875
    eps: float = 1e-8
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        N, (p, q), r = self.N, self.shape, self.rank
        self.weights = [normal(p, q, dtype=self.dtype, padding=self.padding) for _ in range(N)]
        self.grads = [normal(p, q, dtype=self.dtype, padding=self.padding) for _ in range(N)]
        self.factors: list[Factors | None] = [
            Factors(normal(N, p, r), normal(N, r, q)) for _ in range(abs(self.products))
        ]
        if self.products < 0:
            self.factors[0] = None
        n = len(self.factors)
        self.row, self.column = torch.rand(N, p, 1), torch.rand(N, 1, q)
        self.E = [[normal(p, q, dtype=wide(self.dtype)).abs() for _ in range(N)] for _ in "mv"]
        steps = torch.arange(1.0, N + 1) if self.each else torch.full((N,), 3.0)
        self.t = steps.view(-1, 1, 1)
        self.M = Moments(
            self.factors, [self.number(x) for x in self.a[:n]], self.number(self.b),
            [self.number(x) for x in self.c[:n]], self.number(self.d),
            self.row if self.rest else None, self.column if self.rest else None,
        )  # fmt: skip
        self.T = operand(self.grads, self.shape, dtype=self.dtype, **self.options)

    def number(self, x: float) -> Any:
        if not self.each:
            return x
        factors = torch.tensor([1.0, 0.5, 0.25])[: self.N]
        return (x * factors).view(-1, 1, 1)

    def exact(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weights after the step, how far rounding may take them, and the means, in float64."""
        g = stacked(self.grads, self.shape) * self.options.get("scale", 1.0)
        finite = self.options.get("finite")
        if finite is not None:
            g = torch.where(finite[:, None, None], g, 0)
        w, r = stacked(self.weights, self.shape), self.rank
        b, d = (torch.as_tensor(self.number(x)).double() for x in (self.b, self.d))
        m, v = b * g, d * g.square()
        m_error, v_error = m.abs() * EPS, 4 * v * EPS
        if self.rest:
            v = v + self.row.double() * self.column.double()
        for f, a, c in zip(self.factors, self.a, self.c, strict=False):
            if f is None:
                continue
            a, c = (torch.as_tensor(self.number(x)).double() for x in (a, c))
            P, size = f.B.double() @ f.A.double(), f.B.double().abs() @ f.A.double().abs()
            m, v = m + a * P, v + c * P.square()
            m_error = m_error + (r + 2) * EPS * a.abs() * size
            v_error = v_error + 2 * (r + 2) * EPS * c * size.square()
        if self.dense:
            E = stacked(self.E[0], self.shape)
            self.new_m = E + 0.25 * (g - E)
            m = self.new_m / (1 - 0.75 ** self.t.double())
            m_error = 4 * EPS * (E.abs() + g.abs())
            E = stacked(self.E[1], self.shape)
            self.new_v = E + 0.5 * (g.square() - E)
            v = self.new_v / (1 - 0.5 ** self.t.double())
            v_error = 8 * EPS * (E.abs() + g.square())
        root = v.clamp(min=0).sqrt() + max(self.eps, torch.finfo(torch.float32).tiny)
        v_error = v_error + 4 * EPS * v
        lr, decay = (torch.as_tensor(self.number(x)).double() for x in (self.lr, self.decay))
        error = m_error / root + m.abs() / root.square() * v_error / (2 * v.sqrt()).clamp(min=1e-30)
        new = decay * w - lr * m / root
        eps = torch.finfo(self.dtype).eps
        allowed = (
            lr * error + 4 * EPS * (w.abs() + lr * (m / root).abs()) + (eps * new.abs() if eps > EPS else 0)
        )
        return (
            new,
            2 * allowed,
            g.square().mean(-1, keepdim=True),
            g.square().mean(-2, keepdim=True),
        )

    def step(self, **options: Any) -> Any:
        options = {"lr": self.number(self.lr), "decay": self.number(self.decay), "eps": self.eps} | options
        if self.dense:
            return self.T.adamw_(self.weights, Full(*self.E, self.t, (0.75, 0.5)), **options)
        return self.T.step_(self.weights, self.M, **options)

    def inputs(self) -> list[Tensor]:
        """All that a step must leave alone."""
        factors = [x for f in self.factors if f is not None for x in f]
        return [*self.grads, *factors, self.row, self.column]

    def check(self) -> None:
        new, allowed, row_means, column_means = self.exact()
        inputs = [x.clone() for x in self.inputs()]
        places = [x.data_ptr() for x in self.weights]
        means = self.step()
        assert [x.data_ptr() for x in self.weights] == places
        assert all(torch.equal(x, y) for x, y in zip(self.inputs(), inputs, strict=True))
        found = stacked(self.weights, self.shape)
        if self.dense:  # torch's fused AdamW takes it where it can, and rounds twice as often
            assert ((found - new).abs() <= 2 * allowed).all(), ((found - new).abs() / allowed).max()
            for E, exact in zip(self.E, (self.new_m, self.new_v), strict=True):
                torch.testing.assert_close(stacked(E, self.shape), exact, rtol=16 * EPS, atol=8 * EPS)
            return
        assert ((found - new).abs() <= allowed).all(), ((found - new).abs() / allowed).max()
        rows, columns = means
        p, q = self.shape
        assert rows.dtype == columns.dtype == torch.float32
        assert (rows.shape, columns.shape) == (row_means.shape, column_means.shape)
        assert ((rows - row_means).abs() <= (q + 4) * EPS * row_means).all()
        assert ((columns - column_means).abs() <= (p + 4) * EPS * column_means).all()


@shapes
@every_dtype
@pytest.mark.parametrize("N", [1, 3])
def test_a_step_of_any_shape_and_type(shape: tuple[int, int], dtype: torch.dtype, N: int) -> None:
    Problem(shape, N, dtype, products=2, rest=True).check()


MOMENTS: dict[str, dict[str, Any]] = {
    "gradient alone": {"products": 0, "b": 1.0, "d": 1.0},
    "one product": {"products": 1},
    "two products": {"products": 2},
    "second product alone": {"products": -2},
    "one product in m, the other in v": {"products": 2, "a": (0.9, 0.0), "c": (0.0, 0.5)},
    "no gradient": {"products": 2, "b": 0.0, "d": 0.0},
    "rest": {"products": 2, "rest": True},
    "rest alone": {"products": 0, "rest": True},
    "dense": {"dense": True},
    "rank 1": {"products": 2, "rank": 1},
}


@pytest.mark.parametrize("each", [False, True], ids=["one", "each"])
@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_step_of_any_moments(name: str, dtype: torch.dtype, each: bool) -> None:
    Problem((23, 31), 3, dtype, each=each, **MOMENTS[name]).check()


@every_dtype
def test_a_step_of_rows_in_wider_matrices_leaves_the_rest_of_them_alone(dtype: torch.dtype) -> None:
    problem = Problem((13, 17), 2, dtype, products=2, rest=True, padding=5)
    around = [x.as_strided((13, 5), (22, 1), 17) for x in problem.weights]
    before = [x.clone() for x in around]
    problem.check()
    assert all(torch.equal(x, y) for x, y in zip(around, before, strict=True))


@pytest.mark.parametrize("scale", [1.0, -1.0, 3.0])
@pytest.mark.parametrize("each", [False, True], ids=["one", "each"])
@pytest.mark.parametrize("lr", [0.125, 0.0])
def test_a_dense_step(scale: float, each: bool, lr: float) -> None:
    Problem((97, 61), 3, lr=lr, each=each, dense=True, options={"scale": scale}).check()


@every_dtype
def test_a_step_against_the_gradient(dtype: torch.dtype) -> None:
    Problem((13, 17), 3, dtype, options={"scale": -1.0}).check()


@pytest.mark.parametrize("dense", [False, True])
@every_dtype
def test_a_skipped_member_stays_to_the_last_bit(dtype: torch.dtype, dense: bool) -> None:
    finite = torch.tensor([True, False, True])
    problem = Problem((13, 17), 3, dtype, dense=dense, options={"finite": finite})
    problem.grads[1][5, 6] = math.nan
    keep = finite.view(-1, 1, 1)
    problem.number = lambda x: torch.where(keep, x, 0.0)  # type: ignore[method-assign]
    E = [[x.clone() for x in each] for each in problem.E]
    before = [x.clone() for x in problem.weights]
    lr, decay = torch.where(keep, 0.1, 0.0), torch.where(keep, 0.9, 1.0)
    problem.step(lr=lr, decay=decay)
    same = [torch.equal(x, y) for x, y in zip(problem.weights, before, strict=True)]
    assert same == [False, True, False]
    for old, new in zip(E, problem.E, strict=True):
        same = [torch.equal(x, y) for x, y in zip(old, new, strict=True)]
        assert same == ([False, True, False] if dense else [True] * 3)
    assert all(x.isfinite().all() for x in problem.weights)


def test_a_zero_second_moment_divides_by_no_zero() -> None:
    problem = Problem((13, 17), 2, products=0, eps=0.0)
    problem.T = operand([torch.zeros(13, 17)] * 2, (13, 17))
    before = [x.clone() for x in problem.weights]
    problem.step()
    for x, y in zip(problem.weights, before, strict=True):
        assert torch.equal(x, 0.875 * y)


def test_a_product_may_leave_the_range_of_float32_where_it_does_not_count() -> None:
    """As the product of v does in m, and its square where v is infinite: nothing moves then."""
    problem = Problem((13, 17), 2, products=-2, a=(0.0, 0.0), b=1.0)
    assert problem.factors[1] is not None
    problem.factors[1].B.mul_(1e30)
    problem.factors[1].A.mul_(1e30)
    before = [x.clone() for x in problem.weights]
    problem.step()
    for x, y in zip(problem.weights, before, strict=True):
        assert torch.equal(x, 0.875 * y)


@pytest.mark.parametrize("shape", [(13, 17), (0, 17), (13, 0)], ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_a_step_without_member_or_element_does_nothing(shape: tuple[int, int], dense: bool) -> None:
    for N in (0, 2) if 0 in shape else (0,):
        problem = Problem(shape, N, products=2, rest=True, dense=dense)
        means = problem.step()
        if not dense:
            assert [x.shape for x in means] == [(N, shape[0], 1), (N, 1, shape[1])]
        problem.T.orthogonal_step_(problem.weights, problem.M, lambda M: M, lr=0.1, decay=0.9)


# --- stochastic rounding


@pytest.mark.parametrize("orthogonal", [False, True], ids=["adam", "muon"])
def test_keys_round_what_the_step_makes_of_float32(orthogonal: bool) -> None:
    """Whatever the tiles: bfloat16 weights become those of a float32 step, rounded as a whole."""
    keys = torch.tensor([5, 2**31 + 7, 11])
    found, wide_ones = (Problem((13, 17), 3, torch.bfloat16) for _ in range(2))
    wide_ones.weights = [x.float() for x in found.weights]
    wide_ones.grads, wide_ones.M = found.grads, found.M
    wide_ones.T = operand(found.grads, (13, 17))
    for problem, options in ((found, {"keys": keys}), (wide_ones, {})):
        if orthogonal:
            problem.T.orthogonal_step_(
                problem.weights, problem.M, lambda M: M.float() / 3, lr=0.1, decay=0.9, **options
            )
        else:
            problem.step(**options)
    rows, columns = torch.arange(13), torch.arange(17)
    expected = rounding.round_(torch.stack(wide_ones.weights), keys, rows, columns, 17).bfloat16()
    assert torch.equal(torch.stack(found.weights), expected)
    nearest = torch.stack(wide_ones.weights).bfloat16()
    assert not torch.equal(expected, nearest)  # else this test shows nothing


# --- the orthogonalised step


@every_dtype
@pytest.mark.parametrize("products", [0, 1, -1])
@pytest.mark.parametrize("each", [False, True], ids=["one", "each"])
def test_the_orthogonalised_step_hands_out_whole_momenta(
    dtype: torch.dtype, products: int, each: bool
) -> None:
    scale = -1.0 if each else 1.0
    options = {"scale": scale}
    problem = Problem((13, 17), 3, dtype, products=products, each=each, padding=2, options=options)
    g, given = scale * stacked(problem.grads, (13, 17)), []
    m = torch.as_tensor(problem.number(problem.b)).double() * g
    size = m.abs()
    if products > 0:
        assert problem.factors[0] is not None
        B, A = (x.double() for x in problem.factors[0])
        m = m + torch.as_tensor(problem.number(0.9)) * (B @ A)
        size = size + B.abs() @ A.abs()

    def half(M: Tensor) -> Tensor:
        given.append(M.clone())
        return (M / 2).bfloat16()

    before = stacked(problem.weights, (13, 17))
    problem.T.orthogonal_step_(
        problem.weights, problem.M, half, lr=problem.number(0.1), decay=problem.number(0.9)
    )
    assert all(M.shape[1:] == (13, 17) and M.dtype == wide(dtype) for M in given)
    seen = torch.cat(given).double()
    assert ((seen - m).abs() <= 8 * EPS * size).all()
    lr, decay = (torch.as_tensor(problem.number(x)).double() for x in (0.1, 0.9))
    new = decay * before - lr * (torch.cat(given) / 2).bfloat16().double()
    allowed = 4 * EPS * (before.abs() + new.abs()) + torch.finfo(dtype).eps * new.abs()
    assert ((stacked(problem.weights, (13, 17)) - new).abs() <= allowed).all()


def test_small_matrices_are_orthogonalised_together_and_large_ones_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def count(M: Tensor) -> Tensor:
        calls.append(len(M))
        return M

    for small, expected in (
        (2 * 13 * 17, [2, 2, 1]),
        (13 * 17, [1] * 5),
        (1, [1] * 5),
        (2**20, [5]),
    ):
        monkeypatch.setattr(gradient, "SMALL", small)
        calls.clear()
        problem = Problem((13, 17), 5)
        problem.T.orthogonal_step_(problem.weights, problem.M, count, lr=0.1, decay=0.9)
        assert calls == expected


# --- sums over processes


class Doubled(gradient.Shards):
    """As if other processes held the same numbers in the other rows and the other columns."""

    count = 4

    def size(self, p: int, q: int) -> tuple[int, int]:
        return 2 * p, 2 * q

    def sum(self, x: Tensor, letters: str) -> Tensor:
        return 2 * x


def test_products_and_means_are_summed_over_processes() -> None:
    grads = [normal(13, 17) for _ in range(2)]
    T, alone = operand(grads, (13, 17), shards=Doubled()), operand(grads, (13, 17))
    assert (T.p, T.q, T.spread) == (26, 34, True)
    X, L = normal(2, 17, 3), normal(2, 3, 13)
    torch.testing.assert_close(T @ X, 2 * (alone @ X))
    torch.testing.assert_close(L @ T, 2 * (L @ alone))
    means: list[tuple[Tensor, Tensor]] = []
    for each in (T, alone):
        problem = Problem((13, 17), 2)
        means.append(each.step_(problem.weights, problem.M, lr=0.0, decay=1.0, eps=1e-8))
    for found, expected in zip(*means, strict=True):  # twice the sum over twice the number
        torch.testing.assert_close(found, expected)
