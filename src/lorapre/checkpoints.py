"""State and what is saved of it: whether it fits a parameter and its options, how it is loaded.

`groups.state_shapes` has the names and shapes of the state tensors. A wrapper may keep tensors of
its own beside them, which are carried along.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapre import sharding
from lorapre.gradient import state_dtype
from lorapre.groups import is_low_rank, names_of, state_shapes

# A release that changes what state_dict saves counts this up and reads the older formats, of which
# tests/data has a checkpoint each. It is an option of every group, because
# torch.distributed.checkpoint keeps those too.
STATE_FORMAT = 1

OURS = frozenset(
    ("step", "skipped", "m_B", "m_A", "v_B", "v_A", "v_row", "v_col", "exp_avg", "exp_avg_sq")
)


def meaning(group: Mapping[str, Any], shape: torch.Size | None = None) -> str:
    """What the state of a weight means: variants fill the same names differently."""
    rule = {"adam": "Adam", "muon": "Muon"}[group["algorithm"]]
    if shape is not None and not is_low_rank(shape, group.get("rank"), group.get("flatten", False)):
        return f"{rule} (dense)"
    options = [f"{name}={group[name]!r}" for name in ("rank", "variant") if name in group]
    return f"{rule} ({', '.join(options)})"


def check_format(saved: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError where a newer lorapre has written the saved groups."""
    found = max((group.get("state_format", STATE_FORMAT) for group in saved), default=STATE_FORMAT)
    if found > STATE_FORMAT:
        raise ValueError(
            f"state_dict has state format {found}, of a newer lorapre; this one reads formats up "
            f"to {STATE_FORMAT}: update lorapre"
        )


