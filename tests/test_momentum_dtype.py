"""A momentum in bfloat16: exactly what rounding the float32 factors after every step would give."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from cases import (
    CASES,
    SHAPES,
    Case,
    assert_same,
    parameters,
    set_gradients,
    state,
    train,
    weights,
)
from lorapre import coverage, gradient_release, param_groups
from lorapre.migration import from_adamw, to_adamw
from test_state import through_a_file

NAMES = ["adam-split", "adam-paper", "muon-subspace", "muon-paper"]
every_momentum = pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=NAMES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)

HALF: dict[str, Any] = {"momentum_dtype": "bfloat16"}
FACTORS = ("m_B", "m_A")


def round_factors(optimizer: torch.optim.Optimizer) -> None:
    for own in optimizer.state.values():
        for name in FACTORS:
            if name in own:
                own[name].copy_(own[name].bfloat16())


def wide(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Copies of states, with their factors in float32."""
    return [{k: x.float() if k in FACTORS else x for k, x in own.items()} for own in states]


@every_momentum
@every_dtype
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.usefixtures("arithmetic")
def test_steps_are_those_of_factors_rounded_after_every_step(
    case: Case, dtype: torch.dtype, nonfinite: str
) -> None:
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer, rounded = (
        case.make(params, nonfinite=nonfinite, **HALF),
        case.make(others, nonfinite=nonfinite),
    )
    for step in range(5):
        for own, each in ((optimizer, params), (rounded, others)):
            set_gradients(each, step)
            if step == 2 and nonfinite == "skip":
                each[1].grad = torch.full_like(each[1], math.inf)
            own.step()
        if step == 0:  # the first factors are rounded before they are used: start from the same
            for p, other in zip(params, others, strict=True):
                p.data.copy_(other.data)
                for name, value in rounded.state[other].items():
                    optimizer.state[p][name].copy_(value)
        round_factors(rounded)
        assert_same(weights(params), weights(others))
        assert_same(wide(state(optimizer)), state(rounded))
    dtypes = {name: value.dtype for own in state(optimizer) for name, value in own.items()}
    assert dtypes["m_B"] == dtypes["m_A"] == torch.bfloat16
    assert {dtypes[name] for name in dtypes if name not in (*FACTORS, "exp_avg", "exp_avg_sq")} == {
        torch.float32
    }


@every_momentum
def test_the_loss_of_precision_is_that_of_bfloat16(case: Case) -> None:
    """Ten steps end within 1 % of what they moved the weights: bfloat16 keeps 8 bits of a factor."""
    moved = []
    for options in ({}, HALF):
        params = parameters(SHAPES[:3])
        train(case.make(params, **options), params, 10)
        start = parameters(SHAPES[:3])
        moved.append(torch.stack([p.detach() - q.detach() for p, q in zip(params, start, strict=True)]))
    change = (moved[0] - moved[1]).norm() / moved[0].norm()
    assert 0 < change < 0.01


@every_momentum
@every_dtype
def test_resuming_from_a_file_continues_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    optimizer = case.make(params, **HALF)
    train(optimizer, params, 3)
    saved = through_a_file({"optimizer": optimizer.state_dict(), "weights": weights(params)})
    others = [nn.Parameter(p) for p in saved["weights"]]
    resumed = case.make(others)  # the dtype comes with the checkpoint, as every option does
    resumed.load_state_dict(saved["optimizer"])
    assert_same(state(resumed), state(optimizer))
    train(optimizer, params, 2, start=3)
    train(resumed, others, 2, start=3)
    assert_same([weights(others), state(resumed)], [weights(params), state(optimizer)])


@every_momentum
def test_distributed_checkpoint_keeps_the_dtype(case: Case) -> None:
    models = [nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 20)) for _ in range(2)]
    optimizers = [case.make(model.parameters(), **HALF) for model in models]
    for step in range(2):
        set_gradients(list(models[0].parameters()), step)
        optimizers[0].step()
    saved = through_a_file(get_optimizer_state_dict(models[0], optimizers[0]))
    set_optimizer_state_dict(models[1], optimizers[1], saved)
    assert_same(state(optimizers[1]), state(optimizers[0]))


@every_momentum
def test_the_dtype_may_be_edited_in_a_run(case: Case) -> None:
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, 2)
    for dtype in ("bfloat16", "float32"):
        optimizer.param_groups[0]["momentum_dtype"] = dtype
        train(optimizer, params, 1, start=2)
        assert optimizer.state[params[0]]["m_B"].dtype == getattr(torch, dtype)


@every_momentum
def test_coverage_knows_the_bytes_before_and_after(case: Case) -> None:
    params = parameters()
    whole, half = case.make(parameters()), case.make(params, **HALF)
    planned = [row.planned_bytes for row in coverage(half).rows]
    train(half, params, 1)
    rows = coverage(half).rows
    assert [row.state_bytes for row in rows] == planned
    saved = [x.planned_bytes - y.planned_bytes for x, y in zip(coverage(whole).rows, rows, strict=True)]
    elements = [sum(own[name].numel() for name in FACTORS if name in own) for own in state(half)]
    assert saved == [2 * n for n in elements]
    assert any(elements)


@pytest.mark.parametrize("name", ["adam-split", "muon-subspace"])
def test_release_and_migration_take_it(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 20))
    optimizer = CASES[name].make(param_groups(model, rank=3), **HALF)
    gradient_release(model, optimizer)
    model(torch.randn(5, 20)).square().sum().backward()
    weight = model[0].weight
    own = optimizer.state[weight]
    assert own["m_B"].dtype == torch.bfloat16
    make: Any = torch.optim.AdamW if name.startswith("adam") else torch.optim.Muon
    dense = make([p for p in model.parameters() if make is torch.optim.AdamW or p.ndim == 2])
    full = to_adamw(optimizer, dense)
    key = "exp_avg" if name.startswith("adam") else "momentum_buffer"
    scale = 0.1 if name.startswith("adam") else 0.05  # 1 - beta: the factors of the first step have no bias
    expected = own["m_B"].float() @ own["m_A"].float()
    torch.testing.assert_close(full["state"][0][key] / expected, torch.full_like(expected, scale))
    dense.load_state_dict(full)
    back = CASES[name].make(param_groups(model, rank=3), **HALF)
    from_adamw(back, dense.state_dict(), like=dense)
    assert back.state[weight]["m_B"].dtype == torch.bfloat16
