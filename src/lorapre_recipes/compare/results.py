"""What came of the runs of a comparison: losses and figures, by contender.

A contender stands where its best values on the first seed put it, over all seeds that were run with them.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorapre_recipes.compare.cells import SWEPT, Ending, ending_of, folder_name
from lorapre_recipes.config import PretrainConfig, UserError
from lorapre_recipes.files import read_json
from lorapre_recipes.train.summary import describe_optimizer

# Figures of a summary that `report.json` keeps.
KEPT = ("state_bytes", "peak_bytes", "optimizer_share", "step_seconds", "device")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder that has ended."""

    folder: Path
    contender: str
    config: PretrainConfig
    ending: Ending

    @property
    def loss(self) -> float:
        """Of the last evaluation, infinite where training broke down."""
        return self.ending.loss

    @property
    def values(self) -> dict[str, float]:
        """The numbers that a sweep may change; those that the optimizer has not are left out."""
        fields = dataclasses.asdict(self.config)
        fields["beta1"], fields["beta2"] = self.config.betas
        return {name: fields[name] for name in SWEPT if fields[name] is not None}

    @property
    def figures(self) -> dict[str, Any]:
        """What `report.json` keeps of it."""
        loss = self.loss if math.isfinite(self.loss) else None  # JSON has no infinity
        return {
            "contender": self.contender,
            "seed": self.config.seed,
            "steps": self.config.steps,
            **self.values,
            "validation_loss": loss,
            "reason": self.ending.reason,
            **{name: self.ending.summary.get(name) for name in KEPT},
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """The runs of an optimizer with its options: `best` are those with its best values, one per seed."""

    name: str
    runs: list[Run]
    best: list[Run]

    @property
    def title(self) -> str:
        """The optimizer in words, with what its own options say beyond that."""
        config = self.runs[0].config
        described = {"variant", "compress", "rank", *SWEPT[:2]}
        _, _, options = self.name.partition(":")
        others = [option for option in options.split(",") if option and option.split("=")[0] not in described]
        several = len({run.config.rank for run in self.runs}) > 1
        words = label(config) if several else describe_optimizer(config)
        return ", ".join([words, *others])

    @property
    def loss(self) -> float:
        """Mean over seeds, in nats per token; infinite where no run ended with a number."""
        return statistics.fmean(run.loss for run in self.best) if self.best else math.inf

    @property
    def spread(self) -> float | None:
        """Standard deviation of the loss over seeds; None of a single one."""
        return statistics.stdev(run.loss for run in self.best) if len(self.best) > 1 else None

    @property
    def at_edge(self) -> bool:
        """Whether the best lr or scale is the lowest or highest value that was tried."""
        for name in ("lr", "scale") if self.best else ():
            tried = {run.values[name] for run in self.runs}
            ended = {run.values[name] for run in self.runs if not run.ending.reason}
            if len(tried) > 1 and self.best[0].values[name] in (min(ended), max(ended)):
                return True
        return False

    def lowest(self, name: str) -> dict[float, float]:
        """The lowest loss on the first seed for each value of a number, at the best of the others."""
        seed = min(run.config.seed for run in self.runs)
        lowest: dict[float, float] = {}
        for run in self.runs:
            if run.config.seed == seed and name in run.values:
                value = run.values[name]
                lowest[value] = min(lowest.get(value, math.inf), run.loss)
        return lowest

    def mean(self, key: str) -> float:
        """Of a figure of the summaries."""
        return statistics.fmean(run.ending.summary[key] for run in self.best)


def read_runs(folder: Path) -> list[Run]:
    """The ended runs of a comparison, or the one of a run folder. Raises UserError where there is none."""
    if (folder / "compare.json").is_file():
        names = read_json(folder / "compare.json")["contenders"]
        folders = [(x, name) for name in names for x in sorted((folder / folder_name(name)).glob("*seed*"))]
    elif (folder / "config.json").is_file():
        folders = [(folder, None)]
    else:
        raise UserError(f"RUNS {folder}: neither a comparison (compare.json) nor a run folder (config.json)")
    runs = []
    for run, name in folders:
        ending = ending_of(run)
        if ending is not None and (run / "config.json").is_file():  # else it ended before it began
            config = PretrainConfig.load(run / "config.json")
            contender = name or describe_optimizer(config)
            runs.append(Run(folder=run, contender=contender, config=config, ending=ending))
    if not runs:
        raise UserError(f"RUNS {folder}: no run has ended here yet")
    return runs


def standings_of(runs: Iterable[Run]) -> list[Standing]:
    """Runs by contender, in the order they come; each with the runs of its best values on the first seed."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.contender, []).append(run)
    standings = []
    for name, mine in by_name.items():
        ended = [run for run in mine if math.isfinite(run.loss)]
        seed = min(run.config.seed for run in mine)
        first = min((run for run in ended if run.config.seed == seed), key=lambda run: run.loss, default=None)
        best = [run for run in ended if first is not None and run.values == first.values]
        standings.append(Standing(name=name, runs=mine, best=best))
    return standings


def label(config: PretrainConfig) -> str:
    """An optimizer's name with its variant, without its numbers."""
    parts = [config.optimizer, config.variant, None if config.compress == "both" else config.compress]
    return ", ".join(part for part in parts if part)
