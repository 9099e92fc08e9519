"""Weights spread over processes as DTensors, by FSDP2, HSDP or tensor parallelism.

Plain tensors pass through.

The factors of a weight follow it: B is sharded where rows are and else replicated, A where columns
    are, and
all arithmetic runs on local shards. What is missing are sums, over the processes that hold the
other rows or
the other columns of the same matrices, of small matrices: B^T g and B^T B, (r, q) and (r, r), or
    their mirror
images. No matrix is gathered, except for Newton-Schulz, where whole matrices are dealt out over the
processes.

torch.distributed.tensor is imported where a DTensor is met: it takes a second.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorapre.shards import WHOLE, Shards

REMEDY = "shard the model with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps the matrices"
ROWS, COLUMNS, EXPERTS = "rows", "columns", "experts"


def is_spread(x: object) -> bool:
    """Whether x is a DTensor."""
    return isinstance(x, Tensor) and hasattr(x, "device_mesh")


def local(x: Any) -> Tensor:
    """The shard of x that this process holds; x itself where it is no DTensor."""
    shard: Tensor = x.to_local() if is_spread(x) else x
    return shard


def gradient(p: Any) -> Tensor:
    """The gradient of p, placed as p is: tensor parallelism may leave sums to be taken."""
    g: Any = p.grad
    if is_spread(p) and g.placements != p.placements:
        g = g.redistribute(placements=p.placements)
    placed: Tensor = g
    return placed


def refusal(p: Any, flatten: bool) -> str | None:
    """Why p cannot be stepped, and what to do instead; None if it can.

    FSDP1 and DeepSpeed ZeRO cut the concatenation of all weights into equal pieces, each a vector
    that has
    lost rows and columns: it would be stepped as a dense vector, or as a matrix of other weights'
        rows.
    """
    if getattr(p, "_fsdp_flattened", False):
        return f"is a flat piece of FSDP1, which has no rows and columns; {REMEDY}"
    if any(getattr(p, name, None) is not None for name in ("ds_id", "ds_tensor", "_hp_mapping")):
        return (
            f"is partitioned by DeepSpeed ZeRO, into flat pieces without rows and columns; {REMEDY}"
        )
    if not is_spread(p):
        mixed = "is a plain tensor with a DTensor as its gradient; make it a DTensor"
        return mixed if is_spread(p.grad) else None
    if p.grad is not None and not is_spread(p.grad):
        return (
            "is a DTensor with a plain tensor as its gradient; make that a DTensor of the same mesh"
        )
    pixels = p.ndim > 3 or (p.ndim == 3 and flatten)
    for i, placement in enumerate(p.placements):
        dim = getattr(placement, "dim", None)
        if dim is None and not placement.is_replicate():
            return f"is placed as {placement!r}; weights can be replicated or sharded"
        if pixels and dim is not None and dim > 1:
            return f"is a convolution placed as {placement!r}; shard its outputs or its inputs"
        # The columns of A, inputs times pixels, must split where a DTensor of their number does.
        count = p.device_mesh.size(i)
        if pixels and dim == 1 and p.shape[1] % count:
            return (
                f"is a convolution with {p.shape[1]} inputs on {count} processes; shard its outputs"
            )
    return None


def spread(model: nn.Module) -> str | None:
    """What spreads the training of a model over processes; None if nothing does."""
    if not processes() and not any(is_spread(p) for p in model.parameters()):
        return next((why for p in model.parameters() if (why := refusal(p, flatten=False))), None)
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import

    kinds = (nn.parallel.DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    found = (
        kind.__name__ for module in model.modules() for kind in kinds if isinstance(module, kind)
    )
    if (kind := next(found, None)) is not None:
        return f"a module of torch's {kind}"
    names = [name for name, p in model.named_parameters() if is_spread(p)]
    return f"a DTensor, {names[0]!r}" if names else processes()


def processes() -> str | None:
    """How many processes train together; None if this one is alone."""
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return f"{count} processes of torch.distributed" if count > 1 else None


def shards(p: Tensor, flatten: bool) -> Shards:
    """How to sum over the shards of p."""
    return MeshShards(p, flatten) if is_spread(p) else WHOLE


def layout(p: Any) -> Hashable:
    """What same-shaped weights must share to be stepped as one batch."""
    return (p.device_mesh, p.placements) if is_spread(p) else None


def experts(p: Any, flatten: bool) -> Tensor:
    """Which of the matrices of p are held here, (E,)."""
    fused = p.ndim == 3 and not flatten
    held = torch.arange(p.shape[0] if fused else 1, device=local(p).device)
    return _part(held, p, p.placements, 0) if fused and is_spread(p) else held


def zeros(p: Any, flatten: bool, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A state tensor of p under its name: zeros, sharded where it shares a dimension with p."""
    if not is_spread(p) or not shape:
        return torch.zeros(shape, dtype=dtype, device=local(p).device)
    placements, part_shape = _place(p, flatten, name, shape)
    part = torch.zeros(part_shape, dtype=dtype, device=local(p).device)
    stride = torch.empty(shape, device="meta").stride()
    sharded: Tensor = p.from_local(
        part, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return sharded


def held(p: Tensor, flatten: bool, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what this process holds of a state tensor of p."""
    return _place(p, flatten, name, shape)[1] if is_spread(p) else tuple(shape)


def place(p: Any, flatten: bool, name: str, value: Any) -> Tensor:
    """A loaded state tensor of p, whole or a DTensor, placed as `zeros` places it.

    Every process must hold the whole of one that is no DTensor. Any other is gathered: a
    collective.
    """
    placements = _place(p, flatten, name, value.shape)[0] if is_spread(p) and value.shape else None
    if is_spread(value):
        if placements is not None and (value.device_mesh, value.placements) == (
            p.device_mesh,
            tuple(placements),
        ):
            return value  # type: ignore[no-any-return]
        value = value.full_tensor()
    if placements is None:
        return value  # type: ignore[no-any-return]
    like = zeros(p, flatten, name, value.shape, value.dtype)
    for dim in range(value.ndim):
        value = value.index_select(
            dim, _part(torch.arange(value.shape[dim], device=value.device), p, placements, dim)
        )
    local(like).copy_(value)
    return like


def _place(
    p: Any, flatten: bool, name: str, shape: Sequence[int]
) -> tuple[list[Any], tuple[int, ...]]:
    """Placements of a state tensor of p, and the shape of the part that is held here."""
    from torch.distributed.tensor import Replicate

    held, placements = list(shape), []
    for placement in p.placements:
        dim = _state_dim(name, _role(p, placement, flatten), placement, len(shape))
        placements.append(Replicate() if dim is None else _moved(placement, dim))
        if dim is not None:
            held[dim] = local(p).shape[placement.dim] * (shape[dim] // p.shape[placement.dim])
    return placements, tuple(held)


class MeshShards(Shards):
    """The shards of the matrices of a DTensor parameter."""

    def __init__(self, p: Any, flatten: bool) -> None:
        self.mesh = p.device_mesh
        shape = p.shape
        fused = len(shape) == 3 and not flatten
        self.inner = 1  # columns that a sharded one stands for: the pixels of a convolution
        if len(shape) < 2:
            self.shape = (1, max(1, shape.numel()))
        elif fused:
            self.shape = (shape[1], shape[2])
        else:
            self.inner = shape[2:].numel()
            self.shape = (shape[0], shape[1:].numel())
        roles = {
            i: _role(p, p.placements[i], flatten)
            for i in _outer_first(p.placements, range(self.mesh.ndim))
        }
        self.splits = [
            (i, role) for i, role in roles.items() if role is not None and self.mesh.size(i) > 1
        ]
        self.count = 1
        for i, _ in self.splits:
            self.count *= self.mesh.size(i)

    def size(self, p: int, q: int) -> tuple[int, int]:
        """Size of a whole matrix."""
        return self.shape

    def rows(self, p: int) -> range | Tensor:
        """Which rows of the whole are held here."""
        return _as_range(self._held(ROWS))

    def columns(self, q: int) -> range | Tensor:
        """Which columns of the whole are held here."""
        return _as_range(self._held(COLUMNS))

    def sum_rows(self, x: Tensor) -> Tensor:
        """Sum over the processes that hold other rows of the same matrices."""
        return self._sum(x, ROWS)

    def sum_columns(self, x: Tensor) -> Tensor:
        """Sum over the processes that hold other columns of the same matrices."""
        return self._sum(x, COLUMNS)

    def sum_all(self, x: Tensor) -> Tensor:
        """Sum over the processes that hold other parts of the same parameters."""
        return self._sum(x, ROWS, COLUMNS, EXPERTS)

    def whole(self, function: Callable[[Tensor], Tensor], M: Tensor) -> Tensor:
        """What is held here of `function` of whole matrices, of which M (N, p, q) is held here.

        Each process is dealt about N / count of them by all-to-all, and deals the result back.
        """
        for depth, (_, role) in enumerate(self.splits):
            if role != EXPERTS:
                function = functools.partial(self._deal, depth, function)
        return function(M)

    def _deal(self, depth: int, function: Callable[[Tensor], Tensor], M: Tensor) -> Tensor:
        i, role = self.splits[depth]
        group, n, here = self.mesh.get_group(i), self.mesh.size(i), self.mesh.get_local_rank(i)
        hands = M.tensor_split(n)
        dim = 1 if role == ROWS else 2
        # The splits inside this one are whole already.
        outside = {j: self.mesh.get_local_rank(j) for j, _ in self.splits[:depth]}
        lengths = [len(self._held(role, {**outside, i: j})) for j in range(n)]
        shapes = [list(hands[here].shape) for _ in range(n)]
        for shape, length in zip(shapes, lengths, strict=True):
            shape[dim] = length
        parts = _exchange(list(hands), shapes, group)
        result = function(torch.cat(parts, dim))
        back = torch.split(result, lengths, dim)
        return torch.cat(_exchange(list(back), [hand.shape for hand in hands], group))

    def _sum(self, x: Tensor, *roles: str) -> Tensor:
        dims = [i for i, role in self.splits if role in roles]
        x = x.contiguous() if dims else x
        for i in dims:
            dist.all_reduce(x, group=self.mesh.get_group(i))
        return x

    def _held(self, role: str, coordinates: Mapping[int, int] | None = None) -> Tensor:
        """Indices of the rows or columns held here, or at `coordinates` (mesh dimension -> one)."""
        total, inner = (self.shape[0], 1) if role == ROWS else (self.shape[1], self.inner)
        held = torch.arange(total, device="cpu").view(-1, inner)
        if coordinates is None:
            coordinates = {i: self.mesh.get_local_rank(i) for i, _ in self.splits}
        splits = [i for i, split in self.splits if split == role and i in coordinates]
        for i in splits:
            held = _chunk(held, self.mesh.size(i), coordinates[i])
        return held.reshape(-1)


def _as_range(places: Tensor) -> range | Tensor:
    """Places without gaps as a range."""
    start, count = (int(places[0]) if len(places) else 0), len(places)
    return (
        range(start, start + count)
        if torch.equal(places, torch.arange(start, start + count, device="cpu"))
        else places
    )


def _part(x: Tensor, p: Any, placements: Sequence[Any], dim: int) -> Tensor:
    """The part of x, along a whole dimension that placements split, that this process holds."""
    for i in _outer_first(
        placements, [i for i, y in enumerate(placements) if getattr(y, "dim", None) == dim]
    ):
        x = _chunk(x, p.device_mesh.size(i), p.device_mesh.get_local_rank(i))
    return x


def _outer_first(placements: Sequence[Any], dims: Iterable[int]) -> list[int]:
    """Mesh dimensions in the order of their splits: a strided shard splits what others left."""
    return sorted(dims, key=lambda i: getattr(placements[i], "split_factor", 0))


def _chunk(x: Tensor, count: int, index: int) -> Tensor:
    """The part of x that a DTensor puts on process `index` of `count`; the last may get none."""
    chunks = x.chunk(count)
    return chunks[index] if index < len(chunks) else x[:0]


def _exchange(
    parts: list[Tensor], shapes: Sequence[Sequence[int]], group: dist.ProcessGroup
) -> list[Tensor]:
    """Send one part to every process of the group, receive one of each shape."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    sent = torch.cat([part.reshape(-1) for part in parts])
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=group)
    return [
        piece.view(*shape)
        for piece, shape in zip(torch.split(received, sizes), shapes, strict=True)
    ]


def _role(p: Tensor, placement: Any, flatten: bool) -> str | None:
    """What a mesh dimension spreads of the matrices of p: rows, columns, experts or nothing."""
    names = {0: ROWS, 1: COLUMNS}
    if p.ndim < 2:
        names = {0: COLUMNS}
    elif p.ndim == 3 and not flatten:
        names = {0: EXPERTS, 1: ROWS, 2: COLUMNS}
    return (
        None if placement.is_replicate() else names[placement.dim]
    )  # anything else has been refused


def _state_dim(name: str, role: str | None, placement: Any, ndim: int) -> int | None:
    """The dimension of a state tensor that a mesh dimension spreads."""
    if role is None:
        return None
    if name in ("exp_avg", "exp_avg_sq"):
        return int(placement.dim)
    if role == EXPERTS:
        return 0
    last = {ROWS: {"_B": ndim - 2, "row": ndim - 1}, COLUMNS: {"_A": ndim - 1, "col": ndim - 1}}[
        role
    ]
    return next((dim for ending, dim in last.items() if name.endswith(ending)), None)


def _moved(placement: Any, dim: int) -> Any:
    """The same split of another dimension."""
    split = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(dim, **split)
