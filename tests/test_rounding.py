"""Stochastic rounding: the noise, the rounding, the keys, and training with them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Shard, distribute_tensor

import distributed
from cases import (
    CASES,
    SHAPES,
    Case,
    assert_same,
    every_case,
    gradient,
    parameters,
    set_gradients,
    state,
    train,
    weights,
)
from lorapre import LoRAPreAdamW, LoRAPreMuon, rounding
from test_contract import Forbid

LARGEST = torch.finfo(torch.bfloat16).max
ONE = torch.tensor(1.0)


def specified(index: int, key: int) -> int:
    """The noise of an element, computed with Python's integers."""
    x = (index * 0x9E3779B1) % 2**32 ^ key
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return (x ^ x >> 16) & 0xFFFF


def noise(key: Tensor, p: int, q: int) -> Tensor:
    return rounding.noise(key, torch.arange(p), torch.arange(q), q)


def rounded(x: Tensor, keys: Tensor) -> Tensor:
    """x (p, q) rounded with each key, (N, p, q)."""
    p, q = x.shape
    return rounding.round_(x.repeat(len(keys), 1, 1), keys, torch.arange(p), torch.arange(q), q)


def some_keys(count: int, seed: int = 0) -> Tensor:
    return rounding.keys(seed, range(count), [ONE] * count, torch.zeros(1))


# --- the noise


def test_the_noise_is_what_is_specified_also_where_indices_leave_32_bits() -> None:
    keys = [0, 1, 2**31, 2**32 - 1, 0x12345678]
    rows, columns, width = [0, 1, 7, 65_000, 90_000, 10**9], [0, 2, 65_535, 69_999], 70_000
    found = rounding.noise(torch.tensor(keys), torch.tensor(rows), torch.tensor(columns), width)
    wanted = [[[specified(i * width + j, key) for j in columns] for i in rows] for key in keys]
    assert found.tolist() == wanted


def test_the_noise_is_uniform_in_every_part_of_a_matrix_and_for_every_key() -> None:
    # Chi-square over 256 cells of the high and of the low byte; 255 degrees of freedom have sd 22.6.
    drawn = noise(some_keys(8), 64, 1024)
    for part in (*drawn, drawn[:, :, :128], drawn[:, :8], drawn[:, :, ::16], drawn[:, ::8]):
        for byte in (part >> 8, part & 0xFF):
            counts = torch.bincount(byte.flatten(), minlength=256).double()
            expected = part.numel() / 256
            assert abs(((counts - expected) ** 2 / expected).sum().item() - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("shift", [1, 2, 64, 1024])
def test_the_noise_of_neighbours_rows_and_keys_is_uncorrelated(shift: int) -> None:
    drawn = (noise(some_keys(2), 64, 1024).double() - 32767.5).flatten(1) / 65536 * math.sqrt(12)
    one, two = drawn
    bound = 5 / math.sqrt(one.numel() - shift)
    assert abs((one[:-shift] * one[shift:]).mean()) < bound
    assert abs((one[:-shift] * two[shift:]).mean()) < bound
    assert abs((one * two).mean()) < bound


# --- rounding


def test_every_result_is_a_neighbour_and_what_is_representable_stays() -> None:
    x = torch.randn(40, 50) * torch.logspace(-44, 38, 50)
    below = torch.where(x > 0, 1, -1) * (x.abs().view(torch.int32) & -0x10000).view(torch.float32)
    above = torch.where(x > 0, 1, -1) * ((below.abs().view(torch.int32)) + 0x10000).view(torch.float32)
    results = rounded(x, some_keys(30))
    assert ((results == below) | (results == above)).all()
    assert (results == below).any()
    assert (results == above).any()
    assert_same(results.bfloat16().float(), results)
    exact = x.bfloat16().float()
    assert_same(rounded(exact, some_keys(3)), exact.repeat(3, 1, 1))
    assert_same(rounded(torch.tensor([[0.0, -0.0]]), some_keys(1)).signbit(), torch.tensor([[[False, True]]]))


@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-38, 1e38, 1e-41])
def test_the_mean_is_the_number(scale: float) -> None:
    x = torch.linspace(1.0, 1.99, 200)[None] * scale
    count = 4000
    error = rounded(x, some_keys(count)).double().mean(0) - x
    # A step between neighbours has a variance of at most a quarter of its square.
    gap = rounded(x, some_keys(count)).double()
    gap = gap.amax(0) - gap.amin(0)
    assert (error.abs() <= 5 * gap / 2 / math.sqrt(count)).all()
    assert (error / gap.clamp_min(1e-300)).mean().abs() < 5 / 2 / math.sqrt(count * x.numel())


