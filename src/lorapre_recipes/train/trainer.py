"""transformers.Trainer with a clock, metrics.jsonl, a progress bar and complete checkpoints.

The loop, checkpoints, resuming, mixed precision, accumulation and loggers are the Trainer's.
"""

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType  # type: ignore[import-untyped]
from accelerate import FullyShardedDataParallelPlugin as FSDPPlugin
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from lorapre_recipes.config import RunConfig, user_errors
from lorapre_recipes.console import one_line
from lorapre_recipes.files import append_line, write_lines
from lorapre_recipes.train import distributed
from lorapre_recipes.train.loss import ChunkedLoss
from lorapre_recipes.train.runs import PARTIAL, checkpoints, write_manifest
from lorapre_recipes.train.summary import STATS, Metric

KEPT = 2  # checkpoints: should the last one be damaged, there is another


class Diverged(RuntimeError):
    """The loss is not a number any more."""


class NotWritten(RuntimeError):
    """A checkpoint could not be written."""


class Finished(Exception):
    """There is no step left to take: the run was cut off after its last checkpoint."""


class Brake(TrainerCallback):
    """SIGINT and SIGTERM end the run after its step, with a checkpoint; a second one at once.

    A context manager: the signals have their old meaning again behind its block.
    """

    def __enter__(self) -> None:
        self._asked: float | None = None
        # Only the main thread may take signals.
        ours = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if ours else ()
        self._before = {number: signal.signal(number, self._ask) for number in signals}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            if distributed.is_main():  # not print: the signal may have come amid another one
                os.write(2, b"\nlorapre: ends after this step, with a checkpoint; again: at once\n")
        elif now - self._asked > 1:  # torchrun repeats what the terminal has sent to all
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log, save and stop where any process was asked to."""
        if distributed.anyone(self._asked is not None):
            control.should_log = control.should_save = control.should_training_stop = True


class Bookkeeper(TrainerCallback):
    """Times the steps, keeps metrics.jsonl, and takes up both where a checkpoint left them.

    `step_seconds` leave out evaluation and checkpoints. Of them `optimizer_seconds` are in
    optimizer.step.
    """

    def __init__(self, optimizer: Optimizer, file: Path) -> None:
        self.file, self.steps, self.step_seconds, self.optimizer_seconds = file, 0, 0.0, 0.0
        optimizer.register_step_pre_hook(self._optimizer_begins)
        optimizer.register_step_post_hook(self._optimizer_ended)
        self._began = self._step_began = 0.0

    def _optimizer_begins(self, *_: Any) -> None:
        self._began = now()

    def _optimizer_ended(self, *_: Any) -> None:
        self.optimizer_seconds += now() - self._began

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A training step begins."""
        self._step_began = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A training step has ended."""
        self.step_seconds += now() - self._step_began
        self.steps += 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget what an earlier session logged after its last checkpoint: it will come again."""
        if distributed.is_main():
            write_lines(self.file, metrics_of(state.log_history))
        for entry in state.log_history:
            if "timed_steps" in entry:
                self.steps, self.step_seconds = entry["timed_steps"], entry["step_seconds"]
                self.optimizer_seconds = entry["optimizer_seconds"]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raises Finished where no step is left: the trainer takes one before it looks."""
        if state.global_step >= state.max_steps:
            raise Finished


def now() -> float:
    """Seconds, when an accelerator is done: else who waits for it next would get its time."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class RecipeTrainer(Trainer):
    """transformers.Trainer with metrics.jsonl, and checkpoints that are complete or not there."""

    def __init__(
        self, config: RunConfig, books: Bookkeeper, *, eval_items: float | None, **kwargs: Any
    ) -> None:
        self.recipe, self.books = config, books
        super().__init__(**kwargs)
        self.eval_items = eval_items
        # With FSDP the head has its weight in its own forward alone.
        wanted = config.chunked_loss and not config.fsdp
        self.in_chunks = ChunkedLoss(kwargs["model"], wanted=wanted)

    def create_accelerator_and_postprocess(self) -> None:
        """FSDP2 on CPUs too: torch has it, but accelerate puts it aside there."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.recipe.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FSDPPlugin(**self.args.fsdp_plugin_args)
            if self.recipe.precision == "bf16":
                state.fsdp_plugin.set_mixed_precision("bf16")
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.books.file.parent / PARTIAL)  # aside, until a checkpoint is complete

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, and rename it to its name when every process has written its part."""
        run, name = self.books.file.parent, f"checkpoint-{self.state.global_step}"
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
            room = f"the disk has {free:,.0f} MiB left"
            raise NotWritten(f"{name} could not be written ({one_line(error)}); {room}") from error
        if distributed.is_main():
            (run / PARTIAL / name).rename(run / name)
            for old in checkpoints(run)[:-KEPT]:
                old.rename(run / PARTIAL / old.name)  # out of the way before it is incomplete
            shutil.rmtree(run / PARTIAL)
        distributed.barrier()  # torchrun ends all where one has left: here it is complete

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What the Trainer writes, but for training_args.bin: a pickle, which nothing reads."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.books.file.parent)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with user_errors(f"--resume: {checkpoint} does not fit this run", ValueError):
            super()._load_optimizer_and_scheduler(checkpoint)

    def metrics(self) -> list[Metric]:
        """The lines of metrics.jsonl."""
        return metrics_of(self.state.log_history)

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """In evaluation, weigh tokens alike: the mean over batches is then that over tokens."""
        if not model.training and self.eval_items is not None:
            kwargs["num_items_in_batch"] = torch.tensor(self.eval_items, device=self.args.device)
        return self.in_chunks(partial(super().compute_loss, model, *args, **kwargs))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log to history, loggers and metrics.jsonl. Raises Diverged at a loss of nan or inf."""
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        counted = self.state.num_input_tokens_seen  # where sequences differ in length
        logs["tokens"] = counted or self.state.global_step * self.recipe.tokens_per_step
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(loss) if loss < 700 else math.inf  # where floats end
        if "loss" in logs:
            logs["timed_steps"], logs["step_seconds"] = self.books.steps, self.books.step_seconds
            logs["optimizer_seconds"] = self.books.optimizer_seconds
            own = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
            logs |= {name: float(x) for name, x in getattr(own, "stats", dict)().items()}
        super().log(logs, start_time)
        if distributed.is_main():
            for row in metrics_of(self.state.log_history[-1:]):
                append_line(self.books.file, json.dumps(row))
        if not math.isfinite(loss):
            where = f"the loss is {loss} at step {self.state.global_step}"
            raise Diverged(f"{where}; try a lower --lr or --scale")


class Progress(ProgressCallback):
    """One bar with the training loss, and a line above it for each evaluation."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the figure."""
        if self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)
        if "eval_loss" in logs:
            step = f"step {state.global_step:>{len(str(state.max_steps))}}"
            perplexity = f"validation perplexity {logs['eval_perplexity']:.2f}"
            self.training_bar.write(f"{step}  {perplexity}")


METRICS: tuple[str, ...] = ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_perplexity")
METRICS += (*STATS, "step_seconds", "optimizer_seconds")


def metrics_of(history: Iterable[dict[str, Any]]) -> list[Metric]:
    """Entries of the trainer's history as lines of metrics.jsonl, but for its closing ones."""
    rows = []
    for entry in history:
        row = {
            name.replace("eval_", "validation_").replace("learning_rate", "lr"): entry[name]
            for name in METRICS
            if name in entry
        }
        if not math.isfinite(row.get("grad_norm", 0.0)):  # as where gradients are released
            del row["grad_norm"]
        if "loss" in entry or "eval_loss" in entry:
            rows.append({"step": entry["step"], "tokens": entry["tokens"]} | row)
    return rows
