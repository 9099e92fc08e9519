"""Update each weight inside the backward pass, once its gradient is complete, and free that.

A tensor without memory takes the gradient's place until `zero_grad()`. It raises when it is used:
code that needs all gradients together, or those of several backward passes, fails at once.
"""

import contextlib
import math
import numbers
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lorapre import sharding
from lorapre.groups import names_of
from lorapre.linalg import exact_products
from lorapre.optimizers import LoRAPreOptimizer

__all__ = ["GradientRelease", "gradient_release"]


class GradientRelease:
    """Handle of `gradient_release`; as a context manager it removes itself at the end."""

    def __init__(
        self, optimizer: LoRAPreOptimizer, updates: Sequence[tuple[Tensor, "_Update"]]
    ) -> None:
        self._optimizer, self._updates = optimizer, updates
        self._hooks: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(update)  # type: ignore[no-untyped-call]
            for p, update in updates
        ]

    def remove(self) -> None:
        """Leave the gradients to `optimizer.step()` again, and clear what the last ones left."""
        for hook in self._hooks:
            hook.remove()
        for p, _ in self._updates:
            if isinstance(p.grad, Released):
                p.grad = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context backward passes update nothing and leave gradients as usual.

        Use it for a loss that passes through this model but trains another one. An example is the
        generator of a GAN, whose loss passes through the discriminator. Clear these gradients
        (`zero_grad()`) before the next step.
        """
        for _, update in self._updates:
            update.resting = True
        try:
            yield
        finally:
            for _, update in self._updates:
                update.resting = False

    def __enter__(self) -> "GradientRelease":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def gradient_release(
    model: nn.Module, optimizer: LoRAPreOptimizer, max_norm: float | None = None
) -> GradientRelease:
    """Update every weight inside the backward pass, and free its gradient.

    Training loops keep their form: `optimizer.step()` finds nothing to do, schedulers, closures,
    checkpoints and `coverage` work as before. A backward pass takes the learning rates that the
    groups have then.

    Whatever needs the gradients of several backward passes, or of all weights at once, raises a
    RuntimeError: accumulating gradients, retaining a graph, clipping by the global norm or by
    value, GradScaler (after one update by scaled gradients), a weight in more than one reentrant
    checkpoint. Weights that are frozen now, or not in `optimizer`, keep their gradients;
    `optimizer.step()` updates those of them that are in it.

    Args:
        model: trained on this process alone: DistributedDataParallel, FSDP and tensor parallelism
            are refused.
        optimizer: `LoRAPreAdamW` or `LoRAPreMuon`, whose parameters are the model's.
        max_norm: scale the gradient of each weight down to this norm before its update, as
            `torch.nn.utils.clip_grad_norm_` does for one weight. Not the same as clipping them all
            together.

    Returns:
        A handle with `remove()`.

    Raises:
        TypeError: `model` or `optimizer` is something else, for instance accelerate's wrapper.
        ValueError: an argument is out of range, a parameter of the optimizer is not the model's or
            is updated in the backward pass already, or the model is spread over processes. Nothing
            has changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, LoRAPreOptimizer):
        raise TypeError(
            "optimizer must be a LoRAPreAdamW or LoRAPreMuon itself, before anything wraps it, got "
            f"{type(optimizer).__name__}"
        )
    positive = isinstance(max_norm, numbers.Real) and 0 < max_norm < math.inf
    if max_norm is not None and not positive:
        raise ValueError(f"max_norm must be a finite number > 0 or None, but is {max_norm!r}")
    if what := sharding.spread(model):
        raise ValueError(
            f"model must be on this process alone for gradient_release, but has {what}"
        )
    name_of = {p: name for name, p in model.named_parameters()}
    updates: list[tuple[Tensor, _Update]] = []
    for group in optimizer.param_groups:
        for p, called in zip(group["params"], names_of(group), strict=True):
            if p not in name_of:
                shape = tuple(p.shape)
                raise ValueError(f"optimizer: {called}, of shape {shape}, is not one of model's")
            name, hooks = name_of[p], p._post_accumulate_grad_hooks or {}
            if any(isinstance(hook, _Update) for hook in hooks.values()):
                what = f"optimizer: {name!r} is updated in the backward pass already"
                raise ValueError(f"{what}; remove() that handle first")
            if p.requires_grad:
                updates.append((p, _Update(weakref.ref(optimizer), name, max_norm)))
    return GradientRelease(optimizer, updates)


