"""The Triton kernels against plain tensor arithmetic: compiled on a GPU, in Triton's interpreter without one.

Without a GPU they are also compiled, for the devices that matter, to see that they can be.
"""

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import assert_same
from lorapre import kernels, rounding
from lorapre.kernels import Dense, Factors

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")]
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

# p, q, r: odd sizes, one row, one column, padded ranks, ranks in chunks, sweeps that are cut in parts.
SIZES = [(17, 33, 4), (64, 64, 16), (130, 70, 48), (1, 40, 5), (40, 1, 6), (20, 1100, 16), (600, 20, 8),
         (40, 50, 130), (30, 20, 300)]  # fmt: skip
TYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32)]  # weight, gradient


def near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    difference = (actual.double() - expected).abs().max()
    assert difference <= tolerance * expected.abs().max(), (difference / expected.abs().max(), tolerance)


class Problem:
    """Inputs of both sweeps for a group of n matrices, and what should come out, in float64."""

    def __init__(
        self, p: int, q: int, r: int, types: tuple[torch.dtype, torch.dtype] = (F32, F32), *, n: int = 3,
        dense: str = "", strided: bool = False, means: bool = False, finite: bool = False, sign: int = 1,
        probe: bool = False,
    ) -> None:  # fmt: skip
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=DEVICE)

        def matrix(dtype: torch.dtype) -> Tensor:
            return randn(p, q + 7).to(dtype)[:, 3 : q + 3] if strided else randn(p, q).to(dtype)

        self.shape, self.sign, self.dense, self.means = (n, p, q, r), sign, dense, means
        self.weights = [matrix(types[0]) for _ in range(n)]
        self.grads = [matrix(types[1]) for _ in range(n)]
        self.alive = torch.ones(n, dtype=torch.bool, device=DEVICE)
        self.finite = self.alive if finite else None
        if finite:
            self.alive[0] = False
            self.grads[0][-1, -1] = torch.nan
        # Entries of the second moment are positive: otherwise 1 / sqrt(v) is a matter of rounding.
        self.mB, self.mA = [randn(p, r) for _ in range(n)], [randn(r, q) for _ in range(n)]
        self.vB, self.vA = [randn(p, r).abs() for _ in range(n)], [randn(r, q).abs() for _ in range(n)]
        self.m, self.v = [randn(p, q) for _ in range(n)], [randn(p, q).square() for _ in range(n)]
        self.mP, self.vP = ([randn(r, q) for _ in range(n)] if probe else None for _ in range(2))
        self.row, self.column = randn(n, p).abs() + 0.5, randn(n, q).abs() + 0.5
        self.numbers = torch.rand(6, n, device=DEVICE) * 0.5 + 0.5

    def row_sweep(self, **changes: Any) -> kernels.RowSweep:
        keep_m, fresh_m, keep_v, fresh_v, decay, lr = self.numbers
        scales = (self.row, self.column) if self.means else (None, None)
        first: Factors | Dense = Factors(self.mB, self.mA, keep_m, fresh_m, probe=self.mP)
        second: Factors | Dense = Factors(self.vB, self.vA, keep_v, fresh_v, *scales, self.vP)
        first = Dense(self.m, 0.9, keep_m) if self.dense == "m" else first
        second = Dense(self.v, 0.99, keep_v) if self.dense == "v" else second
        options = dict(decay=decay, lr=lr, eps=1e-3, sign=self.sign, finite=self.finite) | changes
        return kernels.row_sweep(self.weights, self.grads, first, second, **options)

    def column_sweep(self) -> kernels.ColumnSweep:
        bases = (None if self.dense == "m" else self.mB, None if self.dense == "v" else self.vB)
        return kernels.column_sweep(
            self.grads, *bases, sign=self.sign, finite=self.finite, column_sums=self.means
        )

    def expected(self) -> dict[str, Tensor]:
        """Everything, (N, ...), from the equations."""
        keep_m, fresh_m, keep_v, fresh_v, decay, lr = self.numbers.double()[..., None, None]
        g = self.sign * torch.stack(self.grads).double()
        g = torch.where(self.alive[:, None, None], g, 0)
        mB, mA, vB, vA = (torch.stack(x).double() for x in (self.mB, self.mA, self.vB, self.vA))
        m, v, W = (torch.stack(x).double() for x in (self.m, self.v, self.weights))
        if self.dense == "m":
            m = m + 0.1 * (g - m)
        if self.dense == "v":
            v = v + 0.01 * (g * g - v)
        stored = {"m": m, "v": v}
        m = m / keep_m if self.dense == "m" else keep_m * mB @ mA + fresh_m * g
        root = vB @ vA
        if self.means:
            root = self.row[..., None] * root * self.column[:, None]
        v = v / keep_v if self.dense == "v" else keep_v * root**2 + fresh_v * g**2
        if self.mP is not None and self.vP is not None:
            mA, vA = torch.stack(self.mP).double(), torch.stack(self.vP).double()
        # Operands of products with a bfloat16 gradient are rounded to it.
        if self.grads[0].dtype == BF16:
            mB, mA, vB, vA = (x.to(BF16).double() for x in (mB, mA, vB, vA))
        TAt = {"m": g @ mA.mT, "v": g.abs() @ vA.mT}
        LtT = {"m": mB.mT @ g, "v": vB.mT @ g.abs()}
        factorised = [name for name in "mv" if name != self.dense]
        return stored | {
            "W": decay * W - lr * m / (v.sqrt() + 1e-3),
            "TAt": torch.stack([TAt[name] for name in factorised]),
            "LtT": torch.stack([LtT[name] for name in factorised]),
            "row_sums": g.square().sum(-1),
            "column_sums": g.square().sum(-2),
        }

    def check(self) -> None:
        """Both sweeps against `expected`."""
        expected, before = self.expected(), [w.clone() for w in self.weights]
        moments = {"m": [x.clone() for x in self.m], "v": [x.clone() for x in self.v]}
        rows, columns = self.row_sweep(row_sums=self.means), self.column_sweep()
        # What a product in TF32 on a GPU costs, where the gradient is bfloat16 or float16.
        coarse = 3e-3 if GPU and self.grads[0].dtype != F32 else 1e-5
        near(rows.TAt, expected["TAt"], 1e-5 if self.grads[0].dtype == BF16 else coarse)
        near(columns.LtT, expected["LtT"], 1e-5 if self.grads[0].dtype == BF16 else coarse)
        assert (rows.row_sums is None) == (columns.column_sums is None) == (not self.means)
        if rows.row_sums is not None and columns.column_sums is not None:
            near(rows.row_sums, expected["row_sums"], 1e-5)
            near(columns.column_sums, expected["column_sums"], 1e-5)
        resolution = torch.finfo(self.weights[0].dtype).eps / 2
        for n in range(self.shape[0]):
            if self.alive[n]:
                near(self.weights[n], expected["W"][n], max(coarse, resolution))
            else:
                assert torch.equal(self.weights[n], before[n])
                assert not rows.TAt[:, n].any()
                assert not columns.LtT[:, n].any()
            for name, own in (("m", self.m), ("v", self.v)):
                if self.dense == name and self.alive[n]:
                    near(own[n], expected[name][n], 1e-6)
                else:
                    assert torch.equal(own[n], moments[name][n])


