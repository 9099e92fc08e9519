"""`lorapre finetune`."""

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
from lorapre_recipes.config import Compress, FinetuneConfig, Method, Precision, UserError, Variant
from lorapre_recipes.finetune_presets import get_preset


def finetune(
    *,
    preset: str | None = None,
    method: Method | None = None,
    model: str | None = None,
    data: str | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    accumulation: int | None = None,
    lr: float | None = None,
    scale: float | None = None,
    rank: int | None = None,
    variant: Variant | None = None,
    compress: Compress | None = None,
    rules: list[str] | None = None,
    freeze: list[str] | None = None,
    release: bool | None = None,
    gradient_checkpointing: bool | None = None,
    packing: bool | None = None,
    precision: Precision | None = None,
    dtype: Precision | None = None,
    stochastic_rounding: bool | None = None,
    report_to: list[str] | None = None,
    seed: int | None = None,
) -> int:
    """Fine-tune a causal language model on questions and answers; the loss is that of the answers.

    What is not given comes from the preset. See docs/finetuning.md on the choice of rank, lr and scale.

    Args:
        preset: data and schedule: metamath100k (default), the paper's, or arithmetic, for a CPU.
        method: an optimizer of all weights (lorapre-adamw, the default, lorapre-muon, adamw, galore) or
            adapters of peft (lora, rslora, dora, lora+).
        model: a name on the Hugging Face hub, a folder, or the run folder of `lorapre pretrain`.
        data: a JSONL file with the fields query and response or question and answer, or a Hugging Face
            dataset with these columns: meta-math/MetaMathQA, openai/gsm8k:main.
        out: run folder, new or empty. Default: runs/PRESET-METHOD-TIME.
        resume: a run folder to go on with from its last checkpoint. It holds all other options.
        samples: take so many of the examples, evenly spaced.
        sequence_length: leave out examples with more tokens.
        steps: optimizer steps.
        batch_size: examples in a forward pass.
        accumulation: forward passes in an optimizer step.
        lr: peak learning rate.
        scale: the attention and MLP matrices learn at lr times this (not adapters).
        rank: of the momenta, of GaLore's projection or of the adapters.
        variant: of the algorithm (lorapre-* only).
        compress: which moments are low rank (lorapre-adamw only).
        rules: PATTERN=RANK or PATTERN=dense, for parameters in whose names the regular expression is found:
            embed_tokens=8. May be repeated; the first match wins (lorapre-* only).
        freeze: do not train parameters in whose names this regular expression is found. May be repeated.
        release: update each weight in the backward pass and free its gradient (lorapre-* only).
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        packing: put the examples of a batch in one row instead of padding them; each sees itself alone.
        precision: of matrix products, whatever the weights have.
        dtype: of weights and gradients.
        stochastic_rounding: round updated bf16 weights up or down at random, without bias (lorapre-* only).
        report_to: a logger that is installed, such as tensorboard, trackio or wandb; may be repeated.
        seed: of adapters, data order and factors.
    """
    given: dict[str, Any] = {
        "preset": preset,
        "method": method,
        "model": model,
        "data": data,
        "samples": samples,
        "sequence_length": sequence_length,
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "lr": lr,
        "scale": scale,
        "rank": rank,
        "variant": variant,
        "compress": compress,
        "rules": None if rules is None else tuple(rules),
        "freeze": None if freeze is None else tuple(freeze),
        "release": release or None,
        "gradient_checkpointing": gradient_checkpointing or None,
        "packing": packing or None,
        "precision": precision,
        "dtype": dtype,
        "stochastic_rounding": stochastic_rounding or None,
        "report_to": None if report_to is None else tuple(report_to),
        "seed": seed,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        run = old_run(resume, out, changes)
    else:
        chosen = changes.pop("method", "lorapre-adamw")
        config = get_preset(changes.pop("preset", "metamath100k"))(chosen).replace(**changes)
        paths = {"data": config.data, "model": config.model}
        settle_path(paths, "data")
        settle_path(paths, "model")
        config = config.replace(**paths)
        if launched_with_fsdp():
            raise UserError("lorapre finetune: runs on one process; start it without accelerate launch")
        run = new_run(out, config)

    sleepy_threads()
    from lorapre_recipes.train import finetune as recipe
    from lorapre_recipes.train.runs import load_run

    if resume is not None:
        config = load_run(run, FinetuneConfig)
    return launch(recipe.finetune, config, run, resume=resume is not None)
