"""The training loop that recipes share: transformers.Trainer with a clock, a progress bar and a run folder.

The loop, checkpoints, resuming, mixed precision, accumulation and loggers are transformers.Trainer's. This
module adds the clock that knows how long the optimizer takes, and the files of `lorapre_recipes.train.runs`.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from rich.console import Console
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer import TRAINING_ARGS_NAME

from lorapre import coverage, gradient_release
from lorapre_recipes.config import RunConfig, UserError
from lorapre_recipes.plan.footprint import FLOAT32
from lorapre_recipes.train import distributed
from lorapre_recipes.train.optim import state_bytes
from lorapre_recipes.train.runs import (
    PARTIAL,
    checkpoint_step,
    checkpoints,
    last_checkpoint,
    prepare_folder,
    write_manifest,
)
from lorapre_recipes.train.summary import Metric, Summary, plot_curves, summary_table

if TYPE_CHECKING:
    from peft import PeftModel


KEPT = 2  # checkpoints: should the last one be damaged, there is another


class Diverged(RuntimeError):
    """The loss is not a number any more."""


class NotWritten(RuntimeError):
    """A checkpoint could not be written."""


class Finished(Exception):
    """There is no step left to take: the run was cut off after its last checkpoint."""


def train(
    config: RunConfig,
    out: Path,
    *,
    model: PreTrainedModel | PeftModel,
    optimizer: Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Any,
    eval_dataset: Any,
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]],
    facts: dict[str, Any],
    resume: bool,
    command: str | None,
    callbacks: Sequence[TrainerCallback] = (),
    eval_items: float | None = None,
    **arguments: Any,
) -> Summary:
    """Train, evaluate as it goes, fill the run folder `out`, and print the table.

    Args:
        config: everything that decides the numbers.
        out: the run folder; new or empty, or that of the run to go on with.
        model: with its weights.
        optimizer: of all of its parameters that train.
        tokenizer: kept with every checkpoint.
        train_dataset: rows for `collate`, mapped or streamed.
        eval_dataset: rows for `collate`, mapped.
        collate: makes a batch of rows.
        facts: of the data (see `runs.record_data`), which must be the same again when a run goes on.
        resume: go on from the last checkpoint in `out`; `config` must be what `load_run` returns for it.
        command: what to write to command.txt.
        callbacks: more of transformers' trainer callbacks.
        eval_items: labels in a batch of the evaluation, on average; needed where batches differ in it.
        **arguments: for TrainingArguments, over those that follow from the config.

    Raises:
        UserError: the run cannot start.
        Diverged: the loss became infinite or not a number.
        NotWritten: a checkpoint could not be written.
    """
    start = time.perf_counter()
    clock = Clock()
    optimizer.register_step_pre_hook(clock.start_optimizer)
    optimizer.register_step_post_hook(clock.stop_optimizer)
    if config.release:
        gradient_release(model, optimizer)  # type: ignore[arg-type]

    # Nothing is written before this line: a mistake leaves no folder behind.
    distributed.on_main(lambda: prepare_folder(out, config, tokenizer, facts, resume=resume, command=command))
    trainer = RecipeTrainer(
        config,
        clock,
        out / "metrics.jsonl",
        model=model,
        args=training_arguments(config, out, **arguments),
        data_collator=collate,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        eval_items=eval_items,
    )
    trainer.optimizer = optimizer  # the constructor refuses one with FSDP; accelerate gives it the shards
    trainer.remove_callback(ProgressCallback)
    for callback in (Progress(), Bookkeeping(trainer), *callbacks):
        trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=str(last_checkpoint(out)) if resume else None)
    except Finished:
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)

    metrics = [row for entry in trainer.state.log_history if (row := metric(entry)) is not None]
    last = next(row for row in reversed(metrics) if "validation_loss" in row)
    state = coverage(optimizer)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]  # what peft calls them
    adamw_bytes = state.adamw_bytes
    if adapters:  # of the model without them
        own = {*model.parameters()} - {*adapters}
        adamw_bytes = sum(2 * p.numel() * p.element_size() + FLOAT32 for p in own)
    held, adamw_held = distributed.largest(state_bytes(optimizer), adamw_bytes)
    summary = Summary(
        optimizer=config.method,
        parameters=model.num_parameters() - sum(p.numel() for p in adapters),
        trained_parameters=model.num_parameters(only_trainable=True),
        adapter_bytes=sum(p.numel() * p.element_size() for p in adapters),
        steps=config.steps,
        tokens=last["tokens"],
        validation_loss=last["validation_loss"],
        validation_perplexity=last["validation_perplexity"],
        processes=distributed.processes(),
        state_bytes=held,
        adamw_state_bytes=adamw_held,
        optimizer_share=None if config.release else clock.optimizer_seconds / clock.step_seconds,
        tokens_per_second=clock.steps * last["tokens"] / config.steps / clock.step_seconds,
        peak_bytes=peak_bytes(),
        step_seconds=clock.step_seconds,
        wall_seconds=time.perf_counter() - start,
        device=describe_device(model.device),
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "datasets", "tokenizers")},
    )
    if not distributed.is_main():
        return summary
    (out / "coverage.txt").write_text(f"{state}\n", encoding="utf-8")
    plot_curves(metrics, config, summary.parameters, out / "curves.png")
    summary.save(out / "summary.json")  # the last: where it is, a run has ended
    console = Console()
    console.print(summary_table(summary, config))
    console.print(f"Run folder: {out}", soft_wrap=True)
    return summary


# What the trainer is given


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
        use_cpu=not torch.accelerator.is_available(),  # without it bf16 is refused there
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # a loss that is no number must show
        eval_strategy="steps",
        eval_steps=config.eval_every,
        prediction_loss_only=True,
        save_steps=config.save_every,
        report_to=list(config.report_to) or "none",
        disable_tqdm=False,
        ddp_timeout=round(distributed.TIMEOUT.total_seconds()),
        ddp_find_unused_parameters=False,
        log_level_replica="error",
        fsdp=config.fsdp or None,
        fsdp_config=FSDP if config.fsdp else None,
    )
    return TrainingArguments(**(arguments | changes))


# transformers hands it to accelerate. Each layer is a unit: gathered before it computes, freed after.
FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "reshard_after_forward": True,
    "state_dict_type": "SHARDED_STATE_DICT",
}


# What the trainer is taught


@dataclass
class Clock:
    """Seconds in training steps and, within them, in optimizer.step; without evaluation and checkpoints."""

    steps: int = 0
    step_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    _step_start: float = 0.0
    _optimizer_start: float = 0.0

    @staticmethod
    def now() -> float:
        """Seconds. Waits for an accelerator, whose work would else be booked on whoever waits for it next."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    def start_step(self) -> None:
        """A training step begins."""
        self._step_start = self.now()

    def stop_step(self) -> None:
        """A training step has ended."""
        self.step_seconds += self.now() - self._step_start
        self.steps += 1

    def start_optimizer(self, *_: Any) -> None:
        """Hook before optimizer.step."""
        self._optimizer_start = self.now()

    def stop_optimizer(self, *_: Any) -> None:
        """Hook after optimizer.step."""
        self.optimizer_seconds += self.now() - self._optimizer_start


