"""Weights spread over processes as DTensors, by FSDP2, HSDP or tensor parallelism.

The factors of a weight follow it: B is sharded where rows are and else replicated, A where columns are, and
all arithmetic runs on local shards. What is missing are sums, over the processes that hold the other rows or
the other columns of the same matrices, of small matrices: B^T g and B^T B, (r, q) and (r, r), or their mirror
images. No matrix is gathered, except for Newton-Schulz, where whole matrices are dealt out over the
processes.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lorapre.linalg import WHOLE, Shards, gram

REMEDY = "shard the model with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps the matrices"

ROWS, COLUMNS, EXPERTS = "rows", "columns", "experts"


def local(x: Tensor) -> Tensor:
    """The shard of x that this process holds; x itself where it is no DTensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def gradient(p: Tensor) -> Tensor:
    """The gradient of p, placed as p is: tensor parallelism may leave it as sums still to be taken."""
    g = p.grad
    assert g is not None
    if isinstance(p, DTensor) and isinstance(g, DTensor) and g.placements != p.placements:
        return g.redistribute(placements=p.placements)
    return g


def refusal(p: Tensor, flatten: bool) -> str | None:
    """Why p cannot be stepped, and what to do instead; None if it can.

    FSDP1 and DeepSpeed ZeRO cut the concatenation of all weights into equal pieces, each a vector that has
    lost rows and columns: it would be stepped as a dense vector, or as a matrix of other weights' rows.
    """
    if getattr(p, "_fsdp_flattened", False):
        return f"is a flat piece of FSDP1 (FullyShardedDataParallel), which has no rows and columns; {REMEDY}"
    if any(getattr(p, name, None) is not None for name in ("ds_id", "ds_tensor", "_hp_mapping")):
        return f"is partitioned by DeepSpeed ZeRO, into flat pieces without rows and columns; {REMEDY}"
    if not isinstance(p, DTensor):
        if isinstance(p.grad, DTensor):
            return "is a plain tensor with a DTensor as its gradient; make it a DTensor"
        return None
    if p.grad is not None and not isinstance(p.grad, DTensor):
        return "is a DTensor with a plain tensor as its gradient; make that a DTensor of the same mesh"
    pixels = p.ndim > 3 or (p.ndim == 3 and flatten)
    for i, placement in enumerate(p.placements):
        if not isinstance(placement, Replicate | Shard | _StridedShard):
            return f"is placed as {placement!r}; weights can be replicated or sharded"
        dim = getattr(placement, "dim", 0)
        if pixels and dim > 1:
            return (
                f"is a convolution placed as {placement!r}; shard its outputs or its inputs, dimension 0 or 1"
            )
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
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            return f"a DTensor, {name!r}"
        if why := refusal(p, flatten=False):
            return f"{name!r}, which {why}"
    return processes()


def processes() -> str | None:
    """How many processes train together; None if this one is alone."""
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return f"{count} processes of torch.distributed" if count > 1 else None


def experts(p: Tensor, flatten: bool) -> Tensor:
    """Which of the matrices of p are held here, (E,)."""
    fused = p.ndim == 3 and not flatten
    held = torch.arange(p.shape[0] if fused else 1, device=local(p).device)
    if isinstance(p, DTensor) and fused:
        splits = [i for i, placement in enumerate(p.placements) if getattr(placement, "dim", None) == 0]
        for i in _outer_first(p.placements, splits):
            held = _chunk(held, p.device_mesh.size(i), p.device_mesh.get_local_rank(i))
    return held


