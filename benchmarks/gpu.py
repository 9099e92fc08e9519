"""All that needs a GPU, in eight minutes: a report of one NVIDIA GPU, benchmarks/results/DATE_GPU.md.

    python benchmarks/gpu.py

Memory of an 8B model under a cap of 24 GB beside the prediction, speed of a training run, step times, tests.
Each part is a process of its own with a limit of time. Time that it does not need goes to the parts after it.
A part that fails or is cut off is a row that says so, with the end of its output. Nothing is fetched.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

try:
    import report
    import torch
    from common import ROOT, Column, Result, Row, environment, label
    from cyclopts import App

    from lorapre_recipes.train.summary import read_metrics
except ImportError as error:
    raise SystemExit(
        f"gpu.py: {error}; it needs torch 2.9 or newer and pip install -e '.[recipes,bench,dev]'"
    ) from error

SCRATCH = ROOT / "runs" / "gpu"  # logs, and a training run that is removed
PROGRAMS = {"python": [sys.executable], "lorapre": [sys.executable, "-m", "lorapre_recipes"]}
STEPS, LOGGED, TOKENS = 60, 10, 131_072
GRACE = 15.0  # seconds between SIGINT, after which a run ends with its step, and the end
LINES = 8  # of the output of a part that failed

app = App(help=__doc__)


class Part(NamedTuple):
    """Commands, as one types them, and their share of the time."""

    name: str  # the benchmark of the results, of report.ORDER
    title: str
    share: float
    commands: list[str]


class Outcome(NamedTuple):
    """How a part ended: the reason why it is not complete, or None."""

    reason: str | None
    seconds: float
    output: str


@app.default
def main(*, minutes: float = 8.0, dry_run: bool = False, out: Path | None = None) -> None:
    """Run all parts and write the report.

    Args:
        minutes: for all parts together.
        dry_run: print the commands with their limits, and run nothing.
        out: folder of the results. Default: benchmarks/results/DATE_GPU.
    """
    end = time.monotonic() + 60 * minutes - 15  # for imports and the report
    out = out.resolve() if out else None  # the parts run elsewhere
    if dry_run:
        print(f"# {minutes:g} minutes; time that a part does not need goes to the parts after it")
        for part, limit in shares(parts(80 * 10**9, out), end - time.monotonic()):
            print(f"# {part.name}: {limit:.0f} s", *part.commands, sep="\n")
        return
    if not torch.cuda.is_available():
        lack = "is built without CUDA" if torch.version.cuda is None else "finds no GPU"
        needs = "this needs an NVIDIA GPU, its driver and a torch with CUDA"
        raise SystemExit(f"gpu.py: torch {torch.__version__} {lack}; {needs}")
    # A background job of a shell ignores SIGINT, and so would the parts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = out or ROOT / "benchmarks" / "results" / label(environment())
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    todo = parts(torch.cuda.get_device_properties(0).total_memory, out)
    for index in range(len(todo)):
        part, limit = shares(todo[index:], end - time.monotonic())[0]
        carry_out(part, limit, folder)
    report.main(out=out)


def parts(memory: int, out: Path | None) -> list[Part]:
    """What runs on a GPU of so many bytes. The tests come last: they compile kernels as long as they may."""
    place = f" --out {shlex.quote(str(out))}" if out else ""
    size = "llama-3.1-8b --rank 128 --dtype bf16 --ends low-rank --release --gradient-checkpointing"
    # In one pass 24.8 GiB, by lorapre plan; in four 6.5.
    batch = next((x for x, least in ((512, 40e9), (128, 12e9)) if memory > least), 32)
    # All optimizers hold their state at once: about 34 GB for the 24 layers of Llama-1B.
    layers = int(24 * memory / 40e9)
    workers = " -n 4" if find_spec("xdist") else ""  # they compile, which takes most of the time
    return [
        Part(
            "predicted",
            "Peak of a training step: llama-3.1-8b",
            80,
            [f"python benchmarks/predicted.py --model {size} --device cuda --cap 24{place}"],
        ),
        Part(
            "training",
            f"Training: Llama-60M, bf16, {TOKENS:,} tokens a step in {512 // batch} of {batch} x 256",
            110,
            [
                "lorapre arithmetic runs/gpu/arithmetic --train 1 --test 1",
                f"lorapre pretrain --preset llama-60m --steps {STEPS} --data runs/gpu/arithmetic/text.jsonl "
                "--tokenizer runs/gpu/arithmetic/tokenizer --packed --evaluations 1 --eval-sequences 128 "
                f"--checkpoints 1 --log-points {STEPS // LOGGED} --batch-size {batch} "
                f"--accumulation {512 // batch} --out runs/gpu/run",
            ],
        ),
        Part(
            "step_time",
            "optimizer.step: llama-1b, bf16",
            150,
            [
                "python benchmarks/step_time.py --model llama-1b --ranks 64 256 --dtype bf16 --device cuda "
                f"--only 'AdamW (' Muon GaLore LoRA-Pre{f' --layers {layers}' if layers < 24 else ''}{place}"
            ],
        ),
        Part(
            "tests",
            "Tests on the GPU",
            120,
            [f"python -m pytest -m gpu -v{workers} " + " ".join(marked())],
        ),
    ]


def marked() -> list[str]:
    """The files with tests that run on a GPU: others would import what may not be installed."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{file.name}" for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def shares(todo: list[Part], seconds: float) -> list[tuple[Part, float]]:
    """The seconds that are left, by the parts' shares."""
    whole = sum(part.share for part in todo)
    return [(part, max(0.0, seconds) * part.share / whole) for part in todo]


