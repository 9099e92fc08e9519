"""From `--data` to examples to fine-tune on: read, hold out, put in a template, tokenize."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets  # type: ignore[import-untyped]
import numpy as np
from transformers import PreTrainedTokenizerFast

from lorapre_recipes.config import FinetuneConfig, UserError
from lorapre_recipes.data.corpus import (
    JSONL_SUFFIX,
    from_hub,
    hash_documents,
    looks_like_hub_name,
    readable,
)

IGNORED = -100  # a label that the loss leaves out
# MetaMathQA's, GSM8K's and MATH's
FIELDS = (("query", "response"), ("question", "answer"), ("problem", "solution"))

T = TypeVar("T")


class Example(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """What the model is given: the prompt of lm-eval's gsm8k task."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def completion(self) -> str:
        """What it shall say, before the end token."""
        return f" {self.answer}"


class Examples(NamedTuple):
    """What the trainer needs: rows of `input_ids` and `labels`, with IGNORED where no answer is."""

    train: datasets.Dataset
    validation: datasets.Dataset
    facts: dict[str, Any]  # what must be the same when a run goes on


def load_examples(config: FinetuneConfig, tokenizer: PreTrainedTokenizerFast) -> Examples:
    """Read, take `samples` of them, hold out, and tokenize. Raises UserError.

    Examples with more than `sequence_length` tokens are left out, and their number is printed.
    """
    examples = list(read_examples(config.data))
    examples = spaced(examples, config.samples or len(examples))
    rows = [encode(example, tokenizer) for example in examples]
    rows = [row for row in rows if len(row["input_ids"]) <= config.sequence_length]
    if left_out := len(examples) - len(rows):
        count = f"{left_out:,} of {len(examples):,} examples have more"
        most = f"{config.sequence_length} tokens (--sequence-length)"
        print(f"lorapre: {count} than {most} and are left out", file=sys.stderr)
    every, step = config.held_out_every, config.sequences_per_step
    train = [row for number, row in enumerate(rows, start=1) if number % every]
    validation = [row for number, row in enumerate(rows, start=1) if number % every == 0]
    if len(train) < step or not validation:
        few = f"{len(train)} to train on where one step takes {step}"
        raise UserError(
            f"--data {config.data}: too few examples, {few}, and {len(validation)} held out"
        )
    train = train[: len(train) // step * step]  # whole steps
    validation = spaced(validation, config.evaluated(len(validation)))
    facts = {
        "sha256": hash_documents(text for example in examples for text in example),
        "train_examples": len(train),
        "validation_examples": len(validation),
    }
    make = datasets.Dataset.from_list
    return Examples(make(train), make(validation), facts)


def spaced(values: Sequence[T], count: int) -> list[T]:
    """`count` of the values, evenly spaced; all where there are no more."""
    if count >= len(values):
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, count).astype(int)]


def labels_per_batch(rows: datasets.Dataset, batch_size: int) -> float:
    """How many labels count in a batch, on average over the batches of an evaluation."""
    counted = sum(label != IGNORED for labels in rows["labels"] for label in labels)
    return float(counted / -(-len(rows) // batch_size))


def encode(example: Example, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """Prompt, completion and end token as `input_ids`; as `labels` with IGNORED over the prompt.

    All is tokenized at once. A token with any character of the completion belongs to the answer.
    """
    encoding = tokenizer(example.prompt + example.completion, return_offsets_mapping=True)
    tokens, offsets = encoding["input_ids"], encoding["offset_mapping"]
    labels = list(tokens)
    for number, (_, end) in enumerate(offsets):
        if end <= len(example.prompt):
            labels[number] = IGNORED
    if tokens[-1] != tokenizer.eos_token_id:  # some tokenizers add it
        tokens, labels = [*tokens, tokenizer.eos_token_id], [*labels, IGNORED]
    labels[-1] = tokenizer.eos_token_id
    return {"input_ids": tokens, "labels": labels}


def read_examples(data: str, split: str = "train") -> Iterator[Example]:
    """The examples of a JSONL file or of a split of a dataset on the hub. Raises UserError."""
    path = Path(data).expanduser()
    if path.is_file():
        yield from read_lines(path)
    elif looks_like_hub_name(data):
        name, _, subset = data.partition(":")
        with from_hub(data):
            rows = datasets.load_dataset(name, subset or None, split=split)
        for number, row in enumerate(rows, start=1):
            yield example_of(row, f"--data {data}: row {number}")
    else:
        hub = "a Hugging Face dataset (owner/name or owner/name:config, as openai/gsm8k:main)"
        wanted = f"give one of JSON lines, or the name of {hub}"
        raise UserError(f"--data {data}: no such file; {wanted}")


def read_lines(path: Path) -> Iterator[Example]:
    """The example of each line that is not empty. Raises UserError naming the line."""
    if path.suffix != JSONL_SUFFIX:
        raise UserError(f"--data {path}: must be a file of JSON lines, *{JSONL_SUFFIX}")
    with readable(path):
        text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() breaks at U+2028 too
        if line.strip():
            place = f"--data {path}: line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{place} is not JSON ({error.msg})") from error
            yield example_of(row, place)


def example_of(row: Any, place: str) -> Example:
    """The example in a row, under either pair of names. Raises UserError naming the place."""
    for names in FIELDS:
        if isinstance(row, dict) and all(isinstance(row.get(name), str) for name in names):
            question, answer = (row[name].strip() for name in names)
            if not (question and answer):
                raise UserError(f"{place}: the field {names[bool(question)]!r} is empty")
            return Example(question, answer)
    pairs = " or ".join(f"{first!r} and {second!r}" for first, second in FIELDS)
    raise UserError(f"{place}: needs the fields {pairs}, which hold strings")
