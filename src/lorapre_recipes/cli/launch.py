"""What the commands that train share: the run folder's name, the processes, and how a run ends."""

import dataclasses
import errno
import importlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lorapre_recipes.config import RunConfig, UserError, flag

C = TypeVar("C", bound=RunConfig)
PATHS = ("data", "model", "tokenizer")


def new_folder(out: Path | None, name: str) -> Path:
    """The folder to fill, or runs/NAME-TIME. Raises UserError where it holds something."""
    folder = out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if os.environ.get("RANK", "0") != "0":  # another process may find what the first one has begun
        return folder
    if folder.is_file():
        raise UserError(f"--out {folder}: this is a file; give a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        offer = f"give a new one, or go on with --resume {folder}"
        raise UserError(f"--out {folder}: this folder is not empty; {offer}")
    return folder


def settled(values: Mapping[str, Any]) -> dict[str, str]:
    """The options that name an existing file or folder, made absolute.

    A run may go on from elsewhere.
    """
    named = {name: values.get(name) for name in PATHS}
    paths = {name: Path(x).expanduser() for name, x in named.items() if x not in (None, "sotu")}
    return {name: str(path.resolve()) for name, path in paths.items() if path.exists()}


def launched_with_fsdp() -> bool:
    """Whether accelerate launch asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def launch(
    recipe: str, kind: type[C], make: Callable[[], C], resume: Path | None, given: dict[str, Any]
) -> int:
    """Begin a run, or go on with the one in `resume`, and return the exit code.

    `recipe` is a module of `lorapre_recipes.train` and its function, `kind` the class of its
    configs, `make` returns that of a new run. Of the options `given`, a run that goes on takes none
    but more steps, and a dry run is over when its config is printed. Raises UserError.
    """
    steps = given.get("steps")
    if resume is None:
        config = make()
        config = config.replace(**settled(vars(config)))
        if given["dry_run"]:
            print(json.dumps(dataclasses.asdict(config), indent=2))
            return 0
        run = new_folder(given["out"], f"{config.preset}-{config.method}")
    elif refused := [flag(x) for x, value in given.items() if x != "steps" and value is not None]:
        raise UserError(f"--resume: a run goes on as it began; leave out {', '.join(refused)}")

    module = importlib.import_module(f"lorapre_recipes.train.{recipe}")
    from lorapre_recipes.console import quieten
    from lorapre_recipes.train import distributed
    from lorapre_recipes.train.runs import last_checkpoint, load_run

    if resume is not None:
        run, config = resume, load_run(resume, kind, steps)
    if launched_with_fsdp() and not config.fsdp:
        raise UserError(f"--resume {run}: this run began without FSDP; go on without it")
    quieten()
    distributed.join()
    run = distributed.on_main(lambda: run)  # a time in its name must be one and the same
    command = shlex.join(["lorapre", *sys.argv[1:]])
    if distributed.processes() > 1:
        command += f"  # {distributed.processes()} processes"
    try:
        goes_on = last_checkpoint(run) is not None
        getattr(module, recipe)(config, run, resume=goes_on, command=command)
    except BaseException as error:  # a checkpoint's own error is no Exception
        return explain(error, f"lorapre {recipe}", run)
    distributed.leave()
    return 0


def explain(error: BaseException, name: str, run: Path) -> int:
    """Say in a line why a run ended and how to go on; return the exit code, or raise `error`."""
    from lorapre_recipes.data.corpus import StreamLost
    from lorapre_recipes.train import distributed
    from lorapre_recipes.train.runs import last_checkpoint
    from lorapre_recipes.train.trainer import Diverged, NotWritten

    launched = "torchrun --nproc-per-node N -m lorapre_recipes"
    command = name.replace("lorapre", launched, 1) if distributed.processes() > 1 else name
    resume = f"{command} --resume {shlex.quote(str(run))}"
    if last_checkpoint(run) is not None:
        go_on = f"go on with: {resume}"
    elif (run / "config.json").is_file():
        go_on = f"there is no checkpoint yet; start anew with: {resume}"
    else:
        go_on = "nothing was written yet"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, Diverged):
        line = f"{name}: {error}"
    elif full or isinstance(error, KeyboardInterrupt | StreamLost | NotWritten):
        line = f"\n{name}: {str(error) or 'interrupted'}; {go_on}"
    elif distributed.is_lost_contact(error):
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].partition(". ")[0]
        who = f"rank {distributed.rank()} lost contact with another process"
        print(f"\n{name}: {who} ({reason}); {go_on}", file=sys.stderr, flush=True)
        os._exit(1)  # an orderly exit would wait for the other process
    else:
        raise error
    # What ends every process alike is said by one.
    if distributed.is_main() or not isinstance(error, Diverged | KeyboardInterrupt):
        print(line, file=sys.stderr)
    return 130 if isinstance(error, KeyboardInterrupt) else 1
