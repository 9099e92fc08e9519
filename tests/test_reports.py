"""Situations in which people who train with other optimizers met with wrong results: docs/reliability.md."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import ADAM, CASES, FACTORISED, Case, every_case
from lorapre import LoRAPreAdamW, LoRAPreMuon, gradient_release, param_groups

SHAPE = (24, 20)


def stepped(case: Case, steps: int = 2) -> tuple[nn.Parameter, Any]:
    """A weight named "w" and its optimizer, after some steps."""
    weight = nn.Parameter(torch.randn(SHAPE))
    optimizer = case.make([("w", weight)])
    for _ in range(steps):
        step(weight, optimizer)
    return weight, optimizer


def step(weight: nn.Parameter, optimizer: Any) -> None:
    weight.grad = torch.randn(weight.shape)
    optimizer.step()


def refuses(weight: nn.Parameter, optimizer: Any, words: str) -> None:
    """The next step raises an error that has these words, and changes neither weight nor state."""
    weight.grad = torch.randn(weight.shape)
    before = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()
    assert torch.equal(weight, before[0])
    assert all(torch.equal(optimizer.state[weight][name], value) for name, value in before[1].items())


@pytest.mark.parametrize("name", FACTORISED)
@pytest.mark.parametrize("rank", [2, None])
def test_an_edited_rank_is_refused_by_name(name: str, rank: int | None) -> None:
    weight, optimizer = stepped(CASES[name])
    optimizer.param_groups[0]["rank"] = rank
    refuses(weight, optimizer, "state of parameter 'w' was made for")
    del optimizer.state[weight]
    step(weight, optimizer)
    assert weight.isfinite().all()


@pytest.mark.parametrize(("option", "value"), [("variant", "calibrated"), ("compress", "first")])
def test_an_edited_variant_is_refused_by_name(option: str, value: str) -> None:
    weight, optimizer = stepped(CASES["adam-subspace"])
    optimizer.param_groups[0][option] = value
    refuses(weight, optimizer, "state of parameter 'w' was made for")


@every_case
@pytest.mark.parametrize("rows", [16, 40])
def test_a_weight_replaced_by_one_of_another_shape_is_refused_by_name(case: Case, rows: int) -> None:
    weight, optimizer = stepped(case)
    weight.grad = None
    weight.data = torch.randn(rows, SHAPE[1])
    refuses(weight, optimizer, "state '.*' of parameter 'w' has shape")


@every_case
@pytest.mark.parametrize("cast", [Tensor.double, Tensor.bfloat16])
def test_state_of_another_dtype_is_cast_to_its_own(case: Case, cast: Callable[[Tensor], Tensor]) -> None:
    weight, optimizer = stepped(case)
    own = optimizer.state[weight]
    own.update({name: cast(value) for name, value in own.items() if value.ndim})
    step(weight, optimizer)
    assert weight.isfinite().all()
    assert {value.dtype for value in own.values()} == {torch.float32}


@every_case
def test_missing_state_is_refused_by_name(case: Case) -> None:
    weight, optimizer = stepped(case)
    name = list(optimizer.state[weight])[-1]
    del optimizer.state[weight][name]
    refuses(weight, optimizer, f"state '{name}' of parameter 'w' is missing")


@every_case
def test_an_expanded_weight_is_refused_by_name(case: Case) -> None:
    weight = nn.Parameter(torch.zeros(1, 20).expand(SHAPE))
    optimizer = case.make([("w", weight)])
    weight.grad = torch.ones(SHAPE)
    with pytest.raises(RuntimeError, match=r"parameter 'w' is expanded: more than one element"):
        optimizer.step()
    assert not weight.any()


@pytest.mark.parametrize("name", ADAM)
def test_weights_that_share_memory_get_both_updates(name: str) -> None:
    memory = torch.randn(SHAPE)
    apart = nn.Parameter(memory.clone())
    pair = [nn.Parameter(memory), nn.Parameter(memory)]
    optimizer, one = CASES[name].make(pair, weight_decay=0.0), CASES[name].make([apart], weight_decay=0.0)
    grad = torch.randn(SHAPE)
    for p in (*pair, apart):
        p.grad = grad.clone()
    start = apart.detach().clone()
    optimizer.step()
    one.step()
    # Not to the last bit: the second update starts from what the first has rounded.
    assert torch.allclose(pair[0] - start, 2 * (apart - start), rtol=1e-4, atol=1e-6)


@every_case
def test_what_a_wrapper_keeps_in_the_state_is_carried(case: Case) -> None:
    """As timm's Lookahead does: its slow weights are there before ours, saved and loaded."""
    weight, other = nn.Parameter(torch.randn(SHAPE)), nn.Parameter(torch.randn(SHAPE))
    optimizer, fresh = case.make([("w", weight)]), case.make([("w", other)])
    slow = torch.randn(SHAPE)
    optimizer.state[weight]["slow"] = slow
    step(weight, optimizer)
    assert optimizer.state[weight]["slow"] is slow
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(fresh.state[other]["slow"], slow)


