"""`lorapre report`."""

from __future__ import annotations

from pathlib import Path

from lorapre_recipes.config import UserError


def report(*runs: Path, out: Path | None = None) -> None:
    """Make the table and the pictures of comparisons or of runs anew, from their folders.

    Args:
        runs: folders of `lorapre compare` or `lorapre pretrain`.
        out: where report.md, report.html and the pictures go. Default: the first of the folders.
    """
    if not runs:
        raise UserError("RUNS: give the folder of a comparison or of a run")
    from lorapre_recipes.compare.study import write_report

    write_report(runs, out or runs[0])
