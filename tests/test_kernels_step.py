"""The optimizer stepped by the Triton kernels, on a GPU or in Triton's interpreter, and on plain tensors."""

import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from cases import CASES, assert_same, gradient, parameters
from distributed import run
from lorapre import kernels, launch
from lorapre.linalg import Shards

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")]

ADAM = [name for name in CASES if name.startswith("adam") and name != "adam-dense"]
# Two of one shape, a shape that fits no block, experts, a convolution; dense: a vector.
SHAPES = [(12, 20), (12, 20), (37, 71), (3, 10, 14), (8, 3, 3, 3), (7,)]


def to_device(x: Tensor) -> Tensor:
    return x.to(DEVICE)


def full(x: Tensor) -> Tensor:
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


class Run:
    """Weights and their optimizer, stepped by the kernels or not."""

    def __init__(
        self, name: str, use: bool, dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32), *,
        shapes: Sequence[Sequence[int]] = SHAPES, place: Callable[[Tensor], Tensor] = to_device,
        **options: Any,
    ) -> None:  # fmt: skip
        self.use, self.grad_dtype, self.place = use, dtypes[1], place
        self.params = [nn.Parameter(place(p.detach().to(dtypes[0]))) for p in parameters(shapes)]
        self.optimizer = CASES[name].make(self.params, **options)
        self.launches = 0

    def step(self, number: int, *, poison: int | None = None, zero: Any = None) -> None:
        """A step; the gradient of weight `poison` holds a NaN, all gradients are zero at `zero`."""
        for i, p in enumerate(self.params):
            g = gradient(p.shape, number, i)
            if zero is not None:
                g[zero] = 0
            if i == poison:
                g.view(-1)[-1] = torch.nan
            if self.grad_dtype != p.dtype:
                p.grad_dtype = self.grad_dtype
            p.grad = self.place(g.to(self.grad_dtype))
        self.launch()

    def launch(self) -> None:
        """A step along the gradients that are set."""

        def count(*args: Any, **options: Any) -> Any:
            self.launches += 1
            return row_sweep(*args, **options)

        row_sweep = kernels.row_sweep
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "_wants_kernels", lambda batch: self.use)
            patch.setattr(launch, "_wants_cpu_kernels", lambda batch: False)  # they have tests of their own
            patch.setattr(kernels, "row_sweep", count)
            self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [full(p) for p in self.params]

    def state(self) -> list[Tensor]:
        """What is stored; products for factors, whose bases are a matter of rounding where B A is small."""
        found = []
        for own in self.optimizer.state.values():
            own = {name: full(value) for name, value in own.items()}
            found += [own[f"{name}_B"] @ own[f"{name}_A"] for name in "mv" if f"{name}_B" in own]
            found += [value for name, value in own.items() if name[2:] not in ("A", "B")]
        return found


