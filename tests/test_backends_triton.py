"""The Triton backend against float64 and plain torch: on a GPU, or in Triton's interpreter.

Tolerances are bounds of rounding errors, from the number of terms and the precision of operands.
Without a GPU the kernels are also compiled, for devices that matter, to see that they can be.
"""

import copy
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn

from cases import ADAM, CASES, assert_same, gradient, parameters
from lorapre import rounding
from lorapre.backends import triton as backend
from lorapre.backends.triton import TritonGradient
from lorapre.gradient import Factors, Full, Gradient, Moments, Number
from lorapre.sharding import Shards

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if GPU else torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = torch.finfo(F32).eps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backend.triton is None, reason="Triton is not installed"),
]
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

# p, q, r: odd sizes, one row, one column, padded ranks, lengths cut in parts, ranks in chunks.
SIZES = [
    (17, 33, 4), (64, 64, 16), (130, 70, 48), (1, 40, 5), (40, 1, 6), (20, 1100, 16), (600, 20, 8),
    (40, 50, 130),
]  # fmt: skip
TYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32)]  # weight, gradient
SOME = ["adam-paper", "adam-split", "adam-dense"]
Types: TypeAlias = "tuple[torch.dtype, torch.dtype]"  # of weights and gradients
kinds = pytest.mark.parametrize("kind", [Gradient, TritonGradient])


def name_of(x: Any) -> str:
    return "-".join(str(i).removeprefix("torch.") for i in x)


def unit(dtype: torch.dtype) -> float:
    """How far rounding to a dtype moves a number, relative to it."""
    return torch.finfo(dtype).eps / 2


def product_error(grad: torch.dtype, terms: int, *, of_gradient: bool) -> float:
    """Bound of the error of each entry of a product X Y, in units of that entry of |X| |Y|.

    Each of `terms` sums, and each product, is rounded, on some devices towards zero. With a
    bfloat16 gradient the other operand is rounded to bfloat16. Beside gradients of 16 bits both are
    rounded to the 10 bits of TF32, by cutting the others off. Three TF32 products in the place of
    one leave out the product of the two rests.
    """
    operands = 0.0 if grad == F32 or not GPU else 2 * 2.0**-10
    if grad == BF16 and of_gradient:
        operands = unit(BF16)
    return operands + ((3 * terms if GPU else terms) + 8) * EPS


def assert_within(actual: Tensor, exact: Tensor, error: Tensor) -> None:
    excess = (actual.double() - exact).abs() - error
    assert (excess <= 0).all(), f"{excess.max()} above {error.max()}"


class Problem:
    """N gradients as an operand, the weights, and moments of all kinds."""

    def __init__(
        self, p: int, q: int, r: int, types: Types = (F32, F32), *, N: int = 2,
        strided: bool = False, finite: bool = False, products: int = 2, dense: bool = False,
        rest: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=DEVICE)

        def matrix(dtype: torch.dtype) -> Tensor:
            return randn(p, q + 7).to(dtype)[:, 3 : q + 3] if strided else randn(p, q).to(dtype)

        def number() -> Tensor:
            return 0.5 + 0.5 * torch.rand(N, 1, 1, device=DEVICE)

        self.types = types
        self.weights, self.grads = ([matrix(x) for _ in range(N)] for x in types)
        self.alive = torch.arange(N, device=DEVICE) > (0 if finite else -1)
        if finite:
            self.grads[0][-1, -1] = torch.nan
        self.T = TritonGradient(self.grads, (p, q), DEVICE, finite=self.alive if finite else None, **options)
        factors: list[Factors | None] = [Factors(randn(N, p, r), randn(N, r, q)) for _ in range(products)]
        alive = self.alive[:, None, None]
        self.lr, self.decay = torch.where(alive, number(), 0), torch.where(alive, number(), 1)
        self.t = torch.arange(1.0, N + 1, device=DEVICE).view(-1, 1, 1)
        self.full = [[randn(p, q).square() for _ in range(N)] for _ in range(2)] if dense else None
        sides = (randn(N, p, 1).square(), randn(N, 1, q).square()) if rest else (None, None)
        self.M = Moments(
            factors, [number() for _ in factors], number(), [number() for _ in factors], number(),
            *sides,
        )  # fmt: skip

    def step(self, T: Gradient | None = None, **changes: Any) -> Any:
        options: dict[str, Any] = dict(lr=self.lr, decay=self.decay, eps=1e-3) | changes
        if self.full is not None:
            return (T or self.T).adamw_(self.weights, Full(*self.full, self.t, (0.75, 0.5)), **options)
        return (T or self.T).step_(self.weights, self.M, **options)

    def target(self) -> Tensor:
        """T in float64."""
        g = torch.stack(self.grads).double() * self.T.scale
        return torch.where(self.alive[:, None, None], g, 0)

    def as_torch(self) -> Gradient:
        """The same operand in plain torch."""
        T = Gradient.__new__(Gradient)
        vars(T).update(vars(self.T))
        return T


