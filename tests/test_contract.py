"""What users expect of any torch.optim.Optimizer, held for every class and variant.

A table: the rows are `cases.CASES`, the columns are the tests below and those of

    test_state.py        names, types and bytes of the state, checkpoints, resuming bit for bit
    test_state_format.py checkpoints of other state formats
    test_compile.py      torch.compile: one graph, no recompilation
    test_fuzz.py         no NaN from finite gradients, no update above its bound
    test_faults.py       NaN and infinities at random steps
    test_reference.py    the numbers of reference.py, for shapes and options beyond one weight
"""

import contextlib
import copy
import gc
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode

from cases import (
    CASES,
    LOW_RANK,
    RANK,
    SHAPES,
    Case,
    assert_near,
    assert_same,
    assert_unchanged,
    every_case,
    everything,
    factorised,
    gradient,
    parameters,
    set_gradients,
    state,
    train,
    weights,
)
from lorapre import LoRAPreAdamW, LoRAPreMuon, batch, coverage
from lorapre import gradient as gradient_module
from lorapre.variants import ADAM, FOLLOW, gaussian
from reference import AdamReference, MuonReference, first_A


def finite(tensors: list[Tensor]) -> bool:
    return all(x.isfinite().all() for x in tensors)


# --- groups and options


@every_case
def test_a_group_with_its_own_options_equals_an_optimizer_of_its_own(case: Case) -> None:
    decay = {"betas": (0.7, 0.8)} if case.cls is LoRAPreAdamW else {"momentum": 0.7}
    own: list[dict[str, Any]] = [
        {},
        {"rank": 2, "lr": 0.003},
        {"variant": "paper", "rank": RANK if case.rank == 0 else case.rank},
        {"maximize": True, "weight_decay": 0.0, **decay},
    ]
    shapes = [(12, 20), (7,)] * len(own)
    together, apart = parameters(shapes), parameters(shapes)
    optimizer = case.make([{"params": together[2 * i : 2 * i + 2], **o} for i, o in enumerate(own)])
    train(optimizer, together, 3)
    for i, options in enumerate(own):
        alone = case.make(apart[2 * i : 2 * i + 2], **options)
        for step in range(3):
            set_gradients(apart, step)
            alone.step()
    assert_same(weights(together), weights(apart))


@every_case
def test_names_of_parameters_are_kept_and_change_nothing(case: Case) -> None:
    plain, named = parameters(), parameters()
    names = [f"layer.{i}" for i in range(len(named))]
    optimizer = case.make(zip(names, named, strict=True))
    assert optimizer.param_groups[0]["param_names"] == names
    assert [row.name for row in coverage(optimizer)] == names
    assert_same(train(optimizer, named, 2), train(case.make(plain), plain, 2))


@every_case
def test_unknown_keys_of_a_group_are_kept_and_change_nothing(case: Case) -> None:
    theirs: dict[str, Any] = {"nesterov": True, "momentum": 0.5, "betas": (0.1, 0.2), "scale": 9.0}
    theirs |= {"dampening": 0, "lr_scale": 0.1, "name": "decoder"}
    theirs = {key: value for key, value in theirs.items() if key not in case.make(parameters()).defaults}
    params, expected = parameters(), parameters()
    optimizer = case.make([{"params": params, **theirs}])
    assert_same(train(optimizer, params, 3), train(case.make(expected), expected, 3))
    assert theirs.items() <= optimizer.param_groups[0].items()
    assert coverage(optimizer).planned_bytes == coverage(case.make(parameters())).planned_bytes


@every_case
def test_a_group_added_mid_run_equals_an_optimizer_that_starts_there(case: Case) -> None:
    first, late, alone = parameters()[:4], parameters()[4:], parameters()[4:]
    optimizer = case.make(first)
    train(optimizer, first, 2)
    optimizer.add_param_group({"params": late, "lr": 0.002})
    train(optimizer, late, 2)
    assert_same(weights(late), train(case.make(alone, lr=0.002), alone, 2))


@every_case
def test_maximize_in_a_group_equals_minimising_along_negated_gradients(case: Case) -> None:
    up, down = parameters(), parameters()
    ascent, descent = case.make([{"params": up, "maximize": True}]), case.make(down)
    for step in range(3):
        set_gradients(up, step)
        set_gradients(down, step)
        for p in down:
            assert p.grad is not None
            p.grad.neg_()
        ascent.step()
        descent.step()
    assert_same(weights(up), weights(down))


