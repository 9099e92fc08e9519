"""`lorapre pretrain` and `lorapre finetune`."""

import sys
from pathlib import Path
from typing import Any

from lorapre_recipes.cli.launch import launch, launched_with_fsdp
from lorapre_recipes.cli.options import options
from lorapre_recipes.config import FinetuneConfig, Method, PretrainConfig, RunConfig, UserError
from lorapre_recipes.presets import BUDGETS, FINETUNE, PRETRAIN, get_preset
from lorapre_recipes.train.runs import model_folder


@options(PretrainConfig, without=("preset",), preset="llama-tiny")
def pretrain(
    *,
    preset: str | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    dry_run: bool | None = None,
    changes: dict[str, Any],
) -> int:
    """Pre-train a Llama. By default a small one on real English text, in minutes on two CPU cores.

    What is not given comes from the preset, whose learning rates depend on the optimizer. On
    several processes: torchrun --nproc-per-node 2 -m lorapre_recipes pretrain, see
    docs/distributed.md.

    Args:
        preset: model, data and schedule: llama-tiny (default), llama-1m, -5m, -20m; as published,
            on C4: llama-60m, -130m, -350m, -1b, -7b, and llama-7b-24gb for one card of 24 GB.
        out: run folder, new or empty. Default: runs/PRESET-OPTIMIZER-TIME.
        resume: a run folder to go on with from its last checkpoint. It holds all other options;
            --steps makes the run longer.
        dry_run: print the complete config as JSON, and train nothing.
        changes: the other options.
    """

    def make() -> PretrainConfig:
        chosen = get_preset(PRETRAIN, preset or "llama-tiny")
        config = chosen(changes.pop("optimizer", "lorapre-adamw")).replace(**changes)
        config = config.replace(fsdp=config.fsdp or launched_with_fsdp())
        if not dry_run and not config.fsdp:
            check_memory(config, config)
        return config

    given = {"preset": preset, "out": out, "dry_run": dry_run} | changes
    return launch("pretrain", PretrainConfig, make, resume, given)


@options(FinetuneConfig, without=("preset", "optimizer", "fsdp"), preset="own")
def finetune(
    *,
    preset: str | None = None,
    method: Method | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    dry_run: bool | None = None,
    changes: dict[str, Any],
) -> int:
    """Fine-tune a causal language model on questions and answers; the loss is that of the answers.

    What is not given comes from the preset. Without a model and data it is smollm2: a pretrained
    model of 135 million parameters, minutes on two CPU cores. See docs/finetuning.md on the choice
    of rank, lr and scale.

    Args:
        preset: own, for a model or data of yours (default); metamath100k, the paper's; 24gb, which
            trains all weights of an 8B model on one card; smollm2 or arithmetic, for a CPU.
        method: an optimizer of all weights (lorapre-adamw, the default, lorapre-muon, adamw,
            galore) or adapters of peft (lora, rslora, dora, lora+).
        out: run folder, new or empty. Default: runs/PRESET-METHOD-TIME.
        resume: a run folder to go on with from its last checkpoint. It holds all other options;
            --steps makes the run longer.
        dry_run: print the complete config as JSON, and train nothing.
        changes: the other options.
    """

    def make() -> FinetuneConfig:
        name = preset or ("own" if {"model", "data"} & {*changes} else "smollm2")
        chosen = get_preset(FINETUNE, name)
        if launched_with_fsdp():
            alone = "runs on one process; start it without accelerate launch"
            raise UserError(f"lorapre finetune: {alone}")
        config = chosen(method or "lorapre-adamw").replace(**changes)
        if dry_run:
            return config
        try:
            folder = model_folder(config.model)
        except UserError as error:
            if "model" in changes:
                raise
            other = f"it is the model of preset {name}; --model takes another"
            raise UserError(f"{error}; {other}") from error
        if config.adapter is None:
            check_memory(folder, config)
        return config

    given = {"preset": preset, "method": method, "out": out, "dry_run": dry_run} | changes
    return launch("finetune", FinetuneConfig, make, resume, given)


def check_memory(model: str | PretrainConfig, config: RunConfig) -> None:
    """Say what decides the memory of a run whose preset has a budget; refuse what does not fit."""
    if config.preset in BUDGETS:
        from lorapre_recipes.plan.tables import render_run  # brings torch

        plan, fits = render_run(model, config, BUDGETS[config.preset])
        if not fits:
            print(plan, file=sys.stderr)
            raise UserError(f"--preset {config.preset}: no room; lower --batch-size or --rank")
        print(f"lorapre: {savings(config)}; {plan.splitlines()[-1]}", file=sys.stderr)


def savings(config: RunConfig) -> str:
    """What decides the memory of a run, in words."""
    from lorapre_recipes.train.summary import describe_optimizer  # brings torch

    words = {"activations computed again": config.gradient_checkpointing}
    words |= {"loss in chunks": config.chunked_loss}
    size = f"{config.batch_size} sequences of up to {config.sequence_length} tokens"
    return ", ".join([describe_optimizer(config), *(x for x in words if words[x]), size])
