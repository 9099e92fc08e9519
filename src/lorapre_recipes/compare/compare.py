"""Compare optimizers on the same model, data, order and evaluation: `lorapre compare`.

Every contender runs with every combination of the swept values on the first seed. If its best value
lies at the edge of the grid, the grid goes on from there. The best combination then runs on the
other seeds. A cell that is cut off goes on from its last checkpoint.
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

from lorapre_recipes.compare.cells import Cell, Comparison, Contender, Values, cell_config
from lorapre_recipes.compare.progress import Progress
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
    """Run the cells of a comparison that have not ended; print the plan, and a line for each cell.

    Args:
        comparison: what to run.
        out: its folder; cells that are finished there are not run again.
        jobs: cells at a time, each in a process with its share of the cores.
        files: to record every ended cell in, see `compare/record.py`.

    Raises:
        UserError: before the first cell, where one of them could not run.
    """
    contenders = [Contender.parse(text) for text in dict.fromkeys(comparison.contenders)]
    first = {contender.name: first_cells(contender, comparison) for contender in contenders}
    configs = [cell_config(comparison, cell) for cell in itertools.chain(*first.values())]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", comparison)
    progress = Progress(out, configs[0], jobs)
    progress.planned = len(configs)

    def run(cell: Cell) -> Outcome:
        new = not (out / cell.path).exists()
        progress.begin(cell.path)
        outcome = start_cell(cell, out, threads=max(1, (os.cpu_count() or 1) // jobs))
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
        if (best := best_values(outcomes)) is not None:
            cell = Cell(contender=contender, values=best, seed=0)
            seeds = range(1, comparison.seeds)
            outcomes += run_more(dataclasses.replace(cell, seed=seed) for seed in seeds)
        return outcomes

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


def first_cells(contender: Contender, comparison: Comparison) -> list[Cell]:
    """Every combination of the swept values, on the first seed."""
    grid = comparison.grid | contender.grid
    return [
        Cell(contender=contender, values=dict(zip(grid, values, strict=True)), seed=0)
        for values in itertools.product(*grid.values())
    ]


def best_values(outcomes: Iterable[Outcome]) -> Values | None:
    """The values with the lowest loss on the first seed; None where no run has one."""
    finished = [each for each in outcomes if each.cell.seed == 0 and math.isfinite(each.loss)]
    return min(finished, key=lambda each: each.loss).cell.values if finished else None


def beyond_the_edge(outcomes: Sequence[Outcome]) -> Iterator[Cell]:
    """Cells one geometric step beyond the best one, where that lies at the edge of what was run."""
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
