"""What `lorapre plan` is asked: an optimizer with its options, and meshes of GPUs."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, ClassVar, get_args

from lorapre_recipes.config import (
    DEFAULT_VARIANT,
    LOW_RANK,
    ONLY_FOR,
    OptimizerConfig,
    PlannedOptimizer,
    UserError,
)
from lorapre_recipes.train.summary import describe_optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(OptimizerConfig):
    """The optimizer to plan for, and the dtype of weights and gradients."""

    METHODS: ClassVar[tuple[str, ...]] = get_args(PlannedOptimizer)

    optimizer: Annotated[PlannedOptimizer, "what to train with."] = "lorapre-adamw"

    def __post_init__(self) -> None:
        if self.variant is None:
            object.__setattr__(self, "variant", DEFAULT_VARIANT.get(self.optimizer))
        if self.compress is None and self.optimizer in ONLY_FOR["compress"]:
            object.__setattr__(self, "compress", "both")
        super().__post_init__()

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


_COUNT = r"[1-9]\d{0,5}"
_MESH = re.compile(
    rf"(?:fsdp=(?P<fsdp>{_COUNT})|hsdp=(?P<replicas>{_COUNT})x(?P<hsdp>{_COUNT}))?"
    rf"(?:(?:(?<=.),|^)tp=(?P<tp>{_COUNT}))?"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """GPUs as replicas x FSDP2 shards x tensor parallelism; one GPU, where nothing is given."""

    replicas: int = 1
    shards: int = 1
    tp: int = 1

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Read fsdp=8, hsdp=8x8 (replicas x shards), tp=8, or fsdp or hsdp with tp behind a comma."""
        match = _MESH.fullmatch(text)
        if not text or match is None:
            kinds = "fsdp=SHARDS or hsdp=REPLICASxSHARDS, tp=RANKS"
            raise UserError(
                f"--mesh {text!r}: write {kinds}, or both with a comma, as in fsdp=128,tp=8"
            )
        replicas, tp = int(match["replicas"] or 1), int(match["tp"] or 1)
        return cls(replicas=replicas, shards=int(match["fsdp"] or match["hsdp"] or 1), tp=tp)

    def __str__(self) -> str:
        data = (
            f"fsdp={self.shards}" if self.replicas == 1 else f"hsdp={self.replicas}x{self.shards}"
        )
        if self.tp == 1:
            return data
        return f"{data},tp={self.tp}" if self.replicas * self.shards > 1 else f"tp={self.tp}"


ONE_GPU = Mesh()