@pytest.mark.parametrize("types", TYPES[:3], ids=name_of)
@pytest.mark.parametrize("size", SIZES, ids=name_of)
def test_products(size: tuple[int, int, int], types: Types) -> None:
    p, q, r = size
    x = Problem(*size, types, N=1, products=0, scale=-0.5)
    check_products(x, torch.randn(1, q, r, device=DEVICE), torch.randn(1, r, p, device=DEVICE))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_products_of_operands_in_any_layout(dtype: torch.dtype) -> None:
    x = Problem(30, 41, 1, (dtype, dtype), products=0, strided=True, finite=True, N=3)
    X, L = (
        torch.randn(1, 5, 41, device=DEVICE).mT.expand(3, -1, -1),
        torch.randn(3, 30, 11, device=DEVICE)[..., ::2].mT,
    )
    check_products(x, X, L)
    x.T = abs(x.T)
    check_products(x, X, L)


def check_products(x: Problem, X: Tensor, L: Tensor) -> None:
    T, (p, q), grad = x.target(), x.T.local_shape, x.types[1]
    T = T.abs() if x.T.absolute else T
    for kind in (x.T, x.as_torch()):
        right, left = kind @ X, L @ kind
        assert right.dtype == left.dtype == F32
        error = product_error(grad, q, of_gradient=True) * (T.abs() @ X.abs().double())
        assert_within(right, T @ X.double(), error)
        error = product_error(grad, p, of_gradient=True) * (L.abs().double() @ T.abs())
        assert_within(left, L.double() @ T, error)