def test_infinity_and_nan_stay_and_finite_numbers_stay_finite() -> None:
    low_nan = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), low_nan])[None]
    results = rounded(x, some_keys(50)).bfloat16()
    assert_same(results, x.bfloat16().expand(50, 1, -1))
    top = torch.finfo(torch.float32).max
    large = torch.tensor([[LARGEST, -LARGEST, top, -top, LARGEST + 1e36]])
    results = rounded(large, some_keys(50))
    assert_same(results.abs(), torch.full_like(results, LARGEST))
    assert_same(results.sign(), large.sign().expand_as(results))


def test_a_tile_and_a_shard_are_rounded_as_in_the_whole() -> None:
    x, keys = torch.randn(12, 20), some_keys(2)
    whole = rounded(x, keys)
    rows, columns = torch.tensor([3, 4, 11]), torch.tensor([0, 7, 8, 19])
    part = x[rows][:, columns].repeat(2, 1, 1)
    assert_same(rounding.round_(part, keys, rows, columns, 20), whole[:, rows][:, :, columns])


def test_rounding_is_in_place() -> None:
    x = torch.randn(1, 3, 4)
    assert rounding.round_(x, some_keys(1), torch.arange(3), torch.arange(4), 4).data_ptr() == x.data_ptr()
    assert_same(x.bfloat16().float(), x)


@pytest.mark.filterwarnings("ignore:`torch:FutureWarning", "ignore:`torch:DeprecationWarning")
def test_compiled_rounding_is_the_same() -> None:
    x, keys, rows, columns = torch.randn(2, 12, 20), some_keys(2), torch.arange(12), torch.arange(20)
    compiled = torch.compile(rounding.round_, fullgraph=True)
    expected = rounding.round_(x.clone(), keys, rows, columns, 20)
    assert_same(compiled(x.clone(), keys, rows, columns, 20), expected)


# --- keys


def test_every_seed_parameter_expert_and_step_has_a_key_of_its_own() -> None:
    found = torch.cat([
        rounding.keys(seed, range(20), [torch.tensor(float(t))] * 20, torch.arange(4))
        for seed in (0, 1, 2, 2**32, 2**32 + 1, 2**40)
        for t in range(1, 20)
    ])  # fmt: skip
    assert len(found.unique()) == len(found) == 6 * 19 * 20 * 4
    assert found.dtype == torch.int64
    assert 0 <= found.min() < 2**24 < 2**32 - 2**24 < found.max() < 2**32


def test_keys_are_those_of_the_weight_and_of_the_expert_wherever_they_are_stepped() -> None:
    steps = [torch.tensor(4.0), torch.tensor(9.0)]
    together = rounding.keys(3, [5, 7], steps, torch.arange(6)).view(2, 6)
    alone = rounding.keys(3, [7], steps[1:], torch.arange(2, 4))
    assert_same(alone, together[1, 2:4])


def test_neither_keys_nor_rounding_wait_for_the_device() -> None:
    class ForbidCopies(Forbid):
        waits = (*Forbid.waits, "lift_fresh")  # a tensor made of Python numbers would wait too

    x, steps, experts, rows = (
        torch.randn(4, 3, 3),
        [torch.ones(()), torch.ones(())],
        torch.arange(2),
        torch.arange(3),
    )
    with pytest.raises(AssertionError, match="waits"), ForbidCopies():
        torch.tensor([1, 2])
    with ForbidCopies():
        rounding.round_(x, rounding.keys(1, [3, 9], steps, experts), rows, rows, 3)


# --- training


def bf16(case: Case, shapes: Any = SHAPES, **options: Any) -> tuple[list[nn.Parameter], Any]:
    params = parameters(shapes, torch.bfloat16)
    return params, case.make(params, stochastic_rounding=True, **options)


@every_case
def test_bfloat16_weights_follow_the_seed_and_nothing_else(case: Case) -> None:
    runs = []
    for seed in (0, 0, 1):
        params, optimizer = bf16(case, rank=None, seed=seed)  # the start of factors depends on the seed too
        torch.manual_seed(len(runs))
        runs.append(train(optimizer, params, 3))
    assert_same(runs[0], runs[1])
    assert all(not torch.equal(x, y) for x, y in zip(runs[0][:4], runs[2][:4], strict=True))
    plain = parameters(dtype=torch.bfloat16)
    assert not torch.equal(runs[0][0], train(case.make(plain, rank=None), plain, 3)[0])


@every_case
def test_a_resumed_run_rounds_as_one_that_was_not_interrupted(case: Case) -> None:
    params, optimizer = bf16(case)
    train(optimizer, params, 2)
    others, resumed = bf16(case)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(others, params, strict=True):
        p.data = q.detach().clone()
    assert_same(train(resumed, others, 2, start=2), train(optimizer, params, 2, start=2))
    assert_same(state(resumed), state(optimizer))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_weights_of_other_types_are_not_affected(case: Case, dtype: torch.dtype) -> None:
    params, expected = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer = case.make(params, stochastic_rounding=True)
    assert_same(train(optimizer, params, 2), train(case.make(expected), expected, 2))


