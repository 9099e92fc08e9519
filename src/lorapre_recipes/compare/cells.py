"""The parts of a comparison: contenders, a grid of values, and cells, each a run folder.

compare.json              contenders, grid, seeds and the changes to the preset, to go on from
CONTENDER/VALUES-seedN/   the cells: summary.json, or ended.json with the reason why there is none
runs.json                 a row for each of them, see `compare/record.py`
tables.md, *.png          see `compare/tables.py`
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from lorapre_recipes.config import (
    OptimizerName,
    PretrainConfig,
    check_known,
    choices_of,
    user_errors,
)
from lorapre_recipes.files import read_json
from lorapre_recipes.presets import PRETRAIN, get_preset

# Numbers of a config that may be swept. beta1 and beta2 are the two in `betas`.
SWEPT = ("lr", "scale", "rank", "beta1", "beta2", "momentum", "warmup", "batch_size", "refresh")
CHOICES = choices_of(PretrainConfig).keys() - {"optimizer"}
Values = dict[str, float]
Grid = dict[str, Sequence[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer with options of its own: `lorapre-adamw:variant=paper,rank=16,scale=0.1/0.2`."""

    name: str
    optimizer: OptimizerName
    choices: dict[str, str]
    grid: Grid  # its own values, in place of the comparison's

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Read a contender. Raises UserError for an unknown optimizer, option or number."""
        optimizer, _, rest = text.partition(":")
        check_known("--optimizers", optimizer, get_args(OptimizerName))
        choices: dict[str, str] = {}
        grid: Grid = {}
        option = f"--optimizers {text}"
        for part in rest.split(",") if rest else ():
            name, _, value = part.partition("=")
            check_known(option, name, (*sorted(CHOICES), *SWEPT))
            if name in SWEPT:
                grid[name] = numbers(value, "/", option)
            else:
                choices[name] = value
        return cls(name=text, optimizer=optimizer, choices=choices, grid=grid)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that decides the numbers of a comparison; kept as `compare.json`."""

    preset: str
    contenders: Sequence[str]
    grid: Grid
    seeds: int
    extend: int
    changes: dict[str, Any]  # to the preset, for all cells

    @classmethod
    def load(cls, folder: Path) -> Comparison:
        """Read compare.json. Raises UserError where there is no such file."""
        wrong = f"--resume {folder}: not a comparison, compare.json cannot be read"
        with user_errors(wrong, OSError, ValueError, TypeError):
            return cls(**read_json(folder / "compare.json"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a contender with one set of values and a seed."""

    contender: Contender
    values: Values
    seed: int

    @property
    def path(self) -> Path:
        """Its folder within that of the comparison."""
        values = "".join(f"{name}={value:g}-" for name, value in self.values.items())
        folder = re.sub("[:,]", "-", self.contender.name).replace("/", "_")
        return Path(folder, f"{values}seed{self.seed}")


def read_sweep(texts: Sequence[str]) -> Grid:
    """`lr=0.01,0.005` and `scale=0.1` as a grid. Raises UserError."""
    grid: Grid = {}
    for text in texts:
        name, _, values = text.partition("=")
        check_known(f"--sweep {text}", name, SWEPT)
        grid[name] = numbers(values, ",", f"--sweep {text}")
    return grid


def numbers(text: str, separator: str, option: str) -> tuple[float, ...]:
    """Numbers in order. Raises UserError."""
    wrong = f"{option}: give numbers, one or several with {separator!r} between them"
    with user_errors(wrong, ValueError):
        values = {int(x) if x.isdecimal() else float(x) for x in text.split(separator)}
        return tuple(sorted(values))


def cell_config(comparison: Comparison, cell: Cell) -> PretrainConfig:
    """The config of a cell. Raises UserError where its optimizer cannot take it."""
    config = get_preset(PRETRAIN, comparison.preset)(cell.contender.optimizer)
    fields = comparison.changes | cell.contender.choices | cell.values | {"seed": cell.seed}
    beta1, beta2 = config.betas
    fields["betas"] = (fields.pop("beta1", beta1), fields.pop("beta2", beta2))
    return config.replace(**fields)
