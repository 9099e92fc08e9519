"""LoRA-Pre in `transformers.Trainer` and its subclasses, such as `trl.SFTTrainer`.

Since transformers 5.2 the Trainer calls a factory of optimizers with the model
(`Trainer.create_optimizer`, `trainer_optimizer.is_optimizer_factory`). A class would get two groups
of nameless parameters.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from lorapre.groups import param_groups
from lorapre.optimizers import LoRAPreAdamW, LoRAPreMuon, LoRAPreOptimizer
from lorapre.report import coverage

__all__ = ["StatsCallback", "lorapre_adamw", "lorapre_muon"]

# A child of transformers' logger: the Trainer sets its level from log_level, log_level_replica.
_logger = logging.get_logger("transformers.lorapre")


class StatsCallback(TrainerCallback):
    """Log `optimizer.stats()` behind every loss: `trainer.add_callback(StatsCallback(trainer))`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_log(self, *args: Any, logs: Any = None, optimizer: Any = None, **more: Any) -> None:
        """Log the numbers behind a loss."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        stats = optimizer.stats() if isinstance(optimizer, LoRAPreOptimizer) else {}
        if stats and "loss" in logs:
            self.trainer.log({f"lorapre/{name}": float(x) for name, x in stats.items()})


def lorapre_adamw(args: TrainingArguments, **options: Any) -> tuple[Any, dict[str, Any]]:
    """`LoRAPreAdamW` for the Trainer: `optimizer_cls_and_kwargs=lorapre_adamw(args, rank=8)`.

    Of `args`, both the factorised weights and the dense ones take learning_rate, adam_beta1,
    adam_beta2, adam_epsilon and weight_decay, the last without norms and biases, as in the Trainer.
    They are read when the Trainer makes the optimizer, so that each trial of a hyperparameter
    search has its own. `lorapre.coverage` of the optimizer is logged at level INFO:
    `log_level="info"` shows it.

    Args:
        args: the Trainer's. `optim`, `optim_args` and `optim_target_modules` have no effect, as
            with any `optimizer_cls_and_kwargs`.
        options: of `lorapre.param_groups` (rank, ends, rules, strict), and of `LoRAPreAdamW`
            (scale, variant, lr, betas, ...); the latter override `args`.

    Returns:
        The value for the Trainer's `optimizer_cls_and_kwargs`.

    Raises:
        TypeError: there is no such option.
        ValueError: as in `lorapre.param_groups` and the optimizer, when the Trainer makes it.

    Warns:
        UserWarning: as in `lorapre.param_groups`; or the Trainer has a loss with parameters of its
            own, as in sentence-transformers, which are left out. With `strict` that is an error.
    """
    return _for_trainer(LoRAPreAdamW, lambda: _adam_options(args), options)


def lorapre_muon(args: TrainingArguments, **options: Any) -> tuple[Any, dict[str, Any]]:
    """`LoRAPreMuon` for the Trainer; warnings are those of `lorapre_adamw`.

    Of `args`, learning_rate and weight_decay reach both routes, as lr, adamw_lr, weight_decay and
    adamw_weight_decay; adam_beta1, adam_beta2 and adam_epsilon reach the dense weights, which take
    AdamW. `args` have no momentum for Muon: give `momentum`. With `adjust_lr_fn="match_rms_adamw"`
    one learning rate serves both routes. Without it Muon usually needs a larger one than AdamW:
    give `lr`, and the dense weights stay at learning_rate.

    Args:
        args: as in `lorapre_adamw`.
        options: of `lorapre.param_groups` and of `LoRAPreMuon`; the latter override `args`.

    Returns:
        The value for the Trainer's `optimizer_cls_and_kwargs`.

    Raises:
        TypeError: as in `lorapre_adamw`.
        ValueError: as in `lorapre_adamw`.
    """

    def from_args() -> dict[str, Any]:
        dense = _adam_options(args)
        both = {name: dense[name] for name in ("lr", "weight_decay")}
        return both | {f"adamw_{name}": value for name, value in dense.items()}

    return _for_trainer(LoRAPreMuon, from_args, options)


def _adam_options(args: TrainingArguments) -> dict[str, Any]:
    return dict(
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )


def _for_trainer(
    cls: type[LoRAPreAdamW] | type[LoRAPreMuon],
    from_args: Callable[[], dict[str, Any]],
    options: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    names = options.keys() & inspect.signature(param_groups).parameters
    routes = {name: options.pop(name) for name in names}
    inspect.signature(cls).bind([], **options)  # a mistyped option shows before data are loaded

    def build(model: nn.Module, **options: Any) -> LoRAPreOptimizer:
        optimizer = cls(param_groups(model, **routes), **from_args() | options)
        _logger.info("%s\n%s", cls.__name__, coverage(optimizer))
        # The Trainer calls this in a method, and hands over its model but not itself.
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]
        trainer = caller.f_locals.get("self") if caller is not None else None
        if names := _left_out(getattr(trainer, "loss", None), optimizer):
            problem = (
                "parameters of the Trainer's loss are not the model's and would not be trained: "
                f"{', '.join(names)}. Give the Trainer optimizers=({cls.__name__}(param_groups("
                "loss, rank=...), ...), None) instead of optimizer_cls_and_kwargs"
            )
            if routes.get("strict"):
                raise ValueError(problem)
            warnings.warn(problem, stacklevel=2)
        return optimizer

    return lambda: build, options  # the Trainer calls (lambda: build)()(model, **options)


def _left_out(loss: object, optimizer: LoRAPreOptimizer) -> list[str]:
    """Trainable parameters of a loss, or of a dict of losses, that the optimizer does not have."""
    grouped = {p for group in optimizer.param_groups for p in group["params"]}
    losses = list(loss.values()) if isinstance(loss, dict) else [loss]
    modules = [module for module in losses if isinstance(module, nn.Module)]
    parameters = [item for module in modules for item in module.named_parameters()]
    return [name for name, p in parameters if p.requires_grad and p not in grouped]