def check_step(x: Problem, T: Gradient, **changes: Any) -> None:
    """The weights, moments and sums after a step, against float64 and bounds of its errors."""
    before, full = copy.deepcopy((x.weights, x.full))
    W, g, M, grad = torch.stack(x.weights).double(), x.target(), x.M, x.types[1]
    means = x.step(T, **changes)
    (p, q), square = x.T.local_shape, g * g
    if x.full is None:
        rows, columns = means
        assert_within(rows, square.mean(-1, keepdim=True), (q + 4) * EPS * square.mean(-1, keepdim=True))
        assert_within(columns, square.mean(-2, keepdim=True), (p + 4) * EPS * square.mean(-2, keepdim=True))
    m, v = M.b * g, M.d * square
    m_error, v_error = 2 * EPS * m.abs(), 3 * EPS * v
    if M.row is not None and M.column is not None:
        v, v_error = v + M.row.double() * M.column, v_error + 2 * EPS * M.row * M.column
    for factors, a, c in zip(M.products, M.a, M.c, strict=True):
        if factors is not None:
            B, A = (y.double() for y in factors)
            P = B @ A
            error = product_error(grad, B.shape[-1], of_gradient=False) * (B.abs() @ A.abs())
            m, m_error = m + a * P, m_error + a * (error + 2 * EPS * P.abs())
            v, v_error = (
                v + c * P * P,
                v_error + c * (2 * P.abs() * error + error**2 + 3 * EPS * P * P),
            )
            m_error, v_error = m_error + EPS * m.abs(), v_error + EPS * v
    for i, target in enumerate((g, square) if full else ()):
        rate, old = (0.25, 0.5)[i], torch.stack(full[i]).double()
        alive = x.alive[:, None, None].double()
        E = old + rate * alive * (target - old)
        error = 4 * EPS * (old.abs() + (rate * target).abs())
        assert_within(torch.stack(x.full[i]), E, error)
        unbias = 1 / (1 - (1 - rate) ** x.t.double())
        E, error = unbias * E, unbias * (error + EPS * E.abs())
        m, m_error, v, v_error = (E, error, v, v_error) if i == 0 else (m, m_error, E, error)
    # sqrt(v + e) - sqrt(v) is at most e / sqrt(v), and at most sqrt(e).
    root = v.sqrt()
    root_error = torch.minimum(v_error.sqrt(), v_error / root.clamp(min=1e-300)) + 2 * EPS * root
    update, least = m / (root + 1e-3), (root - root_error).clamp(min=0) + 1e-3
    update_error = (m_error + update.abs() * root_error) / least + 4 * EPS * update.abs()
    expected = x.decay * W - x.lr * update
    error = x.lr * update_error + 2 * EPS * (x.decay * W).abs() + (EPS + unit(x.types[0])) * expected.abs()
    assert_within(torch.stack(x.weights), expected, error * (1 + 1e-6))
    for n in range(len(x.weights)):
        if not x.alive[n]:
            assert_same(x.weights[n], before[n])
            for new, old in zip(x.full or (), full or (), strict=True):
                assert torch.equal(new[n], old[n])


@kinds
@pytest.mark.parametrize("types", TYPES, ids=name_of)
@pytest.mark.parametrize("size", [SIZES[i] for i in (0, 3, 4, 7)], ids=name_of)
def test_updates(size: tuple[int, int, int], types: Types, kind: type[Gradient]) -> None:
    x = Problem(*size, types)
    check_step(x, x.T if kind is TritonGradient else x.as_torch())


@kinds
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", [
    dict(strided=True), dict(finite=True), dict(scale=-0.5), dict(rest=False),
    dict(products=1, rest=False), dict(dense=True), dict(dense=True, finite=True),
    dict(dense=True, strided=True, scale=-1.0),
], ids="-".join)  # fmt: skip
def test_options_of_updates(options: dict[str, Any], dtype: torch.dtype, kind: type[Gradient]) -> None:
    x = Problem(33, 70, 5, (dtype, dtype), **options)
    assert backend.why_not(x.weights, x.grads) is None
    check_step(x, x.T if kind is TritonGradient else x.as_torch())


def test_numbers_are_floats_or_tensors() -> None:
    def run(lr: Number, decay: Number, a: Number) -> Tensor:
        torch.manual_seed(0)
        x = Problem(9, 12, 4)
        x.M = x.M._replace(a=[a, 0.0], c=[0.0, a])
        x.step(lr=lr, decay=decay)
        return torch.stack(x.weights)

    plain = run(0.5, 0.25, 0.75)
    each = [torch.full((2, 1, 1), x, device=DEVICE, dtype=torch.float64) for x in (0.5, 0.25, 0.75)]
    assert torch.equal(plain, run(*each))
    assert torch.equal(plain, run(torch.tensor(0.5), torch.tensor(0.25, device=DEVICE), each[2].float()))


@pytest.mark.parametrize("none", [None, 0.0], ids=["no-product", "weight-zero"])
def test_products_that_do_not_count(none: float | None) -> None:
    x = Problem(9, 12, 4)
    y = copy.deepcopy(x)
    x.M = x.M._replace(a=[0.5, 0.0], c=[0.25, 0.0])
    y.M = x.M._replace(products=x.M.products[:1], a=[0.5], c=[0.25])
    if none is None:
        x.M = x.M._replace(products=[x.M.products[0], None], a=[0.5, 1.0], c=[0.25, 1.0])
    assert_same(x.step(), y.step())
    assert_same(x.weights, y.weights)