def carry_out(part: Part, limit: float, folder: Path) -> None:
    """Run a part and leave its result in `folder`, as a file."""
    print(f"\n{part.name}, at most {limit:.0f} s\n" + "\n".join(part.commands), flush=True)
    for old in folder.glob(f"{part.name}-*cuda.*"):
        old.unlink()  # else it would stand for a part that fails now
    outcome = run(part.commands, limit, SCRATCH / f"{part.name}.log")
    if part.name == "tests":
        tests(part, outcome).save(folder)
    elif part.name == "training":
        training(part, outcome, SCRATCH / "run").save(folder)
        shutil.rmtree(SCRATCH / "run", ignore_errors=True)  # with its checkpoint
    elif not list(folder.glob(f"{part.name}-*cuda.json")):
        missing = outcome._replace(reason=outcome.reason or "left no result")
        result(part, missing, [Column("part", "part"), Column("seconds", "s", ".0f")], {}).save(folder)
    print(f"{part.name}: {outcome.reason or 'done'}, {outcome.seconds:.0f} s", flush=True)


def run(commands: list[str], limit: float, log: Path) -> Outcome:
    """Run commands one after the other, within `limit` seconds all together, with their output in `log`."""
    begin, reason = time.monotonic(), None
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # nobody waits for the hub
    # On several GPUs the Trainer would take them all.
    variables["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    with log.open("w", encoding="utf-8") as file:
        for command in commands:
            program, *arguments = shlex.split(command)
            process = subprocess.Popen(
                [*PROGRAMS[program], *arguments],
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                left = limit - (time.monotonic() - begin)
                grace = min(GRACE, limit / 4)
                try:
                    code = process.wait(max(0.0, left - grace))
                    if code:
                        signalled = f"signal {-code}" if code < 0 else f"exit code {code}"
                        reason = f"{signalled} after {time.monotonic() - begin:.0f} s"
                except subprocess.TimeoutExpired:
                    reason = f"cut off at its limit of {limit:.0f} s"
                    process.send_signal(signal.SIGINT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(grace)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with all that it started
                process.wait()
            if reason:
                break
    return Outcome(reason, time.monotonic() - begin, log.read_text(encoding="utf-8", errors="replace"))


# Results


def result(part: Part, outcome: Outcome, columns: list[Column], row: Row) -> Result:
    """The result of a part with one row. Where it is not complete, the notes say why."""
    notes = []
    if outcome.reason:
        row = row or {"reason": outcome.reason}
        notes = [] if "reason" in row else [f"{outcome.reason.capitalize()}."]
        notes += quoted(outcome.output.splitlines()[-LINES:])
    return Result(
        benchmark=part.name,
        title=part.title,
        device="cuda",
        settings={"name": [], "seconds": outcome.seconds},
        columns=columns,
        rows=[{"part": part.name, "optimizer": "LoRA-Pre, split"} | row],
        notes=notes,
        command="\n".join(part.commands),
    )


def quoted(lines: Sequence[str]) -> list[str]:
    """Lines of output as notes: no table, link or fence of the report begins in one."""
    plain = (re.sub(r"[`|\[\]]", " ", line).strip()[:200] for line in lines)
    return [f"`{line}`" for line in plain if line]


def tests(part: Part, outcome: Outcome) -> Result:
    """How many tests passed, and which failed. They are counted one by one: the end may be cut off."""
    kinds = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    columns = [Column("part", ""), *(Column(kind, kind.lower(), "d") for kind in kinds)]
    columns.append(Column("seconds", "s", ".0f"))
    lines = outcome.output.splitlines()
    progress = [line for line in lines if "%]" in line]
    row: Row = {kind: sum(f"{kind} " in line for line in progress) for kind in kinds}
    if not any(row.values()):
        return result(part, outcome, columns, {})
    bad = [line for line in progress if "FAILED " in line or "ERROR " in line]
    outcome = outcome._replace(output="\n".join(bad[:LINES]))
    return result(part, outcome, columns, row | {"seconds": outcome.seconds})


def training(part: Part, outcome: Outcome, run: Path) -> Result:
    """Speed of a run, without its first steps: there kernels are compiled and memory is found."""
    columns = [
        Column("optimizer", "optimizer"),
        Column("rank", "r"),
        Column("steps", "steps"),
        Column("ms", "ms a step", ",.0f"),
        Column("tokens_per_second", "tokens/s", ",.0f"),
        Column("share", "in step", ".1%"),
        Column("first", "first, s", ".1f"),
    ]
    row: Row = {}
    file = run / "metrics.jsonl"
    logged = [x for x in read_metrics(file) if "step_seconds" in x] if file.exists() else []
    if len(logged) > 1:
        first, last = logged[0], logged[-1]
        names = ("step", "tokens", "step_seconds", "optimizer_seconds")
        steps, tokens, seconds, inside = (last[name] - first[name] for name in names)
        row = {"rank": 128, "steps": f"{first['step'] + 1} to {last['step']}", "first": first["step_seconds"]}
        row |= {"ms": 1e3 * seconds / steps, "tokens_per_second": tokens / seconds, "share": inside / seconds}
    elif not outcome.reason:
        outcome = outcome._replace(reason="fewer than two lines of metrics")
    found = result(part, outcome, columns, row)
    found.notes += [
        "in step: share of the time in optimizer.step, whose kernels are compiled in the first "
        f"{LOGGED} steps; first: their seconds. The text has 384 kinds of tokens, the model 32,000."
    ]
    return found


if __name__ == "__main__":
    app()