def check_step(group: Mapping[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Raise a RuntimeError for what cannot be stepped, before anything is written."""
    if group["matrices"] and all(p.ndim < 2 for p in group["params"]):
        # Between construction and here, DeepSpeed puts one vector in the place of all weights of a
        # group.
        raise RuntimeError(
            "the matrices of a group have been replaced by flat vectors, as DeepSpeed ZeRO does; "
            f"{sharding.REMEDY}"
        )
    for p, name in zip(group["params"], names_of(group), strict=True):
        check_weight(p, state.get(p, {}), group, name)


def check_weight(p: Tensor, own: dict[str, Any], group: Mapping[str, Any], name: str) -> None:
    """Raise a RuntimeError unless gradient, memory and state of p fit it and its options.

    Kernels take addresses: memory of another size or type must never get that far. State of another
    dtype or device is cast to its own.
    """
    if p.grad is not None and p.grad.layout is not torch.strided:
        raise RuntimeError(
            f"LoRA-Pre needs dense gradients, but that of {name} is {p.grad.layout}; nn.Embedding "
            "gives dense ones with sparse=False"
        )
    if why := sharding.refusal(p, group["flatten"]):
        raise RuntimeError(f"{name} {why}")
    if p.grad is None:
        return
    if any(n > 1 and stride == 0 for n, stride in zip(p.shape, p.stride(), strict=True)):
        raise RuntimeError(
            f"{name} is expanded: more than one element of it refers to a single memory location"
        )
    if p.grad.shape != p.shape:
        raise RuntimeError(
            f"{name} has shape {tuple(p.shape)}, but its gradient {tuple(p.grad.shape)}: the "
            "weight has been replaced since the backward pass"
        )
    if "step" not in own:
        return
    shapes = state_shapes(group, p.shape)
    for key, shape in shapes.items():
        value, dtype = own.get(key), state_dtype(p, key)
        if value is None and key == "skipped":  # `nonfinite` has been edited: the count starts now
            own[key] = torch.zeros_like(own["step"])
        elif value is None or value.shape != shape:
            found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
            needed = f"a weight of shape {tuple(p.shape)} needs {shape}"
            raise _misfit(f"the state {key!r} of {name} {found}, but {needed}", group)
        elif value.dtype != dtype or value.device != p.device or not value.is_contiguous():
            own[key] = value.to(device=p.device, dtype=dtype).contiguous()
    for key in sorted(OURS.intersection(own) - {*shapes, "skipped"}):
        raise _misfit(f"the state {key!r} of {name} has no use", group)


def _misfit(what: str, group: Mapping[str, Any]) -> RuntimeError:
    return RuntimeError(
        f"{what}; its options now ask for {meaning(group)}. Where the weight has changed, or the "
        "options of its group, delete its state, or that of all weights of the group "
        "(`del optimizer.state[weight]`), which starts it anew"
    )


def matched(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups with their parameters in the order of ours, where both have names.

    Raises:
        ValueError: a name exists on both sides, in places that do not correspond.
    """
    result = []
    everywhere = {name for group in saved for name in group.get("param_names") or ()}
    for theirs, ours in zip(saved, own, strict=True):
        keys, names = theirs["params"], theirs.get("param_names") or []
        wanted = ours.get("param_names") or []
        if names and len(names) == len(wanted) == len(keys):  # else one was taken out or put in
            key_of = dict(zip(names, keys, strict=True))
            if sorted(names) == sorted(wanted) and len(key_of) == len(names):
                keys = [key_of[name] for name in wanted]
                theirs = {**theirs, "params": keys, "param_names": wanted}
            for name, found in zip(wanted, theirs["param_names"], strict=True):
                if name != found and name in everywhere:
                    raise ValueError(
                        f"state_dict has the parameter {name!r}, but {found!r} in its place; make "
                        "the optimizer with the same groups in the same order"
                    )
        result.append(theirs)
    return result


def merged(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The options to go on with: those saved; of torch.optim.AdamW, those that we know."""
    if "rank" not in saved:
        if own["algorithm"] == "muon":  # it has options of the same names for its matrices
            theirs = ("betas", "eps") if own["rank"] is None else ("betas", "eps", "weight_decay")
            saved = {f"adamw_{k}" if k in theirs else k: v for k, v in saved.items()}
            saved["dense_ratio"] = 1.0
        saved = {k: v for k, v in saved.items() if k in own or k == "initial_lr"}
    return {**own, **saved, "state_format": STATE_FORMAT}


def check_fit(
    saved: Mapping[str, Any], state: Mapping[str, Any] | None, group: Mapping[str, Any], p: Tensor,
    name: str,
) -> None:  # fmt: skip
    """Raise a ValueError unless what was saved of p is what its group would make."""
    found_kind = meaning({"algorithm": group["algorithm"], **saved}, p.shape)
    wanted_kind = meaning(group, p.shape)
    wanted = found = state_shapes(group, p.shape)
    if state is not None:
        ours = {key: value for key, value in state.items() if key in OURS}
        found = {key: tuple(getattr(value, "shape", ())) for key, value in ours.items()}
    kinds_fit = found_kind == wanted_kind or "rank" not in saved
    if not kinds_fit or {**found, "skipped": ()} != {**wanted, "skipped": ()}:
        raise ValueError(
            f"state_dict does not fit {name} of shape {tuple(p.shape)}: saved was {found_kind} "
            f"with {found}, this optimizer keeps {wanted_kind} with {wanted}"
        )


class Saved(NamedTuple):
    """What was saved of a parameter."""

    p: Tensor
    flatten: bool  # as in its group
    state: Mapping[str, Any]


def checked(
    state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[Saved]]:
    """A state_dict in the order of our groups, with the options to go on with, and its parts.

    Raises:
        ValueError: it does not fit the groups.
    """
    theirs = state_dict["param_groups"]
    check_format(theirs)
    if [len(g["params"]) for g in theirs] != [len(g["params"]) for g in groups]:
        return state_dict, []  # torch refuses, with its own message
    theirs, found = matched(theirs, groups), []
    for saved, group in zip(theirs, groups, strict=True):
        for p, key, name in zip(group["params"], saved["params"], names_of(group), strict=True):
            state = state_dict["state"].get(key)
            check_fit(saved, state, group, p, name)
            if state is not None:
                found.append(Saved(p, group["flatten"], state))
    options = [merged(*pair) for pair in zip(theirs, groups, strict=True)]
    return {**state_dict, "param_groups": options}, found


def restored(saved: Saved, cast: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter, ours in its own dtype: torch has cast all but "step" to that of p.

    Args:
        saved: as it is in the state_dict.
        cast: as torch has loaded it; the keys of others are left like that.
    """
    state, p = dict(cast), saved.p
    for name in OURS.intersection(saved.state):
        value = torch.as_tensor(saved.state[name])
        value = value.to(device=p.device, dtype=state_dtype(p, name), copy=True)
        state[name] = sharding.place(p, saved.flatten, name, value)
    return state
