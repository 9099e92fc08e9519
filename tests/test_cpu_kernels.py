"""The kernels for CPUs: against their equations in float64, and in a step against torch's operations."""

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import CASES, FACTORISED, Case, parameters, set_gradients
from lorapre import cpu_kernels, launch, rounding
from lorapre.factors import _damped_root, gauge_
from lorapre.linalg import WHOLE, _whitening, waves
from lorapre.operands import Dense, Factors, Split

pytestmark = pytest.mark.usefixtures("compiler")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
dtypes = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
# Below, at and above what a block holds, in every direction; nothing to sum, no rows and no columns.
sizes = pytest.mark.parametrize(
    ("p", "q", "r"),
    [
        (8, 48, 16), (1, 1, 1), (130, 200, 5), (65, 47, 33), (260, 129, 50), (300, 193, 129), (0, 9, 3),
        (9, 0, 3),
    ],
    ids=str,
)  # fmt: skip


def matrices(n: int, p: int, q: int, dtype: torch.dtype = F32, gap: int = 3) -> list[Tensor]:
    """n matrices (p, q) whose rows have a gap between them."""
    return [torch.randn(p, q + gap).to(dtype)[:, :q] for _ in range(n)]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    """Up to `tolerance` of the largest entry."""
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max()
        assert error <= tolerance * expected.double().abs().max(), float(error)


@sizes
@dtypes
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_products_with_the_gradient(
    p: int, q: int, r: int, dtype: torch.dtype, absolute: bool, sign: float
) -> None:
    grads, finite = matrices(3, p, q, dtype), torch.tensor([True, False, True])
    T = torch.stack(grads).double() * finite[:, None, None]
    T = T.abs() if absolute else sign * T
    A, Lt = torch.randn(3, r, q + 1)[..., :q], torch.randn(3, p, r).mT
    options: dict[str, Any] = dict(sign=sign, finite=finite)
    taken = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    rows = cpu_kernels.row_products(grads, A, absolute, **options)
    assert_near(rows, T @ A.to(taken).double().mT)
    for basis in (Lt, Lt.contiguous()):
        columns = cpu_kernels.column_products(grads, basis, absolute, **options)
        assert_near(columns, basis.to(taken).double() @ T)


class Step:
    """An update of three matrices, and what it should be."""

    def __init__(self, p: int, q: int, r: int, dtype: torch.dtype, first: str, second: str) -> None:
        n, self.sign, self.lr, self.decay, self.eps = 3, -1.0, torch.rand(3), 0.9, 0.1
        self.finite = torch.tensor([True, False, True])
        self.weights, self.grads = matrices(n, p, q, dtype), matrices(n, p, q, dtype)
        w, g = (torch.stack(x).double() for x in (self.weights, self.grads))
        g *= self.sign * self.finite[:, None, None]
        B, A, C, W = torch.randn(n, p, r), torch.randn(n, r, q), torch.randn(n, p, r), torch.randn(n, r, q)
        row, column, keep = torch.rand(n, p), torch.rand(n, q), torch.rand(n)
        product, held = B.double() @ A.double(), C.double() @ W.double()
        kept = keep.double()[:, None, None]
        self.ema = {name: [x.clone() for x in matrices(n, p, q)] for name in ("m", "v")}
        self.ema["v"] = [x.square() for x in self.ema["v"]]
        self.new: dict[str, Tensor] = {}
        self.first: Factors | Dense
        self.second: Factors | Dense | Split
        outer = row.double()[:, :, None] * column.double()[:, None, :]
        if first == "factors":
            self.first, m = Factors([B], [A], keep, 0.3), kept * product + 0.3 * g
        else:
            self.first, m = Dense(self.ema["m"], 0.9, keep), self.follow("m", 0.9, g) / kept
        if second == "factors":
            self.second = Factors([C], [W], keep, 0.2)
            v = kept * held.square() + 0.2 * g.square()
        elif second == "scaled":
            self.second = Factors([C], [W], 0.7, 0.2, row, column)
            v = 0.7 * (outer * held).square() + 0.2 * g.square()
        elif second == "split":
            self.second = Split([C], [W], keep, 0.2, 0.1, row, column)
            v = kept * (0.9 * product.square() + 0.1 * held.square()) + 0.2 * g.square() + outer
            m = kept * (product - held) + 0.3 * g
        else:
            self.second, v = Dense(self.ema["v"], 0.8, 0.5), self.follow("v", 0.8, g.square()) / 0.5
        stepped = self.decay * w - self.lr.double()[:, None, None] * m / (v.sqrt() + self.eps)
        self.new["w"] = torch.where(self.finite[:, None, None], stepped, w)
        self.row_sums, self.column_sums = g.square().sum(2), g.square().sum(1)

    def follow(self, name: str, beta: float, x: Tensor) -> Tensor:
        old = torch.stack(self.ema[name]).double()
        self.new[name] = torch.where(self.finite[:, None, None], old.lerp(x, 1 - beta), old)
        return self.new[name]

    def run(self, **options: Any) -> tuple[Tensor, Tensor] | None:
        return cpu_kernels.adam(
            self.weights, self.grads, self.first, self.second, decay=self.decay, lr=self.lr, eps=self.eps,
            sign=self.sign, finite=self.finite, **options,
        )  # fmt: skip


