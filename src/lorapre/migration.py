"""Moments carried over between torch's AdamW or Muon and ours, or to another rank or variant.

One weight at a time: its two moments are formed in full, and from them the state that the other
optimizer keeps.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lorapre import sharding
from lorapre.gradient import Factors, Gradient, wide
from lorapre.groups import matrix_shape, names_of, state_shapes
from lorapre.linalg import debias, exact_products
from lorapre.optimizers import LoRAPreOptimizer
from lorapre.variants import finite_or_zero, first_A, follow_ema, positive

__all__ = ["from_adamw", "to_adamw"]

SWEEPS = 8  # of subspace iteration
FIRST = ("exp_avg", "momentum_buffer", "m_B")  # names under which a first moment is kept
SECOND = ("exp_avg_sq", "v_row", "v_col", "v_B")


@torch.no_grad()
def from_adamw(
    optimizer: LoRAPreOptimizer, state_dict: Mapping[str, Any], like: Optimizer | None = None
) -> list[str]:
    """Let `optimizer` go on from the moments of another one.

    A dense weight takes them as they are. A factorised weight takes a rank-r approximation of the
    first moment, and of the second what its variant keeps. The number of steps is carried over. The
    options stay those of `optimizer`.

    Args:
        optimizer: a `LoRAPreAdamW` or `LoRAPreMuon`.
        state_dict: of torch.optim.AdamW, of torch.optim.Muon, or of ours with any rank and variant.
            Its parameters are matched by names where both sides have them, else by order.
        like: an optimizer of the same parameters, made as the saved one was. Its order is that of
            a `state_dict` without names. It needs no state itself.

    Returns:
        The parameters of which `state_dict` has no state, by name. They keep what they have, so a
        second call can add the AdamW that runs beside Muon.

    Raises:
        TypeError: `optimizer` is something else, for instance accelerate's wrapper.
        ValueError: `state_dict` is no optimizer's, or a state does not fit its parameter, lacks a
            moment that is needed, or belongs to none. The message names it, and nothing has
            changed.
    """
    _check_ours(optimizer)
    if not (isinstance(state_dict, Mapping) and {"state", "param_groups"} <= state_dict.keys()):
        raise ValueError("state_dict must be an optimizer's, with the keys state and param_groups")
    result, own = _layout(optimizer)
    for p, state, source in _matched(state_dict, like or optimizer):
        if p not in own:
            raise ValueError(f"like has a parameter of {tuple(p.shape)} that optimizer lacks")
        group, name, key = own.pop(p)
        new = _converted(p, state, source, group, name)
        result["state"][key] = {**result["state"].get(key, {}), **new}
    optimizer.load_state_dict(result)
    return [name for _, name, *_ in own.values()]


@torch.no_grad()
def to_adamw(optimizer: LoRAPreOptimizer, adamw: Optimizer) -> dict[str, Any]:
    """Make the state_dict with which `adamw` goes on from the moments of `optimizer`.

    Args:
        optimizer: a `LoRAPreAdamW` or `LoRAPreMuon`.
        adamw: a torch.optim.AdamW or torch.optim.Muon of all or some of the same parameters, in any
            order. It stays as it is.

    Returns:
        The moments in full, and the options of `adamw`; for its `load_state_dict`.

    Raises:
        TypeError: `optimizer` or `adamw` is something else.
        ValueError: `optimizer` lacks a parameter, or a moment that `adamw` needs: Muon has no
            second moment, rank 0 no first one. The message names the parameter.
    """
    _check_ours(optimizer)
    if not isinstance(adamw, torch.optim.Adam | torch.optim.AdamW | torch.optim.Muon):
        found = type(adamw).__name__
        raise TypeError(f"adamw must be a torch.optim.AdamW or torch.optim.Muon, got {found}")
    (result, theirs), (_, own) = _layout(adamw), _layout(optimizer)
    for p, (group, name, key) in theirs.items():
        if p not in own:
            raise ValueError(f"adamw has {name}, which optimizer lacks")
        if state := optimizer.state.get(p):
            new = _converted(p, state, own[p][0], group, own[p][1])
            new = {k: sharding.place(p, False, "exp_avg", x) for k, x in new.items()}
            result["state"][key] = new
    return result


def _check_ours(optimizer: object) -> None:
    if not isinstance(optimizer, LoRAPreOptimizer):
        found = type(optimizer).__name__
        raise TypeError(f"optimizer must be a LoRAPreAdamW or LoRAPreMuon itself, got {found}")


def _layout(optimizer: Optimizer) -> tuple[dict[str, Any], dict[Tensor, tuple[Any, ...]]]:
    """Its state_dict, and of every parameter (group, name, key in the state_dict)."""
    state_dict, places = optimizer.state_dict(), {}
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for p, name, key in zip(group["params"], names_of(group), packed["params"], strict=True):
            places[p] = group, name, key
    return state_dict, places


def _matched(
    state_dict: Mapping[str, Any], like: Optimizer
) -> Iterator[tuple[Tensor, Mapping[str, Any], Mapping[str, Any]]]:
    """(parameter, its state, the group that it was saved in) of all that has a state."""
    groups = state_dict["param_groups"]
    saved = [(key, group) for group in groups for key in group["params"]]
    params = [p for group in like.param_groups for p in group["params"]]
    theirs, ours = _names(groups), _names(like.param_groups)
    if not (theirs and ours):
        found, wanted = ([len(g["params"]) for g in side] for side in (groups, like.param_groups))
        if found != wanted:
            raise ValueError(
                f"state_dict has no names, and groups of {found} parameters instead of {wanted}; "
                "pass like=, an optimizer of these parameters made as the saved one was"
            )
        theirs = ours = [str(position) for position in range(len(params))]
    own = dict(zip(ours, params, strict=True))
    for name, (key, group) in zip(theirs, saved, strict=True):
        if state := state_dict["state"].get(key):
            if name not in own:
                raise ValueError(f"state_dict has a state of {name!r}, which is no parameter here")
            yield own[name], state, group


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all parameters in order, of the group or as keys; none unless all have one."""
    names = [x for group in groups for x in group.get("param_names") or group["params"]]
    return names if all(isinstance(x, str) for x in names) else []


