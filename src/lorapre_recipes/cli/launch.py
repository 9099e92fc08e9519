"""What the commands that train share: the run folder's name, the processes, and how a run ends."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lorapre_recipes.config import RunConfig, UserError, flag

C = TypeVar("C", bound=RunConfig)


def old_run(resume: Path, out: Path | None, changes: dict[str, Any]) -> Path:
    """The run folder to go on with. Raises UserError where options are given that it holds."""
    refused = [flag(name) for name in changes] + ([] if out is None else ["--out"])
    if refused:
        raise UserError(f"--resume: a run goes on as it began; leave out {', '.join(refused)}")
    return resume


def new_run(out: Path | None, config: RunConfig) -> Path:
    """The run folder to make. Raises UserError where it holds something."""
    run = out or Path("runs") / f"{config.preset}-{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    if os.environ.get("RANK", "0") == "0":  # another one may find what this one has begun
        check_new(run)
    return run


def check_new(out: Path) -> None:
    """Refuse a folder that holds something. Raises UserError."""
    if out.is_file():
        raise UserError(f"--out {out}: this is a file; give a new folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            f"--out {out}: this folder is not empty; give a new one, or go on with --resume {out}"
        )


def settle_path(changes: dict[str, Any], name: str) -> None:
    """Make an option that names an existing file or folder absolute: resume may start elsewhere."""
    if name in changes and (path := Path(changes[name]).expanduser()).exists():
        changes[name] = str(path.resolve())


def launched_with_fsdp() -> bool:
    """Whether accelerate launch asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def sleepy_threads() -> None:
    """Let torch's threads sleep while they wait for each other. Called before torch is loaded.

    Threads that spin slow one another down several times over when other programs want the same cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def launch(recipe: Callable[..., Any], config: C, run: Path, *, resume: bool) -> int:
    """Call recipe(config, run, resume=, command=) and return the exit code.

    Raises:
        UserError: the run cannot start.
    """
    from lorapre_recipes.data.corpus import StreamLost
    from lorapre_recipes.train import distributed
    from lorapre_recipes.train.trainer import Diverged, NotWritten

    name = f"lorapre {recipe.__module__.rpartition('.')[2]}"
    if launched_with_fsdp() and not config.fsdp:
        raise UserError(f"--resume {run}: this run began without FSDP; go on without it")
    quieten()
    distributed.join()
    run = distributed.on_main(lambda: run)  # a time in its name must be one and the same
    command = shlex.join(["lorapre", *sys.argv[1:]])
    if distributed.processes() > 1:
        command += f"  # {distributed.processes()} processes"
    try:
        recipe(config, run, resume=resume, command=command)
    except Diverged as error:
        if distributed.is_main():
            print(f"{name}: {error}", file=sys.stderr)
        return 1
    except (StreamLost, NotWritten) as error:
        print(f"\n{name}: {error}; {how_to_go_on(name, run)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if distributed.is_main():
            print(f"\n{name}: interrupted; {how_to_go_on(name, run)}", file=sys.stderr)
        return 130
    except BaseException as error:  # the checkpoint's own error is no Exception
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(f"\n{name}: {error}; {how_to_go_on(name, run)}", file=sys.stderr)
            return 1
        if not distributed.is_lost_contact(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].partition(". ")[0]
        print(
            f"\n{name}: rank {distributed.rank()} lost contact with another process ({reason}); "
            f"{how_to_go_on(name, run)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an orderly exit would wait for the other process
    distributed.leave()
    return 0


def how_to_go_on(name: str, run: Path) -> str:
    """The command that goes on with an interrupted run, or that there is nothing to go on from."""
    from lorapre_recipes.train import distributed
    from lorapre_recipes.train.runs import last_checkpoint

    if last_checkpoint(run) is None:
        return "there is no checkpoint yet"
    launched = "torchrun --nproc-per-node N -m lorapre_recipes"
    command = name.replace("lorapre", launched, 1) if distributed.processes() > 1 else name
    return f"go on with: {command} --resume {shlex.quote(str(run))}"


def quieten() -> None:
    """Leave the console to our bar and to errors: the libraries' notes are not about what a user did."""
    import datasets  # type: ignore[import-untyped]
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    # It warns at every retry; the last one ends in an error of ours.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