@every_case
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-element"])
def test_a_tensor_learning_rate_equals_a_number_and_may_change_in_place(
    case: Case, shape: tuple[int, ...]
) -> None:
    numbers, tensors = parameters(), parameters()
    lr = torch.full(shape, 0.01)
    by_number, by_tensor = case.make(numbers, lr=0.01), case.make(tensors, lr=lr)
    assert_near(train(by_tensor, tensors, 2), train(by_number, numbers, 2), 1e-6)
    lr.fill_(0.1)
    by_number.param_groups[0]["lr"] = 0.1
    assert_near(train(by_tensor, tensors, 2, start=2), train(by_number, numbers, 2, start=2), 1e-6)
    assert by_tensor.param_groups[0]["lr"] is lr
    assert lr.shape == shape
    assert_same(lr, torch.full(shape, 0.1))


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "one-cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=20),
}


@every_case
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers_drive_numbers_and_tensors_alike(case: Case, schedule: str) -> None:
    numbers, tensors, by_hand = parameters(), parameters(), parameters()
    optimizers = [case.make(numbers), case.make(tensors, lr=torch.tensor(0.01)), case.make(by_hand)]
    schedulers = [SCHEDULES[schedule](optimizer) for optimizer in optimizers[:2]]
    seen = []
    for step in range(4):
        options = optimizers[0].param_groups[0]
        optimizers[2].param_groups[0].update({name: options[name] for name in ("lr", case.decay)})
        seen.append((options["lr"], options[case.decay]))
        for params, optimizer in zip((numbers, tensors, by_hand), optimizers, strict=True):
            train(optimizer, params, 1, start=step)
        for scheduler in schedulers:
            scheduler.step()
    assert_near(weights(tensors), weights(numbers))
    assert_same(weights(by_hand), weights(numbers))
    assert len({lr for lr, _ in seen}) == 4
    assert len({decay for _, decay in seen}) == (4 if schedule == "one-cycle" else 1)


@every_case
def test_a_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned(case: Case) -> None:
    params, expected = parameters(), parameters()
    optimizer = case.make(params)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert_same(loss, sum((p**2).sum() for p in expected))
    for p in expected:
        p.grad = 2 * p.detach()
    reference = case.make(expected)
    assert reference.step() is None
    assert_near(weights(params), weights(expected), 1e-6)


# --- copies


