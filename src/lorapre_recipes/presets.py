"""Named configurations: each preset is one function that returns a complete config for an optimizer."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

from lorapre_recipes.config import (
    LOW_RANK,
    Adapter,
    FinetuneConfig,
    Method,
    OptimizerConfig,
    OptimizerName,
    PretrainConfig,
    UserError,
)

Rates = dict[str, tuple[float, float]]  # lr and scale of each optimizer
T = TypeVar("T")

# Those of LoRA-Pre, AdamW and Muon: the best of coarse sweeps of llama-tiny. In a run this short, embeddings
# and head learn fastest at rates twenty to forty times those that suit the matrices.
SHORT_RUN: Rates = dict.fromkeys(get_args(OptimizerName), (0.02, 0.025)) | {
    "lorapre-adamw": (0.02, 0.05),
    "lorapre-muon": (0.02, 0.05),
    "muon": (0.02, 0.05),
    "muon-no-momentum": (0.02, 0.05),
    "sgd": (0.02, 5.0),
}
# Of what docs/study.md swept. With 0.1 of 0.02 llama-5m does not train, whatever the optimizer.
LLAMA_1M: Rates = SHORT_RUN | {
    "lorapre-adamw": (0.02, 0.1),
    "adamw": (0.02, 0.1),
    "galore": (0.02, 0.4),
    "fira": (0.02, 0.4),
    "muon": (0.02, 0.4),
    "muon-no-momentum": (0.02, 0.8),
    "lorapre-muon": (0.02, 0.8),
}
LLAMA_5M: Rates = SHORT_RUN | {"adamw": (0.02, 0.05)}
# The paper gives the learning rates that it searched (1e-2, 5e-3, 1e-3, 5e-4, 1e-4) and its scale, 0.25, but
# not which rate each figure was taken at. Here the low-rank ones have GaLore's published rate, the largest of
# these, and the dense ones that in the middle; a comparison should sweep.
PUBLISHED: Rates = {
    "lorapre-adamw": (0.01, 0.25),
    "lorapre-muon": (0.01, 0.25),
    "galore": (0.01, 0.25),
    "fira": (0.01, 0.25),
    "adamw": (0.001, 1.0),
}


Preset = Callable[[OptimizerName], PretrainConfig]


def scaled_down(
    preset: str, rates: Rates, vocab: int, hidden: int, mlp: int, **fields: Any
) -> Callable[..., PretrainConfig]:
    """The protocol at a size for CPUs: text from a package, rank hidden / 8, 8,192 tokens a step."""
    scaled: dict[str, Any] = dict(
        preset=preset, vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp
    )
    scaled |= dict(data="sotu", sequence_length=128, batch_size=64, checkpoints=5, rank=hidden // 8)

    def config(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
        return protocol(optimizer, rates, **(scaled | fields))

    return config


# The quickstart: 4.2 million parameters on 0.8 million tokens, minutes on two CPU cores.
llama_tiny = scaled_down(
    "llama-tiny",
    SHORT_RUN,
    2048,
    256,
    688,
    layers=4,
    heads=4,
    steps=400,
    batch_size=16,
    checkpoints=2,
)
# The paper's experiment for two CPU cores: 1.05 million parameters on 4.1 million tokens.
llama_1m = scaled_down("llama-1m", LLAMA_1M, 1024, 128, 344, layers=4, heads=4, steps=500)
# 5.0 million parameters on 8.2 million tokens, two or three passes over the corpus.
llama_5m = scaled_down("llama-5m", LLAMA_5M, 2048, 256, 688, layers=5, heads=4, steps=1000)
# 20 million parameters on 16.4 million tokens, five or six passes over the corpus.
llama_20m = scaled_down("llama-20m", SHORT_RUN, 4096, 512, 1376, layers=5, heads=8, steps=2000)
# A model to fine-tune on `lorapre arithmetic`: 0.89 million parameters on 2.9 million tokens.
llama_arithmetic = scaled_down(
    "llama-arithmetic", {"adamw": (0.02, 0.25)}, 384, 128, 344, layers=4, heads=4, steps=700, batch_size=16,
    data="arithmetic/text.jsonl", tokenizer="arithmetic/tokenizer", sequence_length=256,
    held_out_every=100, checkpoints=2, precision="bf16",
)  # fmt: skip


def as_published(preset: str, rank: int, steps: int, batch_size: int) -> Preset:
    """The protocol as GaLore and LoRA-Pre publish it: C4, 512 sequences of 256 tokens a step, in bfloat16.

    `batch_size` sequences are a forward pass for one large GPU; the protocol does not depend on it.
    """

    def config(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
        from lorapre_recipes.plan.shapes import BUILT_IN  # brings torch, which takes seconds

        shape = BUILT_IN[preset]
        sizes = ("vocab_size", "hidden_size", "intermediate_size")
        fields: dict[str, Any] = {name: getattr(shape, name) for name in sizes}
        fields |= dict(layers=shape.num_hidden_layers, heads=shape.num_attention_heads)
        fields |= dict(data="allenai/c4:en", validation_split="validation", eval_sequences=51_200)
        fields |= dict(tokenizer="google-t5/t5-base", sequence_length=256, packed=False)
        fields |= dict(steps=steps, batch_size=batch_size, accumulation=512 // batch_size)
        fields |= dict(checkpoints=20, precision="bf16", dtype="bf16")
        return protocol(optimizer, PUBLISHED, preset=preset, rank=rank, **fields)

    return config


def llama_7b(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """A Llama of 7B on C4. The paper has none: rank, steps and the low-rank optimizers' rate are GaLore's."""
    config = as_published("llama-7b", rank=1024, steps=150_000, batch_size=16)(optimizer)
    return config.replace(lr=0.005) if config.scale == 0.25 else config


def protocol(optimizer: OptimizerName, rates: Rates, *, rank: int, **fields: Any) -> PretrainConfig:
    """What all share: no decay, no clipping, warm-up over 10 % of the steps, cosine down to 10 %."""
    lr, scale = rates.get(optimizer) or rates["adamw"]  # of those without a sweep of their own
    shared: dict[str, Any] = dict(optimizer=optimizer, lr=lr, scale=scale, warmup=0.1, final_lr=0.1)
    shared |= dict(
        evaluations=10, held_out_every=20, momentum=0.9 if optimizer == "scale" else 0.95
    )
    refresh = min(200, fields["steps"] // 10)  # GaLore's 200
    fitting = OptimizerConfig.fitting(optimizer, rank, refresh)
    return PretrainConfig(**(shared | fitting | fields))


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


def arithmetic(method: Method = "lorapre-adamw") -> FinetuneConfig:
    """The task of `lorapre arithmetic`, for the model of `lorapre pretrain --preset llama-arithmetic`."""
    data = dict(data="arithmetic/train.jsonl", samples=None, sequence_length=160, held_out_every=20)
    run = dict(lr=3e-3, steps=400, batch_size=16, warmup=0.1, evaluations=4, checkpoints=1)
    return finetuning(method, preset="arithmetic", model="runs/llama-arithmetic", **data, **run)


def finetuning(method: Method, **fields: Any) -> FinetuneConfig:
    """What both share: rank 8, no decay, no clipping, a cosine down to zero, products in bfloat16."""
    adapter = method if method in get_args(Adapter) else None
    optimizer = "adamw" if adapter else method
    shared = dict(optimizer=optimizer, adapter=adapter, scale=1.0, final_lr=0.0, precision="bf16")
    fitting = OptimizerConfig.fitting(method, rank=8, refresh=min(200, fields["steps"] // 4))
    return FinetuneConfig(**(shared | fitting | fields))


PRETRAIN: dict[str, Preset] = {
    "llama-tiny": llama_tiny,
    "llama-1m": llama_1m,
    "llama-5m": llama_5m,
    "llama-20m": llama_20m,
    # Table 1 of the paper, with 1.3, 2.6, 7.9 and 13.1 billion tokens with their padding.
    "llama-60m": as_published("llama-60m", rank=128, steps=10_000, batch_size=128),
    "llama-130m": as_published("llama-130m", rank=256, steps=20_000, batch_size=64),
    "llama-350m": as_published("llama-350m", rank=256, steps=60_000, batch_size=64),
    "llama-1b": as_published("llama-1b", rank=512, steps=100_000, batch_size=32),
    "llama-7b": llama_7b,
    "llama-arithmetic": llama_arithmetic,
}
FINETUNE: dict[str, Callable[[Method], FinetuneConfig]] = {
    "metamath100k": metamath100k,
    "arithmetic": arithmetic,
}


def get_preset(presets: Mapping[str, T], name: str) -> T:
    """The preset of this name. Raises UserError listing those that exist."""
    if name not in presets:
        raise UserError(f"--preset: there is no {name!r}; choose from {', '.join(presets)}")
    return presets[name]
