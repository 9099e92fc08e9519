"""Compare optimizers on the same model, data, order and evaluation: `lorapre compare`.

A comparison is a folder of cells, each a run folder of `lorapre pretrain`. Every contender is run with every
combination of the swept values on the first seed; where its best value lies at the edge of the grid, the
grid goes on from there; and the best combination is then run on the other seeds.

    compare.json              contenders, grid, seeds, the base config: what is needed to go on
    CONTENDER/VALUES-seedN/   the cells
    report.md, report.html    see lorapre_recipes.compare.study

A cell that is cut off goes on from its last checkpoint, or from its start where the optimizer keeps objects
in its state that a safe load refuses.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, get_args

from lorapre_recipes.config import (
    CHOICES,
    LOW_RANK,
    OptimizerName,
    PretrainConfig,
    UserError,
)

# Numbers of a config that may be swept. beta1 and beta2 are the two in `betas`.
SWEPT = ("lr", "scale", "rank", "beta1", "beta2", "momentum", "eps", "warmup", "batch_size", "refresh")
Values = dict[str, float]
Grid = dict[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer with options of its own: `lorapre-adamw:variant=subspace,rank=16,scale=0.1/0.2`."""

    name: str
    optimizer: OptimizerName
    choices: dict[str, str]
    grid: Grid  # over the comparison's

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Read a contender. Raises UserError where it is none."""
        optimizer, _, rest = text.partition(":")
        if optimizer not in get_args(OptimizerName):
            raise UserError(
                f"--optimizers: there is no {optimizer!r}; choose from {', '.join(get_args(OptimizerName))}"
            )
        choices: dict[str, str] = {}
        grid: Grid = {}
        for part in rest.split(",") if rest else ():
            name, _, value = part.partition("=")
            if name in CHOICES and name != "optimizer":
                choices[name] = value
            elif name in SWEPT:
                grid[name] = _numbers(value, "/", f"--optimizers {text}")
            else:
                known = ", ".join([*(key for key in CHOICES if key != "optimizer"), *SWEPT])
                raise UserError(f"--optimizers {text}: there is no option {name!r}; choose from {known}")
        return cls(name=text, optimizer=optimizer, choices=choices, grid=grid)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that decides the numbers of a comparison; kept as `compare.json`."""

    preset: str
    contenders: tuple[str, ...]
    grid: Grid
    seeds: int
    extend: int
    changes: dict[str, Any]  # to the preset, of all cells

    def save(self, path: Path) -> None:
        """Write every field as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Comparison:
        """Read what `save` wrote. Raises UserError where there is no such file."""
        try:
            fields = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
            fields["contenders"] = tuple(fields["contenders"])
            fields["grid"] = {name: tuple(values) for name, values in fields["grid"].items()}
            return cls(**fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--resume {folder}: not a comparison, compare.json cannot be read") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a contender with values of its own, on a seed."""

    contender: Contender
    values: Values
    seed: int

    @property
    def path(self) -> Path:
        """Its folder within that of the comparison."""
        values = "".join(f"{name}={value:g}-" for name, value in self.values.items())
        return Path(folder_name(self.contender.name), f"{values}seed{self.seed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a cell ended: `loss` is that of the last evaluation, infinite where training broke down."""

    cell: Cell
    loss: float
    reason: str | None = None  # why there is no figure


def folder_name(contender: str) -> str:
    """The name of a contender as that of a folder."""
    return re.sub("[:,]", "-", contender).replace("/", "_")


def read_sweep(texts: Sequence[str]) -> Grid:
    """`lr=0.01,0.005` and `scale=0.1` as a grid. Raises UserError."""
    grid: Grid = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in SWEPT:
            raise UserError(f"--sweep {text}: there is no {name!r} to sweep; choose from {', '.join(SWEPT)}")
        grid[name] = _numbers(values, ",", f"--sweep {text}")
    return grid


def cell_config(comparison: Comparison, cell: Cell) -> PretrainConfig:
    """The config of a cell. Raises UserError where its optimizer cannot take it."""
    from lorapre_recipes.presets import get_preset

    config = get_preset(comparison.preset)(cell.contender.optimizer)
    fields = dict(comparison.changes) | cell.contender.choices | cell.values | {"seed": cell.seed}
    beta1, beta2 = config.betas
    fields["betas"] = (fields.pop("beta1", beta1), fields.pop("beta2", beta2))
    for name in ("rank", "batch_size", "refresh"):
        if name in fields:
            fields[name] = int(fields[name])
    return config.replace(**fields)


def compare(
    comparison: Comparison, out: Path, *, jobs: int, command: str | None, say: Callable[[str], None] = print
) -> list[Outcome]:
    """Run what is missing of a comparison.

    Args:
        comparison: what to run.
        out: its folder; cells that are finished there are not run again.
        jobs: cells at a time, each in a process with its share of the cores.
        command: what to write to command.txt.
        say: takes a line for each cell.

    Raises:
        UserError: before the first cell, where one of them could not run.
    """
    contenders = [Contender.parse(text) for text in comparison.contenders]
    first = [
        Cell(contender=contender, values=values, seed=0)
        for contender in contenders
        for values in combinations(comparison.grid | contender.grid)
    ]
    for cell in first:
        cell_config(comparison, cell)
    out.mkdir(parents=True, exist_ok=True)
    comparison.save(out / "compare.json")
    if command is not None:
        with (out / "command.txt").open("a", encoding="utf-8") as file:
            file.write(command + "\n")

    done: dict[Path, Outcome] = {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:  # of threads that wait for a process each
        running: dict[Future[Outcome], Cell] = {}
        planned: set[Path] = set()
        extended = dict.fromkeys((contender.name for contender in contenders), 0)

        def submit(cells: Iterable[Cell]) -> None:
            for cell in cells:
                if cell.path not in planned:
                    planned.add(cell.path)
                    running[pool.submit(start_cell, cell, out, threads)] = cell

        submit(first)
        while running:
            try:
                ready, _ = wait(running, return_when=FIRST_COMPLETED)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            for future in ready:
                cell = running.pop(future)
                outcome = future.result()
                done[cell.path] = outcome
                say(describe(outcome, len(done), len(planned)))
                mine = [each for each in done.values() if each.cell.contender == cell.contender]
                if any(each.contender == cell.contender for each in running.values()):
                    continue
                more = (
                    list(beyond_the_edge(mine)) if extended[cell.contender.name] < comparison.extend else []
                )
                extended[cell.contender.name] += 1
                best = best_values(mine)
                if more:
                    submit(more)
                elif best is not None:
                    submit(
                        Cell(contender=cell.contender, values=best, seed=seed)
                        for seed in range(1, comparison.seeds)
                    )
    return list(done.values())


def combinations(grid: Grid) -> Iterator[Values]:
    """Every combination of the values of a grid."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def best_values(outcomes: Iterable[Outcome]) -> Values | None:
    """The values with the lowest loss on the first seed; None where no run has one."""
    finished = [each for each in outcomes if each.cell.seed == 0 and math.isfinite(each.loss)]
    return min(finished, key=lambda each: each.loss).cell.values if finished else None


def beyond_the_edge(outcomes: Sequence[Outcome]) -> Iterator[Cell]:
    """Cells beyond the best one where that lies at the edge of what has been run, in geometric steps."""
    best = best_values(outcomes)
    if best is None:
        return
    cell = next(each.cell for each in outcomes if each.cell.seed == 0)
    for name in ("lr", "scale"):
        tried = sorted({each.cell.values[name] for each in outcomes if name in each.cell.values})
        if len(tried) < 2 or best[name] not in (tried[0], tried[-1]):
            continue
        low = best[name] == tried[0]
        ratio = tried[0] / tried[1] if low else tried[-1] / tried[-2]
        yield dataclasses.replace(cell, values=best | {name: float(f"{best[name] * ratio:.4g}")})


def start_cell(cell: Cell, out: Path, threads: int) -> Outcome:
    """Run a cell that has not ended in a process of its own, and read how it ended."""
    run = out / cell.path
    ended = read_outcome(cell, run)
    if ended is None:
        run.mkdir(parents=True, exist_ok=True)
        arguments = json.dumps(dataclasses.asdict(cell) | {"contender": cell.contender.name})
        with (run / "log.txt").open("a", encoding="utf-8") as log:
            code = subprocess.run(
                [sys.executable, "-m", "lorapre_recipes.compare.compare", str(out), arguments],
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
        ended = read_outcome(cell, run)
        if ended is None:  # it is tried again when the comparison goes on
            ended = Outcome(cell=cell, loss=math.inf, reason=f"exit code {code}, see {run / 'log.txt'}")
    return ended


def run_cell(out: Path, arguments: str) -> None:
    """Run a cell in this process, or go on with it."""
    from lorapre_recipes.cli.launch import quieten
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
        (run / "ended.json").write_text(json.dumps({"reason": str(error)}), encoding="utf-8")
    for checkpoint in run.glob("checkpoint-*"):  # hundreds of cells; the weights of none are needed
        shutil.rmtree(checkpoint)


# Of the rest some keep objects in their state, which a safe load refuses.
RESUMABLE: tuple[OptimizerName, ...] = (*LOW_RANK, "adamw", "muon", "muon-no-momentum", "galore-muon", "sgd")


def read_outcome(cell: Cell, run: Path) -> Outcome | None:
    """How a cell has ended, or None."""
    with_summary, without = run / "summary.json", run / "ended.json"
    if with_summary.is_file():
        loss = json.loads(with_summary.read_text(encoding="utf-8"))["validation_loss"]
        return Outcome(cell=cell, loss=loss)
    if without.is_file():
        reason = json.loads(without.read_text(encoding="utf-8"))["reason"]
        return Outcome(cell=cell, loss=math.inf, reason=reason)
    return None


def describe(outcome: Outcome, done: int, planned: int) -> str:
    """The line of a cell."""
    loss = outcome.reason or f"validation loss {outcome.loss:.4f}"
    return f"{done}/{planned}  {outcome.cell.path}  {loss}"


def _numbers(text: str, separator: str, where: str) -> tuple[float, ...]:
    """Numbers in order. Raises UserError."""
    try:
        return tuple(sorted({float(value) for value in text.split(separator)}))
    except ValueError as error:
        raise UserError(f"{where}: give numbers, one or several with {separator!r} between them") from error


if __name__ == "__main__":
    run_cell(Path(sys.argv[1]), sys.argv[2])