@every_case
def test_equal_matrices_with_equal_gradients_are_rounded_differently(case: Case) -> None:
    params = [nn.Parameter(torch.ones(3, 30, 40, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = case.make([{"params": params[:1]}, {"params": params[1:]}], stochastic_rounding=True)
    for p in params:
        p.grad = gradient((30, 40), 0, 0).to(p.dtype).expand(3, 30, 40).clone()
    optimizer.step()
    matrices = [matrix for p in params for matrix in p.detach()]
    for i, matrix in enumerate(matrices):
        assert all((matrix != other).float().mean() > 0.01 for other in matrices[:i])
        assert ((matrix - matrices[0]).abs() <= 0.01).all()  # neighbours around one are 1/128 and 1/256 apart


def test_a_batch_and_each_weight_alone_are_rounded_alike() -> None:
    together, apart = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    options: dict[str, Any] = dict(lr=0.01, rank=None, stochastic_rounding=True)
    one, two = LoRAPreAdamW(together, **options), LoRAPreAdamW(apart, **options)
    for step in range(3):
        set_gradients(together, step)
        one.step()
        for index in reversed(range(len(apart))):  # the others have no gradient then
            set_gradients(apart, step)
            for other, p in enumerate(apart):
                if other != index:
                    p.grad = None
            two.step()
    assert_same(weights(apart), weights(together))


def test_updates_too_small_for_bfloat16_add_up() -> None:
    # Each step is 1/64 of the distance between neighbours above one: plain rounding never moves.
    step, count = 2**-13, 256
    moved = {}
    for stochastic in (False, True):
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = LoRAPreAdamW([p], lr=step, rank=None, maximize=True, stochastic_rounding=stochastic)
        for _ in range(count):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[stochastic] = p.detach().float() - 1
    assert (moved[False] == 0).all()
    # Each of 4096 weights makes 256 steps, up by 1/128 with probability 1/64 each.
    sd = math.sqrt(count / 64 * 63 / 64) / 128 / 64
    assert abs(moved[True].mean().item() - step * count) < 5 * sd


@every_case
def test_a_skipped_step_changes_no_weight_and_uses_no_noise(case: Case) -> None:
    params, optimizer = bf16(case, nonfinite="skip")
    expected, plain = bf16(case)
    train(optimizer, params, 1)
    before = weights(params)
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert_same(weights(params), before)
    assert_same(train(optimizer, params, 1, start=1), train(plain, expected, 2))


@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon])
def test_the_option_is_one_of_the_group_and_checked(cls: Any) -> None:
    params = parameters([(12, 20)] * 2, torch.bfloat16)
    optimizer = cls([{"params": params[:1], "stochastic_rounding": True}, {"params": params[1:]}], rank=3)
    assert [group["stochastic_rounding"] for group in optimizer.param_groups] == [True, False]
    with pytest.raises(ValueError, match="stochastic_rounding must be one of False, True, but is 'bf16'"):
        cls(params, stochastic_rounding="bf16")


@pytest.mark.filterwarnings("ignore:`torch:FutureWarning", "ignore:`torch:DeprecationWarning")
@pytest.mark.usefixtures("torch_operations")  # as a compiled step has; C rounds more to bfloat16
@pytest.mark.parametrize("name", ["adam-split", "muon-dense"])
def test_a_compiled_step_rounds_with_new_noise_at_every_step(name: str) -> None:
    torch._dynamo.reset()
    shapes = [(12, 20), (12, 20), (3, 10, 14), (7,)]
    params, optimizer = bf16(CASES[name], shapes)
    expected, eager = bf16(CASES[name], shapes)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for number in range(4):
        set_gradients(params, number)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            step()
    train(eager, expected, 4)
    # Products of bfloat16 in another order now and then move a sum past the noise.
    for p, q in zip(params, expected, strict=True):
        assert (p == q).float().mean() > 0.98


def _sharded(shape: tuple[int, ...], placement: Placement) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = parameters([shape], torch.bfloat16)
    spread = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [placement])) for p in whole]
    runs = []
    for params in (whole, spread):
        optimizer = LoRAPreAdamW(params, lr=0.01, rank=None, stochastic_rounding=True)
        for step in range(3):
            for index, p in enumerate(params):
                g = gradient(shape, step, index).to(torch.bfloat16)
                p.grad = distribute_tensor(g, mesh, [placement]) if params is spread else g
            optimizer.step()
        runs.append(params[0].detach())
    assert_same(runs[1].full_tensor(), runs[0])  # type: ignore[attr-defined]


def _every_sharding() -> None:
    for shape in ((9, 20), (3, 10, 14), (8, 4, 3, 3), (7,)):
        for dim in range(min(len(shape), 3 if len(shape) == 3 else 2)):
            _sharded(shape, Shard(dim))


def test_sharded_weights_are_rounded_as_the_whole() -> None:
    distributed.run(_every_sharding, 2)
