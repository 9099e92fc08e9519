"""Checkpoints of earlier state formats load, and a run goes on from them; those of later ones are refused.

tests/data/state_format_N.pt is a checkpoint that the first release with state format N has written, the
gradients of the steps after it, and the weights that release came to. A new format adds a file, made with

    python tests/test_state_format.py

and the files of the formats before it stay as they are.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from cases import (
    CASES,
    Case,
    assert_near,
    assert_same,
    assert_unchanged,
    every_case,
    everything,
    parameters,
    train,
)
from lorapre.checkpoints import STATE_FORMAT

DATA = Path(__file__).parent / "data"
SHAPES = [(6, 10), (5,)]
KINDS = ("adam-split", "adam-paper", "adam-dense", "muon-subspace", "muon-paper")
OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "nonfinite": "skip"}


def file(number: int) -> Path:
    return DATA / f"state_format_{number}.pt"


def optimizer_of(kind: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    case = CASES[kind]
    return case.make([{"params": params, **OPTIONS}], **({} if kind.endswith("dense") else {"rank": 2}))


def descend(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], gradients: list[Any]) -> None:
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()


def make() -> None:
    """Write the file of the present format."""
    assert not file(STATE_FORMAT).exists(), "it is to stay as the first release has written it"
    torch.manual_seed(0)
    gradients = [[torch.randn(shape) for shape in SHAPES] for _ in range(5)]
    saved: dict[str, Any] = {"gradients": gradients[3:]}
    for kind in KINDS:
        params = parameters(SHAPES)
        optimizer = optimizer_of(kind, params)
        descend(optimizer, params, gradients[:3])
        before = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()))
        descend(optimizer, params, gradients[3:])
        saved[kind] = {"weights": before[0], "optimizer": before[1], "after": [p.detach() for p in params]}
    torch.save(saved, file(STATE_FORMAT), _use_new_zipfile_serialization=False)  # half the bytes


def test_there_is_a_checkpoint_of_every_format() -> None:
    assert sorted(DATA.glob("state_format_*.pt")) == sorted(file(n + 1) for n in range(STATE_FORMAT))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(1, STATE_FORMAT + 1))
def test_a_run_goes_on_from_a_checkpoint_of_every_format(number: int, kind: str) -> None:
    saved = torch.load(file(number), weights_only=True)
    params = [nn.Parameter(p) for p in saved[kind]["weights"]]
    optimizer = optimizer_of(kind, params)
    optimizer.load_state_dict(saved[kind]["optimizer"])
    assert [group["state_format"] for group in optimizer.param_groups] == [STATE_FORMAT]
    descend(optimizer, params, saved["gradients"])
    # Newton-Schulz runs in bfloat16, where a change of rounding is one of 2**-8.
    assert_near([p.detach() for p in params], saved[kind]["after"], 1e-5 if "adam" in kind else 1e-3)


@every_case
def test_the_format_is_saved_through_distributed_checkpoint_too(case: Case) -> None:
    model = nn.Linear(20, 12)
    optimizer = case.make(model.parameters())
    train(optimizer, list(model.parameters()), 1)
    assert [group["state_format"] for group in optimizer.state_dict()["param_groups"]] == [STATE_FORMAT]
    by_name = get_optimizer_state_dict(model, optimizer)
    assert [group["state_format"] for group in by_name["param_groups"]] == [STATE_FORMAT]


@every_case
def test_a_checkpoint_of_a_newer_format_is_refused_and_changes_nothing(case: Case) -> None:
    model = nn.Linear(20, 12)
    params = list(model.parameters())
    optimizer = case.make(params)
    train(optimizer, params, 2)
    before = everything(optimizer)
    newer, by_name = copy.deepcopy(optimizer.state_dict()), get_optimizer_state_dict(model, optimizer)
    for saved in (newer, by_name):
        saved["param_groups"][-1]["state_format"] = STATE_FORMAT + 1
    message = rf"state format {STATE_FORMAT + 1}, of a newer lorapre"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(newer)
    with pytest.raises(ValueError, match=message):
        set_optimizer_state_dict(model, optimizer, by_name)
    assert_unchanged(optimizer, before)


@every_case
def test_a_checkpoint_without_a_format_is_of_the_first(case: Case) -> None:
    params, others = parameters(), parameters()
    optimizer, resumed = case.make(params), case.make(others)
    train(optimizer, params, 2)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["state_format"]
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["state_format"] == STATE_FORMAT
    assert_same([*resumed.state.values()], [*optimizer.state.values()])


if __name__ == "__main__":
    make()
    print(file(STATE_FORMAT), f"{file(STATE_FORMAT).stat().st_size:,} bytes")
