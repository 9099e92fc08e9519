"""What a training step holds in memory and sends over the wire: arithmetic on the shapes of weights.

Bytes of state are those of the tensors that the optimizers allocate, bytes sent those of the collectives in
`lorapre.sharding`; the tests count both. "A GPU" is the one that holds or sends the most: the first, where a
mesh does not divide a weight evenly.

A ring is assumed on the wire, as in NCCL for large messages: of N processes each sends 2 (N - 1) / N n bytes
for an all-reduce of n bytes, and (N - 1) / N n for an all-gather or a reduce-scatter whose long side has n.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lorapre.batch import BATCH, PART, SHARED
from lorapre.groups import matrix_shape
from lorapre_recipes.config import (
    DEFAULT_VARIANT,
    LOW_RANK,
    ONLY_FOR,
    Compress,
    PlannedOptimizer,
    Precision,
    UserError,
    Variant,
    flag,
    parse_rules,
)

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOAT32, FLOAT64, BF16 = 4, 8, 2  # bytes

# What a step of LoRA-Pre's Adam may allocate for its own use, by the tests of `lorapre`: so many bytes, or
# this share of the largest weight where that is more.
SCRATCH, SCRATCH_SHARE = 8 * 2**20, 0.02
DENSE_SCRATCH = 2 * 2**20  # tiles of a dense weight in float32, where it has less


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The optimizer to plan for, and the dtype of weights and gradients."""

    optimizer: PlannedOptimizer = "lorapre-adamw"
    rank: int | None = None
    variant: Variant | None = None
    compress: Compress | None = None
    dtype: Precision = "fp32"
    release: bool = False  # gradients in the backward pass
    rules: tuple[str, ...] = ()  # PATTERN=RANK
    freeze: tuple[str, ...] = ()  # patterns

    def __post_init__(self) -> None:
        """Refuse what cannot be. Raises UserError naming the option."""
        for name, optimizers in ONLY_FOR.items():
            if getattr(self, name, None) is not None and self.optimizer not in optimizers:
                raise UserError(f"{flag(name)}: {self.optimizer} has no such option; leave it out")
        if self.release and self.optimizer not in LOW_RANK:
            raise UserError(f"--release: {self.optimizer} has no such option; leave it out")
        if self.rules and self.optimizer not in LOW_RANK:
            raise UserError(f"--rules: {self.optimizer} has no such option; leave it out")
        parse_rules(self.rules)
        if self.optimizer in LOW_RANK and self.rank is None:
            raise UserError(f"--rank: {self.optimizer} needs a value")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank: must be at least 1, not {self.rank}")
        if self.variant is None:
            object.__setattr__(self, "variant", DEFAULT_VARIANT.get(self.optimizer))
        if self.variant == "split" and self.compress not in (None, "both"):
            raise UserError("--compress: variant split has no moment alone; take another --variant")

    @property
    def item(self) -> int:
        """Bytes of an element of a weight or gradient."""
        return DTYPES[self.dtype].itemsize

    @property
    def moments(self) -> tuple[str, ...]:
        """The moments that have factors."""
        if self.optimizer == "lorapre-muon":
            return ("m",)
        if self.variant == "split":  # its second moment has none
            return ("m",)
        return {"first": ("m",), "second": ("v",)}.get(self.compress or "both", ("m", "v"))

    def __str__(self) -> str:
        options: list[str] = [self.optimizer]
        if self.optimizer in LOW_RANK:
            options += [f"rank {self.rank}", f"variant {self.variant}"]
        if self.compress in ("first", "second"):
            options.append(f"{self.compress} moment only")
        if self.release:
            options.append("gradients released")
        lines = [", ".join(options)]
        for what, patterns in (("rules", self.rules), ("frozen", self.freeze)):
            lines += [f"{what}: {', '.join(patterns)}"] * bool(patterns)
        return "\n".join(lines)


