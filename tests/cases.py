"""The rows of the contract table, and a small zoo of parameters to step.

A new variant gets every property of test_contract.py, test_state.py and test_compile.py by one more row.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lorapre import LoRAPreAdamW, LoRAPreMuon

RANK = 3

# Three weights of one shape, which are one batch, its transpose, two sets of fused experts, a convolution.
# The others go dense at RANK: a matrix too small for it, a column, a row, a vector, a scalar.
SHAPES = [(12, 20)] * 3 + [(20, 12), *[(3, 10, 14)] * 2, (8, 3, 3, 3), (4, 5), (9, 1), (1, 9), (7,), ()]
LOW_RANK = 7  # so many of SHAPES get factors of RANK
RANK_0 = 10  # and of rank 0: all with two or more dimensions


class Case(NamedTuple):
    """A class and its options: one row."""

    cls: type[LoRAPreAdamW] | type[LoRAPreMuon]
    options: dict[str, Any]

    def make(self, params: Iterable[Any], **options: Any) -> LoRAPreAdamW | LoRAPreMuon:
        """The optimizer of `params`; `options` override the row's."""
        return self.cls(params, **{"lr": 0.01, "weight_decay": 0.1, "rank": RANK, **self.options, **options})

    @property
    def rank(self) -> int | None:
        """The rank of the momenta."""
        rank: int | None = self.options.get("rank", RANK)
        return rank

    @property
    def low_rank(self) -> int:
        """How many of `SHAPES` take the low-rank route."""
        return 0 if self.rank is None else LOW_RANK if self.rank else RANK_0

    @property
    def decay(self) -> str:
        """Name of the option that sets how fast momenta decay."""
        return "betas" if self.cls is LoRAPreAdamW else "momentum"


CASES = {
    "adam-split": Case(LoRAPreAdamW, {}),
    "adam-paper": Case(LoRAPreAdamW, {"variant": "paper"}),
    "adam-rank-0": Case(LoRAPreAdamW, {"rank": 0}),
    "adam-dense": Case(LoRAPreAdamW, {"rank": None}),
    "muon-subspace": Case(LoRAPreMuon, {}),
    "muon-paper": Case(LoRAPreMuon, {"variant": "paper"}),
    "muon-plain": Case(LoRAPreMuon, {"nesterov": False}),
    "muon-rank-0": Case(LoRAPreMuon, {"rank": 0}),
    "muon-dense": Case(LoRAPreMuon, {"rank": None}),
}
FACTORISED = [name for name in CASES if not name.endswith("dense")]
ADAM = [name for name in CASES if name.startswith("adam")]

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
factorised = pytest.mark.parametrize("case", [CASES[name] for name in FACTORISED], ids=FACTORISED)
SHAPED = [name for name in CASES if name != "muon-rank-0"]  # whose only state is the number of the step
shaped = pytest.mark.parametrize("case", [CASES[name] for name in SHAPED], ids=SHAPED)


def parameters(
    shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Weights of these shapes, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(tuple(shape), generator=generator).to(dtype)) for shape in shapes]


def gradient(shape: Sequence[int], step: int, index: int) -> Tensor:
    """The gradient of parameter `index` at `step`: of rank one and as much noise again."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    noise = torch.randn(tuple(shape), generator=generator)
    if len(shape) < 2:
        return noise
    signal = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(500_000 + index))
    return noise + signal.mean(-1, keepdim=True) * signal.mean(-2, keepdim=True) * len(signal)


def set_gradients(params: Sequence[Tensor], step: int) -> None:
    for index, p in enumerate(params):
        p.grad = gradient(p.shape, step, index).to(p.dtype)


def train(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, *, start: int = 0
) -> list[Tensor]:
    """Take steps `start` to `start + steps` along `gradient`; return the weights after them."""
    for step in range(start, start + steps):
        set_gradients(params, step)
        optimizer.step()
    return weights(params)


def weights(params: Iterable[Tensor]) -> list[Tensor]:
    """A copy of the weights."""
    return [p.detach().clone() for p in params]


def state(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """A copy of the state of each parameter, empty where it has none."""
    return [
        {name: value.clone() for name, value in optimizer.state.get(p, {}).items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def everything(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """A copy of all that a failed call must leave alone: weights, state and options."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return weights(params), state(optimizer), copy.deepcopy(groups)


def assert_unchanged(optimizer: torch.optim.Optimizer, before: tuple[Any, ...]) -> None:
    """`before` is what `everything` returned earlier."""
    *tensors, groups = everything(optimizer)
    assert_same(tensors, list(before[:2]))
    assert groups == before[2]


def assert_same(actual: Any, expected: Any) -> None:
    """Bitwise equality of tensors, alone or in lists and dictionaries; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_near(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """Equality but for rounding, with `tolerance` relative to the largest entry."""
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, y.abs().max().item()))