KINDS = [("factors", "factors"), ("factors", "scaled"), ("factors", "split"), ("factors", "dense"),
         ("dense", "scaled")]  # fmt: skip


@sizes
@dtypes
@pytest.mark.parametrize(("first", "second"), KINDS)
def test_the_update(p: int, q: int, r: int, dtype: torch.dtype, first: str, second: str) -> None:
    step = Step(p, q, r, dtype, first, second)
    sums = step.run(sums=True)
    assert sums is not None
    assert_near(sums[0], step.row_sums)
    assert_near(sums[1], step.column_sums)
    for name, tensors in {"w": step.weights, **step.ema}.items():
        if name in step.new:
            tolerance = 1e-4 if name != "w" or dtype == F32 else torch.finfo(dtype).eps
            assert_near(torch.stack(tensors), step.new[name], tolerance)


def test_what_lies_between_rows_is_not_touched() -> None:
    step = Step(20, 50, 4, F32, "factors", "split")
    whole = [x._base for x in step.weights]
    before = [x[:, 50:].clone() for x in whole if x is not None]
    step.run()
    assert all(torch.equal(x[:, 50:], y) for x, y in zip(whole, before, strict=True) if x is not None)


@pytest.mark.parametrize("keyed", [False, True])
def test_bfloat16_weights_have_the_bits_of_torch_and_of_rounding(keyed: bool) -> None:
    """NaN and infinity, and what is next to the largest number, included."""
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, -3.39e38, 0.0, 1e-40, 65504.0])
    wanted = torch.cat([odd, torch.randn(42)]).view(1, 1, 50).repeat(1, 7, 1)
    weight, g = torch.zeros(7, 50, dtype=BF16), torch.zeros(7, 50)
    keys = torch.tensor([0x9ABCDEF0]) if keyed else None
    ones = torch.ones(1, 7, 1)
    first = Factors([-ones], [wanted[:, :1].contiguous()], 1.0, 0.0)  # what is wanted, turned around
    second = Factors([ones], [torch.ones(1, 1, 50)], 1.0, 0.0)  # one
    cpu_kernels.adam(
        [weight], [g], first, second, decay=0.0, lr=1.0, eps=0.0, keys=keys, origin=(3, 5), width=100
    )
    if keys is not None:
        rounding.round_(wanted, keys, torch.arange(3, 10), torch.arange(5, 55), 100)
    expected = wanted[0].to(BF16)
    assert torch.equal(weight.view(torch.int16)[:, 1:], expected.view(torch.int16)[:, 1:])
    assert weight[:, 0].isnan().all()


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    def run(threads: int) -> list[Tensor]:
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        try:
            step = Step(300, 500, 40, F32, "factors", "split")
            sums = step.run(sums=True)
            assert sums is not None
            A, L, X = torch.randn(3, 40, 500), torch.randn(3, 40, 300), torch.randn(3, 300, 40)
            return [
                *step.weights, *sums, cpu_kernels.row_products(step.grads, A),
                cpu_kernels.column_products(step.grads, L), cpu_kernels.products(X.mT, X),
                cpu_kernels.products(X, A), cpu_kernels.inverse_roots(X.mT @ X),
            ]  # fmt: skip
        finally:
            torch.set_num_threads(1)

    expected = run(1)
    for threads in (2, 3, 7):
        assert all(torch.equal(x, y) for x, y in zip(run(threads), expected, strict=True)), threads


