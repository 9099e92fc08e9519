"""Runs that are killed, run out of disk or find damaged checkpoints: `lorapre pretrain` in other processes.

    python tests/stress.py --kills 50 --damages 40 --full-disks 20

prints what it has tried and what was lost; test_faults.py runs a few of each. Counts and their command are in
docs/reliability.md.
"""

import argparse
import errno
import itertools
import math
import multiprocessing
import multiprocessing.process
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cases import CASES, assert_near, parameters, set_gradients, state, weights
from lorapre.checkpoints import STATE_FORMAT
from lorapre_recipes import cli, presets
from lorapre_recipes.train import pretrain
from lorapre_recipes.train.pretrain import collate
from lorapre_recipes.train.runs import (
    MANIFEST,
    PARTIAL,
    checkpoint_step,
    checkpoints,
    damage,
    last_checkpoint,
    write_manifest,
)
from recipes_main import arm, tiny
from tiny_runs import losses, write_corpus

STEPS, SAVED_EVERY = 24, 3
SECONDS = 900  # a hang is a failure


class Runs:
    """A folder of runs on one small corpus. Each command runs in a new process with all imports done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_corpus(folder)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["lorapre_recipes.train.pretrain", "lorapre_recipes.cli"])
        start = time.monotonic()
        assert self.run(*self.arguments("whole")) == 0, self.log()
        self.seconds = time.monotonic() - start

    def arguments(self, out: str, *more: str) -> tuple[str, ...]:
        """The arguments that begin a run, or resume it."""
        if (run := self.folder / out).is_dir() and last_checkpoint(run) is not None:
            return ("--resume", out)
        shutil.rmtree(run, ignore_errors=True)  # there is no checkpoint to resume from
        return ("--preset", "tiny", "--data", "corpus.jsonl", "--out", out, *more)

    def start(self, *arguments: str, **limits: Any) -> multiprocessing.process.BaseProcess:
        """Begin `lorapre pretrain` with these arguments."""
        process = self.context.Process(target=command_line, args=(self.folder, arguments), kwargs=limits)
        process.start()
        return process

    def run(self, *arguments: str, **limits: Any) -> int | None:
        """The exit code of `lorapre pretrain` with these arguments."""
        process = self.start(*arguments, **limits)
        process.join(SECONDS)
        return process.exitcode

    def log(self) -> str:
        """What the last command printed."""
        return (self.folder / "log.txt").read_text(encoding="utf-8")

    def assert_equals_whole(self, out: str) -> None:
        """Losses and weights equal those of the undisturbed run, bit for bit."""
        run, whole = self.folder / out, self.folder / "whole"
        assert losses(run) == losses(whole)
        one, two = (load_file(x / f"checkpoint-{STEPS}" / "model.safetensors") for x in (run, whole))
        assert all(torch.equal(one[name], two[name]) for name in one)

    def cut_off(self, out: str, *more: str) -> Path:
        """A run that was killed between its last two checkpoints."""
        process = self.start(*self.arguments(out, *more), kill_at=STEPS - 2)
        process.join(SECONDS)
        assert process.exitcode == -9, self.log()
        run = self.folder / out
        assert {checkpoint_step(checkpoint) for checkpoint in checkpoints(run)} == {STEPS - 6, STEPS - 3}
        return run


def command_line(
    folder: Path,
    arguments: tuple[str, ...],
    *,
    kill_at: int | None = None,
    file_size: int | None = None,
    fail_at: int | None = None,
) -> None:
    """What a process runs.

    It may be killed at the start of a step, find that no file grows beyond some bytes, and that the loader
    fails at some batch.
    """
    os.chdir(folder)
    os.environ["LORAPRE_CACHE"] = str(folder / "cache")
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if kill_at is not None:
        arm("0", "step", str(kill_at))
    if fail_at is not None:
        pretrain.collate = Failing(fail_at)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    presets.PRETRAIN["tiny"] = lambda optimizer: tiny(
        optimizer, steps=STEPS, log_points=STEPS, checkpoints=STEPS // SAVED_EVERY
    )
    sys.argv = ["lorapre", "pretrain", *arguments]
    sys.exit(cli.main())


class Failing:
    """Makes batches, and fails at one of them."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def __call__(self, rows: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "corpus.jsonl")
        return collate(rows)


# --- kills


