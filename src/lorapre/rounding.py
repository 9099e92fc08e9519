"""Stochastic rounding of float32 to bfloat16, with which the smallest updates count.

The noise is a hash of the element and a key: no generator, no state, no wait for the device, the
    same on
every device, for every sharding and after every resume. All arithmetic is that of 32-bit integers,
modulo 2**32: torch has it for int32, in which only the right shift differs, and there the sign is
    masked away.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.bfloat16).max
GOLDEN = 0x9E3779B1


def keys(seed: int, positions: Sequence[int], steps: Sequence[Tensor], experts: Tensor) -> Tensor:
    """The keys of the matrices of n weights at a step, (n E,) int64 in [0, 2**32).

    Args:
        seed: the group's.
        positions: of the weights among all parameters of the optimizer.
        steps: n scalars on the device, the steps counted in the state, this one included.
        experts: (E,), which of its matrices a weight holds here; zero of an ordinary one.
    """
    t = torch.stack(list(steps)).to(torch.int32)
    # A tensor made of a list would wait for the device to copy it there; scalars of a kernel do
    # not.
    position = torch.stack(torch._foreach_add(torch._foreach_mul(list(steps), 0), list(positions)))
    key = torch.zeros_like(t)
    for part in (_signed(seed), _signed(seed >> 32), position.to(torch.int32), t):
        key = _mix(key + part)
    return _mix(key[:, None] + experts.to(torch.int32)).view(-1).long() & 0xFFFFFFFF


def noise(key: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """16 random bits for each element, (N, rows, columns) int32 in [0, 2**16).

    Args:
        key: (N,), one for each matrix.
        rows: their indices in the whole matrix.
        columns: likewise.
        width: columns of the whole matrix.
    """
    index = _int32(rows * width)[:, None] + _int32(columns)
    return _mix(index.mul_(_signed(GOLDEN)) ^ _int32(key)[:, None, None]).bitwise_and_(0xFFFF)


def round_(x: Tensor, key: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Round x (N, rows, columns), float32, in place to a neighbour among the bfloat16 numbers.

    It goes up with the probability that makes the mean x, and stays if it is one of them. Infinity
    and NaN stay too. A finite number never becomes infinite: beyond the largest bfloat16 it becomes
    that.

    Args:
        x: overwritten.
        key: (N,), of `keys`.
        rows: indices of the rows in the whole matrix, so that a shard or a tile is rounded as the
            whole is.
        columns: likewise.
        width: columns of the whole matrix.
    """
    sums = noise(key, rows, columns, width).add_(x.view(torch.int32)).bitwise_and_(-0x10000)
    # The sums of what is finite are numbers or, by a carry, infinity; those of NaN can be anything.
    rounded = sums.view(torch.float32).clamp_(-LARGEST, LARGEST)
    return torch.where(x.isfinite(), rounded, x, out=x)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers without visible structure, in place."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _int32(x: Tensor) -> Tensor:
    """The lower 32 bits of int64."""
    return x.to(torch.int32)


def _signed(x: int) -> int:
    """The lower 32 bits of a number, as int32 has them."""
    return (x + 2**31) % 2**32 - 2**31
