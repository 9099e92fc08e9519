"""The primitives of `lorapre.gradient.Gradient` as compiled kernels: in C for CPUs, in Triton for GPUs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorapre.backends import library
from lorapre.gradient import Gradient


def backend(
    weights: Sequence[Tensor], grads: Sequence[Tensor], *, low_rank: bool
) -> tuple[type[Gradient], str | None]:
    """The kind of Gradient that steps these weights, and why it is torch's where another should."""
    if not weights or torch.compiler.is_compiling() or weights[0].dtype == torch.float64:
        return Gradient, None
    if weights[0].device.type == "cpu" and library.loaded() is not None:
        from lorapre.backends import c

        reason = c.why_not(weights, grads)
        return (c.CGradient, None) if reason is None else (Gradient, reason)
    return Gradient, None
