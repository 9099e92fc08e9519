"""The arithmetic task: right answers, disjoint files, the same for the same seed."""

import json
import random
import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorapre_recipes import cli
from lorapre_recipes.config import ArithmeticConfig
from lorapre_recipes.data.arithmetic import LARGEST, make_equations, make_problem, write_task
from lorapre_recipes.data.examples import read_examples

EQUATION = re.compile(r"(\d+)([+*-])(\d+)=(\d+)")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def holds(equation: str) -> bool:
    match = EQUATION.fullmatch(equation)
    assert match is not None, equation
    left, sign, right, result = match.groups()
    left, right, result = int(left), int(right), int(result)
    return {"+": left + right, "-": left - right, "*": left * right}[sign] == result


def test_answers_are_worked_out_from_the_numbers_of_the_question() -> None:
    drawn = random.Random(0)
    lengths = set()
    for _ in range(500):
        problem = make_problem(drawn)
        *lines, last = problem.answer.split("\n")
        things = problem.question.split()[3].rstrip(".")
        equations = [line.removesuffix(f" {things}") for line in lines]
        assert all(map(holds, equations)), problem
        assert last == f"#### {equations[-1].partition('=')[2]}"
        # Every number of the question is used, and none that is not there or worked out before.
        known = set(re.findall(r"\d+", problem.question)) | {"2"}  # to double
        used: set[str] = set()
        for equation in equations:
            left, _, right, result = EQUATION.fullmatch(equation).groups()  # type: ignore[union-attr]
            assert {left, right} <= known
            used |= {left, right}
            known.add(result)
            assert 0 < int(result) <= LARGEST
        assert set(re.findall(r"\d+", problem.question)) <= used
        lengths.add(len(equations))
    assert lengths >= {1, 2, 3, 4}


def test_problems_made_on_the_spot_are_those_of_the_files(tmp_path: Path) -> None:
    sizes = ArithmeticConfig(train=20_000, test=500, text=1)
    write_task(tmp_path / "task", sizes)
    for split in ("train", "test"):
        assert [row._asdict() for row in read_examples("arithmetic", split)] == read(
            tmp_path / "task" / f"{split}.jsonl"
        )


def test_equations_hold() -> None:
    assert all(map(holds, islice(make_equations(random.Random(0)), 500)))


def test_files_share_no_question_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_task(tmp_path / name, ArithmeticConfig(train=300, test=50, text=40, seed=seed))
    files = ("train.jsonl", "test.jsonl", "text.jsonl", "tokenizer/tokenizer.json")
    a, b, c = ([(tmp_path / name / file).read_text() for file in files] for name in "abc")
    assert a == b
    assert all(x != y for x, y in zip(a[:3], c[:3], strict=True))

    train, test, text = (read(tmp_path / "a" / file) for file in files[:3])
    assert (len(train), len(test), len(text)) == (300, 50, 40)
    questions = [row["question"] for row in train + test]
    stories = [line for row in text for line in row["text"].split("\n") if "?" in line]
    assert len({*questions, *stories}) == len(questions) + len(stories)
    assert "####" not in a[2]  # no answers to learn the task from before

    write_task(tmp_path / "d", ArithmeticConfig(train=1, test=50, text=1, seed=0))
    assert read(tmp_path / "d" / "test.jsonl") == test


def test_digits_are_tokens(tmp_path: Path) -> None:
    write_task(tmp_path / "task", ArithmeticConfig(train=50, test=1, text=20, seed=0))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "task" / "tokenizer")
    text = "14+15=29 plums\n#### 29"
    tokens = tokenizer.tokenize(text)
    assert [token for token in tokens if any(map(str.isdecimal, token))] == [*"14152929"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lorapre", "arithmetic", *map(str, arguments)])
    return cli.main()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = tmp_path / "task"
    sizes = ("--train", 30, "--test", 4, "--text", 6)
    assert run(monkeypatch, out, *sizes) == 0
    assert len(read(out / "test.jsonl")) == 4
    capsys.readouterr()
    for arguments, message in {
        (out, *sizes): f"OUT {out}: this folder is not empty",
        (out / "test.jsonl" / "x",): "this folder cannot be made",
        (tmp_path / "new", "--train", 0): "--train: must be at least 1",
    }.items():
        assert run(monkeypatch, *arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert message in printed.err
    assert not (tmp_path / "new").exists()
