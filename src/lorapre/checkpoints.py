"""Check that a state fits its parameter and the options of its group, and load a saved one.

`groups.state_shapes` gives the names and shapes of the state tensors. A wrapper may keep other
tensors beside them; they are saved and loaded too.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorapre import sharding
from lorapre.gradient import state_dtype
from lorapre.groups import is_low_rank, names_of, state_shapes

# A release that changes the content of state_dict increases this number, and still reads the older
# formats: tests/data has a checkpoint of each. Every group has it as an option, because
# torch.distributed.checkpoint saves the options of groups and no other entries.
STATE_FORMAT = 1

OURS = frozenset(
    ("step", "skipped", "m_B", "m_A", "v_B", "v_A", "v_row", "v_col", "exp_avg", "exp_avg_sq")
)


def meaning(group: Mapping[str, Any], shape: torch.Size | None = None) -> str:
    """Algorithm, rank and variant, for messages: two variants can use the same names of state."""
    rule = str(group["algorithm"]).capitalize()
    if shape is not None and not is_low_rank(shape, group.get("rank"), group.get("flatten", False)):
        return f"{rule} (dense)"
    options = [f"{name}={group[name]!r}" for name in ("rank", "variant") if name in group]
    return f"{rule} ({', '.join(options)})"


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our tensors in a state; a counter may have been saved as a number."""
    return {k: tuple(getattr(x, "shape", ())) for k, x in state.items() if k in OURS}


def check_step(group: Mapping[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Raise a RuntimeError where a weight cannot be stepped, before anything is written."""
    if group["matrices"] and all(p.ndim < 2 for p in group["params"]):
        # After the constructor has run, DeepSpeed replaces all weights of a group by one vector.
        raise RuntimeError(
            "the matrices of a group have been replaced by flat vectors, as DeepSpeed ZeRO does; "
            f"{sharding.REMEDY}"
        )
    for p, name in zip(group["params"], names_of(group), strict=True):
        check_weight(p, state.get(p, {}), group, name)


def check_weight(p: Tensor, own: dict[str, Any], group: Mapping[str, Any], name: str) -> None:
    """Raise a RuntimeError unless gradient, memory and state of p fit it and its options.

    The kernels read memory by its address, so a tensor of a wrong size must be found here. State
    that has another dtype or is on another device is converted.
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
    wanted = state_shapes(group, p.shape)
    if "skipped" in wanted and "skipped" not in own:  # `nonfinite` has been edited
        own["skipped"] = torch.zeros_like(own["step"])
    found = shapes_of(own)
    for key in [*wanted, *sorted(set(found) - {"skipped"})]:
        if found.get(key) != wanted.get(key):
            has = f"has shape {found[key]}" if key in found else "is missing"
            needs = f"needs {wanted[key]}" if key in wanted else "has no use for it"
            raise RuntimeError(
                f"the state {key!r} of {name} {has}, but a weight of shape {tuple(p.shape)} "
                f"{needs}; its options now ask for {meaning(group)}. Where the weight has changed, "
                "or the options of its group, delete its state, or that of all weights of the "
                "group (`del optimizer.state[weight]`), which starts it anew"
            )
    for key in wanted:
        value, dtype = own[key], state_dtype(group, p, key)
        if value.dtype != dtype or value.device != p.device or not value.is_contiguous():
            own[key] = value.to(device=p.device, dtype=dtype).contiguous()


def matched(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups with their parameters in the order of ours, where both have names.

    Raises:
        ValueError: a name of ours was saved too, but in another group.
    """
    result = []
    everywhere = {name for group in saved for name in group.get("param_names") or ()}
    for theirs, ours in zip(saved, own, strict=True):
        names, wanted = theirs.get("param_names") or [], ours.get("param_names") or []
        if names and len(names) == len(wanted) == len(theirs["params"]):  # names can be stale
            key_of = dict(zip(names, theirs["params"], strict=True))
            if len(key_of) == len(names) and key_of.keys() == set(wanted):
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
    """The options after loading: the saved ones win. Of torch.optim.AdamW we take those we know."""
    if "rank" not in saved:
        if own["algorithm"] == "muon":  # where these names belong to the matrices
            theirs = ("betas", "eps") if own["rank"] is None else ("betas", "eps", "weight_decay")
            saved = {f"adamw_{k}" if k in theirs else k: v for k, v in saved.items()}
            saved["dense_ratio"] = 1.0
        saved = {k: v for k, v in saved.items() if k in own or k == "initial_lr"}
    return {**own, **saved, "state_format": STATE_FORMAT}


def check_fit(
    saved: Mapping[str, Any], state: Mapping[str, Any] | None, group: Mapping[str, Any], p: Tensor,
    name: str,
) -> None:  # fmt: skip
    """Raise a ValueError unless the saved state of p is one that its group would make."""
    found_kind = meaning({"algorithm": group["algorithm"], **saved}, p.shape)
    wanted_kind = meaning(group, p.shape)
    wanted = state_shapes(group, p.shape)
    found = wanted if state is None else shapes_of(state)
    kinds_fit = found_kind == wanted_kind or "rank" not in saved
    if not kinds_fit or {**found, "skipped": ()} != {**wanted, "skipped": ()}:
        raise ValueError(
            f"state_dict does not fit {name} of shape {tuple(p.shape)}: saved was {found_kind} "
            f"with {found}, this optimizer keeps {wanted_kind} with {wanted}"
        )


def checked(
    state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[Tensor, Mapping[str, Any]]]:
    """The state_dict with our order and the options after loading; the saved state of each weight.

    Raises:
        ValueError: it does not fit the groups, or a newer lorapre has written it.
    """
    theirs = state_dict["param_groups"]
    newest = max((group.get("state_format", 1) for group in theirs), default=1)
    if newest > STATE_FORMAT:
        raise ValueError(
            f"state_dict has state format {newest}, of a newer lorapre; this one reads formats up "
            f"to {STATE_FORMAT}: update lorapre"
        )
    if [len(g["params"]) for g in theirs] != [len(g["params"]) for g in groups]:
        return state_dict, {}  # torch refuses, with its own message
    theirs, found = matched(theirs, groups), {}
    for saved, group in zip(theirs, groups, strict=True):
        for p, key, name in zip(group["params"], saved["params"], names_of(group), strict=True):
            state = state_dict["state"].get(key)
            check_fit(saved, state, group, p, name)
            if state is not None:
                found[p] = state
    options = [merged(*pair) for pair in zip(theirs, groups, strict=True)]
    return {**state_dict, "param_groups": options}, found


def restore(
    state: Mapping[Tensor, dict[str, Any]], groups: list[dict[str, Any]],
    saved: Mapping[Tensor, Mapping[str, Any]],
) -> None:  # fmt: skip
    """Put our tensors into the state in their own dtype: torch has cast all but "step".

    `saved` is what `checked` has found. Tensors of others stay as torch has loaded them.
    """
    for group in groups:
        for p in group["params"]:
            own = saved.get(p, {})
            for name in OURS.intersection(own):
                value = torch.as_tensor(own[name])
                value = value.to(device=p.device, dtype=state_dtype(group, p, name), copy=True)
                state[p][name] = sharding.place(p, group["flatten"], name, value)