_COUNT = r"[1-9]\d{0,5}"
_MESH = re.compile(
    rf"(?:fsdp=(?P<fsdp>{_COUNT})|hsdp=(?P<replicas>{_COUNT})x(?P<hsdp>{_COUNT}))?"
    rf"(?:(?:(?<=.),|^)tp=(?P<tp>{_COUNT}))?"
)


@dataclass(frozen=True, kw_only=True)
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
            raise UserError(
                f"--mesh {text!r}: write fsdp=SHARDS or hsdp=REPLICASxSHARDS, tp=RANKS, "
                "or both with a comma, as in fsdp=128,tp=8"
            )
        replicas, tp = int(match["replicas"] or 1), int(match["tp"] or 1)
        return cls(replicas=replicas, shards=int(match["fsdp"] or match["hsdp"] or 1), tp=tp)

    @property
    def gpus(self) -> int:
        """How many there are."""
        return self.replicas * self.shards * self.tp

    def __str__(self) -> str:
        data = f"fsdp={self.shards}" if self.replicas == 1 else f"hsdp={self.replicas}x{self.shards}"
        if self.tp == 1:
            return data
        return f"{data},tp={self.tp}" if self.replicas * self.shards > 1 else f"tp={self.tp}"


ONE_GPU = Mesh()


class Cut(NamedTuple):
    """A dimension of a weight, divided over so many processes."""

    size: int
    dim: int


class Matrices(NamedTuple):
    """What a GPU holds of a weight: parts (p, q) of E matrices.

    `splits` are (processes, what is split between them: "experts", "rows" or "columns"), in the order in
    which `lorapre.sharding` goes through the mesh.
    """

    E: int
    p: int
    q: int
    splits: tuple[tuple[int, str], ...]

    def over(self, role: str) -> list[int]:
        """Sizes of the mesh dimensions that divide "rows" or "columns"."""
        return [size for size, split in self.splits if split == role]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter: its shape, the state that an optimizer makes for it, and where tensor parallelism cuts it.

    Attributes:
        name: in the model.
        shape: of the whole.
        group: index of the optimizer's group that it is in.
        rank: of its factors; None without.
        flatten: whether three dimensions are one matrix, a convolution.
        matrix: whether it takes the route of the matrices, low rank or torch.optim.Muon's.
        state: names and shapes of the state tensors of the whole.
        state_item: bytes of an element of the state, steps aside.
        tp_dim: the dimension that tensor parallelism divides, None where it replicates.
        frozen: whether it has neither gradient nor state.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    rank: int | None
    flatten: bool
    matrix: bool
    state: Mapping[str, tuple[int, ...]]
    state_item: int
    tp_dim: int | None
    frozen: bool

    def cuts(self, mesh: Mesh) -> tuple[Cut, ...]:
        """How `mesh` divides the weight: FSDP2 cuts rows, after tensor parallelism where that does too."""
        fsdp = [Cut(mesh.shards, 0)] if self.shape else []
        tp = [] if self.tp_dim is None else [Cut(mesh.tp, self.tp_dim)]
        cuts = tp + fsdp if self.tp_dim == 0 else fsdp + tp
        return tuple(cut for cut in cuts if cut.size > 1)

    def part(self, mesh: Mesh) -> tuple[int, ...]:
        """Shape of the largest shard."""
        shape = list(self.shape)
        for size, dim in self.cuts(mesh):
            shape[dim] = math.ceil(shape[dim] / size)
        return tuple(shape)

    def held(self, mesh: Mesh) -> int:
        """Elements of the largest shard."""
        return math.prod(self.part(mesh))

    def matrices(self, mesh: Mesh) -> Matrices:
        """What a GPU holds of it, as a matrix or as E fused experts."""
        fused = len(self.shape) == 3 and not self.flatten
        roles = ("experts", "rows", "columns") if fused else ("rows", "columns")
        splits = tuple((size, roles[dim]) for size, dim in self.cuts(mesh))
        return Matrices(*matrix_shape(self.part(mesh), self.flatten), splits)

    def state_bytes(self, mesh: Mesh) -> int:
        """Bytes of state on a GPU: B is divided as rows are, A as columns are, else they are whole."""
        E, p, q = matrix_shape(self.part(mesh), self.flatten)
        r = self.rank or 0
        sizes = {
            "m_B": E * p * r,
            "v_B": E * p * r,
            "m_A": E * r * q,
            "v_A": E * r * q,
            "v_row": E * p,
            "v_col": E * q,
        }
        total = 0
        for name, shape in self.state.items():
            is_step = not shape and name in ("step", "skipped")
            total += FLOAT32 if is_step else sizes.get(name, self.held(mesh)) * self.state_item
        return total

    def adamw_bytes(self, mesh: Mesh, item: int) -> int:
        """Bytes of the state of torch.optim.AdamW on a GPU: two moments in the weight's dtype and a step."""
        return 2 * self.held(mesh) * item + FLOAT32


