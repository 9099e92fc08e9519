"""Stochastic rounding of float32 to bfloat16: updates below its precision count on average.

The noise is a hash of the element and a key. It needs no generator, no state and no wait for the
device, and it is the same on every device, for every sharding and after every resume. All
arithmetic is on unsigned 32-bit integers, modulo 2**32. torch's int32 gives the same bits, except
that its right shift copies the sign bit; the copies are masked away.
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
        positions: of the n weights among all parameters of the optimizer.
        steps: n scalars on the device: the steps of each weight so far, with this one.
        experts: (E,), indices of the local matrices of a weight; one zero for a plain weight.
    """
    t = torch.stack(list(steps)).to(torch.int32)
    # A tensor made of a list waits for the copy to the device; scalars of a kernel do not.
    position = torch.stack(torch._foreach_add(torch._foreach_mul(list(steps), 0), list(positions)))
    key = torch.zeros_like(t)
    for part in (_signed(seed), _signed(seed >> 32), position.to(torch.int32), t):
        key = _mix(key + part)
    return _mix(key[:, None] + experts.to(torch.int32)).view(-1).long() & 0xFFFFFFFF


def noise(key: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """16 random bits for each element, (N, rows, columns) int32 in [0, 2**16).

    Args:
        key: (N,), one for each matrix.
        rows: the indices of the rows in the whole matrix.
        columns: those of the columns.
        width: columns of the whole matrix.
    """
    # A conversion of int64 to int32 keeps the lower 32 bits.
    index = (rows * width).to(torch.int32)[:, None] + columns.to(torch.int32)
    key = key.to(torch.int32)[:, None, None]
    return _mix(index.mul_(_signed(GOLDEN)) ^ key).bitwise_and_(0xFFFF)


def round_(x: Tensor, key: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Round x (N, rows, columns), float32, in place to a neighbour among the bfloat16 numbers.

    A number goes up with the probability that makes the mean x. A bfloat16 number, infinity and NaN
    stay as they are. A finite number stays finite: above the largest bfloat16 it becomes that one.

    The other arguments are those of `noise`. Rows and columns count in the whole matrix, so a shard
    or a tile is rounded as it would be as a part of the whole.
    """
    sums = noise(key, rows, columns, width).add_(x.view(torch.int32)).bitwise_and_(-0x10000)
    # The addition can carry: a finite number becomes infinite, and NaN becomes any number.
    rounded = sums.view(torch.float32).clamp_(-LARGEST, LARGEST)
    return torch.where(x.isfinite(), rounded, x, out=x)


def indices(places: range | Tensor, device: torch.device) -> Tensor:
    """The rows or columns that a gradient holds, as `round_` takes them."""
    if isinstance(places, Tensor):
        return places.to(device)
    return torch.arange(places.start, places.stop, device=device)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers without visible structure, in place."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _signed(x: int) -> int:
    """The lower 32 bits of a number, as int32 reads them."""
    return (x + 2**31) % 2**32 - 2**31
