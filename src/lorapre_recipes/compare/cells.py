"""What a comparison consists of: contenders, a grid of values, and cells, each a run folder.

compare.json              contenders, grid, seeds, the changes to the preset: what is needed to go on
CONTENDER/VALUES-seedN/   the cells: summary.json, or ended.json with the reason why there is none
runs.json                 a row for each of them, see `compare/record.py`
tables.md, *.png          see `compare/tables.py`
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from lorapre_recipes.config import OptimizerName, PretrainConfig, UserError, choices_of, user_errors
from lorapre_recipes.files import read_json
from lorapre_recipes.presets import PRETRAIN, get_preset

# Numbers of a config that may be swept. beta1 and beta2 are the two in `betas`.
SWEPT = (
    "lr",
    "scale",
    "rank",
    "beta1",
    "beta2",
    "momentum",
    "eps",
    "warmup",
    "batch_size",
    "refresh",
)
CHOICES = choices_of(PretrainConfig).keys() - {"optimizer"}
Values = dict[str, float]
Grid = dict[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer with options of its own: `lorapre-adamw:variant=subspace,rank=16,scale=0.1/0.2`.

    Rules take several values too: `lorapre-adamw:rules=embed_tokens=8/lm_head=8`.
    """

    name: str
    optimizer: OptimizerName
    choices: dict[str, Any]
    grid: Grid  # over the comparison's

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Read a contender. Raises UserError where it is none."""
        optimizer, _, rest = text.partition(":")
        known = get_args(OptimizerName)
        if optimizer not in known:
            raise UserError(
                f"--optimizers: there is no {optimizer!r}; choose from {', '.join(known)}"
            )
        choices: dict[str, Any] = {}
        grid: Grid = {}
        for part in rest.split(",") if rest else ():
            name, _, value = part.partition("=")
            if name in CHOICES:
                choices[name] = value
            elif name == "rules":
                choices[name] = tuple(value.split("/"))
            elif name in SWEPT:
                grid[name] = numbers(value, "/", f"--optimizers {text}")
            else:
                known = (*sorted(CHOICES), "rules", *SWEPT)
                raise UserError(
                    f"--optimizers {text}: there is no option {name!r}; choose from {', '.join(known)}"
                )
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

    @classmethod
    def load(cls, folder: Path) -> Comparison:
        """Read compare.json. Raises UserError where there is no such file."""
        wrong = f"--resume {folder}: not a comparison, compare.json cannot be read"
        with user_errors(wrong, OSError, ValueError, KeyError, TypeError, AttributeError):
            fields = read_json(folder / "compare.json")
            fields["contenders"] = tuple(fields["contenders"])
            fields["grid"] = {name: tuple(values) for name, values in fields["grid"].items()}
            return cls(**fields)


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
        folder = re.sub("[:,]", "-", self.contender.name).replace("/", "_")
        return Path(folder, f"{values}seed{self.seed}")


class Ending(NamedTuple):
    """How a run ended."""

    loss: float  # of the last evaluation, infinite where training broke down
    reason: str | None  # why there is no figure
    summary: dict[str, Any]


def ending_of(run: Path) -> Ending | None:
    """How a run ended, or None of one that has not."""
    if (run / "summary.json").is_file():
        summary = read_json(run / "summary.json")
        return Ending(summary["validation_loss"], None, summary)
    if (run / "ended.json").is_file():
        return Ending(math.inf, read_json(run / "ended.json")["reason"], {})
    return None


def read_sweep(texts: Sequence[str]) -> Grid:
    """`lr=0.01,0.005` and `scale=0.1` as a grid. Raises UserError."""
    grid: Grid = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in SWEPT:
            raise UserError(
                f"--sweep {text}: there is no {name!r} to sweep; choose from {', '.join(SWEPT)}"
            )
        grid[name] = numbers(values, ",", f"--sweep {text}")
    return grid


def numbers(text: str, separator: str, where: str) -> tuple[float, ...]:
    """Numbers in order. Raises UserError."""
    with user_errors(
        f"{where}: give numbers, one or several with {separator!r} between them", ValueError
    ):
        return tuple(sorted({float(value) for value in text.split(separator)}))


def cell_config(comparison: Comparison, cell: Cell) -> PretrainConfig:
    """The config of a cell. Raises UserError where its optimizer cannot take it."""
    config = get_preset(PRETRAIN, comparison.preset)(cell.contender.optimizer)
    fields = comparison.changes | cell.contender.choices | cell.values | {"seed": cell.seed}
    beta1, beta2 = config.betas
    fields["betas"] = (fields.pop("beta1", beta1), fields.pop("beta2", beta2))
    for name in ("rank", "batch_size", "refresh"):
        if name in fields:
            fields[name] = int(fields[name])
    return config.replace(**fields)
