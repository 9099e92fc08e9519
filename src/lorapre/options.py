"""The options of the constructors: conversion to plain types, and an error for a wrong value."""

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
            result[name] = tuple(float(x) if _is_number(x) else x for x in value)
        elif name in INTEGERS and isinstance(value, numbers.Integral):
            result[name] = value if isinstance(value, bool) else int(value)
    return result


def check(group: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first option out of range."""
    muon, rank = group["algorithm"] == "muon", group["rank"]
    _require_numbers(group, "lr", "weight_decay", "eps")
    least = int(group["variant"] == "paper")  # at rank 0 it would keep no state
    dense = f"an integer >= {least}, or None for dense"
    _require(group, "rank", rank is None or _is_integer(rank, least), dense)
    _require(group, "seed", _is_integer(group["seed"], 0, 2**62), "an integer >= 0 and < 2**62")
    _require_choice(group, "nonfinite", "propagate", "skip")
    _require_choice(group, "stochastic_rounding", False, True)
    _require_choice(group, "variant", *(FOLLOW if muon else ADAM))
    _require_betas(group, "adamw_betas" if muon else "betas")
    if not muon:
        _require_numbers(group, "scale")
        return
    momentum, steps = group["momentum"], group["ns_steps"]
    _require(group, "momentum", _is_number(momentum) and 0 <= momentum < 1, "a number in [0, 1)")
    _require(group, "ns_coefficients", _are_numbers(group["ns_coefficients"], 3), "three numbers")
    _require(group, "ns_steps", _is_integer(steps, 1, 100), "1 to 99")
    _require_choice(group, "adjust_lr_fn", None, "original", "match_rms_adamw")
    given = [name for name in ("adamw_lr", "adamw_weight_decay") if group[name] is not None]
    _require_numbers(group, "adamw_eps", *given)
    if rank is not None and group["adamw_lr"] is not None:
        _require(group, "lr", float(group["lr"]) > 0, "above 0 where adamw_lr is given")


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


def _require(group: Mapping[str, Any], name: str, condition: bool, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, but is {group[name]!r}")


def _require_choice(group: Mapping[str, Any], name: str, *choices: str | bool | None) -> None:
    _require(group, name, group[name] in choices, f"one of {', '.join(map(repr, choices))}")


def _require_betas(group: Mapping[str, Any], name: str) -> None:
    betas = group[name]
    valid = _are_numbers(betas, 2) and all(0 <= beta < 1 for beta in betas)
    _require(group, name, valid, "two numbers in [0, 1)")


def _require_numbers(group: Mapping[str, Any], *names: str) -> None:
    for name in names:
        value = group[name]
        if name == "lr" and isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        _require(group, name, _is_number(value) and value >= 0, "a number >= 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)  # not "1e-3", which YAML reads as a string


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, tuple) and len(value) == count and all(map(_is_number, value))


def _is_integer(value: Any, least: int, below: float = float("inf")) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < below