# Memory


class Memory(NamedTuple):
    """Bytes on a GPU."""

    weights: int
    gradients: int
    matrices: int  # optimizer state of the matrices: low rank or, for muon, its momentum
    dense: int  # optimizer state of all else
    transient: int  # what the step allocates for its own use, at most
    adamw: int  # what torch.optim.AdamW would hold as state

    @property
    def state(self) -> int:
        """All optimizer state."""
        return self.matrices + self.dense

    @property
    def peak(self) -> int:
        """Of a training step, but for activations and for what the traffic between GPUs needs."""
        return self.weights + self.gradients + self.state + self.transient


def memory(weights: Iterable[Weight], settings: Settings, mesh: Mesh = ONE_GPU) -> Memory:
    """What a GPU of `mesh` holds in a training step."""
    weights, item = list(weights), settings.item
    held = sum(weight.held(mesh) for weight in weights) * item
    weights = [weight for weight in weights if not weight.frozen]
    gradients = sum(weight.held(mesh) for weight in weights) * item
    transient = step_transient(weights, settings, mesh)
    if settings.release:  # one gradient at a time, from when it is complete until its weight is updated
        gradients, transient = max(
            ((weight.held(mesh) * item, step_transient([weight], settings, mesh)) for weight in weights),
            key=sum,
        )
    return Memory(
        weights=held,
        gradients=gradients,
        matrices=sum(weight.state_bytes(mesh) for weight in weights if weight.matrix),
        dense=sum(weight.state_bytes(mesh) for weight in weights if not weight.matrix),
        transient=transient,
        adamw=sum(weight.adamw_bytes(mesh, item) for weight in weights),
    )


def step_transient(weights: Sequence[Weight], settings: Settings, mesh: Mesh) -> int:
    """Bytes that optimizer.step allocates beside weights, gradients and state, at most."""
    item = settings.item
    elementwise = [weight.held(mesh) * item for weight in weights if not weight.matrix]
    matrices = [weight for weight in weights if weight.matrix]
    if settings.optimizer == "adamw":  # foreach, as on a GPU: the denominators of all weights
        return sum(weight.held(mesh) * item for weight in weights)
    if settings.optimizer == "muon":
        return max([sum(elementwise), *(newton_schulz_bytes(weight, item) for weight in matrices)])
    if not matrices:
        return 0 if item == FLOAT32 else DENSE_SCRATCH
    largest = max(weight.held(mesh) * item for weight in weights)
    scratch = max(SCRATCH, round(SCRATCH_SHARE * largest))
    low_rank = [weight for weight in weights if weight.rank]
    if settings.variant == "split" and settings.optimizer == "lorapre-adamw":
        alike = Counter(weight.shape for weight in low_rank)
        return scratch // 4 + max(
            (split_copies(weight, mesh, stacked(weight, alike[weight.shape])) for weight in low_rank),
            default=0,
        )
    if settings.variant in ("paper", "subspace"):
        scratch += max((factor_copies(weight, settings, mesh) for weight in low_rank), default=0)
    if settings.optimizer == "lorapre-muon":
        return max([scratch, *(newton_schulz_bytes(weight, FLOAT32) for weight in matrices)])
    return scratch


