"""A training session of any recipe: from model, optimizer and data to a filled run folder."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch.optim import Optimizer
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import get_available_reporting_integrations

from lorapre import coverage, gradient_release
from lorapre_recipes.config import RunConfig, UserError
from lorapre_recipes.files import append_line, write_json
from lorapre_recipes.train import distributed
from lorapre_recipes.train.optim import matrices_of, state_bytes
from lorapre_recipes.train.runs import last_checkpoint, prepare_folder
from lorapre_recipes.train.summary import Summary, plot_curves, summary_table
from lorapre_recipes.train.trainer import Bookkeeper, Brake, Finished, Progress, RecipeTrainer

if TYPE_CHECKING:
    from peft import PeftModel

    from lorapre_recipes.data.examples import Examples
    from lorapre_recipes.data.stream import TokenData


def train(
    config: RunConfig,
    out: Path,
    *,
    model: PreTrainedModel | PeftModel,
    optimizer: Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    data: TokenData | Examples,
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]],
    resume: bool = False,
    command: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    eval_items: float | None = None,
    **arguments: Any,
) -> Summary:
    """Train, evaluate as it goes, fill the run folder `out`, and print the table.

    `optimizer` has all parameters of `model` that train. `collate` makes batches of rows of `data`,
    whose facts must be the same when a run goes on. With `resume` it does, from the last checkpoint
    in `out`. `command` is written to command.txt. Where batches of the evaluation differ in the
    number of labels, `eval_items` is the mean. `arguments` go to TrainingArguments, over those that
    follow from the config.

    Raises:
        UserError: the run cannot start.
        Diverged: the loss is no number.
        NotWritten: a checkpoint could not be written.
        KeyboardInterrupt: the run was asked to stop (SIGINT, SIGTERM), and has a checkpoint.
    """
    start = time.perf_counter()
    books = Bookkeeper(optimizer, out / "metrics.jsonl")
    if config.release:
        gradient_release(model, optimizer)  # type: ignore[arg-type]
    if config.gradient_checkpointing:
        old = model.gradient_checkpointing_enable  # before transformers 5.23
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})

    # Nothing is written before this line: a mistake leaves no folder behind.
    distributed.on_main(lambda: prepare_folder(out, config, tokenizer, data.facts))
    if command is not None and distributed.is_main():
        append_line(out / "command.txt", command)
    trainer = RecipeTrainer(
        config,
        books,
        model=model,
        args=training_arguments(config, out, **arguments),
        data_collator=collate,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        eval_items=eval_items,
    )
    # The constructor refuses one with FSDP; accelerate gives it the shards.
    trainer.optimizer = optimizer
    trainer.remove_callback(ProgressCallback)
    progress, brake = Progress(), Brake()
    for callback in (progress, books, *callbacks, brake):
        trainer.add_callback(callback)
    try:
        with brake:
            trainer.train(resume_from_checkpoint=str(last_checkpoint(out)) if resume else None)
        if trainer.state.global_step < config.steps:
            raise KeyboardInterrupt
    except Finished:
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    finally:
        if progress.training_bar is not None:  # before anyone says why the run ended
            progress.training_bar.close()

    metrics = trainer.metrics()
    first, *_, last = [row for row in metrics if "validation_loss" in row] * 2
    state = coverage(optimizer)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]  # peft's names
    # Of the model without its adapters: two moments and a float32 step each.
    dense = sum(2 * p.nbytes + 4 for p in {*model.parameters()} - {*adapters})
    adamw_bytes = dense if adapters else state.adamw_bytes
    kibibyte = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibyte
    summary = Summary(
        optimizer=config.method,
        parameters=model.num_parameters() - sum(p.numel() for p in adapters),
        trained_parameters=model.num_parameters(only_trainable=True),
        adapter_bytes=sum(p.nbytes for p in adapters),
        steps=config.steps,
        tokens=last["tokens"],
        loss_before=first["validation_loss"] if first["step"] == 0 else None,
        validation_loss=last["validation_loss"],
        validation_perplexity=last["validation_perplexity"],
        processes=distributed.processes(),
        state_bytes=state_bytes(optimizer),
        matrix_state_bytes=state_bytes(optimizer, matrices_of(model)),
        adamw_state_bytes=adamw_bytes,
        optimizer_share=None if config.release else books.optimizer_seconds / books.step_seconds,
        tokens_per_second=books.steps * last["tokens"] / config.steps / books.step_seconds,
        peak_bytes=torch.cuda.max_memory_allocated() or resident,
        step_seconds=books.step_seconds,
        wall_seconds=time.perf_counter() - start,
        device=describe_device(model.device),
        versions=versions("torch", "transformers", "datasets", "tokenizers"),
    )
    if not distributed.is_main():
        return summary
    (out / "coverage.txt").write_text(f"{state}\n", encoding="utf-8")
    plot_curves(metrics, config, summary.parameters, out / "curves.png")
    write_json(out / "summary.json", summary)  # the last: where it is, a run has ended
    console = Console()
    console.print(summary_table(summary, config))
    console.print(f"Run folder: {out}", soft_wrap=True)
    return summary


def training_arguments(config: RunConfig, out: Path, **changes: Any) -> TrainingArguments:
    """The trainer's view of a config; `changes` go over it."""
    arguments: dict[str, Any] = dict(
        output_dir=str(out),
        run_name=out.name,
        seed=config.seed,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size // distributed.processes(),
        per_device_eval_batch_size=config.batch_size // distributed.processes(),
        gradient_accumulation_steps=config.accumulation,
        dataloader_pin_memory=torch.accelerator.is_available(),
        learning_rate=config.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.final_lr},
        warmup_steps=round(config.warmup * config.steps),
        max_grad_norm=0,
        bf16=config.precision == "bf16",
        torch_compile=config.compile,
        use_cpu=not torch.accelerator.is_available(),  # else bf16 would be refused
        logging_steps=config.every(config.log_points),
        logging_nan_inf_filter=False,  # a loss that is no number must show
        eval_strategy="steps",
        eval_steps=config.every(config.evaluations),
        prediction_loss_only=True,
        save_steps=config.every(config.checkpoints),
        report_to=list(config.report_to) or "none",
        disable_tqdm=False,
        ddp_timeout=round(distributed.TIMEOUT.total_seconds()),
        ddp_find_unused_parameters=False,
        log_level_replica="error",
        fsdp=config.fsdp or None,
        fsdp_config=FSDP if config.fsdp else None,
    )
    return TrainingArguments(**(arguments | changes))


