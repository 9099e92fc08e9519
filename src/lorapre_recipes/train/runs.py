"""The run folder: what a run leaves, and how it goes on.

config.json, command.txt    the complete config; the command, one line per session
data.json                   sha256 of the text, sizes of the two splits
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

from __future__ import annotations

import hashlib
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorapre_recipes.config import RunConfig, UserError, user_errors
from lorapre_recipes.files import read_json, write_json

# torch and transformers take seconds to import. What is at fault with a name is said before.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

C = TypeVar("C", bound=RunConfig)

PARTIAL = "partial"  # where a checkpoint is while it is written
DAMAGED = "damaged"
MANIFEST = "manifest.json"  # the last file of a checkpoint
MERGED = "model"
HUB_SECONDS = 5


def prepare_folder(
    out: Path, config: RunConfig, tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]
) -> None:
    """Make the run folder, or clean one that goes on. Raises UserError where that cannot be."""
    with user_errors(f"--out {out}: this folder cannot be made", OSError):
        out.mkdir(parents=True, exist_ok=True)
    record_data(facts, out / "data.json")
    write_json(out / "config.json", config)
    last = last_checkpoint(out)
    if last is None:
        tokenizer.save_pretrained(out)
    (out / "summary.json").unlink(missing_ok=True)  # where it is, a run has ended
    if (out / PARTIAL).is_dir():
        shutil.rmtree(out / PARTIAL)
        note = "the run was cut off in a checkpoint; what is left of that is removed, and it"
        where = "starts anew" if last is None else f"goes on from {last}"
        print(f"lorapre: {note} {where}", file=sys.stderr)


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
    """The newest checkpoint without damage, or None.

    Newer ones are moved to `damaged`, with a line each.
    """
    for checkpoint in reversed(checkpoints(run)):
        if (fault := damage(checkpoint)) is None:
            return checkpoint
        aside = run / DAMAGED / checkpoint.name
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        checkpoint.rename(aside)
        before = last_checkpoint(run)
        then = f"the run goes on from {before}" if before else "there is no other checkpoint"
        note = f"{checkpoint} is damaged ({fault}) and was moved to {aside}; {then}"
        print(f"lorapre: {note}", file=sys.stderr)
    return None


def model_folder(name: str) -> str:
    """Where transformers finds a model: of a run folder the newest, all else as it is.

    Raises UserError where there is no such folder and the hub, asked once, has no such model.
    """
    run = Path(name).expanduser()
    if name == "smollm2" and not run.exists():
        from lorapre_recipes.data.smollm2 import smollm2_folder

        return str(smollm2_folder())
    if not run.exists():
        if name.startswith((".", "/", "~")):
            raise UserError(f"--model {name}: there is no such folder")
        import huggingface_hub as hub

        with user_errors(f"--model {name}: no such folder, and not on the hub", Exception):
            if not hub.try_to_load_from_cache(name, "config.json"):
                hub.model_info(name, timeout=HUB_SECONDS)
        return name
    if not (run / "data.json").is_file():
        return str(run)
    folder = run / MERGED if (run / MERGED).is_dir() else last_checkpoint(run)
    if folder is None:
        raise UserError(f"--model {name}: no checkpoint in this run folder")
    if folder.name != MERGED and (fault := damage(folder)) is not None:
        others = checkpoints(run)[:-1]
        offer = f"; the one before it is {others[-1]}" if others else ""
        raise UserError(f"--model {name}: {folder.name} is damaged ({fault}){offer}")
    return str(folder.resolve())


def load_run(run: Path, kind: type[C], steps: int | None = None) -> C:
    """The config, of this kind, of a run that can go on, to the end of `steps` if these are given.

    A run that has no checkpoint yet begins anew. Raises UserError where a run cannot go on.
    """
    from lorapre_recipes.train import distributed

    if not (run / "config.json").is_file():
        raise UserError(f"--resume {run}: not a run folder, config.json is missing")
    config = kind.load(run / "config.json")
    distributed.join()
    checkpoint = distributed.on_main(lambda: sound_checkpoint(run))
    if checkpoint is None and (run / DAMAGED).is_dir():
        again = "start again with a new --out"
        raise UserError(f"--resume {run}: no checkpoint in this run folder; {again}")
    taken = 0 if checkpoint is None else checkpoint_step(checkpoint)
    if steps is not None and steps <= taken:
        raise UserError(f"--steps {steps}: the run has taken {taken} already; give more")
    if steps is None and taken >= config.steps and (run / "summary.json").is_file():
        done = f"the run has finished its {config.steps} steps; go on with more --steps"
        raise UserError(f"--resume {run}: nothing to do, {done}")
    return config.replace(steps=steps or config.steps)


def record_data(facts: dict[str, Any], file: Path) -> None:
    """Write which data a run sees, or raise UserError where it does not see the same again."""
    if file.is_file() and read_json(file) != facts:
        changed = "the data have changed since this run began; start a new run"
        raise UserError(f"--resume {file.parent}: {changed}")
    write_json(file, facts)
