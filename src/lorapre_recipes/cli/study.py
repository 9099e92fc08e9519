"""Commands that say how good a model or an optimizer is: `lorapre evaluate` and `compare`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from lorapre_recipes.cli.launch import new_folder, settled
from lorapre_recipes.cli.options import options
from lorapre_recipes.compare.cells import SWEPT, Comparison, read_sweep
from lorapre_recipes.config import ONLY_FOR, EvaluateConfig, PretrainConfig, UserError
from lorapre_recipes.train.runs import model_folder

# The options that differ between cells: contenders, sweeps and seeds have options of their own.
OWN = {"preset", "optimizer", "seed", "betas", "freeze", "fsdp", *ONLY_FOR, *SWEPT} - {"batch_size"}


@options(EvaluateConfig)
def evaluate(model: str, *, changes: dict[str, Any]) -> None:
    """Score a model's answers to questions in mathematics with lm-eval, and take their loss.

    The prompt is that of `lorapre finetune`, without examples. Metrics are those of lm-eval's task,
    by the filter that finds the answer in the text. The loss is that of the right answers.

    Args:
        model: a name on the Hugging Face hub, a folder, or a run folder of `lorapre pretrain` or
            `finetune`.
        changes: the other options.
    """
    config = EvaluateConfig(model=model, **changes)
    model_folder(model)  # before the imports, which take seconds
    from lorapre_recipes.console import quieten
    from lorapre_recipes.evaluate import evaluate as recipe

    quieten()
    recipe(config)


@options(PretrainConfig, without=OWN, preset="llama-1m")
def compare(
    *,
    preset: str = "llama-1m",
    optimizers: list[str] | None = None,
    sweep: list[str] | None = None,
    seeds: int = 1,
    extend: int = 0,
    jobs: int | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    record: Path | None = None,
    tables: Path | None = None,
    changes: dict[str, Any],
) -> int:
    """Compare optimizers on the same model, data, order and evaluation, each at its best rate.

    Every optimizer runs every combination of the swept values on seed 0, and the best one on the
    other seeds. Without a sweep each takes the preset's values for it.

    Args:
        preset: model, data and schedule.
        optimizers: a contender, with options of its own after a colon: galore, adamw:lr=0.01,
            lorapre-adamw:variant=paper,rank=16,scale=0.05/0.1. May be repeated.
        sweep: values to try, such as lr=0.005,0.01 or scale=0.1,0.2,0.4 or beta2=0.95,0.999. May
            be repeated.
        seeds: how many for the best values of each.
        extend: go on so many times where the best lr or scale lies at the edge of the sweep.
        jobs: runs at a time, each with its share of the cores. Default: one on each core.
        out: folder of the comparison, new or empty. Default: runs/compare-PRESET-TIME.
        resume: the folder of a comparison to go on with. It holds all other options but jobs and
            record.
        record: a JSON file that takes a row of every run, beside those that it has.
        tables: run nothing; make the tables and pictures of such a file, in --out or beside it.
        changes: the other options.
    """
    from lorapre_recipes.compare.tables import write_tables

    decided = bool(changes or optimizers or sweep)
    if tables is not None:
        if decided or resume or record:
            ended = "makes tables of runs that have ended"
            raise UserError(f"--tables: {ended}; leave out all but --out")
        write_tables(tables, out or tables.parent)
        return 0
    for name, count in (("seeds", seeds), ("jobs", jobs)):
        if count is not None and count < 1:
            raise UserError(f"--{name}: must be at least 1, not {count}")
    if resume is not None:
        if decided or out is not None:
            began = "a comparison goes on as it began"
            raise UserError(f"--resume: {began}; leave out all but --jobs, --record")
        folder, comparison = resume, Comparison.load(resume)
    else:
        folder = new_folder(out, f"compare-{preset}")
        comparison = Comparison(
            preset=preset,
            contenders=optimizers or ("adamw", "lorapre-adamw", "muon", "lorapre-muon"),
            grid=read_sweep(sweep or ()),
            seeds=seeds,
            extend=extend,
            changes=changes | settled(changes),
        )
    from lorapre_recipes.compare.compare import compare as recipe

    files = [folder / "runs.json", *([record] if record else [])]
    try:
        recipe(comparison, folder, jobs=jobs or os.cpu_count() or 1, files=files)
    except KeyboardInterrupt:
        again = f"lorapre compare --resume {shlex.quote(str(folder))}"
        print(f"\nlorapre compare: interrupted; go on with: {again}", file=sys.stderr)
        return 130
    write_tables(folder / "runs.json", folder)
    return 0
