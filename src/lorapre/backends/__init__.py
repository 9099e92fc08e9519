"""The three primitives of `lorapre.gradient.Gradient` as compiled kernels: in C for CPUs, in Triton for GPUs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorapre.backends import library
from lorapre.gradient import Gradient


def backend(weights: Sequence[Tensor], grads: Sequence[Tensor], *, low_rank: bool) -> tuple[type[Gradient], str | None]:
    """The kind of Gradient that steps these weights."""
    return Gradient, None
