"""LoRA-Pre for registries, which make an optimizer by its name and hand it nameless parameters."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lorapre.optimizers import LoRAPreAdamW, LoRAPreMuon

__all__ = ["RoutedAdamW", "RoutedMuon"]

_Groups = Iterable[dict[str, Any]]


class _Routed:
    def __init__(
        self, params: Iterable[Any], *, groups: _Groups | None = None, **options: Any
    ) -> None:
        super().__init__(_routed(list(params), groups), **options)  # type: ignore[call-arg]


class RoutedAdamW(_Routed, LoRAPreAdamW):
    """`LoRAPreAdamW` that finds the routes of its parameters in `groups`.

    The groups of a registry have weight decay and learning rates, but do not say what a parameter
    is for; those of `lorapre.param_groups` do. A parameter takes the options of both. Where both
    name one, as they do the weight decay of norms and biases, `groups` wins.

    Args:
        params: parameters or groups of them.
        groups: from `lorapre.param_groups(model, rank=...)`; not needed where `params` come from
            there.
        options: of `LoRAPreAdamW`.

    Raises:
        ValueError: there are no `groups`, or a parameter is not in them.
    """


class RoutedMuon(_Routed, LoRAPreMuon):
    """`LoRAPreMuon` that finds the routes of its parameters in `groups`, as `RoutedAdamW` does.

    Args:
        params: as in `RoutedAdamW`.
        groups: as in `RoutedAdamW`.
        options: of `LoRAPreMuon`.

    Raises:
        ValueError: as in `RoutedAdamW`.
    """


def _routed(params: Sequence[Any], groups: _Groups | None) -> list[dict[str, Any]]:
    """The groups `params`, each split by the routes of its parameters."""
    given = [item if isinstance(item, dict) else {"params": [item]} for item in params]
    if groups is None:
        if all("rank" in group for group in given):
            return given
        raise ValueError(
            "groups must be lorapre.param_groups(model, rank=...): without names, embeddings and "
            "output head cannot be told from the matrices that take low-rank momenta"
        )
    route_of: dict[Tensor, tuple[int, str, dict[str, Any]]] = {}
    for number, group in enumerate(groups):
        options = {key: value for key, value in group.items() if key != "params"}
        route_of |= {p: (number, name, options) for name, p in group["params"]}
    routed: list[dict[str, Any]] = []
    for group in given:
        own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        parts: dict[int, dict[str, Any]] = {}
        for p in group["params"]:
            if p not in route_of:
                raise ValueError(f"groups: a parameter of shape {tuple(p.shape)} is not in them")
            number, name, options = route_of[p]
            parts.setdefault(number, {**own, **options, "params": []})["params"].append((name, p))
        routed += parts.values()
    return routed