def held(p: Tensor, flatten: bool, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what this process holds of a state tensor of p under its name and whole shape."""
    return _place(p, flatten, name, shape)[1] if isinstance(p, DTensor) else tuple(shape)


def place(p: Tensor, flatten: bool, name: str, value: Tensor) -> Tensor:
    """A loaded state tensor of p, whole or a DTensor, placed as `zeros` places it.

    Every process must hold the whole of one that is no DTensor. Any other is gathered: a collective.
    """
    if not isinstance(p, DTensor) or not value.shape:
        return value.full_tensor() if isinstance(value, DTensor) else value
    placements, _ = _place(p, flatten, name, value.shape)
    if isinstance(value, DTensor):
        if value.device_mesh == p.device_mesh and value.placements == tuple(placements):
            return value
        value = value.full_tensor()
    like = zeros(p, flatten, name, value.shape, value.dtype)
    part = local(like)
    for dim in range(value.ndim):
        splits = [i for i, placement in enumerate(placements) if getattr(placement, "dim", None) == dim]
        held = torch.arange(value.shape[dim])
        for i in _outer_first(placements, splits):
            held = _chunk(held, p.device_mesh.size(i), p.device_mesh.get_local_rank(i))
        value = value.index_select(dim, held.to(value.device))
    part.copy_(value)
    return like


def layout(p: Tensor) -> Hashable:
    """What same-shaped weights must share to be stepped as one batch."""
    return (p.device_mesh, p.placements) if isinstance(p, DTensor) else None


def shards(p: Tensor, flatten: bool) -> Shards:
    """How to sum over the shards of p."""
    return MeshShards(p, flatten) if isinstance(p, DTensor) else WHOLE


def zeros(p: Tensor, flatten: bool, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A state tensor of p under its name: zeros, sharded where it shares a dimension with p."""
    if not isinstance(p, DTensor):
        return torch.zeros(shape, dtype=dtype, device=p.device)
    if not shape:
        return torch.zeros((), dtype=dtype, device=p.to_local().device)
    placements, part_shape = _place(p, flatten, name, shape)
    part = torch.zeros(part_shape, dtype=dtype, device=p.to_local().device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


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
        self.spread_rows, self.spread_columns = (
            role in dict(self.splits).values() for role in (ROWS, COLUMNS)
        )

    def sum_rows(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sum over the processes that hold other rows, in one collective for each mesh dimension of them."""
        return self._sum([i for i, role in self.splits if role == ROWS], parts)

    def send_rows(self, *parts: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Start `sum_rows`; what is returned waits for it."""
        return self._send([i for i, role in self.splits if role == ROWS], parts)

    def sum_columns(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sum over the processes that hold other columns."""
        return self._sum([i for i, role in self.splits if role == COLUMNS], parts)

    def sum_all(self, x: Tensor) -> Tensor:
        """Sum over the processes that hold other parts of the same parameters."""
        return self._sum([i for i, _ in self.splits], (x,))[0]

    def gram(self, X: Tensor) -> Tensor:
        """X^T X of X (..., p, r) with its rows spread; only one triangle travels."""
        G = gram(X)
        i, j = torch.tril_indices(*G.shape[-2:], device=G.device)
        (packed,) = self.sum_rows(G[..., i, j])
        G[..., i, j] = packed
        G[..., j, i] = packed
        return G

    def rows(self, count: int, device: torch.device) -> Tensor:
        """Which rows of the whole are held here, (count,)."""
        held = self._held(ROWS)
        assert len(held) == count
        return held.to(device)

    def columns(self, count: int, device: torch.device) -> Tensor:
        """Which columns of the whole are held here, (count,)."""
        held = self._held(COLUMNS)
        assert len(held) == count
        return held.to(device)

    def size(self, p: int, q: int) -> tuple[int, int]:
        """Shape of a whole matrix."""
        return self.shape

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

    def _sum(self, dims: list[int], parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self._send(dims, parts)()

    def _send(self, dims: list[int], parts: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
        if not dims:
            return lambda: parts
        flat = torch.cat([part.reshape(-1) for part in parts])
        for i in dims[:-1]:
            dist.all_reduce(flat, group=self.mesh.get_group(i))
        last = dist.all_reduce(flat, group=self.mesh.get_group(dims[-1]), async_op=True)

        def receive() -> tuple[Tensor, ...]:
            last.wait()
            pieces = torch.split(flat, [part.numel() for part in parts])
            return tuple(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))

        return receive

    def _held(self, role: str, coordinates: Mapping[int, int] | None = None) -> Tensor:
        """Indices of the rows or columns held here, or where `coordinates` (mesh dimension -> one) say."""
        total, inner = (self.shape[0], 1) if role == ROWS else (self.shape[1], self.inner)
        held = torch.arange(total).view(-1, inner)
        if coordinates is None:
            coordinates = {i: self.mesh.get_local_rank(i) for i, _ in self.splits}
        for i, split in self.splits:
            if split == role and i in coordinates:
                held = _chunk(held, self.mesh.size(i), coordinates[i])
        return held.reshape(-1)


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
