"""What a step allocates beyond weights, gradients and state, counted at the allocator.

The promise, for every variant of Adam, with the kernels for CPUs and with torch's operations: at
most 8 MiB, and 3 (p + q) r float32 numbers of one weight, however many there are. So nothing of the
size of a weight is ever formed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from torch import Tensor, nn

from cases import ADAM, CASES
from lorapre import LoRAPreAdamW, LoRAPreMuon
from lorapre.batch import transient_bytes
from lorapre.groups import is_low_rank, matrix_shape

MIB = 2**20
LLAMA_60M = [*[(512, 512)] * 32, *[(1376, 512)] * 16, *[(512, 1376)] * 8, *[(32000, 512)] * 2]

every_adam = pytest.mark.parametrize("name", [name for name in ADAM if name != "adam-dense"])


def weights(shapes: Iterable[Sequence[int]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(tuple(shape)).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape).to(dtype)
    return params


def factors(shape: Sequence[int], rank: int | None) -> int:
    """Bytes of B and A of one weight, all of its experts."""
    E, p, q = matrix_shape(shape)
    return 4 * E * (p + q) * rank if rank is not None and is_low_rank(shape, rank) else 0


def transient(
    params: list[nn.Parameter], cls: type[torch.optim.Optimizer] = LoRAPreAdamW, **options: Any
) -> int:
    tables = [p for p in params if p.shape[0] == 32000]
    matrices = [p for p in params if p.shape[0] != 32000]
    optimizer = cls([{"params": matrices}, {"params": tables, "rank": None}], **options)
    optimizer.step()
    return peak_bytes(optimizer.step)


def check(taken: int, shapes: Sequence[Sequence[int]], rank: int | None) -> None:
    """The promise holds, and `transient_bytes` is an upper bound."""
    promised = 8 * MIB + max(3 * factors(shape, rank) for shape in shapes)
    assert taken <= promised, f"{taken / MIB:.2f} MiB"
    planned = 0
    for shape in set(map(tuple, shapes)):
        E, p, q = matrix_shape(shape)
        r = rank if rank is not None and is_low_rank(shape, rank) else 0
        planned = max(planned, transient_bytes(E * list(map(tuple, shapes)).count(shape), p, q, r))
    assert taken <= planned, f"{taken / MIB:.2f} MiB of {planned / MIB:.2f}"


shapes = pytest.mark.parametrize(
    ("shape", "rank", "count"),
    [
        ((12, 20), 3, 5),  # a few kilobytes
        ((512, 512), 16, 20),  # several to a batch
        ((1376, 512), 128, 2),
        ((512, 1376), 128, 2),
        ((1024, 14336), 128, 1),  # down projection of Llama-3.1-8B, a quarter of its rows
        ((14336, 1024), 128, 1),
        ((5461, 2048), 512, 1),  # of Llama-1B at the paper's rank
        ((40, 512, 256), 16, 1),  # experts
        ((512, 256, 3, 3), 32, 1),
        ((4096, 2048), 0, 6),  # no factors: their sums of g**2 count
        ((32000, 512), None, 1),  # dense
        ((16384,), None, 30),
    ],
    ids=str,
)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("arithmetic")
def test_a_step_takes_eight_mebibytes_and_three_factors(
    shape: tuple[int, ...], rank: int | None, count: int, dtype: torch.dtype
) -> None:
    check(transient(weights([shape] * count, dtype), rank=rank), [shape] * count, rank)


@every_adam
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2048, 2048), (4096, 512), (512, 4096)], ids=str)
@pytest.mark.usefixtures("arithmetic")
def test_every_variant_does(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    options = {"rank": 128, **CASES[name].options}
    check(transient(weights([shape], dtype), **options), [shape], options["rank"])


@pytest.mark.parametrize("name", ["adam-split", "adam-paper"])
@pytest.mark.usefixtures("arithmetic")
def test_a_whole_model_takes_no_more_than_one_weight(name: str) -> None:
    """Llama-60M at the paper's rank. Embeddings and head are dense."""
    taken = transient(weights(LLAMA_60M), rank=128, **CASES[name].options)
    assert taken <= 8 * MIB + 3 * factors((1376, 512), 128), f"{taken / MIB:.2f} MiB"


@pytest.mark.parametrize(
    "options", [{"nonfinite": "skip", "maximize": True}, {"stochastic_rounding": True}], ids=str
)
@pytest.mark.usefixtures("arithmetic")
def test_options_take_no_more(options: dict[str, Any]) -> None:
    check(transient(weights([(2048, 2048)], torch.bfloat16), rank=64, **options), [(2048, 2048)], 64)


@pytest.mark.usefixtures("arithmetic")
def test_gradients_of_lower_rank_take_no_more() -> None:
    """The basis must be completed then. A batch with fewer tokens than the rank has such gradients."""
    params = weights([(8192, 512)])
    params[0].grad = torch.randn(8192, 8) @ torch.randn(8, 512)
    check(transient(params, rank=128), [(8192, 512)], 128)


@every_adam
@pytest.mark.usefixtures("arithmetic")
def test_the_first_step_takes_no_more_beside_the_state(name: str) -> None:
    options = {"rank": 64, **CASES[name].options}
    optimizer = LoRAPreAdamW(weights([(2048, 2048)]), **options)
    taken = peak_bytes(optimizer.step)
    state = sum(x.nbytes for own in optimizer.state.values() for x in own.values())
    check(taken - state, [(2048, 2048)], options["rank"])


def test_muon_takes_one_dense_matrix_at_a_time() -> None:
    """Beside it a bfloat16 copy and the products of Newton-Schulz; of several weights, stacked factors."""
    one, four = (transient(weights([(1024, 768)] * n), LoRAPreMuon, rank=32) for n in (1, 4))
    assert four <= one + 5 * 4 * factors((1024, 768), 32)
    assert one <= 1024 * 768 * (4 + 3 * 2) + 2 * 2 * 768 * 768


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_chunked_loss_takes_less_than_the_logits(tied: bool, dtype: torch.dtype) -> None:
    """Forward and backward, gradients included: 2,048 positions and a vocabulary of 8,000."""
    transformers = pytest.importorskip("transformers")
    from lorapre_recipes.train.loss import ChunkedLoss

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=8000, tie_word_embeddings=tied, **sizes)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    tokens = torch.randint(8000, (16, 128))

    def plain() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    def chunked() -> None:
        ChunkedLoss(model)(plain)

    taken = []
    for step in (plain, chunked):
        model.zero_grad()
        taken.append(peak_bytes(step))
    logits = 4 * tokens.numel() * 8000
    assert taken[0] > 2 * logits
    assert taken[1] < logits / 2


def test_a_tensor_of_the_size_of_the_weight_would_be_seen() -> None:
    x: Tensor = weights([(2048, 2048)])[0]
    assert peak_bytes(lambda: x.abs()) >= 16 * MIB
