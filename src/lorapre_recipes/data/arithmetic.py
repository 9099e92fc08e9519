"""Arithmetic reasoning, small enough for a model of a million parameters: `lorapre arithmetic`.

A problem is a story about a number of things that grows, shrinks and multiplies, and a question.
Its answer works it out, one equation a line, and ends as GSM8K's do:

    Tom has 3 shells. Tom doubles the number of shells. Tom fills 5 boxes with 8 new shells each.
    How many shells does Tom have now?

    2*3=6 shells
    5*8=40 shells
    6+40=46 shells
    #### 46

The text to pre-train on has stories and questions of the same kind, followed by their numbers but
not by an answer. It also has equations without stories, each going on from the last. A model that
has read it knows the words and how to calculate, but not how to answer a question.
"""

import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path

from lorapre_recipes.config import ArithmeticConfig, UserError, user_errors
from lorapre_recipes.data.examples import Example
from lorapre_recipes.data.tokens import for_transformers, train_tokenizer
from lorapre_recipes.files import write_lines

DEFAULT = ArithmeticConfig()
LARGEST = 60  # of any number in a problem
VOCABULARY = 384  # tokens: bytes, and the words of the task
STEPS = (1, 3)  # what happens in a story, at least and at most
EQUATIONS, STORIES = 24, 3  # in a document

NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
THINGS = ("apples", "books", "cards", "coins", "eggs", "plums", "shells", "stamps")

GAINS = (
    "{name} buys {n} {things}.",
    "{name} finds {n} {things}.",
    "{name} gets {n} {things} from {other}.",
)
LOSSES = (
    "{name} sells {n} {things}.",
    "{name} loses {n} {things}.",
    "{name} gives {n} {things} to {other}.",
)
BAGS = (
    "{name} buys {k} bags of {n} {things}.",
    "{name} fills {k} boxes with {n} new {things} each.",
)
DOUBLES = ("{other} gives {name} as many {things} again.", "{name} doubles the number of {things}.")


def make_problem(random: random.Random) -> Example:
    """One problem; every number on the way is between 1 and `LARGEST`."""
    name, other = random.sample(NAMES, 2)
    things = random.choice(THINGS)
    count = random.randint(2, LARGEST // 2)
    story, steps = [f"{name} has {count} {things}."], []
    for _ in range(random.randint(*STEPS)):
        event, lines, count = make_event(count, random)
        steps += [f"{line} {things}" for line in lines]
        story.append(event.format(name=name, other=other, things=things))
    story.append(f"How many {things} does {name} have now?")
    return Example(" ".join(story), "\n".join([*steps, f"#### {count}"]))


def make_event(count: int, random: random.Random) -> tuple[str, list[str], int]:
    """Something that can happen to so many things: a sentence to fill in, equations, new count."""
    kinds = {"gain": count < LARGEST, "loss": count > 1}
    kinds |= {"bags": count + 4 <= LARGEST, "double": 2 * count <= LARGEST}
    kind = random.choice([kind for kind, possible in kinds.items() if possible])
    if kind == "double":
        return random.choice(DOUBLES), [f"2*{count}={2 * count}"], 2 * count
    k, lines = 0, []
    if kind == "gain":
        n = random.randint(1, LARGEST - count)
        sentence, change, sign = random.choice(GAINS), n, "+"
    elif kind == "loss":
        n = random.randint(1, count - 1)
        sentence, change, sign = random.choice(LOSSES), -n, "-"
    else:
        fitting = [(k, n) for k in range(2, 10) for n in range(2, 10) if count + k * n <= LARGEST]
        k, n = random.choice(fitting)
        sentence, change, sign, lines = random.choice(BAGS), k * n, "+", [f"{k}*{n}={k * n}"]
    lines.append(f"{count}{sign}{abs(change)}={count + change}")
    return sentence.replace("{n}", str(n)).replace("{k}", str(k)), lines, count + change


def make_equations(random: random.Random) -> Iterator[str]:
    """Equations as in answers, without end, now and then from a new number on."""
    while True:
        count = random.randint(2, LARGEST // 2)
        for _ in range(random.randint(*STEPS)):
            _, lines, count = make_event(count, random)
            yield from lines


def problems(random: random.Random, seen: set[str]) -> Iterator[Example]:
    """Problems whose questions are not in `seen`, without end; it takes up each."""
    while True:
        problem = make_problem(random)
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def texts(random: random.Random, seen: set[str]) -> Iterator[str]:
    """Documents to pre-train on, without end: by turns equations, and stories with numbers."""
    stories, equations = problems(random, seen), make_equations(random)
    while True:
        yield "\n".join(itertools.islice(equations, EQUATIONS))
        page = []
        for problem in itertools.islice(stories, STORIES):
            page += [problem.question, " ".join(re.findall("[0-9]+", problem.question))]
        yield "\n".join(page)


def made(
    split: str, sizes: ArithmeticConfig = DEFAULT, seen: set[str] | None = None
) -> list[Example]:
    """The problems of "test" or "train"; those of `seen` are in neither, and it takes up these."""
    seen = set() if seen is None else seen
    if split == "train" and not seen:
        made("test", sizes, seen)
    count = {"test": sizes.test, "train": sizes.train}[split]
    return list(itertools.islice(problems(random.Random(f"{sizes.seed} {split}"), seen), count))


def write_task(out: Path, sizes: ArithmeticConfig) -> None:
    """Write train.jsonl, test.jsonl and text.jsonl, which share no question, and a tokenizer.

    The problems of the test are the same whatever the other sizes are. Every digit is a token of
    its own. Raises UserError.
    """
    with user_errors(f"OUT {out}: this folder cannot be made", OSError):
        out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise UserError(f"OUT {out}: this folder is not empty; give a new one")
    seen: set[str] = set()
    held_out, trained = (made(split, sizes, seen) for split in ("test", "train"))
    pages = list(itertools.islice(texts(random.Random(f"{sizes.seed} text"), seen), sizes.text))
    write_lines(out / "test.jsonl", [problem._asdict() for problem in held_out])
    write_lines(out / "train.jsonl", [problem._asdict() for problem in trained])
    write_lines(out / "text.jsonl", [{"text": page} for page in pages])
    documents = [*pages, *(problem.prompt + problem.completion for problem in trained)]
    tokenizer = train_tokenizer(documents, VOCABULARY, digits=True)
    for_transformers(tokenizer).save_pretrained(out / "tokenizer")
