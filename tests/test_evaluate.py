"""`lorapre evaluate`: scores of answers that are known, the loss of answers, and what mistakes get."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import peak_bytes
from lm_eval.api.model import LM
from transformers import LlamaConfig, LlamaForCausalLM

from lorapre_recipes.config import EvaluateConfig, UserError
from lorapre_recipes.data.examples import Example, encode
from lorapre_recipes.data.tokens import for_transformers, train_tokenizer
from lorapre_recipes.evaluate import answer_loss, evaluate, score, trained_template
from lorapre_recipes.train.finetune import collator
from lorapre_recipes.train.runs import MERGED

ROWS = [
    {"question": f"Ann has {n} apples and buys {m}. How many has she?", "answer": f"{n} + {m}\n#### {n + m}"}
    for n, m in ((3, 4), (10, 2), (7, 7), (500, 500), (2, 6))
]
MATH = [
    {"problem": "What is $1/2 + 1/4$?", "solution": r"It is $\boxed{\frac{3}{4}}$.", "level": 1},
    {"problem": "Expand $(x + 1)^2$.", "solution": r"That is $\boxed{x^2 + 2x + 1}$.", "level": 2},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    return write(tmp_path / "test.jsonl", ROWS)


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    return save(build(), tmp_path / "model")


def build(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**(shape | changes)))


def tokenizer() -> Any:
    return for_transformers(train_tokenizer([str(row) for row in ROWS], 320), 256)


def save(model: LlamaForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


class Says(LM):
    """Gives answers in turn, and keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        super().__init__()
        self.answers, self.asked = answers, []

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked = [request.args for request in requests]
        return [self.answers[i % len(self.answers)] for i in range(len(requests))]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError


# Scores


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("3 + 4\n#### 7", 1, 1),
        ("They are $7.", 0, 1),
        ("#### 7.0", 0, 0),
        ("#### 8\n", 0, 0),
        ("Many.", 0, 0),
    ],
)
def test_gsm8k_scores_are_lm_evals(answer: str, strict: float, flexible: float) -> None:
    examples = [Example(**ROWS[0])] * 3
    metrics, errors, texts = score(Says(answer), "gsm8k", examples, 32)
    assert metrics == {"exact match, strict-match": strict, "exact match, flexible-extract": flexible}
    assert errors == dict.fromkeys(metrics, 0)
    assert texts == [answer] * 3


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        ([r"So it is $\boxed{0.75}$.", r"$\boxed{1 + 2x + x^2}$"], 1.0),
        ([r"$\boxed{\frac{3}{5}}$", r"$\boxed{x^2 + 2x + 1}$"], 0.5),
        (["I do not know."], 0.0),
    ],
)
def test_math_500_scores_are_lm_evals(answers: list[str], right: float) -> None:
    examples = [Example(row["problem"], row["solution"]) for row in MATH]
    metrics, _, _ = score(Says(*answers), "math-500", examples, 32)
    assert metrics["math verify"] == right


def test_the_prompt_is_that_of_fine_tuning() -> None:
    for task in ("gsm8k", "math-500"):
        model = Says("#### 1")
        examples = [Example("Why {{so}}?\n\nSay.", "\\boxed{1} #### 1"), Example("And?", "\\boxed{1} #### 1")]
        score(model, task, examples, 17)
        assert [prompt for prompt, _ in model.asked] == [example.prompt for example in examples]
        options = model.asked[0][1]
        assert options["max_gen_toks"] == 17
        assert options["until"] == ["Question:"]
        assert not options["do_sample"]


def test_the_template_is_that_of_the_training(tmp_path: Path) -> None:
    assert trained_template(str(tmp_path)) == "question"
    (tmp_path / "config.json").write_text('{"template": "instruction"}')
    assert trained_template(str(tmp_path)) == "instruction"
    model = Says("#### 1")
    score(model, "gsm8k", [Example("Why {}?", "#### 1")], 17, "instruction")
    ((prompt, options),) = model.asked
    assert prompt.endswith("### Instruction:\nWhy {}?\n\n### Response:\n")
    assert options["until"] == ["### Instruction:"]


def test_sampling_is_transformers() -> None:
    model = Says("#### 1")
    score(model, "gsm8k", [Example("Why?", "#### 1")], 17, temperature=0.8, top_p=0.95)
    ((_, options),) = model.asked
    assert {"do_sample": True, "temperature": 0.8, "top_p": 0.95}.items() <= options.items()