@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(str(x)[6:] for x in types))
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_sweeps_equal_the_equations(
    size: tuple[int, int, int], types: tuple[torch.dtype, torch.dtype]
) -> None:
    Problem(*size, types, n=1 if size[0] == 130 else 3).check()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [(17, 33, 4), (40, 50, 130)])
@pytest.mark.parametrize("options", [
    dict(dense="m"), dict(dense="v"), dict(strided=True), dict(finite=True), dict(sign=-1), dict(means=True),
    dict(dense="m", means=True, finite=True, sign=-1, strided=True), dict(dense="v", finite=True, sign=-1),
    dict(probe=True), dict(dense="v", probe=True), dict(dense="m", probe=True, means=True, finite=True),
], ids=lambda options: "-".join(options))  # fmt: skip
def test_options(size: tuple[int, int, int], dtype: torch.dtype, options: dict[str, Any]) -> None:
    problem = Problem(*size, (dtype, dtype), **options)
    assert kernels.why_not(problem.weights, problem.grads, size[2]) is None
    problem.check()


@pytest.mark.parametrize("r", [4, 130])
def test_a_probe_does_not_move_the_weights(r: int) -> None:
    problem = Problem(17, 33, r, probe=True)
    for x in (*problem.grads, *problem.mA, *problem.vA):
        x[:, 5] = 0  # a token that is never seen, say: its weights have no gradient and no momentum
    before = [w.clone() for w in problem.weights]
    rows = problem.row_sweep(decay=1.0, eps=1e-30)
    assert all(torch.equal(w[:, 5], x[:, 5]) for w, x in zip(problem.weights, before, strict=True))
    assert not any(torch.equal(w[:, 6], x[:, 6]) for w, x in zip(problem.weights, before, strict=True))
    assert rows.TAt.all()