def kill(runs: Runs, count: int, chance: random.Random) -> Counter[str]:
    """Kill runs `count` times, at any moment or during a checkpoint, and resume them to their end."""
    counts: Counter[str] = Counter()
    number, before = 0, 0
    while True:
        out, start = f"killed-{number}", time.monotonic()
        process = runs.start(*runs.arguments(out))
        run = runs.folder / out
        if counts["killed"] < count:
            in_checkpoint = chance.random() < 0.5
            process.join(chance.uniform(0, runs.seconds))
            while in_checkpoint and process.is_alive() and not (run / PARTIAL).exists():
                time.sleep(0.001)
            if in_checkpoint:
                process.join(chance.uniform(0, 0.1))
            process.kill()
        process.join(SECONDS)
        ended = (run / "summary.json").is_file()
        assert process.exitcode == -9 or (process.exitcode == 0 and ended), runs.log()
        counts["killed"] += process.exitcode != 0
        if process.exitcode == 0:
            runs.seconds = time.monotonic() - start  # the machine may have become faster
        if ended:
            runs.assert_equals_whole(out)
            counts["runs that ended, equal to the run never killed"] += 1
            if counts["killed"] >= count:
                return counts
            number, before = number + 1, 0
            continue
        assert all(damage(checkpoint) is None for checkpoint in checkpoints(run))
        last = last_checkpoint(run)
        step = 0 if last is None else checkpoint_step(last)
        assert step >= before  # only the steps since the last checkpoint are lost
        before = step
        if last is None:
            counts["killed before the first checkpoint was complete"] += 1
        elif (run / PARTIAL).exists():
            counts["killed while a checkpoint was written or removed"] += 1
        else:
            counts["killed at another moment"] += 1


# --- damage


