"""The C backend: products and updates against float64, in a step against torch's operations.

The bounds are those of test_gradient.py: the number of terms of a sum and the size of each, so that they
hold whatever the width of a processor's vectors, and whether it rounds a product before it is added.
"""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import CASES, Case, parameters, set_gradients
from lorapre import backends, rounding
from lorapre.backends import c
from lorapre.backends.c import CGradient
from lorapre.gradient import Factors, Gradient, Moments
from lorapre.sharding import Shards
from operands import EPS
from test_gradient import CPU, MOMENTS, Problem, check_products, normal, stacked

pytestmark = pytest.mark.usefixtures("compiler")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
# Smaller than a block, equal to one, and larger, in every dimension.
SHAPES = [(1, 1), (1, 7), (7, 1), (8, 48), (13, 17), (65, 47), (130, 200), (257, 131), (300, 449)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def operand(grads: list[Tensor], shape: tuple[int, int], **options: Any) -> CGradient:
    return CGradient(grads, shape, CPU, **options)


class CProblem(Problem):
    """An update in C, and the same in float64."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.T = operand(self.grads, self.shape, **self.options)


# --- products with the gradient


@shapes
@dtypes
@pytest.mark.parametrize("N", [1, 3])
def test_products_of_any_shape_and_type(shape: tuple[int, int], dtype: torch.dtype, N: int) -> None:
    grads = [normal(*shape, dtype=dtype) for _ in range(N)]
    check_products(operand(grads, shape), stacked(grads, shape))


@pytest.mark.parametrize("rank", [1, 16, 31, 33, 48, 130])
def test_products_of_any_rank(rank: int) -> None:
    grads = [normal(67, 101, dtype=BF16) for _ in range(2)]
    check_products(operand(grads, (67, 101)), stacked(grads, (67, 101)), rank)


@dtypes
def test_products_of_absolute_masked_scaled_rows_of_wider_matrices(dtype: torch.dtype) -> None:
    grads = [normal(131, 97, dtype=dtype, padding=5) for _ in range(3)]
    exact = -2.0 * stacked(grads, (131, 97))
    grads[1][3, 4], exact[1] = math.nan, 0
    T = operand(grads, (131, 97), finite=torch.tensor([True, False, True]), scale=-2.0)
    check_products(T, exact)
    check_products(abs(T), exact.abs())


# --- the update


@shapes
@dtypes
@pytest.mark.parametrize("N", [1, 3])
def test_a_step_of_any_shape_and_type(shape: tuple[int, int], dtype: torch.dtype, N: int) -> None:
    CProblem(shape, N, dtype, products=2, rest=True).check()


@pytest.mark.parametrize("each", [False, True], ids=["one", "each"])
@pytest.mark.parametrize("name", MOMENTS)
@dtypes
def test_a_step_of_any_moments(name: str, dtype: torch.dtype, each: bool) -> None:
    CProblem((131, 97), 3, dtype, each=each, **MOMENTS[name]).check()


@pytest.mark.parametrize("rank", [1, 16, 127, 129, 260])
def test_a_step_of_any_rank(rank: int) -> None:
    CProblem((67, 101), 2, rank=rank, products=2, rest=True).check()


@dtypes
def test_what_lies_between_rows_is_not_touched(dtype: torch.dtype) -> None:
    problem = CProblem((131, 97), 2, dtype, products=2, rest=True, padding=5)
    around = [x.as_strided((131, 5), (102, 1), 97) for x in problem.weights]
    before = [x.clone() for x in around]
    problem.check()
    assert all(torch.equal(x, y) for x, y in zip(around, before, strict=True))


@dtypes
def test_of_a_masked_member_nothing_changes(dtype: torch.dtype) -> None:
    problem = CProblem((31, 53), 3, dtype, products=2)
    problem.grads[1][3, 4] = math.nan
    problem.T.finite = torch.tensor([True, False, True])
    before = copy.deepcopy(problem.weights)
    rows, columns = problem.step()
    changed = [bool((x != y).any()) for x, y in zip(problem.weights, before, strict=True)]
    assert changed == [True, False, True]
    assert not rows[1].any()
    assert not columns[1].any()


@dtypes
def test_a_column_of_a_wider_matrix(dtype: torch.dtype) -> None:
    """The one column has a stride."""
    problem = CProblem((131, 1), 2, dtype, products=2, rest=True)
    problem.T.grads = [x.repeat(1, 3)[:, ::2][:, 1:] for x in problem.grads]
    problem.weights = [x.repeat(1, 3)[:, ::2][:, 1:] for x in problem.weights]
    assert {x.stride() for x in (*problem.weights, *problem.T.grads)} == {(3, 2)}
    problem.check()


def test_without_means_the_weights_are_the_same() -> None:
    first, second = (copy.deepcopy(x) for x in [CProblem((131, 97), 2, products=2)] * 2)
    assert first.step(means=False) is None
    second.step()
    assert all(torch.equal(x, y) for x, y in zip(first.weights, second.weights, strict=True))


@pytest.mark.parametrize("each", [False, True], ids=["one", "each"])
def test_of_a_weight_of_zero_infinity_counts_nothing(each: bool) -> None:
    problem = CProblem((31, 53), 2, products=2, a=(0.9, 0.0), c=(0.5, 0.0), each=each)
    factors = problem.factors[1]
    assert factors is not None
    expected = copy.deepcopy(problem)
    factors.B.fill_(1e30)
    factors.A.fill_(1e30)
    problem.step()
    expected.step()
    assert all(torch.equal(x, y) for x, y in zip(problem.weights, expected.weights, strict=True))


def test_a_step_of_nothing() -> None:
    M = Moments(b=1.0, d=1.0)
    for N, shape in ((0, (3, 4)), (2, (0, 4)), (2, (3, 0))):
        weights = [torch.zeros(shape)] * N
        check_products(operand([x.to(BF16) for x in weights], shape), torch.zeros(N, *shape).double())
        rows, columns = operand(weights, shape).step_(weights, M, lr=1.0, decay=1.0, eps=1.0)
        assert (rows.shape, columns.shape) == ((N, shape[0], 1), (N, 1, shape[1]))


class Part(Shards):
    """Some rows and columns of a larger matrix."""

    def size(self, p: int, q: int) -> tuple[int, int]:
        return 500, 2**31 // 100

    def rows(self, p: int) -> range | Tensor:
        return torch.arange(p).flip(0) + 3

    def columns(self, q: int) -> range | Tensor:
        return range(5, 5 + q)


ALL_OF_M = Moments(b=1.0)  # and nothing of v, so that with eps = 1 the update is g


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("shards", [Shards(), Part()], ids=["whole", "part"])
def test_bfloat16_weights_have_the_bits_of_torch_and_of_rounding(keyed: bool, shards: Shards) -> None:
    """NaN, infinity and the neighbours of the largest number too."""
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, -3.39e38, 0.0, 1e-40, 65504.0])
    wanted = torch.cat([odd, torch.randn(93)]).repeat(2, 37, 1)
    weights = [torch.zeros(37, 101, dtype=BF16) for _ in range(2)]
    keys = torch.tensor([0x9ABCDEF0, 0x12345678]) if keyed else None
    T = operand(list(-wanted), (37, 101), shards=shards)
    T.step_(weights, ALL_OF_M, lr=1.0, decay=0.0, eps=1.0, keys=keys)
    if keys is not None:
        rows, columns = (torch.as_tensor(list(x)) for x in (T.rows, T.columns))
        rounding.round_(wanted, keys, rows, columns, T.q)
    expected = wanted.to(BF16)
    found = torch.stack(weights)
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize(
    "value", [0.0, 2.0**-24, 6e-8, 1e-5, 6.1e-5, 1.0, 65504.0, 65519.0, 65520.0, 1e9, math.inf]
)
def test_float16_weights_are_rounded_as_torch_rounds(value: float) -> None:
    wanted = torch.tensor([[value, -value, 1.0009765625 * value, math.nan]])
    weight = torch.zeros(1, 4, dtype=F16)
    operand([-wanted], (1, 4)).step_([weight], ALL_OF_M, lr=1.0, decay=0.0, eps=1.0)
    torch.testing.assert_close(weight, wanted.half(), rtol=0, atol=0, equal_nan=True)


# --- what surrounds them


def everything(problem: CProblem) -> list[Tensor]:
    """All results of a problem."""
    factors = problem.factors[0]
    assert factors is not None
    products = [problem.T @ factors.A.mT, factors.B.mT @ problem.T]
    return [*products, *problem.step(), *problem.weights]


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    def run(threads: int) -> list[Tensor]:
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        try:
            return everything(CProblem((300, 449), 3, BF16, rank=40, products=2, rest=True))
        finally:
            torch.set_num_threads(1)

    expected = run(1)
    for threads in (2, 3, 7):
        assert all(torch.equal(x, y) for x, y in zip(run(threads), expected, strict=True)), threads


@pytest.mark.parametrize("setting", [torch.float64, BF16, F16, "meta"], ids=str)
def test_buffers_do_not_follow_the_defaults_of_torch(setting: Any) -> None:
    def run() -> list[Tensor]:
        return everything(copy.deepcopy(made))

    made = CProblem((67, 101), 2, BF16, products=2, rest=True)
    expected = run()
    try:
        if setting == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(setting)
        found = run()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(F32)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def train(case: Case, kind: type[Gradient], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Weights after three steps."""
    params = parameters([(65, 130), (65, 130), (300, 40), (4, 20, 30), (16, 3, 3, 3)], dtype)
    kinds: set[type[Gradient]] = set()
    with pytest.MonkeyPatch.context() as patch:

        def choose(weights: list[Tensor], grads: list[Tensor]) -> tuple[type[Gradient], str | None]:
            kinds.add(backends.backend(weights, grads)[0])
            return kind, None

        patch.setattr("lorapre.batch.backend", choose)
        optimizer = case.make(params, **options)
        for step in range(3):
            set_gradients(params, step)
            if step == 1 and options.get("nonfinite") == "skip":
                params[1].grad[3, 4] = torch.nan
            optimizer.step()
    assert kinds == {CGradient}  # the kind that a step chooses
    return [p.detach().double() for p in params]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@dtypes
@pytest.mark.parametrize(
    "options",
    [{}, {"nonfinite": "skip", "maximize": True, "rank": 17}, {"stochastic_rounding": True}],
    ids=str,
)
def test_a_step_is_that_of_the_operations_of_torch(
    case: Case, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Roots of damped Gram matrices, of condition 1e6, lose a thousand eps for each of some terms.

    That much of m is divided by 0.1 at least; Newton-Schulz in bfloat16 makes it some ulps of 2**-8.
    """
    lr, adam = 1e-2, "adam" in case.cls.__name__.lower()
    if case.options.get("rank", 0) is None:
        options = {key: value for key, value in options.items() if key != "rank"}
    own: dict[str, Any] = {"eps": 0.1} if adam else {"adamw_eps": 0.1}
    found, expected = (train(case, kind, dtype, lr=lr, **own, **options) for kind in (CGradient, Gradient))
    error = 1e3 * 20 * EPS / 0.1 if adam else 3 * 20 * 2.0**-8
    ulp = 0.0 if dtype == F32 else torch.finfo(dtype).eps * (2 if "stochastic_rounding" in options else 1)
    for x, y in zip(found, expected, strict=True):
        assert ((x - y).abs() <= 3 * (lr * error + ulp * (y.abs() + lr))).all(), (x - y).abs().max()


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([torch.zeros(3, 4, dtype=torch.float64)], "no kernel for weights in torch.float64"),
        ([torch.zeros(4, 3).mT], "the rows of a weight are not contiguous"),
        ([torch.zeros(3, 8)[:, ::2]], "the rows of a weight are not contiguous"),
        ([torch.zeros(1, 4).expand(3, 4)], "the rows of a weight are not contiguous"),
        ([torch.zeros(3, 4), torch.zeros(3, 5)[:, :4]], "the weights of a group differ in stride"),
        ([torch.zeros(3, 4), torch.zeros(3, 4, dtype=BF16)], "no kernel for weights in torch.bfloat16"),
        ([torch.zeros(3, 4, device="meta")], "not a plain matrix on the CPU"),
        ([torch._neg_view(torch.zeros(3, 4))], "not a plain matrix on the CPU"),
    ],
)
def test_why_not(tensors: list[Tensor], reason: str) -> None:
    assert reason in str(c.why_not(tensors, [torch.zeros(3, 4)]))
    assert c.why_not([torch.zeros(3, 4)], [torch.zeros(3, 4)]) is None


def test_why_not_of_memory_that_has_been_freed() -> None:
    weight = torch.zeros(3, 4)
    weight.untyped_storage().resize_(0)
    assert "freed" in str(c.why_not([weight], [torch.zeros(3, 4)]))
    assert "not a plain matrix" in str(c.why_not([torch.zeros(3, 4)], [torch.zeros(3, 5)]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"products": [Factors(torch.zeros(2, 7, 3), torch.zeros(2, 3, 10))], "a": [1.0], "c": [1.0]},
        {"products": [Factors(torch.zeros(2, 8, 3), torch.zeros(2, 4, 10))], "a": [1.0], "c": [1.0]},
        {"products": [Factors(torch.zeros(2, 8, 3).double(), torch.zeros(2, 3, 10))], "a": [1.0], "c": [1.0]},
        {"row": torch.zeros(2, 9, 1), "column": torch.zeros(2, 1, 10)},
        {"row": torch.zeros(2, 8, 1), "column": torch.zeros(1, 1, 10)},
        {"b": torch.zeros(3, 1, 1)},
    ],
)  # fmt: skip
def test_what_does_not_fit_is_not_handed_over(wrong: dict[str, Any]) -> None:
    weights = [torch.ones(8, 10) for _ in range(2)]
    T = operand([torch.ones(8, 10)] * 2, (8, 10))
    with pytest.raises(ValueError, match=r"expected|have 2 gradients|each of 2 matrices"):
        T.step_(weights, Moments(**wrong), lr=1.0, decay=1.0, eps=1.0)
    with pytest.raises(ValueError, match=r"expected a plain tensor \(2, 10, 3\)"):
        abs(T) @ torch.zeros(2, 9, 3)
    with pytest.raises(ValueError, match=r"expected a plain tensor \(2, 3, 8\)"):
        torch.zeros(2, 3, 8).double() @ abs(T)
    with pytest.raises(ValueError, match="1 weights have 2 gradients"):
        T.step_(weights[:1], Moments(b=1.0), lr=1.0, decay=1.0, eps=1.0)
    assert all(bool((w == 1).all()) for w in weights)


def test_tensors_without_memory_are_left_to_torch() -> None:
    """As those that tools step to estimate memory."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(70, 80))]
        params[0].grad = torch.ones(70, 80)
        optimizer = CASES["adam-split"].make(params, rank=6)
        with pytest.warns(UserWarning, match="is a FakeTensor, not a plain tensor"):
            optimizer.step()
        assert optimizer.state[params[0]]["m_B"].shape == (70, 6)


def test_float64_weights_keep_their_precision_in_silence() -> None:
    params = parameters([(20, 30)], torch.float64)
    set_gradients(params, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CASES["adam-split"].make(params).step()
    assert params[0].dtype == torch.float64
