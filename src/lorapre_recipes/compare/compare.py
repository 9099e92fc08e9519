"""Compare optimizers on the same model, data, order and evaluation: `lorapre compare`.

Every contender is run with every combination of the swept values on the first seed; where its best value lies
at the edge of the grid, the grid goes on from there; and the best combination is then run on the other seeds.

A cell that is cut off goes on from its last checkpoint, or from its start where the optimizer keeps objects
in its state that a safe load refuses.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lorapre_recipes.compare.cells import (
    Cell,
    Comparison,
    Contender,
    Values,
    cell_config,
    ending_of,
)
from lorapre_recipes.compare.progress import Progress
from lorapre_recipes.compare.record import record
from lorapre_recipes.config import COMPRESSED, LOW_RANK, UserError
from lorapre_recipes.files import write_json

# Of the rest some keep objects in their state, which a safe load refuses.
OURS = (
    "racs",
    "alice",
    "scale",
    "column-sgd",
    "muon-no-momentum",
    "muon-bf16",
    "apollo",
    "apollo-mini",
)
RESUMABLE = (*LOW_RANK, *COMPRESSED, *OURS, "adamw", "muon", "sgd")


class Outcome(NamedTuple):
    """How a cell ended: `loss` is that of the last evaluation, infinite where training broke down."""

    cell: Cell
    loss: float
    reason: str | None = None  # why there is no figure


def compare(
    comparison: Comparison, out: Path, *, jobs: int, files: Sequence[Path] = ()
) -> list[Outcome]:
    """Run what is missing of a comparison; print the plan, and a line for each cell.

    Args:
        comparison: what to run.
        out: its folder; cells that are finished there are not run again.
        jobs: cells at a time, each in a process with its share of the cores.
        files: to record every ended cell in, see `compare/record.py`.

    Raises:
        UserError: before the first cell, where one of them could not run.
    """
    contenders = [Contender.parse(text) for text in dict.fromkeys(comparison.contenders)]
    first: dict[str, list[Cell]] = {}
    for contender in contenders:
        grid = comparison.grid | contender.grid
        combinations = [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]
        first[contender.name] = [Cell(contender=contender, values=x, seed=0) for x in combinations]
    configs = [cell_config(comparison, cell) for cell in itertools.chain(*first.values())]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", comparison)

    threads = max(1, (os.cpu_count() or 1) // jobs)
    progress = Progress(out, configs[0], jobs, threads)
    progress.planned = len(configs)

    def run(cell: Cell) -> Outcome:
        new = not (out / cell.path).exists()
        progress.begin(cell.path)
        outcome = start_cell(cell, out, threads)
        words = outcome.reason or f"validation loss {outcome.loss:.4f}"
        progress.end(cell.path, words, finished=new and outcome.reason is None)
        for file in files:
            record(out / cell.path, file)
        return outcome

    def run_more(cells: Iterable[Cell]) -> list[Outcome]:
        progress.planned += len(cells := list(cells))
        return list(pool.map(run, cells))

    def run_contender(contender: Contender) -> list[Outcome]:
        outcomes = list(pool.map(run, first[contender.name]))
        for _ in range(comparison.extend):
            outcomes += run_more(beyond_the_edge(outcomes))
        best = best_values(outcomes)
        if best is None:
            return outcomes
        seeds = range(1, comparison.seeds)
        return outcomes + run_more(
            Cell(contender=contender, values=best, seed=seed) for seed in seeds
        )

    progress.start(comparison)
    # Threads that wait: one for each contender, and one for the process of each cell.
    with ThreadPoolExecutor(len(contenders)) as drivers, ThreadPoolExecutor(jobs) as pool:
        try:
            return list(itertools.chain(*drivers.map(run_contender, contenders)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            progress.stop()


def best_values(outcomes: Iterable[Outcome]) -> Values | None:
    """The values with the lowest loss on the first seed; None where no run has one."""
    finished = [each for each in outcomes if each.cell.seed == 0 and math.isfinite(each.loss)]
    return min(finished, key=lambda each: each.loss).cell.values if finished else None


def beyond_the_edge(outcomes: Sequence[Outcome]) -> Iterator[Cell]:
    """Cells beyond the best one where that lies at the edge of what has been run, in geometric steps."""
    best = best_values(outcomes)
    if best is None:
        return
    for name in ("lr", "scale"):
        tried = sorted({each.cell.values[name] for each in outcomes if name in each.cell.values})
        if len(tried) < 2 or best[name] not in (tried[0], tried[-1]):
            continue
        low = best[name] == tried[0]
        ratio = tried[0] / tried[1] if low else tried[-1] / tried[-2]
        values = best | {name: float(f"{best[name] * ratio:.4g}")}
        yield dataclasses.replace(outcomes[0].cell, values=values)


def start_cell(cell: Cell, out: Path, threads: int) -> Outcome:
    """Run a cell that has not ended in a process of its own, and read how it ended."""
    run = out / cell.path
    ending = ending_of(run)
    if ending is None:
        run.mkdir(parents=True, exist_ok=True)
        arguments = json.dumps(dataclasses.asdict(cell) | {"contender": cell.contender.name})
        with (run / "log.txt").open("a", encoding="utf-8") as log:
            code = subprocess.run(
                [sys.executable, "-m", "lorapre_recipes.compare.compare", str(out), arguments],
                env=os.environ
                | {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"},
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
        ending = ending_of(run)
        if ending is None:  # it is tried again when the comparison goes on
            return Outcome(cell, math.inf, f"exit code {code}, see {run / 'log.txt'}")
    return Outcome(cell, ending.loss, ending.reason)


def run_cell(out: Path, arguments: str) -> None:
    """Run a cell in this process, or go on with it."""
    from lorapre_recipes.console import quieten
    from lorapre_recipes.train.pretrain import pretrain
    from lorapre_recipes.train.runs import sound_checkpoint
    from lorapre_recipes.train.trainer import Diverged

    fields = json.loads(arguments)
    cell = Cell(**(fields | {"contender": Contender.parse(fields["contender"])}))
    run = out / cell.path
    resume = sound_checkpoint(run) is not None and cell.contender.optimizer in RESUMABLE
    if not resume:
        for file in run.glob("*"):
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name != "log.txt":
                file.unlink()
    quieten()
    try:
        pretrain(cell_config(Comparison.load(out), cell), run, resume=resume)
    except (Diverged, UserError) as error:
        write_json(run / "ended.json", {"reason": str(error)})
    for checkpoint in run.glob("checkpoint-*"):  # hundreds of cells; the weights of none are needed
        shutil.rmtree(checkpoint)


if __name__ == "__main__":
    run_cell(Path(sys.argv[1]), sys.argv[2])