# Whole evaluations


def test_a_model_that_knows_the_answers(gsm8k: Path, tmp_path: Path, lorapre: Any) -> None:
    model, encoder = build(hidden_size=64, intermediate_size=128), tokenizer()
    encoder.pad_token = encoder.eos_token
    batch = collator(encoder, packing=False)([encode(Example(**row), encoder) for row in ROWS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = save(model, tmp_path / "model")
    code, stdout, _ = lorapre("evaluate", folder, "--data", gsm8k, "--batch-size", "2")
    assert code == 0
    assert max(map(len, stdout.partition("Written to")[0].splitlines())) <= 80
    result = json.loads((folder / "evaluation-gsm8k.json").read_text())
    assert result["metrics"] == {"exact match, strict-match": 1, "exact match, flexible-extract": 1}
    assert "100.0%" in stdout
    assert [row["generated"].strip() for row in result["generations"]] == [row["answer"] for row in ROWS]
    assert result["answer_loss"] < 0.5
    assert not list(folder.glob("*.partial"))


def test_an_untrained_model(untrained: Path, gsm8k: Path, lorapre: Any, tmp_path: Path) -> None:
    code, stdout, _ = lorapre(
        *("evaluate", untrained, "--data", gsm8k, "--limit", "1", "--out", tmp_path / "out.json"),
        *("--max-new-tokens", "5"),
    )
    assert code == 0
    assert "0.0%" in stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["metrics"] == {"exact match, strict-match": 0, "exact match, flexible-extract": 0}
    assert result["examples"] == len(result["generations"]) == 1
    assert result["errors"] == {}  # of one example
    assert len(result["generations"][0]["generated"]) <= 5 * 20  # a token has few characters
    assert not (untrained / "evaluation-gsm8k.json").exists()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answer_loss_is_the_mean_over_answer_tokens(batch_size: int, untrained: Path, gsm8k: Path) -> None:
    result = evaluate(
        EvaluateConfig(model=str(untrained), data=str(gsm8k), batch_size=batch_size, max_new_tokens=2)
    )
    model, total, count = build(), 0.0, 0
    for row in ROWS:
        ids, labels = encode(Example(**row), tokenizer()).values()
        losses = torch.nn.functional.cross_entropy(
            model(torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:]), reduction="none"
        )
        total, count = total + losses.sum().item(), count + sum(label != -100 for label in labels)
    assert result["answer_tokens"] == count
    assert result["answer_loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_answer_loss_makes_no_logits_of_the_batch() -> None:
    """A batch of questions has few tokens; times a vocabulary of 50,000 they took gigabytes."""
    model, reader = build(vocab_size=8000), tokenizer()
    reader.pad_token = reader.eos_token
    rows = [{"input_ids": list(range(1, 129)), "labels": list(range(1, 129))}] * 16

    def loss() -> None:
        assert answer_loss(model, reader, rows, 16, 256)["answer_tokens"] == 16 * 127

    assert peak_bytes(loss) < 4 * 16 * 128 * 8000 / 2


def test_batches_change_no_answer(untrained: Path, gsm8k: Path) -> None:
    results = [
        evaluate(EvaluateConfig(model=str(untrained), data=str(gsm8k), batch_size=size, max_new_tokens=12))
        for size in (1, 5)
    ]
    assert results[0]["generations"] == results[1]["generations"]


def test_the_weights_take_the_dtype_that_is_asked_for(untrained: Path, gsm8k: Path) -> None:
    options: dict[str, Any] = dict(model=str(untrained), data=str(gsm8k), max_new_tokens=2)
    stored, rounded = (evaluate(EvaluateConfig(**options, dtype=dtype)) for dtype in (None, "bf16"))
    assert (stored["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert rounded["answer_loss"] != stored["answer_loss"] == pytest.approx(rounded["answer_loss"], rel=0.02)


def test_sampled_answers_depend_on_the_seed(untrained: Path, gsm8k: Path) -> None:
    options: dict[str, Any] = dict(model=str(untrained), data=str(gsm8k), max_new_tokens=12)
    first, again, other = (
        evaluate(EvaluateConfig(**options, temperature=0.8, top_p=0.95, seed=seed)) for seed in (0, 0, 1)
    )
    assert first["generations"] == again["generations"] != other["generations"]
    assert first["answer_loss"] == other["answer_loss"]
    with pytest.raises(UserError, match=r"--top-p: answers are greedy; give --temperature too"):
        evaluate(EvaluateConfig(**options, top_p=0.95))


def test_math_500(untrained: Path, tmp_path: Path, lorapre: Any) -> None:
    file = write(tmp_path / "math.jsonl", MATH)
    code, _, _ = lorapre("evaluate", untrained, "--task", "math-500", "--data", file, "--max-new-tokens", "4")
    assert code == 0
    result = json.loads((untrained / "evaluation-math-500.json").read_text())
    assert result["metrics"] == {"exact match": 0, "math verify": 0}


def test_a_run_folder_stands_for_its_model(untrained: Path, gsm8k: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "data.json").write_text("{}")
    untrained.rename(run / MERGED)
    result = evaluate(EvaluateConfig(model=str(run), data=str(gsm8k), max_new_tokens=2))
    assert (run / "evaluation-gsm8k.json").is_file()
    assert result["model"] == str(run)


def test_what_the_model_cannot_read_is_not_cut(tmp_path: Path, gsm8k: Path) -> None:
    longest = max(len(tokenizer()(Example(**row).prompt)["input_ids"]) for row in ROWS)
    whole = max(len(encode(Example(**row), tokenizer())["input_ids"]) for row in ROWS)
    folder = save(build(max_position_embeddings=whole - 1), tmp_path / "model")
    result = evaluate(EvaluateConfig(model=str(folder), data=str(gsm8k)))
    assert result["max_new_tokens"] == whole - 1 - longest
    assert 0 < result["too_long"] <= 5


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing/model"], "--model missing/model: no such folder, and not on the hub"),
        (["nope"], "--model nope: no such folder, and not on the hub"),
        (["a b"], "--model a b: no such folder, and not on the hub"),
        (["model", "--data", "none.jsonl"], "--data none.jsonl: no such file"),
        (["model", "--data", "empty.jsonl"], "--data empty.jsonl: there are no examples"),
        (["model", "--data", "fields.jsonl"], "fields.jsonl: line 2: needs the fields"),
        (["model", "--data", "unscored.jsonl"], "unscored.jsonl: answer 2 cannot be scored, for gsm8k it"),
        (["model", "--data", "test.jsonl", "--task", "math-500"], r"answer 1 cannot be scored, for math-500"),
        (["model", "--data", "test.jsonl", "--task", "mmlu"], "--task"),
        (["model", "--data", "test.jsonl", "--limit", "0"], "--limit: must be at least 1, not 0"),
        (["model", "--data", "test.jsonl", "--batch-size", "0"], "--batch-size: must be at least 1"),
        (
            ["model", "--data", "test.jsonl", "--max-new-tokens", "250"],
            "--max-new-tokens 250: the model reads",
        ),
        (["model", "--data", "long.jsonl"], "--data: its longest question has"),
        (["model", "--data", "test.jsonl", "--out", "none/there.json"], "--out none/there.json: no file can"),
        (["model"], "--data openai/gsm8k:main: no such file here, nor a dataset"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    untrained: Path,
    gsm8k: Path,
    lorapre: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "fields.jsonl", [ROWS[0], {"question": "?"}])
    write(tmp_path / "unscored.jsonl", [ROWS[0], {"question": "?", "answer": "3"}])
    write(tmp_path / "long.jsonl", [{"question": "? " * 300, "answer": "#### 3"}])
    before = sorted(tmp_path.rglob("*"))
    if arguments[0] != "model":
        arguments = [*arguments, "--data", "test.jsonl"]
    code, stdout, stderr = lorapre("evaluate", *arguments)
    assert code == 2
    assert stdout == ""
    (line,) = (line for line in stderr.splitlines() if line.startswith("lorapre: "))
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_model_is_found_before_anything_slow(tmp_path: Path) -> None:
    command = "import sys; from lorapre_recipes.cli import main; code = main(); print(sorted(sys.modules)); "
    result = subprocess.run(
        [sys.executable, "-c", command + "sys.exit(code)", "evaluate", "nope"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("lorapre: --model nope: no such folder, and not on the hub (")
    assert not {"torch", "transformers", "lm_eval", "datasets"} & {*ast.literal_eval(result.stdout)}