@every_case
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_made_mid_run_continues_alike_and_on_its_own(case: Case, clone: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = case.make([{"params": params[:4], "rank": 2}, {"params": params[4:], "lr": 0.003}])
    train(optimizer, params, 2)
    copied_params, copied = clone((params, optimizer))
    assert_same(state(copied), state(optimizer))
    before = everything(optimizer)
    after = train(copied, copied_params, 2, start=2)
    assert_unchanged(optimizer, before)
    assert_same(after, train(optimizer, params, 2, start=2))


# --- mixed precision


@every_case
def test_grad_scaler_skips_the_step_of_an_infinite_gradient_and_changes_no_other(
    case: Case,
) -> None:
    params, expected = parameters(), parameters()
    optimizer, plain = case.make(params), case.make(expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        factor = scaler.scale(torch.ones(())).item()
        set_gradients(params, step)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(factor)
        if step == 1:
            assert params[0].grad is not None
            params[0].grad.view(-1)[3] = math.inf
        before = everything(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert_unchanged(optimizer, before)
        else:
            train(plain, expected, 1, start=step)
    assert scaler.get_scale() == 2.0**9
    assert_same(weights(params), weights(expected))


@every_case
def test_a_step_inside_autocast_equals_one_outside(case: Case) -> None:
    inside, outside = parameters(), parameters()
    optimizer = case.make(inside)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(optimizer, inside, 3)
    assert_same(weights(inside), train(case.make(outside), outside, 3))


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_other_types_follow_float32_with_float32_state(case: Case, dtype: torch.dtype) -> None:
    narrow, exact = parameters(dtype=dtype), parameters(dtype=dtype)
    exact = [nn.Parameter(p.detach().float()) for p in exact]
    optimizer, reference = case.make(narrow), case.make(exact)
    set_gradients(narrow, 0)
    for p, q in zip(narrow, exact, strict=True):
        assert p.grad is not None
        q.grad = p.grad.float()
    optimizer.step()
    reference.step()
    for p, q in zip(narrow, exact, strict=True):
        assert p.dtype == dtype
        torch.testing.assert_close(p.float(), q, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=2e-5)
        wide = {name for name, value in optimizer.state[p].items() if value.dtype == torch.float64}
        dense = {"exp_avg", "exp_avg_sq"} & optimizer.state[p].keys()
        assert wide == (dense if dtype == torch.float64 else set())
        others = optimizer.state[p].keys() - wide
        assert {optimizer.state[p][name].dtype for name in others} == {torch.float32}


@every_case
def test_float64_weights_keep_their_resolution(case: Case) -> None:
    params = parameters(dtype=torch.float64)
    before = weights(params)
    optimizer = case.make(params, lr=1e-12, weight_decay=0.0)
    after = train(optimizer, params, 1)
    for old, new in zip(before, after, strict=True):
        assert 0 < (new - old).abs().max() < 1e-10


# --- settings of the process


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def medium_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


AMBIENT: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
    "medium": medium_precision,
}
ROUNDED: dict[str, Any] = {"nonfinite": "skip", "stochastic_rounding": True}


@every_case
@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize(
    ("dtype", "options", "since"),
    [(torch.float32, {}, 0), (torch.bfloat16, ROUNDED, 0), (torch.float32, {}, 2)],
    ids=["float32", "rounded", "later"],
)
def test_default_dtype_and_device_and_precision_of_products_change_nothing(
    case: Case, ambient: str, dtype: torch.dtype, options: dict[str, Any], since: int
) -> None:
    """They hold from the constructor on, or from the third step. "meta" stands for another device."""
    shapes = [*SHAPES, (256, 192)]  # large enough for libraries to follow the precision that is set
    params, expected = parameters(shapes, dtype), parameters(shapes, dtype)
    with AMBIENT[ambient]() if since == 0 else contextlib.nullcontext():
        optimizer = case.make(params, **options)
    for step in range(4):
        set_gradients(params, step)
        with AMBIENT[ambient]() if step >= since else contextlib.nullcontext():
            optimizer.step()
    reference = case.make(expected, **options)
    train(reference, expected, 4)
    assert_same([weights(params), state(optimizer)], [weights(expected), state(reference)])


# --- what may be missing


@every_case
def test_frozen_parameters_and_those_without_gradient_get_no_state_and_stay(case: Case) -> None:
    params = parameters()
    for p in params[::2]:
        p.requires_grad_(False)
    initial = weights(params)
    optimizer = case.make(params)
    for index, p in enumerate(params):
        p.grad = torch.ones_like(p) if index % 4 == 1 else None
    optimizer.step()
    for index, (p, old) in enumerate(zip(params, initial, strict=True)):
        stepped = index % 4 == 1
        assert (p in optimizer.state) == stepped
        assert torch.equal(p, old) != stepped
    assert finite(weights(params))


@every_case
def test_a_late_first_gradient_is_stepped_with_the_others_as_if_alone(case: Case) -> None:
    params, alone = parameters(), parameters()
    late = [
        1,
        4,
        7,
        10,
    ]  # of the three of a shape, of the experts, a matrix that goes dense, a vector
    optimizer = case.make(params)
    separate = [case.make([p]) for p in alone]
    for step in range(5):
        set_gradients(params, step)
        set_gradients(alone, step)
        for index in late if step < 3 else ():
            params[index].grad = alone[index].grad = None
        optimizer.step()
        for one in separate:
            one.step()
    steps = [int(optimizer.state[p]["step"]) for p in params]
    assert steps == [2 if index in late else 5 for index in range(len(params))]
    assert_near(weights(params), weights(alone), 1e-4)


@every_case
def test_an_all_zero_first_gradient_gives_no_nan_and_later_ones_are_followed(case: Case) -> None:
    params = parameters()
    for p in params:
        p.grad = torch.zeros_like(p)
    initial = weights(params)
    optimizer = case.make(params, weight_decay=0.0)
    optimizer.step()
    assert_same(weights(params), initial)
    after = train(optimizer, params, 30, start=1)
    assert finite(after)
    assert finite([value for own in state(optimizer) for value in own.values()])
    # The signal in the gradients, of rank one, is what all the steps have in common.
    for index, (new, old) in enumerate(zip(after[:4], initial[:4], strict=True)):
        signal = sum(gradient(new.shape, step, index) for step in range(1, 31)) / 30
        assert torch.cosine_similarity((old - new).flatten(), signal.flatten(), 0) > 0.4
        if "m_B" in optimizer.state[params[index]]:
            m = optimizer.state[params[index]]["m_B"] @ optimizer.state[params[index]]["m_A"]
            assert torch.cosine_similarity(m.flatten(), signal.flatten(), 0) > 0.5


@every_case
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_first_step_of_zero_gradients_and_zero_lr_makes_the_state_alone(case: Case, lr: Any) -> None:
    # torch.distributed.checkpoint and torchtitan make the state by such a step before they load it.
    params, stepped = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    initial = weights(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = case.make(params, lr=lr)
    optimizer.step()
    assert_same(weights(params), initial)
    reference = case.make(stepped)
    train(reference, stepped, 1)
    for own, other in zip(state(optimizer), state(reference), strict=True):
        assert finite(list(own.values()))
        assert {k: (v.shape, v.dtype) for k, v in own.items()} == {
            k: (v.shape, v.dtype) for k, v in other.items()
        }


@every_case
def test_weights_without_elements_are_harmless(case: Case) -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in [(0,), (0, 8), (8, 0), (2, 0, 4)]]
    for nonfinite in ("propagate", "skip"):
        train(case.make(params, nonfinite=nonfinite), params, 2)


# --- shapes and memory formats


@every_case
def test_scalars_vectors_and_thin_matrices_go_dense_and_are_stepped(case: Case) -> None:
    params = parameters()
    initial = weights(params)
    optimizer = case.make(params)
    after = train(optimizer, params, 3)
    assert finite(after)
    assert all(not torch.equal(new, old) for new, old in zip(after, initial, strict=True))
    for index, p in enumerate(params):
        low_rank = index < case.low_rank
        assert ("exp_avg" not in optimizer.state[p]) == low_rank
        assert ("m_B" in optimizer.state[p]) == (low_rank and case.rank != 0)


@factorised
def test_a_rank_for_which_factors_are_not_smaller_makes_the_matrix_dense(case: Case) -> None:
    # 4 (6 + 12) = 6 x 12: equal is not smaller.
    params, dense = parameters([(6, 12), (12, 6)]), parameters([(6, 12), (12, 6)])
    optimizer = (
        case.make(params, rank=4, scale=0.25) if case.cls is LoRAPreAdamW else case.make(params, rank=4)
    )
    reference = case.make(dense, rank=None)
    assert_same(train(optimizer, params, 2), train(reference, dense, 2))
    assert {row.note for row in coverage(optimizer)} == {"factors not smaller"}
    assert all("m_B" not in own and "v_B" not in own for own in state(optimizer))
    assert "m_B" in _stepped(case, rank=3) or "v_B" in _stepped(case, rank=3)


def _stepped(case: Case, **options: Any) -> set[str]:
    """Names of the state of a (6, 12) weight after a step."""
    params = parameters([(6, 12)])
    optimizer = case.make(params, **options)
    train(optimizer, params, 1)
    return set(optimizer.state[params[0]])


@every_case
@pytest.mark.filterwarnings("ignore:a step of weights.*without compiled kernels")  # channels_last
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("grad_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolution_is_the_matrix_of_its_filters_in_any_memory_format(
    case: Case, weight_format: torch.memory_format, grad_format: torch.memory_format
) -> None:
    (conv,), (matrix,) = parameters([(8, 3, 3, 3)]), parameters([(8, 27)])
    matrix.data = conv.detach().flatten(1).clone()
    conv.data = conv.detach().to(memory_format=weight_format)
    by_conv, by_matrix = case.make([conv]), case.make([matrix])
    for step in range(3):
        g = gradient((8, 27), step, 0)
        matrix.grad, conv.grad = g, g.view(8, 3, 3, 3).clone(memory_format=grad_format)
        by_conv.step()
        by_matrix.step()
    assert conv.is_contiguous(memory_format=weight_format)
    assert_near([conv.detach().flatten(1)], [matrix.detach()], 1e-6)
    for name, value in by_matrix.state[matrix].items():  # not in the order of the memory
        assert_near([by_conv.state[conv][name].view_as(value)], [value], 1e-5)


@every_case
def test_a_one_dimensional_convolution_is_flattened_by_an_option_of_its_group(case: Case) -> None:
    (conv,), (matrix,) = parameters([(8, 9, 3)]), parameters([(8, 27)])
    matrix.data = conv.detach().flatten(1).clone()
    by_conv, by_matrix = case.make([{"params": [conv], "flatten": True}]), case.make([matrix])
    for step in range(3):
        matrix.grad = gradient((8, 27), step, 0)
        conv.grad = matrix.grad.view(8, 9, 3).clone()
        by_conv.step()
        by_matrix.step()
    assert_near([conv.detach().flatten(1)], [matrix.detach()], 1e-6)


@every_case
def test_fused_experts_equal_separate_matrices(case: Case) -> None:
    (fused,), single = parameters([(3, 12, 20)]), parameters([(12, 20)] * 3)
    for expert, p in enumerate(single):
        p.data = fused.detach()[expert].clone()
    together, apart = case.make([fused]), case.make(single)
    for step in range(3):
        set_gradients(single, step)
        fused.grad = torch.stack([p.grad for p in single if p.grad is not None])
        together.step()
        apart.step()
    assert_near(list(fused.detach()), weights(single), 1e-6)
    for name, value in together.state[fused].items():
        if value.ndim > 1:
            assert_near([value], [torch.stack([apart.state[p][name] for p in single])], 1e-5)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else strided(x)


def reversed_order(x: Tensor) -> Tensor:
    """The last dimension outermost in memory, as channels_last has the channels innermost."""
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


def padded(x: Tensor) -> Tensor:
    """Rows in a larger matrix."""
    return torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0, dtype=x.dtype)[..., : x.shape[-1]].copy_(x)


def strided(x: Tensor) -> Tensor:
    """Every other number of longer rows."""
    return torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype)[..., ::2].copy_(x)


