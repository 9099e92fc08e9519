"""Compare optimizers on the same model, data, order and evaluation: `lorapre compare`.

Every contender runs with every combination of the swept values on the first seed, and the best
combination then on the other seeds. A cell that is cut off goes on from its last checkpoint.
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
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm  # type: ignore[import-untyped]

from lorapre_recipes.compare.cells import Cell, Comparison, Contender, cell_config
from lorapre_recipes.compare.record import record
from lorapre_recipes.config import UserError
from lorapre_recipes.files import read_json, write_json


class Outcome(NamedTuple):
    """The end of a cell; `loss` is that of the last evaluation, infinite if training broke down."""

    cell: Cell
    loss: float
    reason: str | None = None  # why there is no loss


def compare(
    comparison: Comparison, out: Path, *, jobs: int, files: Sequence[Path] = ()
) -> list[Outcome]:
    """Run the cells of a comparison that have not ended; print a line for each cell.

    Args:
        comparison: what to run.
        out: its folder; cells that are finished there are not run again.
        jobs: cells at a time, each in a process with its share of the cores.
        files: to record every ended cell in, see `compare/record.py`.

    Raises:
        UserError: before the first cell, where one of them could not run.
    """
    contenders = [Contender.parse(text) for text in dict.fromkeys(comparison.contenders)]
    cells = [cell for contender in contenders for cell in first_cells(contender, comparison)]
    for cell in cells:
        cell_config(comparison, cell)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", comparison)
    total = len(cells) + len(contenders) * (comparison.seeds - 1)
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def run(cells: Iterable[Cell]) -> Iterator[Outcome]:
        begun = [pool.submit(start_cell, cell, out, threads=threads) for cell in cells]
        for outcome in map(Future.result, as_completed(begun)):
            for file in files:
                record(out / outcome.cell.path, file)
            bar.update()
            words = outcome.reason or f"validation loss {outcome.loss:.4f}"
            with bar.external_write_mode():
                print(f"{bar.n}/{total}  {outcome.cell.path}  {words}", flush=True)
            yield outcome

    # Threads that wait, one for the process of each cell.
    with tqdm(total=total, unit="run") as bar, ThreadPoolExecutor(jobs) as pool:
        try:
            outcomes = list(run(cells))
            best = [best_cell(contender, outcomes) for contender in contenders]
            seeds = range(1, comparison.seeds)
            more = (dataclasses.replace(x, seed=seed) for x in best if x for seed in seeds)
            return [*outcomes, *run(more)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def first_cells(contender: Contender, comparison: Comparison) -> list[Cell]:
    """Every combination of the swept values, on the first seed."""
    grid = comparison.grid | contender.grid
    return [
        Cell(contender=contender, values=dict(zip(grid, values, strict=True)), seed=0)
        for values in itertools.product(*grid.values())
    ]


def best_cell(contender: Contender, outcomes: Iterable[Outcome]) -> Cell | None:
    """The contender's cell with the lowest loss; None where no run has one."""
    mine = [x for x in outcomes if x.cell.contender is contender and math.isfinite(x.loss)]
    return min(mine, key=lambda x: x.loss).cell if mine else None


def start_cell(cell: Cell, out: Path, *, threads: int) -> Outcome:
    """Run a cell that has not ended in a process of its own, and read how it ended."""
    run = out / cell.path
    if (outcome := outcome_of(cell, run)) is not None:
        return outcome
    run.mkdir(parents=True, exist_ok=True)
    arguments = json.dumps(dataclasses.asdict(cell) | {"contender": cell.contender.name})
    command = [sys.executable, "-m", "lorapre_recipes.compare.compare", str(out), arguments]
    shares = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with (run / "log.txt").open("a", encoding="utf-8") as log:
        ended = subprocess.run(
            command, env=os.environ | shares, stdout=log, stderr=log, check=False
        )
    # A cell that fails otherwise is tried again when the comparison goes on.
    failure = f"exit code {ended.returncode}, see {run / 'log.txt'}"
    return outcome_of(cell, run) or Outcome(cell, math.inf, failure)


def outcome_of(cell: Cell, run: Path) -> Outcome | None:
    """The end of a run; None where it has not ended."""
    if (run / "summary.json").is_file():
        return Outcome(cell, read_json(run / "summary.json")["validation_loss"])
    if (run / "ended.json").is_file():
        return Outcome(cell, math.inf, read_json(run / "ended.json")["reason"])
    return None


def run_cell(out: Path, arguments: str) -> None:
    """Run a cell in this process, or go on with it."""
    from lorapre_recipes.console import quieten
    from lorapre_recipes.train.pretrain import pretrain
    from lorapre_recipes.train.runs import sound_checkpoint
    from lorapre_recipes.train.trainer import Diverged

    fields = json.loads(arguments)
    cell = Cell(**(fields | {"contender": Contender.parse(fields["contender"])}))
    run = out / cell.path
    quieten()
    try:
        config = cell_config(Comparison.load(out), cell)
        pretrain(config, run, resume=sound_checkpoint(run) is not None)
    except (Diverged, UserError) as error:
        write_json(run / "ended.json", {"reason": str(error)})
    for checkpoint in run.glob("checkpoint-*"):  # hundreds of cells; no weights are needed
        shutil.rmtree(checkpoint)


if __name__ == "__main__":
    run_cell(Path(sys.argv[1]), sys.argv[2])