def truncate(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def flip(file: Path, chance: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def remove(file: Path, chance: random.Random) -> None:
    file.unlink()


DAMAGES = {"truncated": truncate, "flipped": flip, "removed": remove}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def spoil(runs: Runs, count: int, chance: random.Random) -> Counter[str]:
    """Damage a file of the last checkpoint, `count` times. Each time the run resumes from the one before."""
    counts: Counter[str] = Counter()
    cut = runs.cut_off("cut")
    last = f"checkpoint-{STEPS - 3}"
    for number in range(count):
        run = shutil.copytree(cut, runs.folder / f"spoiled-{number}")
        name, how = FILES[number % len(FILES)], [*DAMAGES][number // len(FILES) % len(DAMAGES)]
        DAMAGES[how](run / last / name, chance)
        assert runs.run("--resume", run.name) == 0, runs.log()
        assert f"lorapre: {run.name}/{last} is damaged ({name} " in runs.log()
        assert f"the run goes on from {run.name}/checkpoint-{STEPS - 6}" in runs.log()
        runs.assert_equals_whole(run.name)
        shutil.rmtree(run)
        counts[f"files {how}, named, and the run gone on with from the checkpoint before"] += 1
    return counts


def spoil_unread(runs: Runs, count: int, chance: random.Random) -> Counter[str]:
    """Damage any file of a checkpoint or its manifest, `count` times. Each time the damage is found."""
    counts: Counter[str] = Counter()
    checkpoint = runs.folder / "whole" / f"checkpoint-{STEPS}"
    files = sorted(file for file in checkpoint.iterdir() if file.name != MANIFEST)
    for _ in range(count):
        file, how = chance.choice(files), chance.choice([*DAMAGES])
        content = file.read_bytes()
        DAMAGES[how](file, chance)
        found = damage(checkpoint)
        assert found is not None
        assert found.startswith(file.name)
        file.write_bytes(content)
        counts[f"files {how}, named"] += 1
    assert damage(checkpoint) is None
    return counts


# --- checkpoints of others


def of_another_run(*options: str) -> Callable[[Runs, Path], None]:
    """Replace a checkpoint by that of a run with these options."""

    def change(runs: Runs, checkpoint: Path) -> None:
        other = runs.folder / f"other{''.join(options)}"
        if not other.is_dir():
            runs.cut_off(other.name, *options)
        shutil.rmtree(checkpoint)
        shutil.copytree(other / checkpoint.name, checkpoint)

    return change


def of_a_newer_version(_: Runs, checkpoint: Path) -> None:
    file = checkpoint / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    for group in saved["param_groups"]:
        group["state_format"] = STATE_FORMAT + 1
    torch.save(saved, file)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)


# What replaces the last checkpoint, and what the error line says.
OTHERS: dict[str, tuple[Callable[[Runs, Path], None], str]] = {
    "rank": (of_another_run("--rank", "2"), "saved was Adam (rank=2, variant='split')"),
    "variant": (of_another_run("--variant", "paper"), "saved was Adam (rank=4, variant='paper'"),
    "optimizer": (of_another_run("--optimizer", "lorapre-muon"), "saved was Muon ("),
    "version": (of_a_newer_version, f"state format {STATE_FORMAT + 1}, of a newer lorapre"),
}


def exchange(runs: Runs, count: int, chance: random.Random, kinds: Iterable[str] = OTHERS) -> Counter[str]:
    """Replace the last checkpoint by that of another run, `count` times. Each time it is refused."""
    counts: Counter[str] = Counter()
    cut = runs.cut_off("cut-to-exchange")
    for number, kind in zip(range(count), itertools.cycle(kinds)):
        run = shutil.copytree(cut, runs.folder / f"exchanged-{number}")
        last = run / f"checkpoint-{STEPS - 3}"
        change, message = OTHERS[kind]
        change(runs, last)
        before = (run / "metrics.jsonl").read_text()
        assert runs.run("--resume", run.name) == 2, runs.log()
        (line,) = runs.log().splitlines()
        assert line.startswith(f"lorapre: --resume: {run.name}/{last.name} does not fit this run ("), line
        assert message in line
        assert (run / "metrics.jsonl").read_text() == before
        shutil.rmtree(last)
        shutil.copytree(cut / last.name, last)
        assert runs.run("--resume", run.name) == 0, runs.log()
        runs.assert_equals_whole(run.name)
        shutil.rmtree(run)
        counts[f"checkpoints of another {kind}, refused in one line"] += 1
    return counts


# --- what a user gets wrong

NUMBERS = ("-1", "0", "nan", "inf", "-inf", "1e400", "1e-400", "", "x", "1,5")
WORDS = ("", "x", "-", "--", "../..", "a\nb", "\u00e9")
OPTIONS = {
    **dict.fromkeys(("--steps", "--batch-size", "--accumulation", "--lr", "--scale", "--rank"), NUMBERS),
    **dict.fromkeys(("--optimizer", "--variant", "--precision", "--dtype", "--preset"), WORDS),
    **dict.fromkeys(("--report-to", "--tokenizer", "--resume"), WORDS),
    "--seed": ("-1", "nan", "1e400", "", "x"),
    "--data": ("none.txt", "", "-", ".", "empty.txt", "bytes.txt", "cut.jsonl", "list.jsonl", "folder"),
}


def mistake(runs: Runs, count: int, chance: random.Random) -> Counter[str]:
    """Give wrong options and data, `count` times. Each time the answer is one line and exit code 2."""
    counts: Counter[str] = Counter()
    (runs.folder / "empty.txt").touch()
    (runs.folder / "bytes.txt").write_bytes(bytes(range(256)) * 40)
    (runs.folder / "cut.jsonl").write_text('{"text": "whole"}\n{"text": "cut o')
    (runs.folder / "list.jsonl").write_text("[1, 2]\n")
    (runs.folder / "folder").mkdir()
    every = [(option, value) for option, values in OPTIONS.items() for value in values]
    chance.shuffle(every)
    for number, (option, value) in zip(range(count), itertools.cycle(every)):
        out = f"mistaken-{number}"
        begun = () if option == "--resume" else ("--preset", "tiny", "--data", "corpus.jsonl", "--out", out)
        code = runs.run(*begun, option, value)
        log = runs.log()
        assert code == 2, (option, value, code, log)
        assert log.startswith("lorapre: "), (option, value, log)
        assert log.count("\n") == 1, (option, value, log)
        assert not (runs.folder / out).exists(), (option, value)
        counts["wrong options and data, said in one line"] += 1
    return counts


# --- a loader that fails


def fail(runs: Runs, count: int, chance: random.Random) -> Counter[str]:
    """Let the loader raise at a different batch each time. The run resumes afterwards."""
    counts: Counter[str] = Counter()
    for number in range(count):
        out = f"failed-{number}"
        batch = chance.randrange(2, STEPS)
        assert runs.run(*runs.arguments(out), fail_at=batch) == 1
        assert "Input/output error: 'corpus.jsonl'" in runs.log()
        assert all(damage(checkpoint) is None for checkpoint in checkpoints(runs.folder / out))
        assert runs.run(*runs.arguments(out)) == 0, runs.log()
        runs.assert_equals_whole(out)
        counts["loaders that failed, and the run gone on with"] += 1
    return counts


# --- a full disk


def fill(runs: Runs, count: int, chance: random.Random) -> Counter[str]:
    """Fill the disk during a checkpoint, at another byte each time. The run resumes when there is room."""
    counts: Counter[str] = Counter()
    sizes = [(runs.folder / "whole" / f"checkpoint-{STEPS}" / name).stat().st_size for name in FILES[:2]]
    for number in range(count):
        out = f"full-{number}"
        # All files but those of weights and optimizer are smaller.
        code = runs.run(*runs.arguments(out), file_size=chance.randrange(max(sizes) // 2, max(sizes)))
        assert_not_written(runs, out, code)
        runs.run(*runs.arguments(out))
        runs.assert_equals_whole(out)
        counts["files that could not grow, said in one line, and the run gone on with"] += 1
    return counts


def fill_disk(runs: Runs, count: int, chance: random.Random) -> Counter[str]:
    """The same with a disk of its own. Needs root."""
    counts: Counter[str] = Counter()
    whole = runs.folder / "whole"
    least = 2 * sum(file.stat().st_size for file in (whole / f"checkpoint-{STEPS}").iterdir())
    disk = runs.folder / "disk"
    disk.mkdir()
    for _ in range(count):
        size = chance.randrange(least // 2, least * 3 // 2)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)], check=True)
        try:
            assert_not_written(runs, "disk/run", runs.run(*runs.arguments("disk/run")))
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
            runs.run(*runs.arguments("disk/run"))
            runs.assert_equals_whole("disk/run")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        counts["disks full, said in one line, and the run gone on with"] += 1
    return counts


def assert_not_written(runs: Runs, out: str, code: int | None) -> None:
    assert code == 1, runs.log()
    line = runs.log().splitlines()[-1]
    assert line.startswith("lorapre pretrain: checkpoint-"), runs.log()
    assert "could not be written" in line
    assert "Traceback" not in runs.log()
    assert not (runs.folder / out / PARTIAL).exists()  # the partial files are gone
    there = last_checkpoint(runs.folder / out) is not None
    assert (f"go on with: lorapre pretrain --resume {out}" in line) == there
    assert all(damage(checkpoint) is None for checkpoint in checkpoints(runs.folder / out))


# --- gradients that are no numbers


def poison(name: str, chance: random.Random, *, steps: int = 40, start: int = 0) -> int:
    """Put NaN and infinities into gradients at random. Each of them must be skipped and counted.

    The others step as if there had been no such gradient.
    """
    case = CASES[name]
    params, expected = parameters(), parameters()
    optimizer, reference = case.make(params, nonfinite="skip"), case.make(expected, nonfinite="skip")
    skipped = [0] * len(params)
    for step in range(start, start + steps):
        set_gradients(params, step)
        set_gradients(expected, step)
        for index, (p, q) in enumerate(zip(params, expected, strict=True)):
            if step > start and chance.random() < 0.2:
                assert p.grad is not None
                p.grad.view(-1)[chance.randrange(p.numel())] = chance.choice((math.nan, math.inf, -math.inf))
                q.grad = None
                skipped[index] += 1
        optimizer.step()
        reference.step()
    assert [int(own["skipped"]) for own in state(optimizer)] == skipped
    # Other batches round differently, and the printed tracker magnifies the differences.
    assert_near(weights(params), weights(expected), 1e-2 if "paper" in name else 1e-3)
    return sum(skipped)


def poison_all(_: Runs, count: int, chance: random.Random) -> Counter[str]:
    """`count` series of 40 steps of every kind of optimizer."""
    counts: Counter[str] = Counter()
    for number, name in itertools.product(range(count), CASES):
        counts["gradients with a NaN or an infinity, skipped"] += poison(name, chance, start=40 * number)
    return counts


def main() -> None:
    """Run all and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=30)
    parser.add_argument("--full-disks", type=int, default=10)
    parser.add_argument("--others", type=int, default=12)
    parser.add_argument("--mistakes", type=int, default=137)
    parser.add_argument("--bad-gradients", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        parts = [(kill, options.kills), (spoil, options.damages), (spoil_unread, 10 * options.damages)]
        parts += [(fail, options.full_disks), (fill, options.full_disks), (exchange, options.others)]
        parts += [(mistake, options.mistakes), (poison_all, options.bad_gradients)]
        if os.geteuid() == 0 and sys.platform == "linux":
            parts += [(fill_disk, options.full_disks)]
        for part, count in parts:
            for what, number in part(runs, count, chance).items() if count else ():
                print(f"{number:>6}  {what}", flush=True)


if __name__ == "__main__":
    main()