class RecipeTrainer(Trainer):
    """transformers.Trainer with a clock, metrics.jsonl, and checkpoints that are complete or not there."""

    def __init__(
        self,
        config: RunConfig,
        clock: Clock,
        metrics_file: Path,
        *,
        eval_items: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.recipe, self.clock, self.metrics_file = config, clock, metrics_file
        self._saving = False
        super().__init__(**kwargs)
        self.eval_items = eval_items

    def create_accelerator_and_postprocess(self) -> None:
        """Let accelerate know FSDP2 on CPUs too: torch has it, but accelerate puts it aside there."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.recipe.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if self.recipe.precision == "bf16":
                state.fsdp_plugin.set_mixed_precision("bf16")
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are written: aside, until they are complete."""
        run = super()._get_output_dir(trial)
        return str(Path(run) / PARTIAL) if self._saving else run

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, and rename it to its name when every process has written its part.

        What is called checkpoint-N is complete, whenever a process or the machine's owner kills the run.
        """
        run, name = self.metrics_file.parent, f"checkpoint-{self.state.global_step}"
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            distributed.barrier()
            if distributed.is_main():
                write_manifest(run / PARTIAL / name)
        except (Exception, CheckpointException) as error:
            if distributed.is_lost_contact(error):
                raise
            free = shutil.disk_usage(run).free / 2**20
            if distributed.processes() == 1:
                shutil.rmtree(run / PARTIAL, ignore_errors=True)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise NotWritten(
                f"{name} could not be written ({reason}); the disk has {free:,.0f} MiB left"
            ) from error
        finally:
            self._saving = False
        if distributed.is_main():
            (run / PARTIAL / name).rename(run / name)
            for old in sorted(checkpoints(run), key=checkpoint_step)[:-KEPT]:
                old.rename(run / PARTIAL / old.name)  # out of the way before it is incomplete
            shutil.rmtree(run / PARTIAL)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write what the Trainer writes, but for training_args.bin: a pickle, which nothing here reads."""
        super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        assert folder is not None
        (Path(folder) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Raises UserError where the state in the checkpoint does not fit the optimizer."""
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise UserError(f"--resume: {checkpoint} does not fit this run ({error})") from error

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """In evaluation, weigh tokens alike, not batches: the mean over batches is then that over tokens."""
        if not model.training and self.eval_items is not None:
            num_items_in_batch = torch.tensor(self.eval_items, device=self.args.device)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log to the trainer's history, loggers and metrics.jsonl. Raises Diverged at a loss of nan, inf."""
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        # Counted where sequences differ in length.
        logs["tokens"] = (
            self.state.num_input_tokens_seen or self.state.global_step * self.recipe.tokens_per_step
        )
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(loss)
        if "loss" in logs:
            logs["timed_steps"] = self.clock.steps
            logs["step_seconds"] = self.clock.step_seconds
            logs["optimizer_seconds"] = self.clock.optimizer_seconds
        super().log(logs, start_time)
        if distributed.is_main() and (row := metric(self.state.log_history[-1])) is not None:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at step {self.state.global_step}; try a lower --lr or --scale"
            )


class Bookkeeping(TrainerCallback):
    """Runs the clock, and takes up clock and metrics.jsonl where the checkpoint left them."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what an interrupted session logged after its last checkpoint: it will be logged again."""
        if distributed.is_main():
            metrics = [row for entry in state.log_history if (row := metric(entry)) is not None]
            self.trainer.metrics_file.write_text(
                "".join(json.dumps(row) + "\n" for row in metrics), encoding="utf-8"
            )
        timed = [entry for entry in state.log_history if "timed_steps" in entry]
        if timed:
            clock = self.trainer.clock
            clock.steps = timed[-1]["timed_steps"]
            clock.step_seconds = timed[-1]["step_seconds"]
            clock.optimizer_seconds = timed[-1]["optimizer_seconds"]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take no step more than there are: the trainer takes one before it looks. Raises Finished."""
        if state.global_step >= state.max_steps:
            raise Finished

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.trainer.clock.start_step()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.trainer.clock.stop_step()


class Progress(ProgressCallback):
    """One bar with the training loss, and a line above it for each evaluation."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar, at the checkpoint's step."""
        if not state.is_world_process_zero:
            return
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if Console(stderr=True).is_terminal else 10,  # a log file needs no animation
        )
        self.current_step = state.global_step

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Draw nothing: an evaluation takes a second or two."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the figure."""
        if self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)
        if "eval_loss" in logs:
            step = f"{state.global_step:>{len(str(state.max_steps))}}"
            self.training_bar.write(f"step {step}  validation perplexity {logs['eval_perplexity']:.2f}")