def test_what_lies_between_strided_rows_is_not_touched() -> None:
    problem = Problem(5, 6, 4, strided=True)
    around = problem.weights[0]._base
    assert around is not None
    before = around.clone()
    problem.row_sweep()
    assert torch.equal(around[:, :3], before[:, :3])
    assert torch.equal(around[:, 9:], before[:, 9:])


def test_numbers_are_floats_or_tensors_for_one_or_all() -> None:
    def run(decay: Any, lr: Any) -> Tensor:
        torch.manual_seed(0)
        problem = Problem(9, 12, 4, n=2)
        problem.row_sweep(decay=decay, lr=lr)
        return torch.stack(problem.weights)

    plain = run(0.5, 0.25)
    assert torch.equal(plain, run(torch.tensor(0.5), torch.tensor([0.25, 0.25], device=DEVICE)))
    half, quarter = torch.full((2, 1, 1), 0.5, device=DEVICE), torch.tensor(0.25, device=DEVICE)
    assert torch.equal(plain, run(half, quarter))


def test_fused_experts_are_matrices() -> None:
    problem, apart = Problem(10, 14, 4, n=4), Problem(10, 14, 4, n=4)
    for name in ("weights", "grads", "mB", "mA", "vB", "vA"):
        setattr(apart, name, [x.clone() for x in getattr(problem, name)])
        first, *rest = getattr(problem, name)  # a matrix and three experts
        setattr(problem, name, [first[None], torch.stack(rest)])
    apart.numbers = problem.numbers
    rows, expected = problem.row_sweep(), apart.row_sweep()
    assert torch.equal(torch.cat(problem.weights), torch.stack(apart.weights))
    assert torch.equal(rows.TAt, expected.TAt)
    assert torch.equal(problem.column_sweep().LtT, apart.column_sweep().LtT)