def test_a_product_is_weighed_before_it_is_squared() -> None:
    x = Problem(9, 12, 4, products=1, rest=False)
    x.M.products[0].B.fill_(1e20)
    x.M.products[0].A.fill_(1.0)
    x.M = x.M._replace(a=[1.0], c=[torch.full((2, 1, 1), 1e-20, device=DEVICE)], b=0.0, d=0.0)
    x.step(lr=1.0, decay=0.0, eps=0.0)
    assert (torch.stack(x.weights) + 1e10).abs().max() <= 8 * EPS * 1e10


def test_what_lies_between_strided_rows_is_not_touched() -> None:
    x = Problem(5, 6, 4, strided=True)
    around = x.weights[0]._base
    assert around is not None
    before = around.clone()
    x.step()
    assert torch.equal(around[:, :3], before[:, :3])
    assert torch.equal(around[:, 9:], before[:, 9:])
    assert not torch.equal(around[:, 3:9], before[:, 3:9])


def test_moments_in_another_order_take_torch() -> None:
    x = Problem(9, 12, 4, dense=True)
    assert x.full is not None
    x.full[1] = [E.mT.contiguous().mT for E in x.full[1]]
    check_step(x, x.T)


def test_factors_in_any_layout() -> None:
    x = Problem(10, 14, 4)
    y = copy.deepcopy(x)
    y.M = y.M._replace(
        products=[f and Factors(*(z.mT.contiguous().mT for z in f)) for f in y.M.products],
        a=[a.expand(2, 1, 1) for a in y.M.a],
    )  # fmt: skip
    assert_same(x.step(), y.step())
    assert_same(x.weights, y.weights)


def test_wide_loads_are_for_rows_that_begin_at_16_bytes() -> None:
    x = torch.zeros(8, 32, device=DEVICE)
    assert all(backend._table([y])[1] for y in (x, x[:, 4:], x[::2], x[:1, :5]))
    assert not any(backend._table([y])[1] for y in (x[:, 1:], x[..., 1:].contiguous()))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_shard_has_empty_sums(shape: tuple[int, int]) -> None:
    x = Problem(*shape, 4)
    right = x.T._right(torch.randn(2, shape[1], 4, device=DEVICE))
    left = x.T._left(torch.randn(2, 4, shape[0], device=DEVICE))
    rows, columns = x.T._step_(x.weights, x.M, 0.1, 0.9, 1e-8, None, True)
    found = [tuple(y.shape) for y in (right, left, rows, columns)]
    assert found == [(2, shape[0], 4), (2, 4, shape[1]), (2, shape[0], 1), (2, 1, shape[1])]
    assert not any(y.any() for y in (right, left, rows, columns))


@needs_gpu
def test_the_same_bits_at_every_run() -> None:
    def run() -> list[Any]:
        torch.manual_seed(0)
        x = Problem(400, 1100, 16, (BF16, BF16))
        factors = x.M.products[0]
        assert factors is not None
        return [x.T @ factors.A.mT, factors.B.mT @ x.T, x.step(), x.weights]

    assert_same(run(), run())


class Held(Shards):
    """Some rows and columns of whole matrices of (20, 30)."""

    count = 2

    def __init__(self, rows: range, columns: range) -> None:
        self.places = rows, columns

    def size(self, p: int, q: int) -> tuple[int, int]:
        return 20, 30

    def rows(self, p: int) -> range | Tensor:
        rows = self.places[0]
        return rows if rows.step == 1 else torch.tensor(rows, device=DEVICE)

    def columns(self, q: int) -> range | Tensor:
        return self.places[1]


def rounded(x: Problem, keys: Tensor) -> Tensor:
    """The weights after a step that multiplies them by 0.99, and tests nothing but the rounding."""
    x.step(decay=0.99, lr=0.0, keys=keys)
    return torch.stack(x.weights)