# For accelerate. Each layer is a unit: gathered before it computes, freed after.
FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "reshard_after_forward": True,
    "state_dict_type": "SHARDED_STATE_DICT",
}


def check_machine(config: RunConfig) -> None:
    """Refuse what this machine and these processes cannot do, before any work. Raises UserError."""
    lacks_bf16 = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
    if config.precision == "bf16" and lacks_bf16:
        raise UserError("--precision: this GPU has no bf16; use fp32")
    if config.precision == "bf16" and not torch.accelerator.is_available() and not cpu_has_bf16():
        slow = (
            "this processor has no instructions for it and takes many times as long; fp32 is faster"
        )
        print(f"lorapre: --precision bf16: {slow}", file=sys.stderr)
    available = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for logger in config.report_to:
        if logger not in available:
            wrong = f"{logger!r} is unknown or not installed"
            names = ", ".join(available) or "none"
            raise UserError(f"--report-to: {wrong}; available here: {names}")
    count = distributed.processes()
    if config.batch_size % count:
        uneven = f"{count} processes cannot share it evenly; start a number of them that divides it"
        raise UserError(f"--batch-size {config.batch_size}: {uneven}")
    if config.fsdp and not torch.distributed.is_initialized():
        start = "torchrun --nproc-per-node N -m lorapre_recipes pretrain"
        raise UserError(f"--fsdp: start it with {start}; N may be 1")


def cpu_has_bf16() -> bool:
    """Whether torch's products in bfloat16 are fast on this processor."""
    one_dnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return one_dnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def describe_device(device: torch.device) -> str:
    """The device in words, with the number of threads where its speed depends on them."""
    count = distributed.processes()
    times = f"{count} × " if count > 1 else ""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{times}{threads} CPU thread{'s' * (threads > 1)}"
    return times + (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
