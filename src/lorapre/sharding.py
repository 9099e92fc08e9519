"""Weights spread over processes as DTensors, by FSDP2, HSDP or tensor parallelism.

Plain tensors pass through. The factors of a DTensor follow it: B is sharded where its rows are, A
where its columns are. All arithmetic runs on local shards. Small matrices, B^T g (r, q) and
B^T B (r, r) or their mirror images, are summed over the processes that hold the other rows or
columns. No matrix is gathered. Newton-Schulz needs whole ones: each process is dealt its share of
them.

torch.distributed.tensor takes a second to import, so that waits for the first DTensor.
"""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

REMEDY = "shard the model with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps the matrices"
# The dimensions of factors and means: experts e, rows p, columns q, rank r.
STATE_DIMS = {"B": "epr", "A": "erq", "row": "ep", "col": "eq"}


class Shards:
    """The part of some whole matrices that a process holds: here all of them."""

    count = 1  # processes that hold parts of the same parameters

    def size(self, p: int, q: int) -> tuple[int, int]:
        """Size of a whole matrix whose local part is (p, q)."""
        return p, q

    def rows(self, p: int) -> range | Tensor:
        """Which rows of the whole the p local ones are."""
        return range(p)

    def columns(self, q: int) -> range | Tensor:
        """Which columns of the whole the q local ones are."""
        return range(q)

    def sum(self, x: Tensor, letters: str) -> Tensor:
        """Sum over the processes that hold other experts (e), rows (p) or columns (q)."""
        return x

    def whole(self, function: Callable[[Tensor], Tensor], M: Tensor) -> Tensor:
        """The local part of `function` of whole matrices, whose local part is M (N, p, q)."""
        return function(M)


WHOLE = Shards()


