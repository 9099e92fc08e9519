"""The run folder: what a run leaves, and how it goes on.

config.json, command.txt    the complete config; the command, one line per session
data.json                   sha256 of the text, sizes of the two splits, records skipped
tokenizer.json, tokenizer_config.json
metrics.jsonl               one line per logged training loss and per evaluation
coverage.txt                which parameter took which route, and its bytes
summary.json, curves.png    the figures of the table at the end, and the picture
checkpoint-N/               weights (of adapters, those alone), their config, tokenizer,
                        optimizer, scheduler, random state; with --fsdp in shards of
                        torch.distributed.checkpoint; manifest.json, the sha256 of each file
damaged/                    checkpoints whose files are no longer those of the manifest
model/                      only of adapters, at the end: the model with them merged in
"""

import hashlib
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from lorapre_recipes.config import RunConfig, UserError, user_errors
from lorapre_recipes.data import smollm2
from lorapre_recipes.files import read_json, write_json
from lorapre_recipes.train import distributed

C = TypeVar("C", bound=RunConfig)

PARTIAL = "partial"  # where a checkpoint is while it is written
DAMAGED = "damaged"
MANIFEST = "manifest.json"  # the last file of a checkpoint
MERGED = "model"


def prepare_folder(
    out: Path,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    facts: dict[str, Any],
    *,
    resume: bool,
) -> None:
    """Make the run folder, or clean one that goes on. Raises UserError where that cannot be."""
    with user_errors(f"--out {out}: this folder cannot be made", OSError):
        out.mkdir(parents=True, exist_ok=True)
    record_data(facts, out / "data.json")
    if not resume:
        write_json(out / "config.json", config)
        tokenizer.save_pretrained(out)
    elif (out / PARTIAL).is_dir():
        shutil.rmtree(out / PARTIAL)
        note = "the run was cut off in a checkpoint; what is left of that is removed, and it"
        print(f"lorapre: {note} goes on from {last_checkpoint(out)}", file=sys.stderr)


def checkpoint_step(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest last. What has this name was written to its end."""
    return sorted(run.glob("checkpoint-*[0-9]"), key=checkpoint_step)


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(reversed(checkpoints(run)), None)


def write_manifest(checkpoint: Path) -> None:
    """Write down the sha256 of each file of a checkpoint."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    sums = {file.relative_to(checkpoint).as_posix(): sha256(file) for file in files}
    write_json(checkpoint / MANIFEST, {"lorapre": version("lorapre"), "files": sums})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are those of its manifest."""
    name = MANIFEST
    try:
        for name, expected in read_json(checkpoint / MANIFEST)["files"].items():
            if sha256(checkpoint / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not what was written"
    return None


def sha256(file: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while part := opened.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def sound_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint without damage, or None. Newer ones are moved to `damaged`, with a line each."""
    while (checkpoint := last_checkpoint(run)) is not None and (
        fault := damage(checkpoint)
    ) is not None:
        aside = run / DAMAGED / checkpoint.name
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        checkpoint.rename(aside)
        before = last_checkpoint(run)
        then = f"the run goes on from {before}" if before else "there is no other checkpoint"
        print(
            f"lorapre: {checkpoint} is damaged ({fault}) and was moved to {aside}; {then}",
            file=sys.stderr,
        )
    return checkpoint


def model_folder(name: str) -> str:
    """Where transformers finds a model: of a run folder the newest, all else as it is. Raises UserError."""
    run = Path(name).expanduser()
    if name == smollm2.NAME and not run.exists():
        return str(smollm2.smollm2_folder())
    if not run.exists() and name.startswith((".", "/", "~")):
        raise UserError(f"--model {name}: there is no such folder")
    if not (run / "data.json").is_file():  # a model's folder, or a name on the hub
        return str(run) if run.exists() else name
    folder = run / MERGED if (run / MERGED).is_dir() else last_checkpoint(run)
    if folder is None:
        raise UserError(f"--model {name}: no checkpoint in this run folder")
    if folder.name != MERGED and (fault := damage(folder)) is not None:
        others = checkpoints(run)[:-1]
        offer = f"; the one before it is {others[-1]}" if others else ""
        raise UserError(f"--model {name}: {folder.name} is damaged ({fault}){offer}")
    return str(folder.resolve())


def load_run(run: Path, kind: type[C]) -> C:
    """The config, of this kind, of a run that can go on. Raises UserError where it cannot."""
    if not (run / "config.json").is_file():
        raise UserError(f"--resume {run}: not a run folder, config.json is missing")
    config = kind.load(run / "config.json")
    distributed.join()
    checkpoint = distributed.on_main(lambda: sound_checkpoint(run))
    if checkpoint is None:
        raise UserError(
            f"--resume {run}: no checkpoint in this run folder; start again with a new --out"
        )
    if checkpoint_step(checkpoint) >= config.steps and (run / "summary.json").is_file():
        raise UserError(
            f"--resume {run}: nothing to do, the run has finished its {config.steps} steps"
        )
    return config


def record_data(facts: dict[str, Any], file: Path) -> None:
    """Write which data a run sees, or raise UserError where it does not see the same again."""
    grows = {"skipped": None}  # as a stream is read
    if file.is_file() and read_json(file) | grows != facts | grows:
        changed = "the data have changed since this run began; start a new run"
        raise UserError(f"--resume {file.parent}: {changed}")
    write_json(file, facts)
