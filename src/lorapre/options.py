"""The options of the constructors: conversion to plain types, and an error for a wrong value."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorapre import sharding
from lorapre.variants import ADAM, FOLLOW

SEQUENCES = ("betas", "adamw_betas", "ns_coefficients")
INTEGERS = ("rank", "seed", "ns_steps")


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with tuples for sequences of numbers, and int for integers of other libraries.

    Libraries for configurations have their own types, which must not get into checkpoints.
    """
    result = dict(options)
    for name, value in options.items():
        if name in SEQUENCES and isinstance(value, Sequence) and not isinstance(value, str):
            result[name] = tuple(float(x) if isinstance(x, numbers.Real) else x for x in value)
        elif name in INTEGERS and isinstance(value, numbers.Integral):
            result[name] = value if isinstance(value, bool) else int(value)
    return result


def check(group: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first option out of range."""
    muon, rank = group["algorithm"] == "muon", group["rank"]
    rate = group["lr"]
    given = {**group, "lr": rate.item() if isinstance(rate, Tensor) and rate.numel() == 1 else rate}
    sizes = ["lr", "weight_decay", "eps", "adamw_eps" if muon else "scale"]
    sizes += [x for x in ("adamw_lr", "adamw_weight_decay") if group.get(x) is not None]
    betas = "adamw_betas" if muon else "betas"
    least = int(group["variant"] == "paper")  # at rank 0 it would keep no state
    ranks = f"an integer >= {least}, or None for dense"
    checks = [(name, _is_number(given[name], 0), "a finite number >= 0") for name in sizes]
    checks += [
        ("rank", rank is None or _is_integer(rank, least), ranks),
        ("seed", _is_integer(group["seed"], 0, 2**62), "an integer >= 0 and < 2**62"),
        (betas, _are_numbers(group[betas], 2, 0, 1), "two numbers in [0, 1)"),
    ]
    choices: dict[str, Sequence[Any]] = {
        "variant": [*(FOLLOW if muon else ADAM)],
        "nonfinite": ["propagate", "skip"],
        "stochastic_rounding": [False, True],
        "momentum_dtype": ["float32", "bfloat16"],
    }
    if muon:
        choices["adjust_lr_fn"] = [None, "original", "match_rms_adamw"]
        choices["nesterov"] = [None, False, True]
        zero = None not in (rank, group["adamw_lr"]) and given["lr"] == 0
        checks += [
            ("momentum", _is_number(group["momentum"], 0, 1), "a number in [0, 1)"),
            ("ns_coefficients", _are_numbers(group["ns_coefficients"], 3), "three numbers"),
            ("ns_steps", _is_integer(group["ns_steps"], 1, 100), "1 to 99"),
            ("lr", not zero, "above 0 where adamw_lr is given"),
        ]
    checks += [(x, group[x] in some, f"one of {str(some)[1:-1]}") for x, some in choices.items()]
    for name, valid, wanted in checks:
        if not valid:
            raise ValueError(f"{name} must be {wanted}, but is {group[name]!r}")


def checked_params(group: Mapping[str, Any]) -> Any:
    """The parameters, or (name, parameter) pairs, of a new group as a list.

    Raises:
        ValueError: one is no dense tensor of real numbers, or is sharded in a way that cannot be
            stepped.
    """
    params = group["params"]
    if isinstance(params, set):
        return params  # torch refuses it: it has no order
    params = [params] if isinstance(params, Tensor) else list(params)
    for item in params:
        name, p = item if isinstance(item, tuple) else (None, item)
        name = "a parameter" if name is None else f"parameter {name!r}"
        if not isinstance(p, Tensor):
            continue  # torch says so
        real = p.is_floating_point() and p.element_size() > 1  # float8 has no arithmetic
        if not (real and p.layout is torch.strided):
            raise ValueError(
                f"params must be dense tensors of real floating point numbers, but {name} is "
                f"{p.dtype}, {p.layout}"
            )
        if p.is_leaf and (why := sharding.refusal(p, group["flatten"])):
            raise ValueError(f"{name} {why}")
    return params


def lr(group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate; a tensor of one element as a scalar."""
    value: float | Tensor = group["lr"]
    return value.reshape(()) if isinstance(value, Tensor) else value


def dense(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group of Muon for its dense weights, under AdamW's names."""
    weight_decay = group["weight_decay"]
    if group["rank"] is not None and group["adamw_weight_decay"] is not None:
        weight_decay = group["adamw_weight_decay"]
    own = {"lr": lr(group) * group["dense_ratio"], "weight_decay": weight_decay}
    return {**group, **own, "betas": group["adamw_betas"], "eps": group["adamw_eps"]}


def _is_number(value: Any, least: float = -math.inf, below: float = math.inf) -> bool:
    # Not "1e-3", which YAML reads as a string.
    return isinstance(value, numbers.Real) and least <= float(value) < below


def _are_numbers(value: Any, count: int, *limits: float) -> bool:
    fits = isinstance(value, tuple) and len(value) == count
    return fits and all(_is_number(x, *limits) for x in value)


def _is_integer(value: Any, least: int, below: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < below