class _MeshShards(Shards):
    """The part of the matrices of a DTensor.

    Attributes:
        dims: letters of the dimensions of the DTensor, see `_dims`.
        splits: (mesh dimension, letter of what it splits), the outer split first.
        ranks: the ranks of this process, by mesh dimension.
    """

    def __init__(self, p: Any, flatten: bool) -> None:
        self.mesh, self.shape, self.dims = p.device_mesh, p.shape, _dims(p.ndim, flatten)
        sizes = list(zip(self.dims, p.shape, strict=True))
        self.p = math.prod(n for letter, n in sizes if letter == "p")
        self.q = math.prod(n for letter, n in sizes if letter in "qk")
        # A strided shard splits what the other shards of its dimension have left.
        placements = sorted(enumerate(p.placements), key=lambda x: getattr(x[1], "split_factor", 0))
        self.splits = [
            (i, self.dims[placement.dim])
            for i, placement in placements
            if not placement.is_replicate() and self.mesh.size(i) > 1
        ]
        self.ranks = {i: self.mesh.get_local_rank(i) for i, _ in self.splits}
        self.count = math.prod(self.mesh.size(i) for i in self.ranks)

    def size(self, p: int, q: int) -> tuple[int, int]:
        return self.p, self.q

    def rows(self, p: int) -> range | Tensor:
        return _as_range(self.places("p", self.p))

    def columns(self, q: int) -> range | Tensor:
        return _as_range(self.places("q", self.q))

    def sum(self, x: Tensor, letters: str) -> Tensor:
        mesh_dims = [i for i, letter in self.splits if letter in letters]
        x = x.contiguous() if mesh_dims else x
        for i in mesh_dims:
            dist.all_reduce(x, group=self.mesh.get_group(i))
        return x

    def whole(self, function: Callable[[Tensor], Tensor], M: Tensor) -> Tensor:
        for depth, (_, letter) in enumerate(self.splits):
            if letter != "e":
                function = functools.partial(self._deal, depth, function)
        return function(M)

    def _deal(self, depth: int, function: Callable[[Tensor], Tensor], M: Tensor) -> Tensor:
        """`whole` for matrices that are split up to this depth, and whole in the splits below.

        All-to-all deals the N matrices out over the n processes of the split. Another one deals the
        results back.
        """
        i, letter = self.splits[depth]
        group, n, dim = self.mesh.get_group(i), self.mesh.size(i), "epq".index(letter)
        total = self.p if letter == "p" else self.q
        outer = {j: self.ranks[j] for j, _ in self.splits[:depth]}
        lengths = [len(self.places(letter, total, {**outer, i: rank})) for rank in range(n)]
        hands = M.tensor_split(n)
        own = hands[self.ranks[i]].shape
        parts = _exchange(hands, [(*own[:dim], x, *own[dim + 1 :]) for x in lengths], group)
        result = torch.split(function(torch.cat(parts, dim)), lengths, dim)
        return torch.cat(_exchange(result, [hand.shape for hand in hands], group))

    def places(
        self, letter: str, total: int, ranks: Mapping[int, int] | None = None, device: Any = "cpu"
    ) -> Tensor:
        """Which indices of a dimension are local.

        Args:
            letter: the dimension.
            total: its size. The columns of a convolution, inputs times pixels, are split by inputs.
            ranks: those of another process. A split that they leave out does not count.
            device: where the result lies.
        """
        ranks = self.ranks if ranks is None else ranks
        places = torch.arange(total, device=device)
        splits = [i for i, split in self.splits if split == letter and i in ranks]
        if splits:
            size = self.shape[self.dims.index(letter)]
            places = places.view(-1, max(1, total // max(1, size)))
        for i in splits:
            chunks = places.chunk(self.mesh.size(i))  # as DTensor does: the last ones may get none
            places = chunks[ranks[i]] if ranks[i] < len(chunks) else places[:0]
        return places.reshape(-1)


def _as_range(places: Tensor) -> range | Tensor:
    """Increasing places, as a range where they have no gaps."""
    if not len(places):
        return range(0)
    first, last = int(places[0]), int(places[-1])
    return range(first, last + 1) if last - first < len(places) else places


def _exchange(
    parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: dist.ProcessGroup
) -> list[Tensor]:
    """Send one part to every process of the group, receive one of each shape."""
    sizes = [math.prod(shape) for shape in shapes]
    sent = torch.cat([part.reshape(-1) for part in parts])
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=group)
    return [x.view(*shape) for x, shape in zip(torch.split(received, sizes), shapes, strict=True)]


def _dims(ndim: int, flatten: bool, name: str = "exp_avg") -> str:
    """The dimensions of a state tensor, as letters; those of `exp_avg` are the weight's.

    A vector is one row. k are the pixels of a convolution.
    """
    kind = name.rpartition("_")[2]
    if kind in STATE_DIMS:
        return STATE_DIMS[kind][-ndim:]
    if ndim < 2:
        return "q" * ndim
    return "epq" if ndim == 3 and not flatten else "pq" + "k" * (ndim - 2)


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

    FSDP1 and DeepSpeed ZeRO cut the concatenation of all weights into equal pieces. Such a vector
    has lost its rows and columns. It would be stepped as a dense vector, or as a matrix made of
    other weights' rows.
    """
    if getattr(p, "_fsdp_flattened", False):
        return f"is a flat piece of FSDP1; {REMEDY}"
    if any(getattr(p, name, None) is not None for name in ("ds_id", "ds_tensor", "_hp_mapping")):
        return f"is partitioned by DeepSpeed ZeRO, into flat pieces; {REMEDY}"
    if p.grad is not None and is_spread(p.grad) != is_spread(p):
        return "and its gradient are a DTensor and a plain tensor; make both DTensors of one mesh"
    pixels = p.ndim > 3 or (p.ndim == 3 and flatten)
    for i, placement in enumerate(p.placements if is_spread(p) else ()):
        dim = getattr(placement, "dim", None)
        if dim is None and not placement.is_replicate():
            return f"is placed as {placement!r}; weights can be replicated or sharded"
        if pixels and dim is not None and dim > 1:
            return f"is a convolution placed as {placement!r}; shard its outputs or its inputs"
        # The columns of A, inputs times pixels, must split where a DTensor of their number does.
        inputs, n = p.shape[1:2], p.device_mesh.size(i)
        if pixels and dim == 1 and inputs[0] % n:
            return f"is a convolution with {inputs[0]} inputs on {n} processes; shard its outputs"
    return None


def spread(model: nn.Module) -> str | None:
    """What spreads the training of a model over processes; None if nothing does."""
    names = [name for name, p in model.named_parameters() if is_spread(p)]
    if not names and not processes():
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import

    kinds = (nn.parallel.DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
    for module in model.modules():
        for kind in kinds:
            if isinstance(module, kind):
                return f"a module of torch's {kind.__name__}"
    return f"a DTensor, {names[0]!r}" if names else processes()


def processes() -> str | None:
    """How many processes train together; None if this one is alone."""
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return f"{count} processes of torch.distributed" if count > 1 else None


def shards(p: Tensor, flatten: bool) -> Shards:
    """Which part of the matrices of p is local."""
    return _MeshShards(p, flatten) if is_spread(p) else WHOLE


def layout(p: Any) -> Hashable:
    """What same-shaped weights must share to be stepped as one batch."""
    return (p.device_mesh, p.placements) if is_spread(p) else None


def experts(p: Any, flatten: bool) -> Tensor:
    """Which of the matrices of p are local, (E,)."""
    total, device = p.shape[0] if p.ndim == 3 and not flatten else 1, local(p).device
    if not is_spread(p):
        return torch.arange(total, device=device)
    return _MeshShards(p, flatten).places("e", total, device=device)


def zeros(p: Any, flatten: bool, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A state tensor of p under its name: zeros, sharded where it shares a dimension with p."""
    part = torch.zeros(local_shape(p, flatten, name, shape), dtype=dtype, device=local(p).device)
    if not is_spread(p) or not shape:
        return part
    return _joined(p, part, _placement(p, flatten, name, shape)[0], shape)


def local_shape(p: Tensor, flatten: bool, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the local part of a state tensor of p."""
    return tuple(map(len, _placement(p, flatten, name, shape)[1])) if is_spread(p) else tuple(shape)


def place(p: Any, flatten: bool, name: str, value: Any) -> Any:
    """A loaded state tensor of p, whole or a DTensor, placed as `zeros` places it.

    Every process must hold the whole of a plain tensor. A DTensor with other placements is
    gathered, which is a collective.
    """
    shape = value.shape
    sharded = is_spread(p) and len(shape) > 0
    placements, places = _placement(p, flatten, name, shape) if sharded else ((), [])
    if is_spread(value):
        if sharded and (value.device_mesh, value.placements) == (p.device_mesh, placements):
            return value
        value = value.full_tensor()
    for dim, chosen in enumerate(places):
        value = value.index_select(dim, chosen.to(value.device))
    return _joined(p, value, placements, shape) if sharded else value


def _placement(
    p: Any, flatten: bool, name: str, shape: Sequence[int]
) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Placements of a state tensor of p, and which indices of each dimension are local."""
    from torch.distributed.tensor import Replicate

    mesh, dims, placements = _MeshShards(p, flatten), _dims(len(shape), flatten, name), []
    for placement in p.placements:
        dim = -1 if placement.is_replicate() else dims.find(mesh.dims[placement.dim])
        strided = hasattr(placement, "split_factor")
        options = {"split_factor": placement.split_factor} if strided else {}
        placements.append(Replicate() if dim < 0 else type(placement)(dim, **options))
    return tuple(placements), [mesh.places(x, n) for x, n in zip(dims, shape, strict=True)]


def _joined(p: Any, part: Tensor, placements: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """The DTensor of a shape of which this process holds `part`."""
    stride = torch.empty(shape, device="meta").stride()
    joined: Tensor = p.from_local(
        part, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return joined