def factor_copies(weight: Weight, settings: Settings, mesh: Mesh) -> int:
    """Bytes that trackers other than Newton's take for a weight: of the old B, or of a basis and a new A."""
    assert weight.rank is not None
    part, r = weight.matrices(mesh), weight.rank
    kept = part.p if settings.variant == "paper" else 2 * part.p + part.q
    return FLOAT32 * len(settings.moments) * part.E * r * (kept + 2 * r)


def split_copies(weight: Weight, mesh: Mesh, count: int) -> int:
    """Bytes that the split update takes for factors of `count` weights: T W^T, a basis and W.

    Several weights are stacked, their factors too; of a single one there are cuts of `PART` elements.
    """
    assert weight.rank is not None
    part, r = weight.matrices(mesh), weight.rank
    if count == 1:
        kept, cuts = 2 * part.p + part.q, 2 * min(PART, r * max(part.p, part.q))
    else:
        kept, cuts = 3 * part.p + 2 * part.q, 0
    return FLOAT32 * (count * part.E * r * (kept + 2 * r) + cuts)


def stacked(weight: Weight, alike: int) -> int:
    """How many of the weights of a shape are stepped together."""
    assert weight.rank is not None
    E, p, q = matrix_shape(weight.shape, weight.flatten)
    return min(alike, max(1, BATCH // max(1, E * weight.rank * (p + q))))


def newton_schulz_bytes(weight: Weight, item: int) -> int:
    """Bytes that Muon needs for a whole matrix: its momentum, two iterates in bfloat16 and their Grams."""
    E, p, q = matrix_shape(weight.shape, weight.flatten)
    return E * (p * q * (item + 2 * BF16) + 2 * BF16 * min(p, q) ** 2)


def most_row_shards(weight: Weight, settings: Settings) -> int:
    """The most row shards on which a GPU holds less state of a weight than with AdamW, its columns whole.

    With A (r, q) whole on each of N GPUs, c numbers for each row and column (k r of the k factorised moments,
    and one of the means) and d moments in full, all in float32,

        4 c (p / N + q) + 4 d p q / N  <  2 item p q / N    <=>    N < p (2 item - 4 d) / (4 c) - p / q

    which is 2 p / (r + 1) - p / q by default where AdamW's moments are float32 too.
    """
    assert weight.rank is not None
    _, p, q = matrix_shape(weight.shape, weight.flatten)
    kept = sum(name in weight.state for name in ("exp_avg", "exp_avg_sq"))
    spared = 2 * settings.item - FLOAT32 * kept
    numbers = len(settings.moments) * weight.rank + ("v_row" in weight.state)
    limit = p * spared / (FLOAT32 * numbers) - p / q
    return max(0, math.ceil(limit) - 1)


# Traffic


def ring(n: float, sizes: Iterable[int]) -> float:
    """Bytes that each process sends to all-reduce n bytes over groups of `sizes`, one after the other."""
    return sum(2 * (size - 1) / size * n for size in sizes)


def summed(variant: str, moment: str, means: bool, r: int, p: int, q: int) -> tuple[int, int]:
    """Bytes that a step sums over row shards, and over column shards, for one moment of one matrix.

    B (p, r) and A (r, q) are what is held here. Over rows travel L^T T (r, q) and L^T L or Q^T B (r, r); over
    columns T A^T (p, r) and A A^T (r, r). The subspace tracker adds three triangles of Y^T Y and the size of
    Y in `orth` and, where means are kept, what `match_means` or `rank_one_rest` needs. The norms of B, in the
    other trackers, and, where there is a gauge, of A are summed as one float64 each.
    """
    triangle = r * (r + 1) // 2
    rows, columns = FLOAT32 * (r * q + r * r), FLOAT32 * (p * r + r * r)
    if variant == "paper":
        return rows + FLOAT64, columns
    if variant == "calibrated":
        return rows + FLOAT64, columns + FLOAT64
    rows += FLOAT32 * (3 * triangle + 1)
    if means and moment == ("m" if variant == "split" else "v"):
        # The means over columns; the mean of what is left of the rows and the norm of B, or a Gram.
        rows += FLOAT32 * (q + (2 if variant == "split" else triangle))
        columns += FLOAT32 * p
    return rows, columns + FLOAT64


def track_traffic(weight: Weight, settings: Settings, mesh: Mesh) -> float:
    """Bytes that a GPU sends in a step to keep the factors of a weight."""
    assert weight.rank is not None
    part, total = weight.matrices(mesh), 0.0
    for moment in settings.moments:
        rows, columns = summed(
            settings.variant or "", moment, "v_row" in weight.state, weight.rank, part.p, part.q
        )
        total += ring(rows, part.over("rows")) + ring(columns, part.over("columns"))
    return part.E * total


def deal_traffic(n: int, p: int, q: int, splits: Sequence[tuple[int, str]]) -> float:
    """Bytes that the busiest GPU moves to orthogonalise n matrices, of each of which it holds a part (p, q).

    The matrices are dealt out whole, in float32, and the results returned in bfloat16, each all-to-all.
    Where there are fewer matrices than GPUs, the busiest still gets one.
    """
    if not splits:
        return 0.0
    *inner, (size, role) = splits
    if role == "experts":  # whole matrices already
        return deal_traffic(n, p, q, inner)
    mine = math.ceil(n / size)
    p, q = (p * size, q) if role == "rows" else (p, q * size)
    exchanged = mine * p * q * (size - 1) / size * (FLOAT32 + BF16)
    return exchanged + deal_traffic(mine, p, q, inner)


def muon_traffic(weights: Sequence[Weight], mesh: Mesh) -> float:
    """Bytes for the Newton-Schulz of weights of one kind, in batches as `lorapre.batch` makes them."""
    part = weights[0].matrices(mesh)
    count = math.prod(size for size, _ in part.splits)
    size = max(count, SHARED * count // math.prod(weights[0].shape))
    batches = (min(size, len(weights) - start) for start in range(0, len(weights), size))
    return sum(deal_traffic(batch * part.E, part.p, part.q, part.splits) for batch in batches)


def gather_traffic(weight: Weight, item: int, mesh: Mesh) -> float:
    """Bytes that a GPU sends to gather the gradient of a weight: about p q elements."""
    part = weight.matrices(mesh)
    processes = math.prod(size for size, role in part.splits if role != "experts")
    return (processes - 1) * part.E * part.p * part.q * item


def optimizer_traffic(weights: Sequence[Weight], settings: Settings, mesh: Mesh) -> dict[str, float]:
    """Bytes that a GPU sends in a step, by name of the matrix; dense weights send nothing.

    For torch.optim.Muon one gather of each matrix, which is the least it needs.
    """
    sent: dict[str, float] = {}
    batches: dict[Any, list[Weight]] = {}
    for weight in weights:
        if weight.matrix:
            batches.setdefault((weight.group, weight.shape, weight.cuts(mesh)), []).append(weight)
    for batch in batches.values():
        if settings.optimizer == "muon":
            each = gather_traffic(batch[0], settings.item, mesh)
        else:
            each = track_traffic(batch[0], settings, mesh)
        if settings.optimizer == "lorapre-muon":
            each += muon_traffic(batch, mesh) / len(batch)
        sent |= {weight.name: each for weight in batch}
    return sent


def fsdp_traffic(weights: Iterable[Weight], mesh: Mesh, item: int) -> float:
    """Bytes that FSDP2 itself sends from a GPU in a step, whatever the optimizer.

    Weights are gathered in the forward and again in the backward pass (reshard_after_forward=True), gradients
    of those that train are scattered, and HSDP all-reduces the shards of gradients over replicas.
    """
    weights = list(weights)
    held = sum(weight.held(mesh) for weight in weights) * item
    gradients = sum(weight.held(mesh) for weight in weights if not weight.frozen) * item
    return (mesh.shards - 1) * (2 * held + gradients) + ring(gradients, [mesh.replicas])
