"""What `lorapre plan` is asked: an optimizer with its options, and meshes of GPUs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from lorapre_recipes.config import (
    LOW_RANK,
    OptimizerConfig,
    OptimizerName,
    PlannedOptimizer,
    Precision,
    PretrainConfig,
    UserError,
)
from lorapre_recipes.presets import PRETRAIN
from lorapre_recipes.train.summary import describe_optimizer

Model = str | PretrainConfig  # a name as in `meta_model`, or a run
LENGTH = 2048  # tokens of a sequence, where the model reads so many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(OptimizerConfig):
    """The optimizer to plan for, and the dtype of weights and gradients."""

    METHODS: ClassVar[tuple[str, ...]] = get_args(PlannedOptimizer)

    optimizer: Annotated[PlannedOptimizer, "what to train with. Default: lorapre-adamw."] = (
        "lorapre-adamw"
    )
    batch_size: Annotated[int, "sequences or images in a forward pass."] = 1
    sequence_length: Annotated[
        int | None, "tokens of each. Default: 2048, or less if the model reads less."
    ] = None
    accumulation: Annotated[int, "forward passes in an optimizer step."] = 1
    precision: Annotated[Precision, "of matrix products, whatever the weights have."] = "fp32"
    gradient_checkpointing: Annotated[
        bool, "compute activations again in the backward pass instead of keeping them."
    ] = False
    chunked_loss: Annotated[
        bool, "take the loss of some positions at a time, as pretrain and finetune do."
    ] = False
    budget: Annotated[
        str | None, "memory to fit into, 24GiB or 80GB. Default: that of the GPU that is there."
    ] = None

    def __post_init__(self) -> None:
        defaults = self.fitting(self.optimizer, rank=0, refresh=0)
        object.__setattr__(self, "variant", self.variant or defaults["variant"])
        super().__post_init__()
        self.budget_bytes()

    def budget_bytes(self) -> int | None:
        """The budget in bytes."""
        if self.budget is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", self.budget)
        if match is None or not float(match[1]):
            raise UserError(f"--budget {self.budget!r}: write a size, as in 24GiB or 80GB")
        return int(float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2])))

    def length(self, config: Any) -> int:
        """Tokens of a sequence of a model with this config."""
        most: int = getattr(config.get_text_config(), "max_position_embeddings", LENGTH)
        if (self.sequence_length or 0) > most:
            raise UserError(f"--sequence-length {self.sequence_length}: the model reads {most}")
        return self.sequence_length or min(LENGTH, most)

    @classmethod
    def complete(cls, model: str, given: dict[str, Any]) -> Settings:
        """The options given, and a preset's rank or the other options of a run folder.

        Of a run with another optimizer than the one given, nothing is taken.
        """
        config = pretrain_config(model, given.get("optimizer", "lorapre-adamw"))
        if config is None or given.get("optimizer", config.optimizer) != config.optimizer:
            return cls(**given)
        names = [each.name for each in dataclasses.fields(cls) if hasattr(config, each.name)]
        own = {name: getattr(config, name) for name in (["rank"] if model in PRETRAIN else names)}
        return cls(**(own | given))

    @property
    def passes(self) -> tuple[bool, bool]:
        """The options that change what the forward and the backward pass allocate."""
        return self.gradient_checkpointing, self.chunked_loss

    @property
    def low_rank(self) -> bool:
        """Whether it is an optimizer of LoRA-Pre."""
        return self.optimizer in LOW_RANK

    @property
    def item(self) -> int:
        """Bytes of an element of a weight or gradient."""
        return {"fp32": 4, "bf16": 2}[self.dtype]

    def __str__(self) -> str:
        lines = [describe_optimizer(self)]
        for what, patterns in (("rules", self.rules), ("frozen", self.freeze)):
            if patterns:
                lines.append(f"{what}: {', '.join(patterns)}")
        return "\n".join(lines)


def pretrain_config(
    model: Model, optimizer: OptimizerName = "lorapre-adamw"
) -> PretrainConfig | None:
    """The config of a run folder of `lorapre pretrain` or of a preset; None for other models."""
    if isinstance(model, PretrainConfig):
        return model
    folder = Path(model).expanduser()
    if (folder / "data.json").is_file():
        return PretrainConfig.load(folder / "config.json")
    is_preset = model in PRETRAIN and not folder.exists()
    return PRETRAIN[model](optimizer) if is_preset else None


_COUNT = r"[1-9]\d{0,5}"
_MESH = re.compile(
    rf"(?:fsdp=(?P<fsdp>{_COUNT})|hsdp=(?P<replicas>{_COUNT})x(?P<hsdp>{_COUNT}))?"
    rf"(?:(?:(?<=.),|^)tp=(?P<tp>{_COUNT}))?"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """GPUs as replicas x FSDP2 shards x tensor parallelism."""

    name: str = "one GPU"
    replicas: int = 1
    shards: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Read fsdp=8, hsdp=8x8 (replicas x shards), tp=8, or one of the first two with tp."""
        match = _MESH.fullmatch(text)
        if not text or match is None:
            kinds = "write fsdp=SHARDS or hsdp=REPLICASxSHARDS, tp=RANKS"
            raise UserError(f"--mesh {text!r}: {kinds}, or both with a comma, as in fsdp=128,tp=8")
        shards = int(match["fsdp"] or match["hsdp"] or 1)
        replicas, tp = int(match["replicas"] or 1), int(match["tp"] or 1)
        return cls(name=text, replicas=replicas, shards=shards, tp=tp)


ONE_GPU = Mesh()