def _shapes(group: Mapping[str, Any], shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state in a group of ours, of torch.optim.Muon or of AdamW."""
    if "algorithm" in group:  # a rank alone may be in torch's groups too
        return state_shapes(group, shape)
    return {"momentum_buffer": tuple(shape)} if "ns_steps" in group else state_shapes({}, shape)


def _converted(
    p: Tensor, state: Mapping[str, Any], source: Mapping[str, Any], target: Mapping[str, Any],
    name: str,
) -> dict[str, Tensor]:  # fmt: skip
    """The state of p in a group `target`, whole, made of that in a group `source`."""
    expected, wanted = _shapes(source, p.shape), _shapes(target, p.shape)
    found = {k: tuple(getattr(x, "shape", ())) for k, x in state.items() if k in expected}
    if {**found, "skipped": ()} != {**expected, "skipped": ()}:
        raise ValueError(
            f"state_dict does not fit {name} of shape {tuple(p.shape)}: saved was {found}, and "
            f"{expected} was expected"
        )
    s = {
        k: torch.as_tensor(x.full_tensor() if sharding.is_spread(x) else x).to(p.device)
        for k, x in state.items()
        if k in found
    }
    t, matrices = float(s.get("step", 0.0)), matrix_shape(p.shape, target.get("flatten", False))
    first, second = (next((k for k in names if k in s), "") for names in (FIRST, SECOND))
    if not second and any(k in SECOND for k in wanted):
        raise ValueError(f"{name} needs a second moment, of which Muon keeps none")
    if not first and any(k in FIRST for k in wanted):
        raise ValueError(f"{name} needs a first moment, of which rank 0 keeps none")
    step = torch.tensor(t, dtype=torch.float32, device="cpu")
    new = {"step": step} if "step" in wanted else {}  # torch's Muon has none
    with exact_products(p.device):
        moments = {}
        if first:
            moments[first] = s["m_B"].float() @ s["m_A"].float() if first == "m_B" else s[first]
        if second:
            moments[second] = _second(s, _share("v_row", source, t))
        for key, shape in wanted.items():
            kept = first if key in FIRST else second if key in SECOND else ""
            if not kept:  # a counter, or A, which comes with B
                continue
            x = moments[kept].to(wide(p.dtype)).reshape(matrices)
            x = x * (_share(key, target, t) / _share(kept, source, t))
            if key.endswith("_B"):
                x, A = _factors(x if key == "m_B" else x.sqrt(), shape[-1])
                new[key[0] + "_A"] = A.view(wanted[key[0] + "_A"])
            elif key in ("v_row", "v_col"):
                x = x.mean(-1 if key == "v_row" else -2)
            new[key] = x.view(shape)
    return new


def _second(s: Mapping[str, Tensor], k: float) -> Tensor:
    """The second moment in full, as its variant has it, with k = 1 - beta2**t."""
    if "v_row" not in s:
        return (s["v_B"] @ s["v_A"]).square() if "v_B" in s else s["exp_avg_sq"]
    row, col = s["v_row"][..., None], s["v_col"][..., None, :]
    M = s["m_B"] @ s["m_A"] if "m_B" in s else torch.zeros_like(row)  # rank 0
    S = k * M.square()  # `variants.split`
    row, col = positive(row - S.mean(-1, keepdim=True)), positive(col - S.mean(-2, keepdim=True))
    return S + row * finite_or_zero(col / row.mean(-2, keepdim=True))


def _share(key: str, group: Mapping[str, Any], t: float) -> float:
    """The value that a moment has after t steps in which every gradient was one."""
    if key == "momentum_buffer":  # torch's Muon keeps no step
        return 1.0
    if key == "m_B" and group["algorithm"] == "muon":
        return 1 / (1 - float(group["momentum"]))
    if key == "m_B" and group["variant"] == "split":
        return 1.0
    beta = float((group.get("adamw_betas") or group["betas"])[key in SECOND])
    after = torch.tensor(max(t, 1.0), dtype=torch.float64, device="cpu")
    return float(debias(beta, after))


def _factors(M: Tensor, r: int) -> Factors:
    """B (N, p, r) and A (N, r, q), whose product is close to the best approximation of M (N, p, q).

    They come from subspace iteration with a random start, and are in the gauge: the columns of B
    are orthogonal and equally long.
    """
    T = Gradient(M.float().unbind(), (M.shape[-2], M.shape[-1]), M.device)
    A = first_A("split", T, r, seed=0)
    factors = Factors(A.new_zeros(len(M), M.shape[-2], r), A)
    for _ in range(SWEEPS):
        factors = follow_ema(factors, T, 0.0)
    return factors