@pytest.mark.parametrize(
    ("n", "a", "b", "c"), [(3, 130, 70, 50), (1, 300, 260, 150), (2, 9, 1, 1), (1, 5, 0, 7)]
)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_products(n: int, a: int, b: int, c: int, turned: tuple[bool, bool]) -> None:
    X = torch.randn(n, b, a).mT if turned[0] else torch.randn(n, a, b)
    Y = torch.randn(n, c, b).mT if turned[1] else torch.randn(n, b, c)
    assert_near(cpu_kernels.products(X, Y), X.double() @ Y.double())
    assert_near(cpu_kernels.products(X, X.mT, cpu_kernels.SYMMETRIC), X.double() @ X.double().mT)
    L, U = torch.randn(n, b, b).tril(), torch.randn(n, b, b).triu()
    for left, right, kind in ((L, Y, cpu_kernels.LOWER), (X, U, cpu_kernels.UPPER)):
        for x, y in ((left, right), (left.mT.contiguous().mT, right.mT.contiguous().mT)):
            assert_near(cpu_kernels.products(x, y, kind), x.double() @ y.double())


@pytest.mark.parametrize("r", [1, 7, 64, 128, 200])
def test_inverse_roots(r: int) -> None:
    X = torch.randn(5, r + 9, r)
    G = X.mT @ X / r + 0.01 * torch.eye(r)
    before = G.clone()
    R = cpu_kernels.inverse_roots(G)
    assert torch.equal(G, before)
    assert torch.equal(R, R.tril())
    assert_near(R, torch.linalg.inv(torch.linalg.cholesky(G.double())), 1e-4)


def test_of_a_direction_that_is_lost_nothing_comes_back() -> None:
    """Where rounding has made a Gram matrix negative LAPACK stops; NaN in it stays NaN."""
    G = torch.diag_embed(torch.tensor([[4.0, -1e-7, 1.0], [4.0, torch.nan, 1.0]]))
    R = cpu_kernels.inverse_roots(G)
    assert torch.equal(R[0], torch.diag(torch.tensor([0.5, 0.0, 1.0])))
    assert R[1].isnan().any()


