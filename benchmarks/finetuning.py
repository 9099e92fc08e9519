"""Fine-tuning by each method on equal terms: the arithmetic task, and the answers of real GSM8K text.

    OMP_NUM_THREADS=1 python benchmarks/finetuning.py OUT --gsm8k train.jsonl

A Llama of 0.9 million parameters is pre-trained once. Each method then takes the same number of steps from
it, with three learning rates on the first seed, and with the best of them on the others. Every run is one
line of OUT/results.jsonl; what is there already is not run again.

    python benchmarks/finetuning.py OUT --real train.jsonl --seeds 2 --test 200

compares on a pretrained model and GSM8K's problems: see benchmarks/real_model.py.
"""

import contextlib
import io
import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from cyclopts import App
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorapre_recipes.config import ArithmeticConfig, PretrainConfig
from lorapre_recipes.console import quieten
from lorapre_recipes.data.arithmetic import write_task
from lorapre_recipes.data.examples import Example, read_examples
from lorapre_recipes.presets import arithmetic, llama_arithmetic
from lorapre_recipes.train.finetune import finetune
from lorapre_recipes.train.pretrain import pretrain
from lorapre_recipes.train.runs import checkpoint_step, last_checkpoint, load_run, model_folder

TASK, BASE, RESULTS = "arithmetic", "llama-arithmetic", "results.jsonl"
ANSWER = re.compile(r"#### (-?[0-9.,]+)")  # as in lm-eval's gsm8k task
NEW_TOKENS = 80

# The ends of the model low rank or frozen: the state is then at most LoRA's state and adapters. All have the
# betas of the preset, LoRA also those that are usual for it.
ENDS = "embed_tokens|lm_head"
Row = dict[str, Any]
CONTENDERS: dict[str, Row] = {
    "lorapre-adamw": {"method": "lorapre-adamw", "rules": (f"{ENDS}=8",), "lrs": (1e-3, 3e-3, 5e-3, 1e-2)},
    "lora": {"method": "lora", "lrs": (5e-3, 1e-2, 2e-2)},
    "lora, beta2 0.999": {"method": "lora", "betas": (0.9, 0.999), "lrs": (5e-3, 1e-2, 2e-2)},
    "lorapre-adamw, ends frozen": {"method": "lorapre-adamw", "freeze": (ENDS,), "lrs": (3e-3, 5e-3, 1e-2)},
    "rslora": {"method": "rslora", "lrs": (1e-3, 3e-3, 1e-2, 2e-2)},
    "dora": {"method": "dora", "lrs": (3e-3, 1e-2, 3e-2)},
    "lora+": {"method": "lora+", "lrs": (1e-3, 3e-3, 1e-2)},
    "adamw": {"method": "adamw", "lrs": (3e-4, 1e-3, 3e-3, 1e-2)},
    "galore": {"method": "galore", "lrs": (1e-3, 3e-3, 1e-2, 2e-2, 5e-2)},
    # Whether 0.9 is too much momentum for runs this short, as it is in pre-training (docs/study.md).
    "lorapre-adamw, beta1 0.8": {
        "method": "lorapre-adamw",
        "rules": (f"{ENDS}=8",),
        "betas": (0.8, 0.95),
        "lrs": (1e-3, 3e-3, 5e-3),
    },
    "lorapre-adamw, beta1 0.6": {
        "method": "lorapre-adamw",
        "rules": (f"{ENDS}=8",),
        "betas": (0.6, 0.95),
        "lrs": (1e-3, 3e-3, 5e-3),
    },
    "adamw, beta1 0.8": {"method": "adamw", "betas": (0.8, 0.95), "lrs": (1e-3, 3e-3, 5e-3)},
    "adamw, beta1 0.6": {"method": "adamw", "betas": (0.6, 0.95), "lrs": (1e-3, 3e-3, 5e-3)},
}
ON_GSM8K = ("lorapre-adamw", "lora")

app = App(help=__doc__)


class Part(NamedTuple):
    """One of the experiments."""

    name: str
    data: Path
    contenders: Sequence[str]
    steps: int
    sequence_length: int
    tests: list[Example]  # problems to solve, at the end of each run


@app.default
def main(
    out: Path,
    /,
    *,
    gsm8k: Path | None = None,
    real: Path | None = None,
    model: str = "smollm2",
    tiny: bool = False,
    steps: int = 400,
    seeds: int = 3,
    test: int = 500,
    precision: Literal["fp32", "bf16"] = "fp32",
    only: str = "",
) -> None:
    """Run what is not in the results yet, and print the tables.

    Args:
        out: folder of the task, the pre-trained model and the results.
        gsm8k: GSM8K's train.jsonl, for the second part.
        real: GSM8K's train.jsonl, for a pretrained model in place of the two parts.
        model: with --real, what `lorapre finetune --model` takes.
        tiny: with --real, a random model of seconds instead, to try everything out.
        steps: of each run.
        seeds: how many.
        test: problems to solve.
        precision: with --real, of matrix products, and of the weights that answer.
        only: with --real, a regular expression: contenders with it in their names.
    """
    quieten()
    if real is not None:
        from real_model import compare  # which imports this module

        options: dict[str, Any] = {"steps": steps, "seeds": seeds, "test": test, "precision": precision}
        compare(out, real, model=model, only=only, tiny=tiny, **options)
        return
    base = prepare(out)
    tests = list(read_examples(str(out / TASK / "test.jsonl")))[:test]
    parts = [Part("arithmetic", out / TASK / "train.jsonl", list(CONTENDERS), steps, 160, tests)]
    if gsm8k is not None:
        parts.append(Part("gsm8k", gsm8k, ON_GSM8K, steps, 256, []))
    if not read(out, part="before"):
        write(out, {"part": "before", "exact_match": exact_match(base, tests)})
    # What the claims rest on comes first.
    for part, names in [(part, part.contenders[:2]) for part in parts] + [
        (parts[0], parts[0].contenders[2:])
    ]:
        for name in names:
            for lr in CONTENDERS[name]["lrs"]:
                run(out, part, name, lr, 0, base)
            for seed in range(1, seeds):
                run(out, part, name, best(out, part.name, name), seed, base)
        Console().print(table(out, part))
    for part in parts:
        Console().print(table(out, part))