@pytest.mark.parametrize("size", [(17, 33, 4), (64, 80, 130)], ids=name_of)
def test_stochastic_rounding_has_the_bits_of_its_definition(size: tuple[int, int, int]) -> None:
    x = Problem(*size, (BF16, BF16))
    largest = torch.finfo(BF16).max
    edges = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, largest, -largest, 1e-37], device=DEVICE)
    x.weights[0][0, :7] = edges.to(BF16)
    keys = torch.tensor([2**32 - 1, 12345], device=DEVICE)
    exact = torch.stack(x.weights).float() * torch.tensor(0.99)
    rows, columns = (torch.arange(n, device=DEVICE) for n in size[:2])
    expected = rounding.round_(exact.clone(), keys, rows, columns, size[1]).to(BF16)
    assert torch.equal(rounded(x, keys).view(torch.int16), expected.view(torch.int16))
    assert not torch.equal(expected, exact.to(BF16))


@pytest.mark.parametrize("rows", [range(5, 13), range(1, 17, 2)], ids=str)
def test_a_shard_is_rounded_as_the_whole(rows: range) -> None:
    columns = range(7, 18)
    whole = Problem(20, 30, 4, (BF16, BF16), N=1)
    part = Problem(8, 11, 4, (BF16, BF16), N=1, shards=Held(rows, columns))
    part.weights[0].copy_(whole.weights[0][rows.start : rows.stop : rows.step, 7:18])
    keys = torch.tensor([99], device=DEVICE)
    expected = rounded(whole, keys)[:, rows.start : rows.stop : rows.step, 7:18]
    assert torch.equal(rounded(part, keys), expected)


def test_a_number_beyond_the_largest_bfloat16_becomes_that() -> None:
    x = Problem(4, 40, 4, (BF16, BF16), N=1)
    x.weights[0].fill_(torch.finfo(BF16).max)
    x.step(decay=1.001, lr=0.0, keys=torch.tensor([7], device=DEVICE))
    assert x.weights[0].isfinite().all()


def test_addresses_are_sent_once() -> None:
    x = Problem(9, 12, 4)
    backend._upload.cache_clear()
    for _ in range(3):
        x.step()
        x.T @ torch.zeros(2, 12, 4, device=DEVICE)
        torch.zeros(2, 4, 9, device=DEVICE) @ x.T
    assert backend._upload.cache_info()[:2] == (7, 2)  # hits, misses
    assert backend._upload.cache_info().maxsize is not None


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(8, 12, device=DEVICE)
    assert backend.why_not([x.bfloat16(), x.bfloat16()], [x, x]) is None
    assert backend.why_not([x[:1], torch.zeros(1, 40, device=DEVICE)[:, :12]], [x[:1]] * 2) is None

    def reason(weights: list[Any], grads: list[Any]) -> str:
        return backend.why_not(weights, grads) or ""

    assert reason([x[:1, :1]] * 2**16, [x]) == "there are more than 65535 matrices"
    assert "a weight is a Buffer, not a plain tensor" in reason([nn.Buffer(x).as_subclass(nn.Buffer)], [x])
    assert "no kernel for weights in torch.float64" in reason([x.double()], [x])
    assert "no kernel for gradients in torch.int32" in reason([x], [x.int()])
    assert "rows of a gradient are not contiguous" in reason([x], [torch.zeros(12, 8, device=DEVICE).mT])
    assert "rows of a weight are not contiguous" in reason([torch.zeros(8, 24, device=DEVICE)[:, ::2]], [x])
    assert "gradients of a batch differ" in reason([x, x], [x, torch.zeros(8, 20, device=DEVICE)[:, :12]])
    assert "weights of a batch differ" in reason([x, x.bfloat16()], [x, x])
    far = torch.empty(2**25 + 2, dtype=BF16, device=DEVICE).as_strided((2, 2), (2**25, 1))
    assert "more than 16777216 elements apart" in reason([far], [far])
    with monkeypatch.context() as patch:
        patch.setattr(backend, "triton", None)
        assert reason([x], [x]) == "Triton is not installed"
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_interpreted", lambda: False)
        assert "the weights are on cpu" in reason([x.cpu()], [x.cpu()])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        old: Any = types.SimpleNamespace(device=torch.device("cuda", 0))
        assert reason([old], [old]) == "Tesla T4 is older than compute capability 8.0"