def train(case: Case, use: bool, dtype: torch.dtype, steps: int = 3, **options: Any) -> list[Tensor]:
    """Weights and products of factors after some steps, with kernels or without."""
    params = parameters([(65, 130), (65, 130), (300, 40), (4, 20, 30), (16, 3, 3, 3)], dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not use:
            patch.setattr(launch, "_wants_cpu_kernels", lambda batch: False)
            patch.setattr(cpu_kernels, "ready", lambda: False)
        optimizer = case.make(params, **options)
        for step in range(steps):
            set_gradients(params, step)
            if step == 1 and options.get("nonfinite") == "skip":
                params[1].grad[3, 4] = torch.nan
            optimizer.step()
    found: list[Tensor] = [p.detach() for p in params]
    for own in optimizer.state.values():
        found += [own[f"{x}_B"] @ own[f"{x}_A"] for x in "mv" if f"{x}_B" in own]
        found += [value for name, value in own.items() if name[2:] not in ("A", "B")]
    return found


@pytest.mark.parametrize("case", [CASES[name] for name in FACTORISED], ids=FACTORISED)
@dtypes
@pytest.mark.parametrize(
    "options",
    [{}, {"nonfinite": "skip", "maximize": True}, {"stochastic_rounding": True, "rank": 17}],
    ids=str,
)
def test_a_step_is_that_of_the_operations_of_torch(
    case: Case, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    ours, expected = (train(case, use, dtype, lr=1e-2, weight_decay=0.1, **options) for use in (True, False))
    # Of probes that are rounded to bfloat16 some come out otherwise.
    tolerance = 1e-2 if dtype == BF16 else 1e-4
    for x, y in zip(ours, expected, strict=True):
        assert_near(x, y, max(tolerance, 2 * torch.finfo(x.dtype).eps))


def large(use: bool, variant: str) -> list[Tensor]:
    """Of which the products between factors are for the kernels too, in tiles."""
    weight = nn.Parameter(torch.zeros(700, 5000))
    with pytest.MonkeyPatch.context() as patch:
        if not use:
            patch.setattr(launch, "_wants_cpu_kernels", lambda batch: False)
            patch.setattr(cpu_kernels, "ready", lambda: False)
        optimizer = CASES[f"adam-{variant}"].make([weight], rank=150, lr=1.0)
        for step in range(2):
            set_gradients([weight], step)
            optimizer.step()
    return [weight.detach(), optimizer.state[weight]["m_B"] @ optimizer.state[weight]["m_A"]]


@pytest.mark.parametrize("variant", ["split", "calibrated"])
def test_a_step_of_a_large_weight(variant: str) -> None:
    for x, y in zip(large(True, variant), large(False, variant), strict=True):
        assert_near(x, y, 1e-3)


def test_the_kernels_are_used() -> None:
    """By every kind of optimizer, so that the tests that compare are not about nothing."""
    for name in FACTORISED:
        called: set[str] = set()
        with pytest.MonkeyPatch.context() as patch:
            for function in ("adam", "row_products", "column_products"):
                patch.setattr(cpu_kernels, function, counted(getattr(cpu_kernels, function), called))
            params = parameters([(20, 30)])
            set_gradients(params, 0)
            CASES[name].make(params).step()
        wanted = {"row_products", "column_products"} | ({"adam"} if name.startswith("adam") else set())
        assert called == wanted, name


def counted(function: Callable[..., Any], called: set[str]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        called.add(function.__name__)
        return function(*args, **options)

    return call


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([torch.zeros(3, 4, dtype=torch.float64)], "no kernel for weights in torch.float64"),
        ([torch.zeros(4, 3).mT], "the rows of a weight are not contiguous"),
        ([torch.zeros(3, 4), torch.zeros(3, 5)[:, :4]], "the weights of a group differ in stride"),
    ],
)
def test_why_not(tensors: list[Tensor], reason: str) -> None:
    assert reason in str(cpu_kernels.why_not(tensors, [torch.zeros(3, 4)]))
    assert cpu_kernels.why_not([torch.zeros(3, 4)], [torch.zeros(3, 4)]) is None


WITHOUT = """
import sys, warnings
import torch
from lorapre import LoRAPreAdamW
weight = torch.nn.Parameter(torch.ones(30, 40))
optimizer = LoRAPreAdamW([weight], rank=4)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        weight.grad = torch.ones(30, 40)
        optimizer.step()
print(len(said), *(warning.message for warning in said))
assert weight.isfinite().all() and (weight < 1).all()
"""


def say(environment: dict[str, str], tmp_path: Path) -> str:
    """What a process with this environment warns of."""
    import os

    run = subprocess.run(
        [sys.executable, "-c", WITHOUT], check=True, capture_output=True, text=True,
        env={**os.environ, "LORAPRE_CACHE": str(tmp_path / "cache"), **environment},
    )  # fmt: skip
    return run.stdout.strip()


def test_without_a_compiler_it_is_said_once(tmp_path: Path) -> None:
    said = say({"CC": "no-such-compiler"}, tmp_path)
    assert said == (
        "1 a step of weights (30, 40) does without compiled kernels, slower: there is no C compiler "
        "'no-such-compiler': install one, or name one in $CC"
    )


def test_with_a_compiler_that_fails_it_is_said_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho note >&2\necho 'error: not today' >&2\nexit 1\n")
    broken.chmod(0o755)
    said = say({"CC": str(broken)}, tmp_path)
    assert said.startswith("1 ")
    assert "failed: error: not today" in said


def test_nothing_is_said_where_there_is_one(tmp_path: Path) -> None:
    assert say({}, tmp_path) == "0"
    (library,) = (tmp_path / "cache").iterdir()  # and no other file
    kept = library.stat().st_mtime_ns
    assert say({}, tmp_path) == "0"
    assert library.stat().st_mtime_ns == kept


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert say({"LORAPRE_CACHE": str(tmp_path / "file" / "cache")}, tmp_path) == "0"


def test_a_cache_that_others_can_write_is_not_loaded_from(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    assert say({}, tmp_path) == "0"
    assert not list(cache.iterdir())


def test_tensors_without_memory_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that tools step to estimate memory."""
    monkeypatch.setattr(launch, "_said", set())
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(700, 800))]
        params[0].grad = torch.ones(700, 800)
        optimizer = CASES["adam-split"].make(params, rank=64)
        with pytest.warns(UserWarning, match="is a FakeTensor, not a plain tensor"):
            optimizer.step()
        assert optimizer.state[params[0]]["m_B"].shape == (700, 64)


def test_a_damaged_library_is_said(tmp_path: Path) -> None:
    say({}, tmp_path)
    (library,) = (tmp_path / "cache").iterdir()
    library.write_bytes(b"")
    assert "cannot be kept or loaded" in say({}, tmp_path)


def test_float64_weights_keep_their_precision_in_silence() -> None:
    params = parameters([(20, 30)], torch.float64)
    set_gradients(params, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CASES["adam-split"].make(params).step()
    assert params[0].dtype == torch.float64


def test_the_root_of_a_large_matrix_is_made_by_halves() -> None:
    X = torch.randn(2, 400, 300)
    G = X.mT @ X
    R, damping = _damped_root(G.clone(), 0.0).double(), 1e-6 * G.diagonal(dim1=1, dim2=2).sum(1)
    damped = G.double() + damping[:, None, None] * torch.eye(300)
    assert_near(R @ damped @ R.mT, torch.eye(300).expand(2, -1, -1), 1e-4)


@pytest.mark.parametrize("r", [1, 40, 150])
def test_whitening_is_that_of_the_operations_of_torch(r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Y = torch.randn(3, 200, r) * torch.rand(r)
    Y[0, :, -1] = 0
    G = Y.mT @ Y
    SRt, lengths = cpu_kernels.whitening(G, 1e-4)
    monkeypatch.setattr(cpu_kernels, "ready", lambda: False)
    expected = _whitening(G, 1e-4)
    assert torch.equal(SRt, SRt.triu())
    assert_near(SRt, expected[0], 1e-5)
    assert_near(lengths, expected[1], 1e-5)


@pytest.mark.parametrize("before", [False, True])
def test_the_gauge_is_that_of_the_operations_of_torch(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second A is zero, the third not finite; the fourth has squares beyond float32."""
    B, A = torch.randn(4, 70, 9), torch.randn(4, 9, 2000)
    A[1], A[2, 3, 5], A[3] = 0, torch.inf, A[3] * 1e25
    old = torch.randn_like(A) if before else None
    found, expected = (B.clone(), A.clone()), (B.clone(), A.clone())
    gauge_(*found, before=old)
    monkeypatch.setattr(cpu_kernels, "ready", lambda: False)
    if old is None:
        expected[1][2] = 0  # torch's operations would make it NaN, and never meet it: they have `before`
    gauge_(*expected, before=old)
    for x, y in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert_near(x, y)


@pytest.mark.parametrize("columns", [slice(0, 300), slice(37, 301)], ids=str)
def test_the_waves_are_those_of_the_operations_of_torch_in_float64(columns: slice) -> None:
    A = torch.zeros(2, 50, 301)
    expected = waves(A.double().mT, WHOLE.columns, 301, columns).mT
    found = cpu_kernels.add_waves(A, columns, math.sqrt(2 / 301))
    assert_near(found, expected.expand(2, -1, -1), 2e-5)