@every_case
def test_a_checkpoint_is_matched_by_name(case: Case) -> None:
    """torch goes by order, and crosses the states of same-shaped weights."""
    params = {name: nn.Parameter(torch.randn(SHAPE)) for name in "ab"}
    optimizer = case.make(list(params.items()))
    for p in params.values():
        p.grad = torch.randn(SHAPE)
    optimizer.step()
    fresh = case.make([(name, nn.Parameter(params[name].detach().clone())) for name in "ba"])
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, p in zip("ba", fresh.param_groups[0]["params"], strict=True):
        own = optimizer.state[params[name]]
        assert all(torch.equal(fresh.state[p][key], value) for key, value in own.items())


@every_case
def test_a_checkpoint_with_a_name_in_another_group_is_refused(case: Case) -> None:
    params = {name: nn.Parameter(torch.randn(SHAPE)) for name in "ab"}
    groups = [{"params": [item]} for item in params.items()]
    saved = case.make(groups).state_dict()
    other = case.make(groups[::-1])
    with pytest.raises(ValueError, match="has the parameter 'b', but 'a' in its place"):
        other.load_state_dict(saved)


def test_the_generator_of_a_gan_does_not_update_the_discriminator() -> None:
    discriminator = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 20))
    optimizer = LoRAPreAdamW(param_groups(discriminator, rank=3), lr=0.1)
    before = [p.detach().clone() for p in discriminator.parameters()]
    fake = torch.randn(4, 20, requires_grad=True)
    with gradient_release(discriminator, optimizer) as handle:
        with handle.paused():
            discriminator(fake).sum().backward()
        assert fake.grad is not None
        assert all(map(torch.equal, discriminator.parameters(), before))
        assert not any(optimizer.state.values())
        optimizer.zero_grad()
        discriminator(torch.randn(4, 20)).sum().backward()
    assert not any(map(torch.equal, discriminator.parameters(), before))


class Pair(Sequence[float]):
    """As OmegaConf's ListConfig: a sequence, neither list nor tuple."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        return (0.8, 0.9)[index]


def test_a_group_takes_a_pair_of_any_type() -> None:
    optimizer = LoRAPreAdamW([{"params": [nn.Parameter(torch.randn(SHAPE))], "betas": Pair()}], rank=3)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon])
def test_a_seed_that_does_not_fit_is_refused_when_constructed(cls: Any) -> None:
    weight = nn.Parameter(torch.randn(SHAPE))
    cls([weight], rank=3, seed=2**62 - 1)
    with pytest.raises(ValueError, match="seed must be"):
        cls([weight], rank=3, seed=2**62)


def test_release_takes_the_options_of_the_group_that_has_the_weight_then() -> None:
    still, moving = nn.Linear(20, 24, bias=False), nn.Linear(24, 20, bias=False)
    model = nn.Sequential(still, moving)
    groups = [{"params": [still.weight], "lr": 0.0}, {"params": [moving.weight], "lr": 0.1}]
    optimizer = LoRAPreAdamW(groups, rank=3)
    before = [p.detach().clone() for p in model.parameters()]
    with gradient_release(model, optimizer):
        optimizer.param_groups.reverse()
        model(torch.randn(4, 20)).sum().backward()
    assert torch.equal(still.weight, before[0])
    assert not torch.equal(moving.weight, before[1])
