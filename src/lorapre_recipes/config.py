"""The complete, frozen configuration of a run, and the errors that are the user's to mend."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

if TYPE_CHECKING:
    from typing_extensions import Self

# LoRA-Pre, what it replaces, and the peers it stands beside in `lorapre compare`.
OptimizerName = Literal[
    "lorapre-adamw",
    "lorapre-muon",
    "adamw",
    "muon",
    "muon-no-momentum",
    "galore",
    "galore-muon",
    "fira",
    "apollo",
    "adam8bit",
    "adafactor",
    "sgd",
    "lora",
    "relora",
]
# Those whose memory `lorapre plan` computes without running them.
PlannedOptimizer = Literal["lorapre-adamw", "lorapre-muon", "adamw", "muon"]
# How to fine-tune: an optimizer of all weights, or adapters of peft.
Method = Literal["lorapre-adamw", "lorapre-muon", "adamw", "galore", "lora", "rslora", "dora", "lora+"]
Adapter = Literal["lora", "rslora", "dora", "lora+"]
Variant = Literal["paper", "calibrated", "subspace", "split"]
Compress = Literal["both", "first", "second"]
Precision = Literal["fp32", "bf16"]
TaskName = Literal["gsm8k", "math-500"]  # of `lorapre evaluate`

LOW_RANK: tuple[OptimizerName, ...] = ("lorapre-adamw", "lorapre-muon")
PROJECTED: tuple[OptimizerName, ...] = ("galore", "galore-muon", "fira", "apollo")
ADAPTERS: tuple[OptimizerName, ...] = ("lora", "relora")
# As in the library. Every config names its variant, so that a run says what it was.
DEFAULT_VARIANT: dict[OptimizerName, Variant] = {"lorapre-adamw": "split", "lorapre-muon": "calibrated"}

# The options that only some optimizers have. Elsewhere they are None: an option without effect is refused.
ONLY_FOR: dict[str, tuple[OptimizerName, ...]] = {
    "rank": (*LOW_RANK, *PROJECTED, *ADAPTERS),
    "variant": LOW_RANK,
    "compress": ("lorapre-adamw",),
    "refresh": (*PROJECTED, "relora"),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": get_args(OptimizerName),
    "variant": get_args(Variant),
    "compress": get_args(Compress),
    "precision": get_args(Precision),
    "dtype": get_args(Precision),
}


class UserError(ValueError):
    """A mistake of the user's. The message is one line: which argument, what is wrong, what is right."""


def write_whole(file: Path, text: str) -> None:
    """Write a file that nobody ever finds half written, should the process be killed."""
    new = file.with_name(file.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)


