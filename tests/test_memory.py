"""What a step allocates beyond weights, gradients and state, counted at the allocator.

The promise: 8 MiB, or 2 % of the largest weight where that is more, whatever the model's size; in all
variants of Adam but "calibrated" some factors of one weight on top, or of those that make up BATCH elements.
"""

from typing import Any

import pytest
import torch
from allocations import peak_bytes
from torch import Tensor, nn

from lorapre import LoRAPreAdamW, LoRAPreMuon
from lorapre.batch import BATCH
from lorapre.groups import matrix_shape

MIB = 2**20


def weights(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> list[Tensor]:
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(shape).to(dtype)
    return params


def promised(params: list[Tensor]) -> float:
    return max(8 * MIB, 0.02 * params[0].numel() * params[0].element_size())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values())


def transient(params: list[Tensor], cls: type[torch.optim.Optimizer] = LoRAPreAdamW, **options: Any) -> int:
    optimizer = cls(params, **options)
    optimizer.step()
    return peak_bytes(optimizer.step)


shapes = pytest.mark.parametrize(
    ("shape", "rank", "count"),
    [
        ((512, 512), 16, 20),  # several to a batch
        ((1376, 512), 128, 2),
        ((512, 1376), 128, 2),
        ((2048, 2048), 64, 1),
        ((1024, 14336), 128, 1),  # down projection of Llama-3.1-8B, a quarter of its rows
        ((14336, 1024), 128, 1),
        ((5461, 2048), 512, 1),  # of Llama-1B at the paper's rank
        ((40, 512, 256), 16, 1),  # experts
        ((512, 256, 3, 3), 32, 1),
        ((32000, 512), None, 1),  # dense
        ((16384,), None, 30),
    ],
    ids=str,
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@shapes
@dtypes
def test_a_step_of_adam_takes_eight_mebibytes_at_most(
    shape: tuple[int, ...], rank: int | None, count: int, dtype: torch.dtype
) -> None:
    params = weights(shape, count, dtype)
    taken = transient(params, rank=rank, variant="calibrated")
    assert taken <= promised(params), f"{taken / MIB:.2f} MiB"


@shapes
@dtypes
def test_by_default_it_takes_three_factors_of_a_weight_too(
    shape: tuple[int, ...], rank: int | None, count: int, dtype: torch.dtype
) -> None:
    """T W^T, W and the new left factor, beside the old ones."""
    params = weights(shape, count, dtype)
    r, (_, p, q) = rank or 0, matrix_shape(torch.Size(shape))
    stacked = min(count, max(1, BATCH // max(1, r * (p + q))))
    taken = transient(params, rank=rank)
    copies = 4 * stacked * r * (2 * p + q)
    assert taken <= promised(params) + copies, f"{taken / MIB:.2f} MiB"


def test_gradients_of_lower_rank_take_no_more() -> None:
    """The basis is completed then, as where a batch has fewer tokens than there are directions."""
    params = weights((8192, 512), 1, torch.float32)
    full = transient(params, rank=128)
    params[0].grad = torch.randn(8192, 8) @ torch.randn(8, 512)
    assert transient(params, rank=128) <= full + MIB


@pytest.mark.parametrize(("variant", "factors"), [("paper", 2), ("subspace", 3)])
def test_the_other_variants_take_some_copies_of_their_factors_too(variant: str, factors: int) -> None:
    """The printed tracker wants the old left factor to the end; subspace iteration makes a basis."""
    params = weights((2048, 2048), 1, torch.float32)
    assert transient(params, variant=variant, rank=128) <= promised(params) + factors * 4 * 2048 * 128


@pytest.mark.parametrize("compress", ["first", "second"])
def test_one_moment_alone_takes_no_more(compress: str) -> None:
    params = weights((2048, 2048), 1, torch.float32)
    assert transient(params, variant="calibrated", compress=compress, rank=64) <= promised(params)


def test_stochastic_rounding_takes_no_more() -> None:
    params = weights((2048, 2048), 1, torch.bfloat16)
    options: dict[str, Any] = dict(variant="calibrated", weight_decay=0.1, rank=64)
    assert transient(params, stochastic_rounding=True, **options) <= promised(params)


def test_skipping_takes_copies_of_the_factors_and_of_tiles() -> None:
    """So that what is skipped can stay as it was; the gradient is masked and turned around."""
    params = weights((2048, 2048), 1, torch.bfloat16)
    taken = transient(params, nonfinite="skip", maximize=True, rank=64, variant="calibrated")
    assert taken <= promised(params) + 4 * 4 * 2048 * 64 + 2 * MIB


def test_the_first_step_takes_what_the_start_of_A_needs_too() -> None:
    params = weights((2048, 2048), 1, torch.float32)
    optimizer = LoRAPreAdamW(params, rank=64, variant="calibrated")
    taken = peak_bytes(optimizer.step)
    assert taken - state_bytes(optimizer) <= promised(params)


def test_muon_takes_one_dense_matrix_at_a_time() -> None:
    """That of 3 MiB, its bfloat16 image and what Newton-Schulz makes of it; of several the factors too."""
    one, four = (transient(weights((1024, 768), n, torch.float32), LoRAPreMuon, rank=32) for n in (1, 4))
    assert four <= one + MIB
    assert one <= 1024 * 768 * (4 + 3 * 2) + 2 * 2 * 768 * 768


def test_a_tensor_of_the_size_of_the_weight_would_be_seen() -> None:
    params = weights((2048, 2048), 1, torch.float32)
    assert params[0].grad is not None
    assert peak_bytes(lambda: params[0].grad.abs()) >= 16 * MIB
