"""Answer questions with a model and score the answers: `lorapre evaluate`.

Generation, extraction of the answer, and scoring are lm-eval's: its own task, whose questions,
prompt and length are replaced. The prompt is that of `lorapre finetune`, without examples.
"""

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval  # type: ignore[import-untyped]
import torch
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import set_seed

from lorapre_recipes.config import EvaluateConfig, TaskName, Template, UserError
from lorapre_recipes.console import duration
from lorapre_recipes.data.examples import IGNORED, TEMPLATES, Example, encode, read_examples
from lorapre_recipes.files import read_json, write_json, write_lines
from lorapre_recipes.train.finetune import collator, load_model, load_tokenizer
from lorapre_recipes.train.loss import ChunkedLoss
from lorapre_recipes.train.optim import DTYPES
from lorapre_recipes.train.runs import model_folder
from lorapre_recipes.train.session import describe_device, versions
from lorapre_recipes.train.summary import figures

MAX_NEW_TOKENS = 512


class Task(NamedTuple):
    """A benchmark: lm-eval's task, and what it takes the questions from."""

    data: str  # the dataset on the Hugging Face hub
    path: str  # of the task's file below lm_eval/tasks
    question: str  # the name that the task has for questions
    answer: str  # the name that it has for worked answers
    final: str  # where it finds the final answer; an answer without one would count as wrong
    wanted: str  # the same in words


GSM8K = Task(
    data="openai/gsm8k:main", path="gsm8k/gsm8k.yaml", question="question", answer="answer",
    final=r"#### \S+$", wanted="end in '#### ' and a number",
)  # fmt: skip
MATH_500 = Task(
    data="HuggingFaceH4/MATH-500", path="minerva_math/minerva_math500.yaml", question="problem",
    answer="solution", final=r"\\boxed", wanted=r"hold its result in '\boxed{}'",
)  # fmt: skip
TASKS: dict[TaskName, Task] = {"gsm8k": GSM8K, "math-500": MATH_500}


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a model's answers, take the loss of the right ones, print a table and write it as JSON.

    Raises UserError: no such model or data, answers that cannot be scored, or questions too long.
    """
    start = time.perf_counter()
    greedy = config.temperature is None
    if greedy and config.top_p < 1:
        raise UserError("--top-p: answers are greedy; give --temperature too")
    folder = model_folder(config.model)
    out = output_file(config)
    data = config.data or TASKS[config.task].data
    examples = task_examples(config.task, data, config.limit)
    tokenizer = load_tokenizer(config.model, folder)
    model = load_model(config.model, folder, DTYPES[config.dtype] if config.dtype else "auto")
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    model.eval()  # type: ignore[no-untyped-call]

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of options that are ours
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size)
    template = config.template or trained_template(config.model)
    longest = max(len(tokenizer(example.asked(template))["input_ids"]) for example in examples)
    max_new_tokens = answer_length(lm.max_length, longest, config.max_new_tokens)
    set_seed(config.seed)
    began = time.perf_counter()
    sampling = {} if greedy else {"temperature": config.temperature, "top_p": config.top_p}
    metrics, errors, texts = score(lm, config.task, examples, max_new_tokens, template, **sampling)
    answering = time.perf_counter() - began
    encoded = [encode(example, tokenizer, template) for example in examples]
    right = answer_loss(model, tokenizer, encoded, config.batch_size, lm.max_length)
    pairs = zip(examples, texts, strict=True)
    result = {
        "model": config.model,
        "task": config.task,
        "template": template,
        "data": data,
        "examples": len(examples),
        "metrics": metrics,
        "errors": errors,
        **right,
        "max_new_tokens": max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "seed": config.seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": config.batch_size,
        "answers_per_second": len(examples) / answering,
        "seconds": time.perf_counter() - start,
        "device": describe_device(model.device),
        "versions": versions("lm_eval", "torch", "transformers"),
        "generations": [example._asdict() | {"generated": text} for example, text in pairs],
    }
    write_json(out, result)
    console = Console()
    console.print(result_table(result))
    console.print(f"Written to {out}", soft_wrap=True)
    return result


def output_file(config: EvaluateConfig) -> Path:
    """evaluation-TASK.json in a local model's folder, or here. Raises UserError."""
    folder, name = Path(config.model).expanduser(), f"evaluation-{config.task}"
    default = Path(f"{name}-{config.model.replace('/', '--')}.json")
    out = config.out or (folder / f"{name}.json" if folder.is_dir() else default)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: no file can be written there")
    return out


def task_examples(task: TaskName, data: str, limit: int | None) -> list[Example]:
    """The examples, with answers that the task can score. Raises UserError."""
    examples = list(read_examples(data, split="test"))[:limit]
    if not examples:
        raise UserError(f"--data {data}: there are no examples")
    for number, example in enumerate(examples, start=1):
        if not re.search(TASKS[task].final, example.answer):
            wrong = f"cannot be scored, for {task} it must {TASKS[task].wanted}"
            raise UserError(f"--data {data}: answer {number} {wrong}")
    return examples