def perplexity(loss: float) -> float:
    """exp(loss), infinite where floats end."""
    return math.exp(loss) if loss < 700 else math.inf


def metric(entry: dict[str, Any]) -> Metric | None:
    """The line of metrics.jsonl for an entry of the trainer's history; None for its closing statistics."""
    if "loss" in entry:
        names = {
            "loss": "loss",
            "learning_rate": "lr",
            "grad_norm": "grad_norm",
            "step_seconds": "step_seconds",
            "optimizer_seconds": "optimizer_seconds",
        }
    elif "eval_loss" in entry:
        names = {"eval_loss": "validation_loss", "eval_perplexity": "validation_perplexity"}
    else:
        return None
    return {"step": entry["step"], "tokens": entry["tokens"]} | {
        new: entry[old]
        for old, new in names.items()
        # There is none where gradients are released, nor from an older Trainer without clipping.
        if old != "grad_norm" or math.isfinite(entry.get(old, math.nan))
    }


# The machine


def check_machine(config: RunConfig) -> None:
    """Refuse what this machine cannot do, before any work. Raises UserError."""
    if config.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("--precision: this GPU has no bf16; use fp32")
    available = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for logger in config.report_to:
        if logger not in available:
            names = ", ".join(available) or "none"
            raise UserError(f"--report-to: {logger!r} is unknown or not installed; available here: {names}")


def check_processes(config: RunConfig) -> None:
    """Refuse processes that do not fit the config. Raises UserError."""
    count = distributed.processes()
    if config.batch_size % count:
        raise UserError(
            f"--batch-size {config.batch_size}: {count} processes cannot share it evenly; start a number of "
            "processes that divides it"
        )
    if config.fsdp and not torch.distributed.is_initialized():
        raise UserError(
            "--fsdp: start it with torchrun --nproc-per-node N -m lorapre_recipes pretrain; N may be 1"
        )


def peak_bytes() -> int:
    """The most memory that this process has held: allocated on its GPU, or else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if sys.platform == "darwin" else 1024)  # macOS counts in bytes


def describe_device(device: torch.device) -> str:
    """The device in words, with the number of threads where its speed depends on them."""
    count = distributed.processes()
    times = f"{count} × " if count > 1 else ""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{times}{threads} CPU thread{'s' * (threads > 1)}"
    return times + (torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