# Whole steps


class Shaken(Gradient):
    """Plain torch, with errors of random signs in the size of the bounds above.

    What these do to the result of some steps tells what the errors of any backend may do, however
    badly conditioned the systems are that the steps solve.
    """

    def _right(self, X: Tensor) -> Tensor:
        return self._shake(super()._right(X), abs(self), self.local_shape[1], X.abs(), Gradient._right)

    def _left(self, L: Tensor) -> Tensor:
        return self._shake(super()._left(L), abs(self), self.local_shape[0], L.abs(), Gradient._left)

    def _shake(self, product: Tensor, T: Gradient, terms: int, X: Tensor, of: Any) -> Tensor:
        error = product_error(self.grads[0].dtype, terms, of_gradient=True)
        return product + error * signs(product) * of(T, X)

    def _step_(self, weights: Any, M: Moments, *args: Any) -> tuple[Tensor, Tensor] | None:
        def shaken(x: Tensor | None, error: float) -> Any:
            return x if x is None else x * (1 + error * signs(x))

        products = []
        for factors in M.products:
            error = product_error(
                self.grads[0].dtype, factors.B.shape[-1] if factors else 0, of_gradient=False
            )
            products.append(factors and Factors(*(shaken(x, error) for x in factors)))
        row, column = (shaken(x, 4 * EPS) for x in (M.row, M.column))
        M = M._replace(products=products, row=row, column=column)
        sums = super()._step_(weights, M, *args)
        if sums is None:
            return None
        rows, columns = sums
        return shaken(rows, (self.q + 4) * EPS), shaken(columns, (self.p + 4) * EPS)


def signs(x: Tensor) -> Tensor:
    return torch.randint_like(x, 2) * 2 - 1


class Run:
    """Weights and their optimizer, whose gradients are operands of a kind."""

    # Two of one shape, a shape that fits no block, experts, a convolution; dense: a vector.
    SHAPES = ((12, 20), (12, 20), (37, 71), (3, 10, 14), (8, 3, 3, 3), (7,))

    def __init__(
        self, name: str, kind: type[Gradient], types: Types = (F32, F32), *,
        shapes: Any = SHAPES, **options: Any,
    ) -> None:  # fmt: skip
        self.kind, self.types = kind, types
        self.params = [nn.Parameter(p.detach().to(DEVICE, types[0])) for p in parameters(shapes)]
        self.optimizer = CASES[name].make(self.params, **options)

    def step(self, number: int, *, poison: int | None = None, only: Any = ...) -> None:
        """A step along gradients that are zero but for `only`; that of `poison` holds a NaN."""
        for i, p in enumerate(self.params):
            g = torch.zeros(p.shape)
            g[only] = gradient(p.shape, number, i)[only]
            if i == poison:
                g.view(-1)[-1] = torch.nan
            if self.types[0] != self.types[1]:
                p.grad_dtype = self.types[1]
            p.grad = g.to(DEVICE, self.types[1])

        def choose(weights: Any, grads: Any, **options: Any) -> tuple[type[Gradient], None]:
            assert backend.why_not(weights, grads) is None
            return self.kind, None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lorapre.batch.backend", choose)
            self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def state(self) -> list[Tensor]:
        """The state; products for factors, whose bases are rounding where B A is small."""
        found: list[Tensor] = []
        for own in self.optimizer.state.values():
            found += [own[f"{name}_B"] @ own[f"{name}_A"] for name in "mv" if f"{name}_B" in own]
            found += [value.clone() for name, value in own.items() if name[2:] not in ("A", "B")]
        return found