def test_vectors_in_any_layout() -> None:
    def run(*vectors: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        problem = Problem(10, 14, 4, (BF16, BF16))
        problem.finite, keys = vectors
        rows = problem.row_sweep(keys=keys)
        return [rows.TAt, problem.column_sweep().LtT, torch.stack(problem.weights)]

    one = torch.tensor([True], device=DEVICE), torch.tensor([77], device=DEVICE)
    assert_same(run(*(x.expand(3) for x in one)), run(*(x.repeat(3) for x in one)))


def test_factors_in_any_layout() -> None:
    problem = Problem(10, 14, 4)
    plain = [problem.row_sweep(lr=0.0, decay=1.0).TAt, problem.column_sweep().LtT]
    for name in ("mB", "mA", "vB", "vA"):
        setattr(problem, name, [x.mT.contiguous().mT for x in getattr(problem, name)])
    again = [problem.row_sweep(lr=0.0, decay=1.0).TAt, problem.column_sweep().LtT]
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


def test_wide_loads_are_for_rows_that_begin_at_16_bytes() -> None:
    x = torch.zeros(2, 8, 32, device=DEVICE)
    assert all(kernels._table([y])[1] for y in (x, x[:, :, 4:], x[0], x[:, ::2]))
    assert not any(kernels._table([y])[1] for y in (x[:, :, 1:], x[..., 1:].contiguous()))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_shard_has_empty_sums(shape: tuple[int, int]) -> None:
    problem = Problem(*shape, 4, n=2, means=True)
    rows, columns = problem.row_sweep(row_sums=True), problem.column_sweep()
    assert rows.TAt.shape == (2, 2, shape[0], 4)
    assert columns.LtT.shape == (2, 2, 4, shape[1])
    for x in (*rows, *columns):
        assert x is not None
        assert not x.any()


def test_the_same_bits_at_every_run() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        problem = Problem(40, 1100, 16, (BF16, BF16), means=True)
        return [*problem.row_sweep(row_sums=True), *problem.column_sweep(), *problem.weights]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


def noise(key: int, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """The definition, in int64 modulo 2**32."""

    def low(x: Tensor) -> Tensor:
        return x & 0xFFFFFFFF

    x = low(low(rows[:, None] * width + columns) * 0x9E3779B1) ^ key
    x = low((x ^ (x >> 16)) * 0x7FEB352D)
    x = low((x ^ (x >> 15)) * 0x846CA68B)
    return (x ^ (x >> 16)) & 0xFFFF


def rounded(problem: Problem, keys: Tensor, **options: Any) -> Tensor:
    """The weights after a step that only multiplies them by 0.99, so that just the rounding is at stake."""
    problem.row_sweep(decay=0.99, lr=0.0, keys=keys, **options)
    return torch.stack(problem.weights)


@pytest.mark.parametrize("size", [(17, 33, 4), (64, 80, 130)])
def test_stochastic_rounding_has_the_bits_of_its_definition(size: tuple[int, int, int]) -> None:
    problem = Problem(*size, (BF16, BF16), n=2)
    largest = torch.finfo(BF16).max
    edges = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, largest, -largest, 1e-37])
    problem.weights[0][0, :7] = edges.to(BF16)
    keys = torch.tensor([2**32 - 1, 12345], device=DEVICE)
    exact = torch.stack(problem.weights).float() * torch.tensor(0.99)
    rows, columns = (torch.arange(x, device=DEVICE) for x in size[:2])
    twin = rounding.round_(exact.clone(), keys, rows, columns, size[1]).to(BF16)
    ours = rounded(problem, keys)
    assert torch.equal(ours.view(torch.int16), twin.view(torch.int16))
    for n in range(2):
        bits = exact[n].view(torch.int32).long() + noise(int(keys[n]), rows, columns, size[1])
        expected = (bits & -0x10000).to(torch.int32).view(F32).to(BF16)
        inside = exact[n].isfinite()
        assert torch.equal(ours[n][inside], expected[inside])
    assert not torch.equal(ours, exact.to(BF16))


def test_a_shard_is_rounded_as_the_whole() -> None:
    whole, part = Problem(20, 30, 4, (BF16, BF16), n=1), Problem(8, 11, 4, (BF16, BF16), n=1)
    part.weights[0].copy_(whole.weights[0][5:13, 7:18])
    keys = torch.tensor([99], device=DEVICE)
    assert torch.equal(rounded(whole, keys)[:, 5:13, 7:18], rounded(part, keys, origin=(5, 7), width=30))


def test_a_number_beyond_the_largest_bfloat16_becomes_that() -> None:
    problem = Problem(4, 40, 4, (BF16, BF16), n=1)
    problem.weights[0].fill_(torch.finfo(BF16).max)
    problem.row_sweep(decay=1.001, lr=0.0, keys=torch.tensor([7], device=DEVICE))
    assert problem.weights[0].isfinite().all()


def test_addresses_are_sent_once() -> None:
    problem = Problem(9, 12, 4)
    kernels._upload.cache_clear()
    for _ in range(3):
        problem.row_sweep()
        problem.column_sweep()
    assert kernels._upload.cache_info()[:2] == (4, 2)  # hits, misses
    assert kernels._upload.cache_info().maxsize is not None


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(8, 12, device=DEVICE)
    assert kernels.why_not([x, x[None]], [x, x[None]], 4) is None
    assert kernels.why_not([x.bfloat16()], [x], 512) is None
    assert kernels.why_not([x[:1], torch.zeros(1, 40, device=DEVICE)[:, :12]], [x[:1]] * 2, 4) is None

    def reason(weights: list[Any], grads: list[Any], rank: int = 4) -> str:
        return kernels.why_not(weights, grads, rank) or ""

    many = reason([x[:1, :1].expand(2**16, 1, 1)], [x])
    assert many == "there are more than 65535 matrices, or 2097152 columns"
    assert "rank 513 is above 512" in reason([x], [x], 513)
    assert "no kernel for weights in torch.float64" in reason([x.double()], [x])
    assert "no kernel for gradients in torch.int32" in reason([x], [x.int()])
    assert "rows of a gradient are not contiguous" in reason([x], [torch.zeros(12, 8, device=DEVICE).mT])
    assert "rows of a weight are not contiguous" in reason([torch.zeros(8, 24, device=DEVICE)[:, ::2]], [x])
    assert "gradients of a group differ" in reason([x, x], [x, torch.zeros(8, 20, device=DEVICE)[:, :12]])
    assert "weights of a group differ" in reason([x, x.bfloat16()], [x, x])
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert "inside torch.compile" in reason([x], [x])
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "triton", None)
        assert reason([x], [x]) == "Triton is not installed"
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_interpreted", lambda: False)
        assert "the weights are on cpu" in reason([x.cpu()], [x.cpu()])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        old: Any = types.SimpleNamespace(device=torch.device("cuda", 0))
        assert reason([old], [old]) == "Tesla T4 is older than compute capability 8.0"