def prepare(out: Path) -> str:
    """The folder of the pre-trained model, made at first use."""
    if not (out / TASK).is_dir():
        write_task(out / TASK, ArithmeticConfig(train=20_000, test=500, text=20_000, seed=0))
    run = out / BASE
    config = llama_arithmetic("adamw")
    config = config.replace(data=str(out / TASK / "text.jsonl"), tokenizer=str(out / TASK / "tokenizer"))
    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        shutil.rmtree(run, ignore_errors=True)
        pretrain(config, run)
    elif checkpoint_step(checkpoint) < config.steps:
        pretrain(load_run(run, PretrainConfig), run, resume=True)
    return model_folder(str(run))


def run(out: Path, part: Part, name: str, lr: float, seed: int, base: str) -> None:
    """One run, unless the results have it."""
    key = {"part": part.name, "name": name, "lr": lr, "seed": seed, "steps": part.steps}
    if read(out, **key):
        return
    options = {option: value for option, value in CONTENDERS[name].items() if option != "lrs"}
    config = arithmetic(options.pop("method")).replace(
        model=base,
        data=str(part.data),
        sequence_length=part.sequence_length,
        lr=lr,
        seed=seed,
        steps=part.steps,
        evaluations=1,
        **options,
    )
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        summary = finetune(config, folder)
    row = key | {
        "loss": summary.validation_loss,
        "state_bytes": summary.state_bytes,
        "adapter_bytes": summary.adapter_bytes,
        "tokens": summary.tokens,
        "cpu_seconds": round(time.process_time() - start, 1),
    }
    if part.tests:
        row["exact_match"] = exact_match(model_folder(str(folder)), part.tests)
    shutil.rmtree(folder)
    write(out, row)


def exact_match(folder: str, tests: list[Example]) -> float:
    """The share of problems whose last line has the right number, solved greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder)
    right = 0
    for start in range(0, len(tests), 100):
        batch = tests[start : start + 100]
        prompts = tokenizer([example.prompt for example in batch], padding=True, return_tensors="pt")
        prompts.pop("token_type_ids", None)
        tokens = model.generate(
            **prompts, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        for example, text in zip(batch, texts, strict=True):
            right += answer(text) == answer(example.answer)
    return right / len(tests)


def answer(text: str) -> str | None:
    """What stands behind ####, None where nothing does; None equals no answer that a problem has."""
    found = ANSWER.search(text)
    return found and found[1]


# Results


def read(out: Path, **key: Any) -> list[Row]:
    """The results that have these values."""
    file = out / RESULTS
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [row for row in rows if all(row.get(name) == value for name, value in key.items())]


def write(out: Path, row: Row) -> None:
    """Append a result, and show it."""
    with (out / RESULTS).open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def quality(row: Row) -> tuple[float, float]:
    """Larger is better: exact match, then loss."""
    return row.get("exact_match", 0.0), -row["loss"]


def best(out: Path, part: str, name: str) -> float:
    """The learning rate that did best on the first seed."""
    return float(max(read(out, part=part, name=name, seed=0), key=quality)["lr"])


def table(out: Path, part: Part) -> Table:
    """Mean and spread (half the range) over n seeds, at the best learning rate."""
    title, columns = f"{part.name}, {part.steps} steps", ["method", "lr", "n"]
    if part.tests:
        title += f"; exact match before: {read(out, part='before')[0]['exact_match']:.1%}"
        columns.append("match, %")
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    for number, column in enumerate([*columns, "answer loss", "state", "adapters"]):
        shown.add_column(column, justify="right" if number else "left", no_wrap=True)
    for name in part.contenders:
        if not read(out, part=part.name, name=name):
            continue
        lr = best(out, part.name, name)
        rows = read(out, part=part.name, name=name, lr=lr)
        cells = [name, f"{lr:g}", str(len(rows))]
        if part.tests:
            cells.append(spread([100 * row["exact_match"] for row in rows], ".1f"))
        cells.append(spread([row["loss"] for row in rows], ".3f"))
        cells += [f"{rows[0][size] / 1024:,.0f} K" for size in ("state_bytes", "adapter_bytes")]
        shown.add_row(*cells)
    return shown


def spread(values: Sequence[float], form: str) -> str:
    """Mean and half the range."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):{form}} ± {half:{form}}"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    app()
