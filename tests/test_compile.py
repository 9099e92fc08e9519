"""torch.compile of the step: one graph, compiled once, and the numbers of eager mode."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.lr_scheduler import LambdaLR

from cases import (
    CASES,
    Case,
    assert_near,
    assert_same,
    every_case,
    parameters,
    set_gradients,
    state,
    train,
    weights,
)
from lorapre import LoRAPreAdamW, LoRAPreMuon

# What third parties emit while Inductor is imported and runs.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:`torch\._prims_common\.check` is deprecated:FutureWarning"),
]

SHAPES = [(12, 20), (12, 20), (3, 10, 14), (8, 3, 3, 3), (7,)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(case: Case, backend: str, shapes: list[tuple[int, ...]]) -> None:
    """Four compiled steps from the very first equal eager ones, with one compilation for them all."""
    params, expected = parameters(shapes), parameters(shapes)
    lr = torch.tensor(0.01)

    def make(params: list[nn.Parameter], **options: Any) -> LoRAPreAdamW | LoRAPreMuon:
        last = {"params": params[-1:], "maximize": True}  # a group of its own is part of the same graph
        return case.make([{"params": params[:-1]}, last], **options)

    optimizer, eager = make(params, lr=lr), make(expected)
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(optimizer.step, backend=counter, fullgraph=True)
    for number in range(4):
        lr.fill_(0.01 / (1 + number))
        for group in eager.param_groups:
            group["lr"] = 0.01 / (1 + number)
        set_gradients(params, number)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            step()
        train(eager, expected, 1, start=number)
        assert counter.frame_count == 1
    # Newton-Schulz runs in bfloat16, where a change of rounding is one of 2**-8.
    assert_near(weights(params), weights(expected), 1e-6 if case.decay == "betas" else 1e-3)
    for own, other in zip(state(optimizer), state(eager), strict=True):
        assert_near(list(own.values()), list(other.values()), 1e-5)
    assert {int(own["step"]) for own in state(optimizer)} == {4}
    assert_near(list(optimizer.stats().values()), list(eager.stats().values()), 1e-4)


@every_case
def test_a_compiled_step_is_one_graph_compiled_once_and_equals_eager(case: Case) -> None:
    compare(case, "aot_eager", SHAPES)


@pytest.mark.parametrize("name", ["adam-split", "muon-subspace"])
def test_inductor_equals_eager(name: str) -> None:
    compare(CASES[name], "inductor", [(12, 20), (12, 20)])


@pytest.mark.parametrize("name", ["adam-split", "muon-subspace"])
def test_a_momentum_in_bfloat16_stays_in_the_graph(name: str) -> None:
    params, expected = parameters(SHAPES), parameters(SHAPES)
    optimizer, eager = (CASES[name].make(each, momentum_dtype="bfloat16") for each in (params, expected))
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for number in range(3):
        set_gradients(params, number)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            step()
        train(eager, expected, 1, start=number)
    # A sum in another order may round a factor to its other neighbour, 2**-8 away.
    assert_near(weights(params), weights(expected), 1e-3)
    assert optimizer.state[params[0]]["m_B"].dtype == torch.bfloat16


def test_a_second_optimizer_compiles_in_the_same_process() -> None:
    """Dynamo traces again where options differ from the first one's, and finds the state that it has made."""
    cases = [CASES["adam-split"], CASES["adam-split"], CASES["muon-subspace"]]
    for case, lr in zip(cases, (0.01, 0.02, 0.01), strict=True):
        params, expected = parameters(SHAPES), parameters(SHAPES)
        optimizer, eager = case.make(params, lr=lr), case.make(expected, lr=lr)
        step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
        for number in range(2):
            set_gradients(params, number)
            step()
        train(eager, expected, 2)
        assert_near(weights(params), weights(expected), 1e-6 if case.decay == "betas" else 1e-3)


def test_a_compiled_step_refuses_what_does_not_fit() -> None:
    params = parameters(SHAPES)
    optimizer = CASES["adam-split"].make(params)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    set_gradients(params, 0)
    step()
    optimizer.param_groups[0]["rank"] = 2
    before = weights(params)
    set_gradients(params, 1)
    with pytest.raises(Exception, match="its options now ask for Adam"):
        step()
    assert_same(weights(params), before)


@pytest.mark.parametrize("name", ["adam-split", "muon-subspace"])
def test_a_compiled_step_skips_non_finite_gradients(name: str) -> None:
    params, expected = parameters(SHAPES), parameters(SHAPES)
    case = CASES[name]
    optimizer, eager = case.make(params, nonfinite="skip"), case.make(expected, nonfinite="skip")
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for number in range(3):
        set_gradients(params, number)
        set_gradients(expected, number)
        if number == 1:
            for p in (params[0], expected[0], params[2], expected[2]):
                assert p.grad is not None
                p.grad.view(-1)[0] = torch.nan
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            step()
        eager.step()
    assert_near(weights(params), weights(expected), 1e-6 if case.decay == "betas" else 1e-3)
    assert [int(own["skipped"]) for own in state(optimizer)] == [1, 0, 1, 0, 0]
    assert [int(own["step"]) for own in state(optimizer)] == [2, 3, 2, 3, 3]


def test_a_scheduler_of_a_tensor_lr_does_not_recompile() -> None:
    params, expected = parameters(SHAPES), parameters(SHAPES)
    optimizer = CASES["adam-split"].make(params, lr=torch.tensor(0.01))
    eager = CASES["adam-split"].make(expected)
    schedulers = [LambdaLR(o, lambda step: 1 / (1 + step)) for o in (optimizer, eager)]
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=counter)  # the scheduler wraps it in what is not compiled
    for number in range(4):
        set_gradients(params, number)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            step()
        train(eager, expected, 1, start=number)
        for scheduler in schedulers:
            scheduler.step()
    assert counter.frame_count == 1
    assert_near(weights(params), weights(expected), 1e-6)


def test_a_loaded_checkpoint_is_stepped_by_a_compiled_step_as_in_eager() -> None:
    case = CASES["adam-split"]
    params, resumed_params = parameters(SHAPES), parameters(SHAPES)
    optimizer, resumed = case.make(params), case.make(resumed_params)
    train(optimizer, params, 2)
    for p, q in zip(resumed_params, params, strict=True):
        p.data = q.detach().clone()
    step = torch.compile(resumed.step, backend="aot_eager", fullgraph=True)
    resumed.load_state_dict(optimizer.state_dict())
    for number in (2, 3):
        set_gradients(resumed_params, number)
        step()
    assert_near(weights(resumed_params), train(optimizer, params, 2, start=2), 1e-6)
