"""From `--data` to examples to fine-tune on: read, hold out, put in a template, tokenize."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets  # type: ignore[import-untyped]
import numpy as np
from transformers import PreTrainedTokenizerFast

from lorapre_recipes.config import FinetuneConfig, Template, UserError
from lorapre_recipes.data.corpus import JSONL_SUFFIX, hash_documents, load_split, read_lines

MADE = "arithmetic"  # what `--data` calls the problems of `lorapre arithmetic`, made on the spot
IGNORED = -100  # a label that the loss leaves out
# MetaMathQA's, GSM8K's and MATH's
FIELDS = (("query", "response"), ("question", "answer"), ("problem", "solution"))

T = TypeVar("T")


class Wording(NamedTuple):
    """What stands around a question."""

    prompt: str  # with {} in its place
    stop: str  # what a model that goes on after its answer would say next


TEMPLATES: dict[Template, Wording] = {
    "question": Wording("Question: {}\nAnswer:", "Question:"),  # of lm-eval's gsm8k task
    "instruction": Wording(  # of Alpaca
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{}\n\n### Response:\n",
        "### Instruction:",
    ),
}


class Example(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """What the model is given where no template is named."""
        return self.asked("question")

    def asked(self, template: Template) -> str:
        """What the model is given."""
        return TEMPLATES[template].prompt.format(self.question)

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
    """Read, take the first `samples` that are wanted, tokenize, hold out. Raises UserError.

    Examples with too many tokens are left out, and their number is printed.
    """
    most, option = config.sequence_length, "--sequence-length"
    if config.fewer_than is not None and config.fewer_than <= most:
        most, option = config.fewer_than - 1, "--fewer-than"
    examples, rows, left_out = list[Example](), list[dict[str, list[int]]](), 0
    for example in read_examples(config.data, only=config.only):
        row = encode(example, tokenizer, config.template)
        if len(row["input_ids"]) > most:
            left_out += 1
            continue
        examples.append(example)
        rows.append(row)
        if len(rows) == config.samples:
            break
    if left_out:
        count = f"{left_out:,} of {left_out + len(rows):,} examples have more"
        print(f"lorapre: {count} than {most} tokens ({option}) and are left out", file=sys.stderr)
    every, step = config.held_out_every, config.sequences_per_step
    train = [row for number, row in enumerate(rows, start=1) if number % every]
    validation = [row for number, row in enumerate(rows, start=1) if number % every == 0]
    if len(train) < step or not validation:
        few = f"{len(train)} to train on where one step takes {step}"
        few += f" (with {config.only!r} in their field type, --only)" if config.only else ""
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


def encode(
    example: Example, tokenizer: PreTrainedTokenizerFast, template: Template = "question"
) -> dict[str, list[int]]:
    """Prompt, completion and end token as `input_ids`; as `labels` with IGNORED over the prompt.

    All is tokenized at once. A token with any character of the completion belongs to the answer.
    """
    prompt = example.asked(template)
    encoding = tokenizer(prompt + example.completion, return_offsets_mapping=True)
    tokens, offsets = encoding["input_ids"], encoding["offset_mapping"]
    labels = list(tokens)
    for number, (_, end) in enumerate(offsets):
        if end <= len(prompt):
            labels[number] = IGNORED
    if tokens[-1] != tokenizer.eos_token_id:  # some tokenizers add it
        tokens, labels = [*tokens, tokenizer.eos_token_id], [*labels, IGNORED]
    labels[-1] = tokenizer.eos_token_id
    return {"input_ids": tokens, "labels": labels}


def read_examples(data: str, split: str = "train", only: str | None = None) -> Iterator[Example]:
    """The examples of a JSONL file or of a split of a dataset on the hub. Raises UserError.

    With `only`, those that have it in their field `type`.
    """
    for place, row in read_rows(data, split):
        example = example_of(row, f"--data {data}: {place}")
        if only is None or only in str(row.get("type")):
            yield example


def read_rows(data: str, split: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file or dataset, and where each stands. Raises UserError."""
    path = Path(data).expanduser()
    if path.is_file():
        if path.suffix != JSONL_SUFFIX:
            raise UserError(f"--data {path}: must be a file of JSON lines, *{JSONL_SUFFIX}")
        yield from read_lines(path)
    elif data == MADE and not path.exists():
        from lorapre_recipes.data.arithmetic import made  # which imports this module

        yield from ((f"problem {i}", each._asdict()) for i, each in enumerate(made(split), start=1))
    else:
        for number, row in enumerate(load_split(data, split), start=1):
            yield f"row {number}", row


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
