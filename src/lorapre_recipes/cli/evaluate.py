"""`lorapre evaluate`."""

from __future__ import annotations

from pathlib import Path

from lorapre_recipes.cli.launch import quieten, sleepy_threads
from lorapre_recipes.config import TaskName


def evaluate(
    model: str,
    *,
    task: TaskName = "gsm8k",
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    out: Path | None = None,
) -> None:
    """Score a model's answers to questions in mathematics with lm-eval, and take the loss of the right ones.

    The prompt is that of `lorapre finetune`, without examples. Metrics are those of lm-eval's task, by the
    filter that finds the answer in the text.

    Args:
        model: a name on the Hugging Face hub, a folder, or a run folder of `lorapre pretrain` or `finetune`.
        task: gsm8k, or math-500, where math verify compares the results as mathematics, and exact match
            only counts answers in the words of its own examples.
        data: a JSONL file with the fields question and answer, query and response or problem and solution,
            or another dataset on the hub, instead of the task's own.
        limit: take the first of the examples only.
        batch_size: examples in a batch.
        max_new_tokens: length of an answer. Default: 512, or less if the model reads less.
        out: a JSON file. Default: evaluation-TASK.json in the model's folder.
    """
    sleepy_threads()
    from lorapre_recipes.evaluate import evaluate as recipe

    quieten()
    recipe(
        model,
        task,
        data=data,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        out=out,
    )