LAYOUTS = {
    "contiguous": Tensor.clone,
    "transposed": transposed,
    "reversed": reversed_order,
    "padded": padded,
    "strided": strided,
}


@every_case
@pytest.mark.filterwarnings("ignore:.*without compiled kernels")  # some layouts have none
@pytest.mark.parametrize(
    ("weight_layout", "grad_layout", "dtype"),
    [
        *[(x, y, torch.float32) for x in LAYOUTS for y in LAYOUTS if x == y or "contiguous" in (x, y)],
        ("transposed", "reversed", torch.float32),
        ("padded", "transposed", torch.bfloat16),
        ("reversed", "strided", torch.bfloat16),
    ],
    ids=str,
)
def test_weights_and_gradients_in_any_memory_give_the_same_result(
    case: Case, weight_layout: str, grad_layout: str, dtype: torch.dtype
) -> None:
    shapes = [shape for shape in SHAPES if shape]
    params, expected = parameters(shapes, dtype), parameters(shapes, dtype)
    for p in params:
        p.data = LAYOUTS[weight_layout](p.detach())
    strides = [p.stride() for p in params]
    optimizer, reference = case.make(params), case.make(expected)
    for step in range(3):
        set_gradients(expected, step)
        for p, q in zip(params, expected, strict=True):
            assert q.grad is not None
            p.grad = LAYOUTS[grad_layout](q.grad)
        optimizer.step()
        reference.step()
    assert [p.stride() for p in params] == strides
    # Sums in another order; a bfloat16 weight may then round to its other neighbour.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert_near(weights(params), weights(expected), tolerance)
    assert all(value.is_contiguous() for own in state(optimizer) for value in own.values())
    if weight_layout in ("padded", "strided"):  # the memory between the rows belongs to others
        for p in params:
            whole = p.detach().as_strided((p.untyped_storage().nbytes() // p.element_size(),), (1,))
            assert (whole == 7).sum() == len(whole) - p.numel()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_stride_within_rows_of_one_number_means_nothing(case: Case, dtype: torch.dtype) -> None:
    """torch calls a column contiguous whatever that stride is; nothing warns of slow steps."""
    column, expected = parameters([(9, 1)], dtype), parameters([(9, 1)], dtype)
    column[0].data = column[0].detach().clone().as_strided((9, 1), (1, 2))
    optimizer, reference = case.make(column), case.make(expected)
    for step in range(2):
        set_gradients(expected, step)
        assert expected[0].grad is not None
        column[0].grad = expected[0].grad.as_strided((9, 1), (1, 2))
        optimizer.step()
        reference.step()
    assert_same(weights(column), weights(expected))


@every_case
@pytest.mark.usefixtures("torch_operations")  # rank one would magnify another order of sums
def test_a_broadcast_gradient_is_that_of_its_copy(case: Case) -> None:
    broadcast, plain = parameters([(12, 20)]), parameters([(12, 20)])
    by_broadcast, by_plain = case.make(broadcast), case.make(plain)
    for step in range(3):
        row = gradient((20,), step, 0)
        broadcast[0].grad, plain[0].grad = row.expand(12, 20), row.repeat(12, 1)
        by_broadcast.step()
        by_plain.step()
    assert_near(weights(broadcast), weights(plain), 1e-6)


@factorised
def test_a_graph_made_with_the_old_weights_is_refused(case: Case) -> None:
    (weight,) = parameters([(12, 20)])
    x = torch.ones(3, 20, requires_grad=True)
    stale = nn.functional.linear(x, weight).sum()
    train(case.make([weight]), [weight], 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# --- batches and tiles


@every_case
def test_a_batch_of_same_shaped_weights_equals_one_at_a_time(case: Case) -> None:
    together, apart = parameters(), parameters()
    optimizer, separate = case.make(together), [case.make([p]) for p in apart]
    for step in range(4):
        set_gradients(together, step)
        set_gradients(apart, step)
        optimizer.step()
        for one in separate:
            one.step()
    assert_near(weights(together), weights(apart), 1e-4)


@every_case
def test_results_do_not_depend_on_the_size_of_tiles_and_batches(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = parameters()
    train(case.make(expected), expected, 4)
    # One row at a time; tiles that do not divide the rows; two of the three of a shape to a batch.
    factors = 2 * RANK * (12 + 20)
    for tile, small, stack in ((1, 1, 1), (110, 1, factors), (2**30, 2**30, 2**30), (110, 500, 1)):
        monkeypatch.setattr(gradient_module, "TILE", tile)
        monkeypatch.setattr(gradient_module, "SMALL", small)
        monkeypatch.setattr(batch, "STACK", stack)
        params = parameters()
        assert_near(train(case.make(params), params, 4), weights(expected), 1e-4)


@every_case
def test_two_runs_are_bitwise_equal(case: Case) -> None:
    one, two = parameters(), parameters()
    first, second = case.make(one), case.make(two)
    train(first, one, 3)
    torch.manual_seed(7)  # the random start must not depend on it
    train(second, two, 3)
    assert_same([weights(one), state(first)], [weights(two), state(second)])


@every_case
def test_the_start_depends_on_the_seed(case: Case) -> None:
    if not case.rank:
        pytest.skip("nothing random")
    params, other = parameters()[:LOW_RANK], parameters()[:LOW_RANK]
    train(case.make(params, seed=0), params, 3)
    train(case.make(other, seed=1), other, 3)
    assert all(not torch.equal(p, q) for p, q in zip(params, other, strict=True))


# --- what a step leaves alone


@every_case
def test_a_step_modifies_no_gradient_and_draws_no_global_random_number(case: Case) -> None:
    params = parameters()
    set_gradients(params, 0)
    grads = [p.grad for p in params]
    before = [g.clone() for g in grads if g is not None]
    random = torch.get_rng_state()
    optimizer = case.make(params, maximize=True, nonfinite="skip")
    for _ in range(2):
        optimizer.step()
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert_same(grads, before)
    assert torch.equal(torch.get_rng_state(), random)


@every_case
def test_a_sparse_gradient_is_refused_by_name_before_anything_changes(case: Case) -> None:
    params = parameters()
    names = [f"layer.{i}" for i in range(len(params))]
    named = list(zip(names, params, strict=True))
    optimizer = case.make([{"params": named[:6]}, {"params": named[6:]}])
    train(optimizer, params, 2)
    params[7].grad = torch.ones(4, 5).to_sparse()  # in the last group
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=r"layer\.7.*sparse"):
        optimizer.step()
    assert_unchanged(optimizer, before)


class Forbid(TorchDispatchMode):
    """Raise where the host would have to wait for the device."""

    waits = ("_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@every_case
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.usefixtures("torch_operations")
def test_a_step_never_waits_for_the_device(case: Case, nonfinite: str) -> None:
    with pytest.raises(AssertionError, match="waits"), Forbid():
        torch.ones(()).item()
    params = parameters()
    optimizer = case.make(params, lr=torch.tensor(0.01), nonfinite=nonfinite)
    for step in range(2):
        set_gradients(params, step)
        with Forbid():
            optimizer.step()
            optimizer.stats()


# --- non-finite gradients


@every_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_skip_leaves_a_weight_and_its_state_alone_and_counts(
    case: Case, bad: float, dtype: torch.dtype
) -> None:
    params, expected = parameters(dtype=dtype), parameters(dtype=dtype)
    poisoned = [1, 4, 6, 7, 10, 11]
    optimizer, reference = (
        case.make(params, nonfinite="skip"),
        case.make(expected, nonfinite="skip"),
    )
    train(optimizer, params, 2)
    train(reference, expected, 2)
    set_gradients(params, 2)
    set_gradients(expected, 2)
    for index in poisoned:
        grad = params[index].grad
        assert grad is not None
        grad.view(-1)[grad.numel() // 2] = bad
    before, before_state = weights(params), state(optimizer)
    optimizer.step()
    reference.step()
    after, after_state = weights(params), state(optimizer)
    for index in range(len(params)):
        if index in poisoned:
            before_state[index]["skipped"] += 1
            assert_same(after[index], before[index])
            assert_same(after_state[index], before_state[index])
        else:
            assert_same(after[index], expected[index].detach())
            assert_same(after_state[index], reference.state[expected[index]])
    assert [row.skipped for row in coverage(optimizer)] == [int(i in poisoned) for i in range(len(params))]
    # Then all have gradients again, and each its own step count.
    assert finite(train(optimizer, params, 2, start=3))
    steps = [int(optimizer.state[p]["step"]) for p in params]
    assert steps == [4 if i in poisoned else 5 for i in range(len(params))]


@every_case
def test_skip_survives_a_first_gradient_that_is_not_finite(case: Case) -> None:
    params = parameters()
    initial = weights(params)
    optimizer = case.make(params, nonfinite="skip")
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert_same(weights(params), initial)
    assert [(int(own["step"]), int(own["skipped"])) for own in state(optimizer)] == [(0, 1)] * len(SHAPES)
    assert finite(train(optimizer, params, 3))
    assert all(not torch.equal(p, old) for p, old in zip(params, initial, strict=True))


@every_case
def test_skip_changes_nothing_while_gradients_are_finite(case: Case) -> None:
    params, expected = parameters(), parameters()
    assert_same(
        train(case.make(params, nonfinite="skip"), params, 3),
        train(case.make(expected), expected, 3),
    )


@every_case
def test_propagate_lets_nan_through_to_that_weight_alone(case: Case) -> None:
    params, expected = parameters(), parameters()
    optimizer, reference = case.make(params), case.make(expected)
    for step in range(2):
        set_gradients(params, step)
        set_gradients(expected, step)
        if step == 1:
            assert params[1].grad is not None
            params[1].grad.fill_(math.nan)
        optimizer.step()
        reference.step()
    assert params[1].isnan().all()
    others = [i for i in range(len(params)) if i != 1]
    assert_near([weights(params)[i] for i in others], [weights(expected)[i] for i in others], 1e-6)


@every_case
def test_nonfinite_may_be_switched_mid_run(case: Case) -> None:
    params, expected = parameters(), parameters()
    optimizer, reference = case.make(params), case.make(expected)
    for step, nonfinite in enumerate(["propagate", "skip", "propagate", "skip"]):
        optimizer.param_groups[0]["nonfinite"] = nonfinite
        train(optimizer, params, 1, start=step)
        train(reference, expected, 1, start=step)
    assert_same(weights(params), weights(expected))
    assert {int(own["skipped"]) for own in state(optimizer)} == {0}
    set_gradients(params, 4)
    assert params[0].grad is not None
    params[0].grad[0, 0] = math.nan
    before = params[0].detach().clone()
    optimizer.step()
    assert_same(params[0].detach(), before)
    assert int(optimizer.state[params[0]]["skipped"]) == 1


# --- limits of the options


@every_case
def test_momenta_that_keep_nothing_are_finite(case: Case) -> None:
    decay: dict[str, Any] = {"betas": (0.0, 0.0)} if case.cls is LoRAPreAdamW else {"momentum": 0.0}
    params = parameters()
    assert finite(train(case.make(params, **decay), params, 4))


@every_case
def test_zero_learning_rate_moves_nothing_and_still_tracks(case: Case) -> None:
    still, moving = parameters(), parameters()
    initial = weights(still)
    optimizer, reference = case.make(still, lr=0.0), case.make(moving)
    train(optimizer, still, 2)
    train(reference, moving, 2)
    assert_same(weights(still), initial)
    assert_same(state(optimizer), state(reference))


@every_case
def test_weight_decay_is_decoupled(case: Case) -> None:
    params, free = parameters(), parameters()
    initial = weights(params)
    train(case.make(params, lr=0.01, weight_decay=0.5), params, 1)
    train(case.make(free, lr=0.01, weight_decay=0.0), free, 1)
    difference = [q.detach() - p.detach() for p, q in zip(params, free, strict=True)]
    assert_near(difference, [0.005 * old for old in initial], 1e-6)


@every_case
def test_a_regression_problem_is_solved(case: Case) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    inputs = torch.randn(64, 16)
    targets = torch.tanh(inputs @ torch.randn(16, 8))
    optimizer = case.make(model.parameters(), lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- the mathematics


@every_case
def test_steps_are_those_of_the_reference(case: Case) -> None:
    """One weight; test_reference.py has the shapes and options."""
    (p,) = params = parameters([(12, 20)])
    initial = p.detach().clone()
    optimizer = case.make(params)
    gradients = [gradient((12, 20), step, 0) for step in range(10)]
    options = {name: value for name, value in case.options.items() if name != "rank"}
    reference: Any
    if case.rank is None:
        reference = DenseReference(initial)
    else:
        starts = [first_A(case.options.get("variant", ""), gaussian(case.rank, 20, seed=i)) for i in (0, 1)]
        if case.cls is LoRAPreAdamW:
            reference = AdamReference(initial, *starts, lr=0.01, weight_decay=0.1, **options)
        else:
            reference = MuonReference(initial, starts[0], lr=0.01, weight_decay=0.1, **options)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        reference.step(g)
    distance = (p.detach() - reference.weight).norm() / (reference.weight - initial).norm()
    # Newton-Schulz runs in bfloat16.
    assert distance < (1e-3 if "betas" in optimizer.defaults or "dense" in str(reference) else 0.02)


class DenseReference:
    """torch.optim.AdamW in float64."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.double()
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)

    def step(self, g: Tensor) -> None:
        self.weight.grad = g.double()
        self.optimizer.step()


# --- over time, and elsewhere


@every_case
def test_three_hundred_steps_hold_no_more_memory_than_ten(case: Case) -> None:
    params = parameters([(6, 10)])
    optimizer = case.make(params)
    set_gradients(params, 0)
    held = []
    for steps in (10, 290):
        for _ in range(steps):
            optimizer.step()
        held.append(holdings())
    (count, size, objects), (later_count, later_size, later_objects) = held
    assert (later_count, later_size) == (count, size)
    assert later_objects <= objects + 100  # fewer than one for each of 280 steps


def holdings() -> tuple[int, int, int]:
    """How many tensors there are, their bytes, and how many objects of any kind."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [x for x in objects if issubclass(type(x), Tensor)]  # proxies would answer isinstance
    return len(tensors), sum(x.numel() * x.element_size() for x in tensors), len(objects)


DEVICES = [
    pytest.param("cpu"),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
    ),
]


@every_case
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("before", [0, 2], ids=["made", "stepped"])
def test_a_model_may_move_to_its_device_after_the_optimizer_was_made_and_stepped(
    case: Case, device: str, before: int
) -> None:
    model, expected = (nn.ParameterList(parameters()) for _ in range(2))
    optimizer, reference = case.make(model.parameters()), case.make(expected.parameters())
    train(optimizer, list(model), before)
    train(reference, list(expected), 4)
    model.to(device)
    for step in range(before, 4):
        for index, p in enumerate(model):
            p.grad = gradient(p.shape, step, index).to(device)
        optimizer.step()
    assert {value.device.type for own in state(optimizer) for value in own.values()} == {device}
    assert_near([p.cpu() for p in weights(model)], weights(expected), 1e-4 if device == "cpu" else 1e-3)


def test_the_table_has_a_row_for_every_variant_of_both_classes() -> None:
    for cls, known in ((LoRAPreAdamW, ADAM), (LoRAPreMuon, FOLLOW)):
        default = cls(parameters()).defaults["variant"]
        assert {case.options.get("variant", default) for case in CASES.values() if case.cls is cls} == {
            *known
        }