def run(script: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True,
        env=os.environ | environment, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_library_does_without_triton() -> None:
    run(
        "import sys; sys.modules['triton'] = None; import torch; from lorapre import kernels; "
        "x = torch.zeros(2, 2); assert kernels.why_not([x], [x], 1) == 'Triton is not installed'"
    )


def compile_all() -> None:
    """Compile what the sweeps would launch, for capabilities with and without their own instructions."""
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
                divisible = isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0)
                if i >= len(args) or x is None or (isinstance(x, int) and x == 1):
                    signature[name], constants[(i,)] = "constexpr", x
                    continue
                kinds = {F32: "*fp32", torch.int64: "*i64", torch.bool: "*i1"}
                signature[name] = kinds[x.dtype] if isinstance(x, Tensor) else "i32"
                signature[name] = "fp32" if isinstance(x, float) else signature[name]
                if divisible:
                    hints[(i,)] = [["tt.divisibility", 16]]
            source = ASTSource(self.function, signature, constants, hints)
            for capability in (89, 90) if self.function is rows and problem.mP else (90,):
                program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
                assert program.metadata.shared <= {89: 99, 90: 227}[capability] * 1024
                print(capability, self.function.__name__, program.metadata.shared)

    kernels._interpreted = lambda: False
    rows = kernels._row_sweep
    kernels._row_sweep, kernels._column_sweep = Compiler(kernels._row_sweep), Compiler(kernels._column_sweep)
    keys = torch.zeros(3, dtype=torch.int64)
    for problem in (
        Problem(64, 64, 128, (BF16, BF16), means=True, finite=True, probe=True),
        Problem(64, 64, 32, (F32, F32), probe=True),
        Problem(64, 64, 512, (BF16, BF16), dense="v", probe=True),
        Problem(64, 64, 128, (F32, F32), dense="m", means=True),
        Problem(1, 1, 1, (BF16, F16)),
        Problem(64, 64, 64, (BF16, BF16), probe=True),
    ):
        problem.row_sweep(keys=keys if problem.weights[0].dtype == BF16 else None, row_sums=problem.means)
        problem.column_sweep()


def test_the_kernels_compile_for_devices_that_are_not_here(tmp_path: Path) -> None:
    output = run(
        "import test_kernels; test_kernels.compile_all()",
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert output.count("row_sweep") == 10


@needs_gpu
def test_no_call_waits_for_the_device() -> None:
    problem = Problem(64, 64, 16, (BF16, BF16))
    problem.row_sweep()
    problem.column_sweep()
    kernels._upload.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.row_sweep(decay=0.99, lr=torch.tensor(0.1))
        problem.column_sweep()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_cuda_graph_replays_the_step() -> None:
    problem, expected = Problem(64, 64, 16, (BF16, BF16)), Problem(64, 64, 16, (BF16, BF16))
    for name, value in vars(problem).items():
        setattr(expected, name, [x.clone() for x in value] if isinstance(value, list) else value)
    start = [w.clone() for w in problem.weights]
    problem.row_sweep()
    problem.column_sweep()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, columns = problem.row_sweep(), problem.column_sweep()
    kernels._upload.cache_clear()
    for w, x in zip(problem.weights, start, strict=True):
        w.copy_(x)
    for _ in range(3):
        graph.replay()
        expected_rows, expected_columns = expected.row_sweep(), expected.column_sweep()
    assert all(torch.equal(x, y) for x, y in zip(problem.weights, expected.weights, strict=True))
    assert torch.equal(rows.TAt, expected_rows.TAt)
    assert torch.equal(columns.LtT, expected_columns.LtT)