def near(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Equality but for `tolerance` of the largest entry, or for the last bit of a narrow dtype."""
    for x, y in zip(actual, expected, strict=True):
        allowed = tolerance * float(y.abs().max()) + 2 * torch.finfo(y.dtype).eps * y.double().abs()
        assert ((x.double() - y.double()).abs() <= allowed).all(), (x.double() - y.double()).abs().max()


def pair(name: str, dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32), **options: Any) -> tuple[Run, Run]:
    return Run(name, True, dtypes, **options), Run(name, False, dtypes, **options)


def check(ours: Run, expected: Run, steps: int = 3, tolerance: float = 3e-6, **options: Any) -> None:
    """Both step; the kernels, and only they, are used wherever there are factors, and give the same."""
    shapes = {p.shape for p in ours.params if p.ndim > 1}
    for step in range(steps):
        ours.step(step, **options)
        expected.step(step, **options)
    assert ours.launches >= steps * len(shapes)
    assert not expected.launches
    # A float32 that falls between two bfloat16 numbers, or TF32 of a GPU, may go either way in a product.
    exact = ours.grad_dtype == F32 or (ours.grad_dtype == F16 and not GPU)
    near(ours.state(), expected.state(), tolerance if exact else 2e-3)
    near(ours.weights(), expected.weights(), tolerance if exact else 3e-5)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ADAM)
def test_steps_equal_those_on_plain_tensors(name: str, dtype: torch.dtype) -> None:
    check(*pair(name, (dtype, dtype)))


def need_gradients_of(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    if dtype != grad_dtype and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch takes no gradient of another dtype than the weight's")


@pytest.mark.parametrize("dtypes", [(F32, BF16), (BF16, F32), (F16, F16)], ids=str)
def test_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    need_gradients_of(*dtypes)
    check(*pair("adam-subspace", dtypes))


@pytest.mark.parametrize("options", [
    dict(maximize=True), dict(lr=torch.tensor(0.01), weight_decay=0.0), dict(scale=0.25, betas=(0.0, 0.5)),
    dict(eps=0.0),
], ids=lambda options: "-".join(options))  # fmt: skip
@pytest.mark.parametrize("name", ["adam-calibrated", "adam-split", "adam-subspace-first"])
def test_options(name: str, options: dict[str, Any]) -> None:
    check(*pair(name, shapes=SHAPES[2:4], **options))


def test_the_rate_may_be_on_the_device() -> None:
    check(*pair("adam-calibrated", shapes=SHAPES[:1], lr=torch.tensor(0.01, device=DEVICE)))


@pytest.mark.parametrize("name", ADAM)
def test_a_gradient_that_is_not_finite_is_skipped(name: str) -> None:
    ours, expected = pair(name, shapes=[SHAPES[0], *SHAPES[:4:3]], nonfinite="skip")
    check(ours, expected, 1)
    for poison in (1, 2):  # one of two of a shape, experts
        before = ours.weights()[poison]
        check(ours, expected, 1, poison=poison)
        assert_same(ours.weights()[poison], before)
    check(ours, expected, 1)


@pytest.mark.parametrize("name", ["adam-calibrated", "adam-subspace", "adam-split"])
def test_a_large_rank(name: str) -> None:  # the row sweep takes two launches
    check(*pair(name, shapes=[(272, 280)], rank=130, eps=1e-2), steps=2, tolerance=2e-5)


@pytest.mark.parametrize("name", ["adam-paper", "adam-calibrated", "adam-subspace", "adam-split"])
def test_factors_too_large_to_be_stacked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapre.steps.GPU_BATCH", 1)
    monkeypatch.setattr("lorapre.batch.GPU_BATCH", 1)
    check(*pair(name, shapes=SHAPES[2:4]))


@pytest.mark.parametrize("name", ["adam-calibrated", "adam-paper-second", "adam-split"])
def test_stochastic_rounding_draws_the_same_bits(name: str) -> None:
    ours, expected = pair(name, (BF16, BF16), stochastic_rounding=True, seed=3)
    for step in range(3):
        ours.step(step)
        expected.step(step)
    for x, y in zip(ours.weights(), expected.weights(), strict=True):
        # Before rounding they differ by some 1e-7, after it by 4e-3 in one of 1e4 weights or so.
        assert (x == y).double().mean() > 0.98
    near(ours.weights(), expected.weights(), 3e-5)
    nearest = Run(name, True, (BF16, BF16))
    for step in range(3):
        nearest.step(step)
    assert all((x != y).any() for x, y in zip(ours.weights(), nearest.weights(), strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ["adam-calibrated", "adam-calibrated-first", "adam-calibrated-second"])
def test_a_column_without_gradient_stays_where_it_is(name: str, dtype: torch.dtype) -> None:
    ours, expected = pair(name, (dtype, dtype), shapes=SHAPES[2:4], weight_decay=0.0, eps=1e-30)
    before = ours.weights()
    check(ours, expected, zero=(..., 5))
    for w, x in zip(ours.weights(), before, strict=True):
        assert torch.equal(w[..., 5], x[..., 5])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_factors_find_rows_and_columns_that_were_zero(dtype: torch.dtype) -> None:
    need_gradients_of(F32, dtype)
    ours, expected = pair("adam-calibrated", (F32, dtype), shapes=[(12, 20)])
    for step in range(7):  # in the upper left corner, then in the lower right
        for x in (ours, expected):
            for p in x.params:
                g = torch.zeros(12, 20)
                corner = (slice(6), slice(10)) if step < 2 else (slice(6, None), slice(10, None))
                g[corner] = gradient(p.shape, step, 0)[corner]
                p.grad_dtype = dtype
                p.grad = x.place(g.to(dtype))
            x.launch()
    found = [[x[6:, 10:] for x in each.state()[:2]] for each in (ours, expected)]
    assert all(x.any() for x in found[1])  # little, by way of the probe; without it nothing for ever
    near(*found, 1e-4)


def test_what_the_kernels_cannot_take_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_said", set())
    wide = pair("adam-calibrated", (torch.float64, torch.float64), shapes=[(12, 20), (20, 12)])
    with pytest.warns(
        UserWarning, match=r"without Triton kernels.*no kernel for weights in torch.float64"
    ) as said:
        wide[0].step(0)
    assert len(said) == 1
    wide[1].step(0)
    assert_same(wide[0].weights(), wide[1].weights())

    def turned(x: Tensor) -> Tensor:
        return x.to(DEVICE, memory_format=torch.channels_last)

    images = pair("adam-calibrated", shapes=[(8, 3, 3, 3)], place=turned)
    with pytest.warns(UserWarning, match="the memory of a convolution") as said:
        images[0].step(0)
    assert len(said) == 1
    images[1].step(0)
    assert_same(images[0].weights(), images[1].weights())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide[0].step(1)
        images[0].step(1)
    assert wide[0].launches == images[0].launches == 0


def test_a_loaded_moment_in_another_order_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_said", set())
    ours, _ = pair("adam-calibrated-first", shapes=[(12, 20)])
    ours.step(0)
    state = ours.optimizer.state[ours.params[0]]
    state["exp_avg_sq"] = state["exp_avg_sq"].mT.contiguous().mT
    with pytest.warns(UserWarning, match="a dense moment is not contiguous"):
        ours.step(1)


def test_a_compiled_step_takes_plain_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Run("adam-calibrated", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ours.step(0)
    assert not ours.launches


def test_a_shard_is_a_block_or_has_no_origin() -> None:
    class Held(Shards):
        count = 2

        def rows(self, count: int, device: torch.device) -> Tensor:
            return torch.tensor(rows)

        def columns(self, count: int, device: torch.device) -> Tensor:
            return torch.tensor([7])

    batch: Any = types.SimpleNamespace(
        shards=Held(), p=3, q=1, rank=1, narrow=True, state={}, rounds_stochastically=True,
        weights=[torch.zeros(3, 1, device=DEVICE)], grads=[torch.zeros(3, 1, device=DEVICE)],
    )  # fmt: skip
    rows = [4, 5, 6]
    assert launch._origin(batch) == (4, 7)
    rows = []
    assert launch._origin(batch) == (0, 7)
    rows = [4, 5, 8]
    assert launch._origin(batch) is None
    assert "shards that are not blocks" in (launch._why_not(batch) or "")
    batch.rounds_stochastically = False
    assert launch._why_not(batch) is None
    batch.shards = Shards()
    assert launch._origin(batch) == (0, 0)


def check_shards(name: str, placement: Placement) -> None:
    mesh = init_device_mesh("cpu", (2,))

    def place(x: Tensor) -> Tensor:
        return distribute_tensor(x.clone(), mesh, [placement], src_data_rank=None)

    options: dict[str, Any] = dict(shapes=[(13, 21), (13, 21)], stochastic_rounding=True)
    ours, expected = (
        Run(name, True, (BF16, BF16), place=place, **options),
        Run(name, False, (BF16, BF16), **options),
    )
    for step in range(3):
        ours.step(step, zero=(..., 17))
        expected.step(step, zero=(..., 17))
    assert ours.launches == 3
    near(ours.state(), expected.state(), 2e-3)
    near(ours.weights(), expected.weights(), 3e-5)
    assert all(
        (x == y).double().mean() > 0.98 for x, y in zip(ours.weights(), expected.weights(), strict=True)
    )


def check_all_shards() -> None:
    for name in ("adam-paper-first", "adam-calibrated", "adam-subspace"):
        for placement in (Shard(0), Shard(1)):
            check_shards(name, placement)


@pytest.mark.skipif(
    GPU, reason="several processes share a CPU here, which the kernels run on in the interpreter"
)
def test_shards_are_stepped_as_the_whole() -> None:
    run(check_all_shards, 2)


@needs_gpu
def test_weights_of_a_shape_share_a_launch() -> None:
    ours = Run("adam-calibrated", True, shapes=[(64, 96)] * 30 + [(96, 64)] * 20)
    ours.step(0)
    assert ours.launches == 2


@needs_gpu
@pytest.mark.parametrize("name", ADAM)
def test_no_step_waits_for_the_device(name: str) -> None:
    ours = Run(name, True, (BF16, BF16), nonfinite="skip", stochastic_rounding=True)
    ours.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