def check(
    name: str, types: Types = (F32, F32), *, poison: tuple[int | None, ...] = (None,) * 3,
    **options: Any,
) -> Run:  # fmt: skip
    """Triton and torch take steps alike, up to twice what errors in the size of their bounds do."""
    ours, torch_, *shaken = (
        Run(name, kind, types, **options) for kind in (TritonGradient, Gradient, Shaken, Shaken, Shaken)
    )
    for step, bad in enumerate(poison):
        for run in (ours, torch_, *shaken):
            before = run.weights()
            run.step(step, poison=bad)
            if bad is not None:
                assert torch.equal(run.params[bad], before[bad])
    found = [run.weights() + run.state() for run in (ours, torch_, *shaken)]
    for x, expected, *others in zip(*found, strict=True):
        moved = max(float((other.double() - expected.double()).abs().max()) for other in others)
        # And an error of float32 a step, or of narrow weights, where either neighbour is right.
        last = (
            2
            * len(poison)
            * (torch.finfo(x.dtype).eps * expected.double().abs() + EPS * expected.abs().max())
        )
        excess = (x.double() - expected.double()).abs() - (2 * moved + last)
        assert (excess <= 0).all(), (float(excess.max()), moved, x.shape)
    return ours


@pytest.mark.parametrize("name", ADAM)
def test_steps_equal_those_in_torch(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", SOME)
def test_steps_in_bfloat16_equal_those_in_torch(name: str) -> None:
    check(name, (BF16, BF16), shapes=Run.SHAPES[:4])


@pytest.mark.parametrize("types", [(F32, BF16), (BF16, F32), (F16, F16)], ids=name_of)
def test_dtypes(types: Types) -> None:
    if types[0] != types[1] and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch takes no gradient of another dtype than the weight's")
    check("adam-split", types, shapes=Run.SHAPES[:3])


@pytest.mark.parametrize("options", [
    dict(maximize=True), dict(lr=torch.tensor(0.01), weight_decay=0.0),
    dict(scale=0.25, betas=(0.0, 0.5)),
    dict(eps=0.0), dict(lr=torch.tensor(0.01, device=DEVICE)),
], ids="-".join)  # fmt: skip
@pytest.mark.parametrize("name", ["adam-paper", "adam-split", "adam-dense"])
def test_options_of_steps(name: str, options: dict[str, Any]) -> None:
    check(name, shapes=Run.SHAPES[2:4], **options)


@pytest.mark.parametrize("name", SOME)
def test_a_gradient_that_is_not_finite_is_skipped(name: str) -> None:
    # One of two of a shape, experts.
    check(name, shapes=[*Run.SHAPES[:2], Run.SHAPES[3]], nonfinite="skip", poison=(None, 1, 2, None))


@pytest.mark.parametrize("name", ["adam-split", "muon-subspace"])
def test_a_large_rank(name: str) -> None:
    check(name, shapes=[(150, 170)], rank=70, poison=(None, None))


def test_stochastic_rounding_draws_the_same_bits() -> None:
    ours = check("adam-split", (BF16, BF16), stochastic_rounding=True, seed=3)
    nearest = Run("adam-split", TritonGradient, (BF16, BF16))
    for step in range(3):
        nearest.step(step)
    assert all((x != y).any() for x, y in zip(ours.weights(), nearest.weights(), strict=True))


def test_a_column_without_gradient_stays_where_it_is() -> None:
    x = Run("adam-dense", TritonGradient, (BF16, BF16), shapes=[(37, 71)], weight_decay=0.0, eps=1e-30)
    before = x.weights()[0]
    for step in range(2):
        x.step(step, only=(..., slice(6, None)))
    assert torch.equal(x.weights()[0][:, :6], before[:, :6])


def test_factors_find_rows_and_columns_that_were_zero() -> None:
    x = Run("adam-split", TritonGradient, (BF16, BF16), shapes=[(12, 20)])
    for step in range(7):  # in the upper left corner, then in the lower right
        x.step(step, only=(slice(6), slice(10)) if step < 2 else (slice(6, None), slice(10, None)))
    assert x.state()[0][6:, 10:].any()  # by way of the probe


# The compiler


def run_script(script: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True,
        env=os.environ | environment, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_library_does_without_triton() -> None:
    run_script(
        "import sys; sys.modules['triton'] = None; import torch; "
        "from lorapre.backends.triton import why_not; "
        "x = torch.zeros(2, 2); assert why_not([x], [x]) == 'Triton is not installed'"
    )


def compile_all() -> None:
    """Compile the kernels as some problems would launch them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    class Compiler:
        def __init__(self, function: Any) -> None:
            self.function = function

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return self.launch

        def launch(self, *args: Any, **rest: Any) -> None:
            options = {name: rest.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
            signature, constants, hints = {}, {}, {}
            for i, name in enumerate(self.function.arg_names):
                x = args[i] if i < len(args) else rest[name]
                if i >= len(args) or x is None or (isinstance(x, int) and x == 1):
                    signature[name], constants[(i,)] = "constexpr", x
                    continue
                kinds = {F32: "*fp32", torch.int64: "*i64", torch.bool: "*i1"}
                signature[name] = kinds[x.dtype] if isinstance(x, Tensor) else "i32"
                signature[name] = "fp32" if isinstance(x, float) else signature[name]
                if isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0):
                    hints[(i,)] = [["tt.divisibility", 16]]
            source = ASTSource(self.function, signature, constants, hints)
            for capability in (80, 90) if "update" in self.function.__name__ else (80,):
                program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
                assert program.metadata.shared <= 99 * 1024
                print(capability, self.function.__name__, program.metadata.shared)

    backend._interpreted = lambda: False
    backend._product_kernel = Compiler(backend._product_kernel)
    backend._update_kernel = Compiler(backend._update_kernel)
    keys = torch.zeros(2, dtype=torch.int64)
    for x in (
        Problem(64, 64, 128, (BF16, BF16), finite=True),
        Problem(64, 64, 64, (F32, F32), products=1, rest=False),
        Problem(17, 33, 16, (F16, F16), dense=True),
    ):
        x.step(keys=keys if x.types[0] == BF16 else None)
        x.T @ torch.zeros(2, x.T.q, 128)
        torch.zeros(2, 64, x.T.p) @ abs(x.T)
    Problem(1, 1, 1, (BF16, F32)).step(lr=0.1, decay=0.9)


def test_the_kernels_compile_for_devices_that_are_not_here(tmp_path: Path) -> None:
    output = run_script(
        "import test_backends_triton; test_backends_triton.compile_all()",
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert output.count("_update_kernel") == 8
    assert output.count("_product_kernel") == 6


@needs_gpu
def test_no_call_waits_for_the_device() -> None:
    x = Problem(64, 64, 16, (BF16, BF16))
    X = torch.zeros(2, 64, 16, device=DEVICE)
    x.step(), x.T @ X
    backend._upload.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x.step(decay=0.99, lr=torch.tensor(0.1), keys=torch.zeros(2, dtype=torch.int64, device=DEVICE))
        x.T @ X, X.mT @ x.T
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_cuda_graph_replays_the_step() -> None:
    x = Problem(64, 64, 16, (BF16, BF16))
    y = copy.deepcopy(x)
    X, start = torch.randn(2, 64, 16, device=DEVICE), [w.clone() for w in x.weights]
    x.step(), x.T @ X
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        means, product = x.step(), x.T @ X
    backend._upload.cache_clear()
    for w, old in zip(x.weights, start, strict=True):
        w.copy_(old)
    for _ in range(3):
        graph.replay()
        expected = y.step(), y.T @ X
    assert_same([x.weights, means, product], [y.weights, *expected])


@needs_gpu
@pytest.mark.parametrize("name", ADAM)
def test_no_step_waits_for_the_device(name: str) -> None:
    ours = Run(name, TritonGradient, (BF16, BF16), nonfinite="skip", stochastic_rounding=True)
    ours.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
