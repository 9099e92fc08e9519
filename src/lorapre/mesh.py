"""Weights spread over processes as DTensors, by FSDP2, HSDP or tensor parallelism.

The factors of a weight follow it: B is sharded where rows are and else replicated, A where columns are, and
all arithmetic runs on local shards. What is missing are sums, over the processes that hold the other rows or
the other columns of the same matrices, of small matrices: B^T g and B^T B, (r, q) and (r, r), or their mirror
images. No matrix is gathered, except for Newton-Schulz, where whole matrices are dealt out over the
processes.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lorapre.gradient import Shards

ROWS, COLUMNS, EXPERTS = "rows", "columns", "experts"


def refusal(p: DTensor, flatten: bool) -> str | None:
    """Why p cannot be stepped, and what to do instead; None if it can."""
    pixels = p.ndim > 3 or (p.ndim == 3 and flatten)
    for i, placement in enumerate(p.placements):
        if not isinstance(placement, Replicate | Shard | _StridedShard):
            return f"is placed as {placement!r}; weights can be replicated or sharded"
        dim = getattr(placement, "dim", 0)
        if pixels and dim > 1:
            return f"is a convolution placed as {placement!r}; shard its outputs or its inputs, dimension 0 or 1"
        # The columns of A, inputs times pixels, must split where a DTensor of their number does.
        count = p.device_mesh.size(i)
        if pixels and dim == 1 and p.shape[1] % count:
            return f"is a convolution with {p.shape[1]} inputs on {count} processes; shard its outputs"
    return None


def spread(model: nn.Module) -> str | None:
    """What spreads the training of a model over processes; None if nothing does."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import

    kinds = (nn.parallel.DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    for module in model.modules():
        for kind in kinds:
            if isinstance(module, kind):
                return f"a module of torch's {kind.__name__}"
    names = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    return f"a DTensor, {names[0]!r}" if names else None


def experts(p: DTensor, flatten: bool) -> Tensor:
    """Which of the matrices of p are held here, (E,)."""
    fused = p.ndim == 3 and not flatten
    splits = [i for i, x in enumerate(p.placements) if fused and getattr(x, "dim", None) == 0]
    held = _part(torch.arange(p.shape[0] if fused else 1, device="cpu"), p.device_mesh, p.placements, splits)
    return held.to(p.to_local().device)


def held(p: DTensor, flatten: bool, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what this process holds of a state tensor of p under its name and whole shape."""
    return _place(p, flatten, name, shape)[1]


def zeros(p: DTensor, flatten: bool, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A state tensor of p under its name: zeros, sharded where it shares a dimension with p."""
    device = p.to_local().device
    if not shape:
        return torch.zeros((), dtype=dtype, device=device)
    placements, part_shape = _place(p, flatten, name, shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        torch.zeros(part_shape, dtype=dtype, device=device), p.device_mesh, placements, run_check=False,
        shape=torch.Size(shape), stride=stride,
    )  # fmt: skip


def place(p: DTensor, flatten: bool, name: str, value: Tensor) -> Tensor:
    """A loaded state tensor of p, whole or a DTensor, placed as `zeros` places it."""
    placements, _ = _place(p, flatten, name, value.shape)
    if isinstance(value, DTensor):
        if value.device_mesh == p.device_mesh and value.placements == tuple(placements):
            return value
        value = value.full_tensor()
    like = zeros(p, flatten, name, value.shape, value.dtype)
    for dim in range(value.ndim):
        splits = [i for i, x in enumerate(placements) if getattr(x, "dim", None) == dim]
        held = _part(torch.arange(value.shape[dim], device="cpu"), p.device_mesh, placements, splits)
        value = value.index_select(dim, held.to(value.device))
    like.to_local().copy_(value)
    return like


def _place(
    p: DTensor, flatten: bool, name: str, shape: Sequence[int]
) -> tuple[list[Placement], tuple[int, ...]]:
    """Placements of a state tensor of p, and the shape of the part that is held here."""
    held, placements = list(shape), []
    for placement in p.placements:
        role = _role(p, placement, flatten)
        dim = _state_dim(name, role, placement, len(shape))
        placements.append(Replicate() if dim is None else _moved(placement, dim))
        if dim is not None:
            of_p: int = placement.dim  # type: ignore[attr-defined]
            held[dim] = p.to_local().shape[of_p] * (shape[dim] // p.shape[of_p])
    return placements, tuple(held)


class MeshShards(Shards):
    """The shards of the matrices of a DTensor parameter."""

    def __init__(self, p: DTensor, flatten: bool) -> None:
        self.mesh: DeviceMesh = p.device_mesh
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
            i: _role(p, p.placements[i], flatten) for i in _outer_first(p.placements, range(self.mesh.ndim))
        }
        self.splits = [(i, role) for i, role in roles.items() if role is not None and self.mesh.size(i) > 1]
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
        """`function` of whole matrices, M (N, p, q) being the part of each held here; returns that part.

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
        """Indices of the rows or columns held here, or where `coordinates` (mesh dimension -> one) say."""
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
    return range(start, start + count) if torch.equal(places, torch.arange(start, start + count, device="cpu")) else places


def _part(x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], splits: Sequence[int]) -> Tensor:
    """The part of x that this process holds, where these dimensions of the mesh split it."""
    for i in _outer_first(placements, splits):
        x = _chunk(x, mesh.size(i), mesh.get_local_rank(i))
    return x


def _outer_first(placements: Sequence[Placement], dims: Iterable[int]) -> list[int]:
    """Mesh dimensions in the order of their splits: a strided shard splits what those behind it have left."""
    return sorted(dims, key=lambda i: getattr(placements[i], "split_factor", 0))


def _chunk(x: Tensor, count: int, index: int) -> Tensor:
    """The part of x that a DTensor puts on process `index` of `count`; the last ones may get nothing."""
    chunks = x.chunk(count)
    return chunks[index] if index < len(chunks) else x[:0]


def _exchange(parts: list[Tensor], shapes: Sequence[Sequence[int]], group: dist.ProcessGroup) -> list[Tensor]:
    """Send one part to every process of the group, receive one of each shape."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    sent = torch.cat([part.reshape(-1) for part in parts])
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=group)
    return [piece.view(*shape) for piece, shape in zip(torch.split(received, sizes), shapes, strict=True)]


def _role(p: Tensor, placement: Placement, flatten: bool) -> str | None:
    """What a mesh dimension spreads of the matrices of p: rows, columns, experts or nothing."""
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, Shard | _StridedShard):
        names = {0: ROWS, 1: COLUMNS}
        if p.ndim < 2:
            names = {0: COLUMNS}
        elif p.ndim == 3 and not flatten:
            names = {0: EXPERTS, 1: ROWS, 2: COLUMNS}
        if placement.dim in names:
            return names[placement.dim]
    raise RuntimeError(
        f"a parameter of shape {tuple(p.shape)} is placed as {placement!r}, which has no update"
    )


def _state_dim(name: str, role: str | None, placement: Any, ndim: int) -> int | None:
    """The dimension of a state tensor that a mesh dimension spreads."""
    if role is None:
        return None
    if name in ("exp_avg", "exp_avg_sq"):
        return int(placement.dim)
    if role == EXPERTS:
        return 0
    last = {ROWS: {"_B": ndim - 2, "row": ndim - 1}, COLUMNS: {"_A": ndim - 1, "col": ndim - 1}}[role]
    return next((dim for ending, dim in last.items() if name.endswith(ending)), None)


def _moved(placement: Any, dim: int) -> Placement:
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim, split_factor=placement.split_factor)
    return Shard(dim)