def trained_template(model: str) -> Template:
    """How the questions were put that a run folder's model was trained on."""
    file = Path(model).expanduser() / "config.json"
    config: dict[str, Template] = read_json(file) if file.is_file() else {}
    return config.get("template", "question")


def answer_length(reads: int, longest: int, wanted: int | None) -> int:
    """How many tokens an answer may have, so that no question is cut. Raises UserError.

    The model reads `reads` tokens, the longest question has `longest`; `wanted` is None for
    MAX_NEW_TOKENS, or what there is room for.
    """
    room = reads - longest
    if room < 1:
        has = f"its longest question has {longest} tokens, and the model reads {reads}"
        raise UserError(f"--data: {has}")
    if wanted is not None and wanted > room:
        has = f"the model reads {reads} tokens, and the longest question has {longest}"
        raise UserError(f"--max-new-tokens {wanted}: {has}; give at most {room}")
    return wanted or min(MAX_NEW_TOKENS, room)


def score(
    lm: lm_eval.api.model.LM,
    task: TaskName,
    examples: Sequence[Example],
    max_new_tokens: int,
    template: Template = "question",
    **sampling: float | None,
) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Let lm-eval generate and score. Returns metrics, their standard errors, and the texts.

    Examples and task go through files, as lm-eval takes them from users. Nothing is fetched.
    Answers are greedy where `sampling` names no options of transformers' generation.
    """
    names = TASKS[task]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "examples.jsonl"
        rows = [{names.question: each.question, names.answer: each.answer} for each in examples]
        write_lines(file, rows)
        absent = ("dataset_name", "training_split", "fewshot_split", "fewshot_config")
        changed = dict.fromkeys(absent) | {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / names.path),
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": folder},
            "num_fewshot": 0,
            "doc_to_text": Example(f"{{{{{names.question}}}}}", "").asked(template),
            "generation_kwargs": {
                "until": [TEMPLATES[template].stop],
                "do_sample": bool(sampling),
                "max_gen_toks": max_new_tokens,
                **sampling,
            },
        }
        config = Path(folder) / "task.yaml"
        config.write_text(json.dumps(changed), encoding="utf-8")  # which is YAML, too
        # Not simple_evaluate, which also lists every package of the machine.
        results = lm_eval.evaluate(lm, TaskManager(include_defaults=False).load([str(config)]))
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in results["results"][task].items():
        metric, comma, chosen = key.partition(",")
        name = metric.removesuffix("_stderr").replace("_", " ")
        name += "" if chosen == "none" else f", {chosen}"
        if comma and isinstance(value, int | float):  # an error may be "N/A"
            (errors if metric.endswith("_stderr") else metrics)[name] = float(value)
    texts = {sample["doc_id"]: sample["resps"][0][0] for sample in results["samples"][task]}
    return metrics, errors, [texts[number] for number in range(len(examples))]


@torch.no_grad()
def answer_loss(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], batch_size: int, reads: int
) -> dict[str, Any]:
    """The loss of the right answers, as `lorapre finetune` takes it.

    Returns:
        answer_loss: nats per token of answers and end tokens; None where no example fits.
        answer_tokens: how many these are.
        too_long: how many examples are left out because the model cannot read so much.
    """
    fitting = [row for row in rows if len(row["input_ids"]) <= reads]
    fitting.sort(key=lambda row: len(row["labels"]))
    collate = collator(tokenizer, packing=False)
    in_chunks = ChunkedLoss(model)
    total, count = 0.0, 0
    for first in tqdm(range(0, len(fitting), batch_size), desc="answer-token loss", leave=False):
        rows_of_batch = collate(fitting[first : first + batch_size])
        batch = {name: value.to(model.device) for name, value in rows_of_batch.items()}
        labels = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(in_chunks(partial(model, **batch)).loss) * labels
        count += labels
    loss = total / count if count else None
    return {"answer_loss": loss, "answer_tokens": count, "too_long": len(rows) - len(fitting)}


def result_table(result: dict[str, Any]) -> Table:
    """The table, at most 80 columns wide."""
    rows, errors = [], result["errors"]
    for name, value in result["metrics"].items():
        error = f"± {errors[name]:.1%} (standard error)" if name in errors else ""
        rows.append((name, f"{value:.1%}", error))
    if (loss := result["answer_loss"]) is not None:
        left_out = f", without {result['too_long']:,} too long" if result["too_long"] else ""
        rows.append(("answer-token loss", f"{loss:.4f}", f"nats{left_out}"))
    sampled = f"temperature {result['temperature']}, top-p {result['top_p']}"
    how = "greedy" if result["temperature"] is None else sampled
    rows.append(("length of an answer", f"{result['max_new_tokens']:,}", "new tokens at most"))
    rows.append(("answers", f"{result['answers_per_second']:.2f}", f"a second, {how}"))
    rows.append(("wall time", duration(result["seconds"]), result["device"]))
    return figures(f"{result['task']}, {result['examples']:,} examples", rows)