@dataclass
class _Update:
    """The hook of one weight."""

    optimizer: Callable[[], LoRAPreOptimizer | None]  # weak: Python frees no cycle through a hook
    name: str
    max_norm: float | None
    resting: bool = False

    def __call__(self, p: Tensor) -> None:
        optimizer = self.optimizer()
        if p.grad is None or self.resting:
            return
        if optimizer is None:
            raise RuntimeError("gradient_release: the optimizer is gone; keep it, or the handle")
        if p.grad.requires_grad:
            raise RuntimeError(
                "gradient_release: backward(create_graph=True) needs the gradients later on"
            )
        if what := sharding.processes():
            raise RuntimeError(
                f"gradient_release: {self.name!r} must be on this process alone, but has {what}"
            )
        # Groups can be added, removed and reordered in a run.
        places = ((group, q) for group in optimizer.param_groups for q in group["params"])
        found = next(((i, group) for i, (group, q) in enumerate(places) if q is p), None)
        if found is None:  # it has been taken out, and trains no longer
            return
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_([p], self.max_norm)
        position, group = found
        group = {**group, "params": [p], "param_names": [self.name], "matrices": False}
        with torch.no_grad(), exact_products(p.device):
            for batch in optimizer._batches([(group, [position])]):
                optimizer._update(batch)
        p.grad = Released(p, self.name)


class Released(Tensor):
    """Stands for a gradient that has been used: its shape, type and device, but no memory.

    Setting it to zero removes it. Every other operation raises, with one exception: transformers'
    Trainer calls `clip_grad_norm_` with an infinite `max_norm` for its log. The norm is infinite
    too. So the factor is inf / inf, which changes nothing, but 0 for a finite `max_norm`, which
    raises.
    """

    lorapre_released = True  # `optimizers` recognises it by this
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    parameter: Callable[[], Tensor | None]
    weight: str  # its name

    @staticmethod
    def __new__(cls, p: Tensor, name: str) -> "Released":
        """The stand-in for the gradient of p."""
        made: Released = Tensor._make_wrapper_subclass(cls, p.shape, dtype=p.dtype, device=p.device)
        made.parameter, made.weight = weakref.ref(p), name
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operation = func._schema.name.removeprefix("aten::")
        released = [x for x in tree_leaves((args, kwargs)) if isinstance(x, cls)]
        if operation in ("zero_", "_foreach_zero_"):  # zero_grad(set_to_none=False)
            for x in released:
                if (p := x.parameter()) is not None and p.grad is x:
                    p.grad = None
            return args[0]
        if operation == "linalg_vector_norm" and len(args) < 3:  # of all elements
            return torch.full((), math.inf, dtype=args[0].dtype, device=args[0].device)
        if operation == "mul_" and isinstance(args[1], Tensor) and args[1].isnan():
            return args[0]
        remedy = next((text for part, text in _REMEDIES.items() if part in operation), _OTHERWISE)
        raise RuntimeError(
            f"gradient_release has updated {released[0].weight!r} in the backward pass and freed "
            f"its gradient, which {operation} needs. {remedy}"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Released(gradient of {self.weight!r}, used in the backward pass)"

    def __deepcopy__(self, memo: Any) -> None:
        """The copy of a weight has no gradient."""


_REMEDIES = {  # by part of the name of an operation
    "add": "A second backward pass needs zero_grad() before it: gradients cannot be accumulated, "
    "nor a graph be retained. Use larger batches and gradient_accumulation_steps=1.",
    "_amp_": "GradScaler cannot be used: the update by the scaled gradient is done. Train in "
    "bfloat16.",
    **dict.fromkeys(
        ("norm", "mul", "clamp"),
        "Gradients cannot be clipped after the update: gradient_release(..., max_norm=...) clips "
        "each one before. In transformers set max_grad_norm=0.",
    ),
}
_OTHERWISE = (
    "Call zero_grad() first, read gradients in a hook that is registered before, or remove() "
    "the handle."
)
