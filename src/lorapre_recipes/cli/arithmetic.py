"""`lorapre arithmetic`."""

from __future__ import annotations

from pathlib import Path


def arithmetic(
    out: Path, /, *, train: int = 20_000, test: int = 500, text: int = 20_000, seed: int = 0
) -> None:
    """Write a small arithmetic reasoning task: stories with a question, and answers worked out line by line.

    For models of a million parameters, which can be trained from nothing on a CPU: see docs/finetuning.md.
    The folder then holds train.jsonl and test.jsonl with GSM8K's fields, text.jsonl and a tokenizer to
    pre-train with, where stories have no answers.

    Args:
        out: a folder, new or empty.
        train: problems to fine-tune on.
        test: problems to evaluate on, none of them in the other files.
        text: documents to pre-train on.
        seed: of all that is drawn.
    """
    from lorapre_recipes.data.arithmetic import write_task

    write_task(out, train=train, test=test, text=text, seed=seed)
    print(f"{train:,} problems to train on, {test:,} to test, {text:,} documents to pre-train on: {out}")
