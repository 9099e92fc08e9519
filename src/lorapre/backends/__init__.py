"""Compiled kernels for `lorapre.gradient.Gradient`: in C for CPUs, in Triton for GPUs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorapre.backends import library
from lorapre.gradient import Gradient


def backend(
    weights: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[type[Gradient], str | None]:
    """The kind of Gradient for these weights, and why it is torch's where another should be.

    Weights in float64 take torch's operations, which keep their precision.
    """
    if not weights or torch.compiler.is_compiling() or weights[0].dtype == torch.float64:
        return Gradient, None
    if weights[0].is_cuda:
        from lorapre.backends import triton  # loads a compiler

        reason = triton.why_not(weights, grads)
        kind: type[Gradient] = triton.TritonGradient
    elif weights[0].is_cpu and library.loaded() is not None:
        from lorapre.backends import c

        reason, kind = c.why_not(weights, grads), c.CGradient
    else:
        return Gradient, None
    if reason is None:
        return kind, None
    return Gradient, f"steps some weights without compiled kernels, slower: {reason}"
