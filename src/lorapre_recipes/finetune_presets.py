"""Named configurations of fine-tuning: each preset returns a complete config for a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from lorapre_recipes.config import (
    DEFAULT_VARIANT,
    LOW_RANK,
    ONLY_FOR,
    Adapter,
    FinetuneConfig,
    Method,
    OptimizerName,
    UserError,
)


def metamath100k(method: Method = "lorapre-adamw") -> FinetuneConfig:
    """The paper's experiment: 100,000 examples of MetaMathQA, once, at rank 8 and a learning rate of 2e-5.

    Batch, warm-up and length are those of PiSSA's recipe, which has the same data, rate and schedule.
    """
    return protocol(
        method,
        preset="metamath100k",
        model="meta-llama/Llama-3.1-8B",
        data="meta-math/MetaMathQA",
        samples=100_000,
        sequence_length=512,
        held_out_every=100,
        lr=2e-5,
        steps=773,  # one pass over the 99,000 that are not held out
        batch_size=128,
        warmup=0.03,
        evaluations=5,
        checkpoints=5,
        precision="bf16",
        dtype="bf16",
        stochastic_rounding=method in LOW_RANK,
    )


def arithmetic(method: Method = "lorapre-adamw") -> FinetuneConfig:
    """The task of `lorapre arithmetic`, for the model of `lorapre pretrain --preset llama-arithmetic`."""
    return protocol(
        method,
        preset="arithmetic",
        model="runs/llama-arithmetic",
        data="arithmetic/train.jsonl",
        samples=None,
        sequence_length=160,
        held_out_every=20,
        lr=3e-3,
        steps=400,
        batch_size=16,
        warmup=0.1,
        evaluations=4,
        checkpoints=1,
        precision="bf16",
    )


def protocol(method: Method, **fields: Any) -> FinetuneConfig:
    """What all presets share: rank 8, no decay, no clipping, a cosine down to zero.

    Args:
        method: to train with; options that it has not are left out.
        **fields: of the config.
    """
    adapter: Adapter | None = method if method in get_args(Adapter) else None  # type: ignore[assignment]
    optimizer: OptimizerName = "lora" if adapter else method  # type: ignore[assignment]
    shared: dict[str, Any] = dict(
        optimizer=optimizer,
        adapter=adapter,
        scale=1.0,
        rank=8 if optimizer in ONLY_FOR["rank"] else None,
        variant=DEFAULT_VARIANT.get(optimizer),
        compress="both" if optimizer in ONLY_FOR["compress"] else None,
        refresh=min(200, fields["steps"] // 4) if optimizer in ONLY_FOR["refresh"] else None,
        betas=(0.9, 0.95),
        eps=1e-8,
        momentum=0.95,
        weight_decay=0.0,
        accumulation=1,
        final_lr=0.0,
        eval_sequences=256,
        log_points=100,
        report_to=(),
        seed=0,
    )
    return FinetuneConfig(**(shared | fields))


Preset = Callable[[Method], FinetuneConfig]

PRESETS: dict[str, Preset] = {"metamath100k": metamath100k, "arithmetic": arithmetic}


def get_preset(name: str) -> Preset:
    """The preset of this name. Raises UserError listing those that exist."""
    if name not in PRESETS:
        raise UserError(f"--preset: there is no {name!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
