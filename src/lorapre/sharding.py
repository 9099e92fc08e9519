"""What the library needs to know of weights that are spread over processes as DTensors.

Here is what holds for plain tensors too; `lorapre.mesh` has the rest. It is imported when a DTensor is met:
torch.distributed.tensor takes a second to load.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorapre.gradient import WHOLE, Shards

REMEDY = "shard the model with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps the matrices"


def is_spread(x: object) -> bool:
    """Whether x is a DTensor."""
    return isinstance(x, Tensor) and hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """The shard of x that this process holds; x itself where it is no DTensor."""
    return x.to_local() if is_spread(x) else x  # type: ignore[no-any-return, operator]


def gradient(p: Tensor) -> Tensor:
    """The gradient of p, placed as p is: tensor parallelism may leave it as sums still to be taken."""
    g = p.grad
    assert g is not None
    if is_spread(p) and g.placements != p.placements:  # type: ignore[attr-defined]
        return g.redistribute(placements=p.placements)  # type: ignore[attr-defined, no-any-return]
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
    if not is_spread(p):
        if is_spread(p.grad):
            return "is a plain tensor with a DTensor as its gradient; make it a DTensor"
        return None
    if p.grad is not None and not is_spread(p.grad):
        return "is a DTensor with a plain tensor as its gradient; make that a DTensor of the same mesh"
    return _mesh().refusal(p, flatten)


def spread(model: nn.Module) -> str | None:
    """What spreads the training of a model over processes; None if nothing does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return _mesh().spread(model)
    return None


def processes() -> str | None:
    """How many processes train together; None if this one is alone."""
    dist = torch.distributed
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return f"{count} processes of torch.distributed" if count > 1 else None


def shards(p: Tensor, flatten: bool) -> Shards:
    """How to sum over the shards of p."""
    return _mesh().MeshShards(p, flatten) if is_spread(p) else WHOLE


def layout(p: Tensor) -> Hashable:
    """What same-shaped weights must share to be stepped as one batch."""
    return (p.device_mesh, p.placements) if is_spread(p) else None  # type: ignore[attr-defined]


def experts(p: Tensor, flatten: bool) -> Tensor:
    """Which of the matrices of p are held here, (E,)."""
    if is_spread(p):
        return _mesh().experts(p, flatten)
    return torch.arange(p.shape[0] if p.ndim == 3 and not flatten else 1, device=p.device)


def zeros(p: Tensor, flatten: bool, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A state tensor of p under its name: zeros, sharded where it shares a dimension with p."""
    if is_spread(p):
        return _mesh().zeros(p, flatten, name, shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=p.device)


def held(p: Tensor, flatten: bool, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what this process holds of a state tensor of p under its name and whole shape."""
    return _mesh().held(p, flatten, name, shape) if is_spread(p) else tuple(shape)


def place(p: Tensor, flatten: bool, name: str, value: Tensor) -> Tensor:
    """A loaded state tensor of p, whole or a DTensor, placed as `zeros` places it.

    Every process must hold the whole of one that is no DTensor. Any other is gathered: a collective.
    """
    if is_spread(p) and value.shape:
        return _mesh().place(p, flatten, name, value)
    return value.full_tensor() if is_spread(value) else value  # type: ignore[no-any-return, operator]


def _mesh() -> Any:
    from lorapre import mesh

    return mesh