def flag(name: str) -> str:
    """The command-line spelling of a field: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the configs of all recipes have: optimizer, schedule, and how the run is kept.

    Two runs with equal configs have equal losses. Presets return one; the command line replaces single
    fields; the run folder keeps it as `config.json`.
    """

    AT_LEAST: ClassVar[dict[str, int]] = {
        "rank": 1,
        "refresh": 1,
        "sequence_length": 2,
        "steps": 1,
        "batch_size": 1,
        "accumulation": 1,
        "log_points": 1,
        "evaluations": 1,
        "checkpoints": 1,
        "seed": 0,
    }

    preset: str
    data: str
    sequence_length: int

    # Optimizer: attention and MLP matrices learn at `lr * scale`, everything else at `lr`, with dense AdamW.
    optimizer: OptimizerName
    lr: float
    scale: float
    rank: int | None
    variant: Variant | None
    compress: Compress | None
    refresh: int | None  # steps between two projections, or between two merges of relora
    betas: tuple[float, float]
    eps: float
    momentum: float
    weight_decay: float

    # Schedule: linear warm-up over `warmup` of the steps, then cosine down to `final_lr` of the peak.
    steps: int
    batch_size: int
    accumulation: int
    warmup: float
    final_lr: float

    # Run: how many times within it losses are logged, the model evaluated, a checkpoint written.
    log_points: int
    evaluations: int
    checkpoints: int
    precision: Precision
    report_to: tuple[str, ...]
    seed: int

    # Weights and state sharded over the processes (FSDP2), and checkpoints with them. Batches are those of
    # all processes together: how many there are does not change what is computed.
    fsdp: bool = False

    # Of weights and gradients, and so of what the optimizer writes back; factors are float32.
    dtype: Precision = "fp32"
    stochastic_rounding: bool = False

    # Update each weight in the backward pass and free its gradient (lorapre.gradient_release).
    release: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot run. Raises UserError naming the option."""
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UserError(f"{flag(name)}: there is no {value!r}; choose from {', '.join(choices)}")
        for name, optimizers in ONLY_FOR.items():
            value = getattr(self, name)
            if value is None and self.optimizer in optimizers:
                raise UserError(f"{flag(name)}: {self.method} needs a value")
            if value is not None and self.optimizer not in optimizers:
                raise UserError(
                    f"{flag(name)}: {self.method} has no such option; leave it out "
                    f"(those that have it: {', '.join(optimizers)})"
                )
        if self.stochastic_rounding and self.optimizer not in LOW_RANK:
            raise UserError(f"--stochastic-rounding: {self.method} has no such option; leave it out")
        if self.stochastic_rounding and self.dtype != "bf16":
            raise UserError("--stochastic-rounding: float32 weights need none; give --dtype bf16 with it")
        if self.release and self.optimizer not in LOW_RANK:
            raise UserError(f"--release: {self.method} has no such option; leave it out")
        if self.release and self.accumulation > 1:
            raise UserError("--release: gradients cannot be accumulated; give --accumulation 1")
        for name, least in self.AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{flag(name)}: must be at least {least}, not {value}")
        for name in ("lr", "scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{flag(name)}: must be a positive number, not {value}")

    @property
    def method(self) -> str:
        """What trains, in one word."""
        return self.optimizer

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step sees, on all processes together."""
        return self.batch_size * self.accumulation

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.sequences_per_step * self.sequence_length

    @property
    def log_every(self) -> int:
        """Steps between two logged training losses."""
        return math.ceil(self.steps / self.log_points)

    @property
    def eval_every(self) -> int:
        """Steps between two evaluations; the last step is always followed by one."""
        return math.ceil(self.steps / self.evaluations)

    @property
    def save_every(self) -> int:
        """Steps between two checkpoints; the last step is always followed by one."""
        return math.ceil(self.steps / self.checkpoints)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def save(self, path: Path) -> None:
        """Write every field as JSON."""
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises UserError where the file is no config of this version."""
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            for name, value in fields.items():
                if isinstance(value, list):  # JSON knows no tuples
                    fields[name] = tuple(value)
            return cls(**fields)
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a config that this version of lorapre wrote ({error})") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """Everything that decides the numbers of a pre-training run."""

    AT_LEAST: ClassVar[dict[str, int]] = RunConfig.AT_LEAST | {
        "eval_sequences": 1,
        "held_out_every": 2,
        "vocab_size": 257,  # 256 bytes and the end of a document
    }

    # Data: one document in `held_out_every` is kept for validation, or what a dataset on the hub has as
    # `validation_split`; at most `eval_sequences` sequences of it.
    vocab_size: int
    held_out_every: int
    eval_sequences: int
    validation_split: str | None = None
    # A tokenizer in a folder or on the hub. None: byte-level BPE of `vocab_size` tokens, trained on the data.
    tokenizer: str | None = None
    # Documents one after the other cut into sequences, or each one truncated and padded to one of its own.
    packed: bool = True

    # Model (LlamaForCausalLM)
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Everything that decides the numbers of a fine-tuning run. `sequence_length` is the longest example."""

    AT_LEAST: ClassVar[dict[str, int]] = RunConfig.AT_LEAST | {
        "samples": 2,
        "eval_sequences": 1,
        "held_out_every": 2,
    }

    # Data: of `samples` examples (None: all) one in `held_out_every` is kept for validation.
    samples: int | None
    held_out_every: int
    eval_sequences: int

    # A name on the Hugging Face hub, a folder, or the run folder of `lorapre pretrain`.
    model: str
    adapter: Adapter | None = None  # its weights train with AdamW, the model's own stay as they are
    rules: tuple[str, ...] = ()  # PATTERN=RANK
    freeze: tuple[str, ...] = ()  # patterns
    gradient_checkpointing: bool = False
    packing: bool = False  # the examples of a batch in one row, without padding

    def __post_init__(self) -> None:
        """Refuse what cannot run. Raises UserError naming the option."""
        if self.method not in get_args(Method):
            choices = ", ".join(get_args(Method))
            raise UserError(f"--method: there is no {self.method!r}; choose from {choices}")
        super().__post_init__()
        if self.rules and self.optimizer not in LOW_RANK:
            raise UserError(f"--rules: {self.method} has no such option; leave it out")
        if self.freeze and self.adapter is not None:
            raise UserError(f"--freeze: {self.method} freezes the whole model; leave it out")
        parse_rules(self.rules)
        parse_patterns("freeze", self.freeze)

    @property
    def method(self) -> str:
        """The adapter, or the optimizer of all weights."""
        return self.adapter or self.optimizer


def parse_rules(rules: Sequence[str]) -> list[tuple[str, int | None]]:
    """PATTERN=RANK or PATTERN=dense as rules of `lorapre.param_groups`. Raises UserError."""
    parsed: list[tuple[str, int | None]] = []
    for rule in rules:
        pattern, _, rank = rule.rpartition("=")
        if not pattern or not (rank == "dense" or (rank.isdecimal() and int(rank) > 0)):
            raise UserError(f"--rules {rule!r}: write PATTERN=RANK or PATTERN=dense, as in lm_head=8")
        parsed.append((pattern, None if rank == "dense" else int(rank)))
    parse_patterns("rules", [pattern for pattern, _ in parsed])
    return parsed


def parse_patterns(option: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """Regular expressions, which are searched in the names of parameters. Raises UserError."""
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(f"{flag(option)} {error.pattern!r}: not a regular expression ({error})") from error
