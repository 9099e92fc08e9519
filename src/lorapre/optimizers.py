"""LoRAPreAdamW and LoRAPreMuon: options, state, loading and the order of a step."""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lorapre import factors, rules, sharding
from lorapre.batch import Batch, batches, keep_freed_memory, wide
from lorapre.groups import is_low_rank, state_shapes
from lorapre.linalg import matmul
from lorapre.steps import VARIANTS, adam, muon

__all__ = ["LoRAPreAdamW", "LoRAPreMuon"]

# What state_dict saves: names, shapes and meaning of its tensors. A release that changes it counts this up
# and reads the older ones; tests/data has a checkpoint of each. It is saved as an option of every group:
# torch.distributed.checkpoint keeps those too.
STATE_FORMAT = 1


class LoRAPreOptimizer(Optimizer):
    """What both optimizers share. Use `LoRAPreAdamW` or `LoRAPreMuon`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, but for one that `gradient_release` has updated.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What `closure` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse, or a weight is sharded in a way that cannot be stepped (flat
                pieces of FSDP1 or DeepSpeed ZeRO). The message names it; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = []
        first = 0
        for number, group in enumerate(self.param_groups):
            # Between construction and here, DeepSpeed puts one vector in the place of all weights of a group.
            if self._matrices.get(number) and all(p.ndim < 2 for p in group["params"]):
                raise RuntimeError(
                    f"the matrices of group {number} have been replaced by flat vectors, as DeepSpeed ZeRO "
                    f"does; {sharding.REMEDY}"
                )
            parts.append((group, range(first, first + len(group["params"]))))
            first += len(group["params"])
        self._step(parts)
        return loss

    @torch.no_grad()
    def _step(self, parts: Sequence[tuple[dict[str, Any], Sequence[int]]]) -> None:
        """Step groups, or copies of groups with fewer parameters.

        Args:
            parts: (group, positions of its parameters among all of the optimizer) pairs.
        """
        for group, _ in parts:
            for index, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} needs dense gradients, but that of {_name(group, index)} is "
                        f"{p.grad.layout}; nn.Embedding gives dense ones with sparse=False"
                    )
                if why := sharding.refusal(p, group["flatten"]):
                    raise RuntimeError(f"{_name(group, index)} {why}")
        started: list[tuple[Batch, Callable[[], None]]] = []
        for group, positions in parts:
            weights: list[Tensor] = []
            grads: list[Tensor] = []
            state: list[Tensor] = []
            self._init_group(group, weights, grads, state)
            held = [i for i, p in zip(positions, group["params"], strict=True) if _waits(p)]
            for batch in batches(group, weights, grads, state, held):
                batch.begin(group["nonfinite"])
                with torch.autocast(batch.device.type, enabled=False):
                    started.append((batch, self._update(batch, group)))
                # The last sums of a sharded batch travel while the next one computes.
                _finish(started, keep=1 if batch.shards.count > 1 else 0)
        _finish(started, keep=0)

    def _update(self, batch: Batch, group: dict[str, Any]) -> Callable[[], None]:
        """Step a batch of parameters, all but what waits for other processes: that is what is returned."""
        raise NotImplementedError

    def _init_group(
        self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], state: list[Tensor]
    ) -> bool:
        """Append what has a gradient, and its state in the order of `state_shapes`; create what is missing.

        torch.compile runs the method of this name by itself, outside the graph, and takes the lists it has
        filled as the graph's inputs.
        """
        shapes_of: dict[Any, dict[str, tuple[int, ...]]] = {}
        for p in group["params"]:
            if not _waits(p):
                continue
            own = self.state[p]
            if own and own["step"].device != p.device:  # the model has been moved
                own.update({name: value.to(p.device) for name, value in own.items()})
            if p.shape not in shapes_of:
                shapes_of[p.shape] = state_shapes(group, p.shape)
            shapes = shapes_of[p.shape]
            if "step" not in own:
                with torch.autocast(p.device.type, enabled=False):
                    own.update(_start(p, group, shapes))
            elif "skipped" in shapes and "skipped" not in own:
                own["skipped"] = torch.zeros_like(own["step"])
            weights.append(p)
            grads.append(sharding.gradient(p))
            state.extend(own[name] for name in shapes)
        return False

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        keep_freed_memory()
        super().__init__(params, defaults | {"state_format": STATE_FORMAT})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may set any option of the constructor for itself.

        Args:
            param_group: `params` (tensors or (name, tensor) pairs) and options; `rank=None` means dense
                AdamW.

        Raises:
            ValueError: an option is out of range, or a parameter is complex; the message names it.
        """
        group = {**self.defaults, **param_group}
        self._check(group)
        params = group["params"]
        if isinstance(params, set):
            raise TypeError(
                "params must be ordered, but is a set: a checkpoint finds parameters by their order"
            )
        params = [params] if isinstance(params, Tensor) else list(params)
        for item in params:
            p = item[1] if isinstance(item, tuple) else item
            name = f"parameter {item[0]!r}" if isinstance(item, tuple) else "a parameter"
            if isinstance(p, Tensor) and not (p.is_floating_point() and p.layout is torch.strided):
                raise ValueError(
                    f"params must be dense tensors of real floating point numbers, but {name} is {p.dtype}, "
                    f"{p.layout}"
                )
            if isinstance(p, Tensor) and p.is_leaf and (why := sharding.refusal(p, group["flatten"])):
                raise ValueError(f"{name} {why}")
        super().add_param_group({**param_group, "params": params})
        if any(p.ndim > 1 for p in self.param_groups[-1]["params"]):
            self._matrices[len(self.param_groups) - 1] = True

    @functools.cached_property
    def _matrices(self) -> dict[int, bool]:
        """Which groups were given matrices; unknown, and so empty, after a copy."""
        return {}

    def _check(self, group: dict[str, Any]) -> None:
        """Raise a ValueError that names the first option out of range."""
        lr, rank, seed = group["lr"], group["rank"], group["seed"]
        _require_number(group, "lr", lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr)
        for name in ("weight_decay", "eps"):
            _require_number(group, name, group[name])
        _require(
            group,
            "rank",
            rank is None or (_is_integer(rank) and rank >= 1),
            "an integer >= 1, or None for dense",
        )
        _require(group, "seed", _is_integer(seed) and seed >= 0, "an integer >= 0")
        _require_choice(group, "variant", *VARIANTS)
        _require_choice(group, "nonfinite", "propagate", "skip")
        _require_choice(group, "stochastic_rounding", False, True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer; options it did not know take their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`: one of this class, or of torch.optim.AdamW where all it holds is dense.

        The factors keep their float32 whatever the weights' dtype.

        Raises:
            ValueError: the state of a parameter does not fit it, its rank or its variant, or a newer lorapre
                has written it. The message names the parameter and what was found and expected, and the
                optimizer is as it was.
        """
        loaded: list[tuple[Tensor, dict[str, Any]]] = []

        def check(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            saved_groups, state = state_dict["param_groups"], state_dict["state"]
            found = max((g.get("state_format", STATE_FORMAT) for g in saved_groups), default=STATE_FORMAT)
            if found > STATE_FORMAT:
                raise ValueError(
                    f"state_dict has state format {found}, of a newer lorapre; this one reads formats up to "
                    f"{STATE_FORMAT}: update lorapre"
                )
            if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
                return state_dict  # torch refuses, with its own message
            for saved, group in zip(saved_groups, self.param_groups, strict=True):
                for index, key in enumerate(saved["params"]):
                    _check_fit(saved, state.get(key), group, index)
                    if key in state:
                        loaded.append((group["params"][index], state[key]))
            merged = [_merge(saved, own) for saved, own in zip(saved_groups, self.param_groups, strict=True)]
            return {**state_dict, "param_groups": merged}

        def restore(_: Optimizer) -> None:
            # torch has cast everything but "step" to the dtype of the weight.
            group_of = {p: group for group in self.param_groups for p in group["params"]}
            for p, saved in loaded:
                flatten = group_of[p]["flatten"]
                self.state[p] = {
                    name: sharding.place(
                        p, flatten, name,
                        torch.as_tensor(value).to(device=p.device, dtype=_state_dtype(p, name), copy=True),
                    )
                    for name, value in saved.items()
                }  # fmt: skip

        # Between the hooks of users, who may adapt a checkpoint before and look at the state after.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


class LoRAPreAdamW(LoRAPreOptimizer):
    r"""AdamW whose moments live as low-rank factors, B (p, r) and A (r, q) (paper, Algorithm 1).

    The state of a (p, q) weight takes (p + q) (r + 1) float32 numbers instead of 2 p q, or 2 (p + q) r in
    variants that keep factors for both moments. Weights for which that would not be less, and groups with
    `rank=None`, take AdamW; `lorapre.coverage` shows which took what.
    `lorapre.param_groups` sends embeddings, output head, norms and biases there, as the paper does.

    Args:
        params: parameters, (name, parameter) pairs or groups of either; every option may be set per group.
        lr: learning rate, a number or a tensor of one element.
        betas: decay of the first and the second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        rank: r, or None for dense AdamW.
        scale: factor on the update of the factorised weights alone (the paper trains with 0.25).
        variant: "split", "subspace", "calibrated" or "paper" (as printed); docs/maths.md has the differences.
        compress: which moments are factorised: "both" or, but for "split", "first" or "second".
        maximize: ascend instead.
        nonfinite: what a NaN or infinite gradient does: "propagate" as in torch, or "skip" the step of that
            weight, which is counted in its state as `skipped` without waiting for the device.
        stochastic_rounding: round bfloat16 weights up or down at random with the right mean, so that updates
            too small for bfloat16 are not lost. Takes no memory; the same seed gives the same weights, in a
            resumed run too. Weights of other dtypes are not affected.
        seed: of the random start, which depends on it and on the shape of the weight, on nothing else, and of
            the stochastic rounding.

    Raises:
        ValueError: an option is out of range; the message names it.

    State of a factorised weight, all float32: `step`, `m_B` (p, r), `m_A` (r, q), `v_row` (p) and `v_col`
    (q); in the other variants `v_B` and `v_A`, in the subspace variant beside `v_row` and `v_col`; of an
    uncompressed moment `exp_avg` or `exp_avg_sq`.
    Fused experts (E, p, q) are E matrices, and their factors have E in front; a convolution is the matrix
    (out, in * k * k).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        scale: float = 1.0,
        variant: str = "split",
        compress: str = "both",
        maximize: bool = False,
        nonfinite: str = "propagate",
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rank=rank, scale=scale, variant=variant,
            compress=compress, maximize=maximize, nonfinite=nonfinite,
            stochastic_rounding=stochastic_rounding, seed=seed, flatten=False,
        )  # fmt: skip
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        _require_betas(group, "betas")
        _require_number(group, "scale", group["scale"])
        _require_choice(group, "compress", "both", "first", "second")
        # It makes the second moment of the first one's factors.
        fits = group["variant"] != "split" or group["compress"] == "both"
        _require(group, "compress", fits, "'both' with variant='split'")

    def _update(self, batch: Batch, group: dict[str, Any]) -> Callable[[], None]:
        return adam(
            batch, VARIANTS[group["variant"]], betas=group["betas"], lr=_lr(group),
            scale=group["scale"] if batch.rank else 1.0, eps=group["eps"],
            weight_decay=group["weight_decay"],
        )  # fmt: skip


class LoRAPreMuon(LoRAPreOptimizer):
    """Muon whose momentum lives as low-rank factors B (p, r), A (r, q) (paper, Algorithm 2).

    The state of a (p, q) weight takes (p + q) r float32 numbers instead of p q. Groups with `rank=None` and
    weights too small for factors take AdamW; `lorapre.param_groups` makes the groups of a model.

    Args:
        params: parameters, (name, parameter) pairs or groups of either; every option may be set per group.
        lr: learning rate, a number or a tensor of one element.
        weight_decay: decoupled, as in torch.optim.Muon.
        momentum: decay of the momentum, in [0, 1).
        nesterov: as in torch.optim.Muon; the paper has none.
        ns_coefficients: of the Newton-Schulz iteration, three numbers.
        eps: least norm of a matrix in the Newton-Schulz iteration.
        ns_steps: Newton-Schulz iterations, 1 to 99.
        adjust_lr_fn: factor on lr by shape, as in torch.optim.Muon: None or "original" is sqrt(max(1, p /
            q)), "match_rms_adamw" is 0.2 sqrt(max(p, q)), with which AdamW's learning rates carry over.
        rank: r, or None for dense AdamW.
        variant: "calibrated", "paper" (as printed) or "subspace"; docs/maths.md has the differences.
        adamw_lr: learning rate of the dense weights, None for lr. A group with `rank=None` takes it as its lr
            unless it names its own. Dense weights inside a factorised group keep the ratio adamw_lr / lr that
            they start with, so that one schedule serves both.
        adamw_betas: of the dense weights.
        adamw_eps: of the dense weights.
        adamw_weight_decay: of the dense weights, None for weight_decay. A group with `rank=None` takes it
            unless it names its own, as `lorapre.param_groups` does for norms and biases.
        maximize: ascend instead.
        nonfinite: as in `LoRAPreAdamW`.
        stochastic_rounding: as in `LoRAPreAdamW`.
        seed: as in `LoRAPreAdamW`.

    Raises:
        ValueError: an option is out of range; the message names it.

    State of a factorised weight, all float32: `step`, `m_B` (p, r), `m_A` (r, q).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = False,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        rank: int | None = 128,
        variant: str = "calibrated",
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        maximize: bool = False,
        nonfinite: str = "propagate",
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
            ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn, rank=rank,
            variant=variant, adamw_lr=adamw_lr, adamw_betas=adamw_betas, adamw_eps=adamw_eps,
            adamw_weight_decay=adamw_weight_decay, maximize=maximize, nonfinite=nonfinite,
            stochastic_rounding=stochastic_rounding, seed=seed, flatten=False, dense_ratio=1.0,
        )  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see `LoRAPreOptimizer.add_param_group`."""
        group = {**self.defaults, **param_group}
        self._check(group)
        adamw_lr, adamw_weight_decay = group["adamw_lr"], group["adamw_weight_decay"]
        if group["rank"] is None:
            dense = {"lr": adamw_lr, "weight_decay": adamw_weight_decay}
            param_group = {k: v for k, v in dense.items() if v is not None} | param_group
        elif adamw_lr is not None:
            _require(group, "lr", float(group["lr"]) > 0, "above 0 where adamw_lr is given")
            param_group = {**param_group, "dense_ratio": adamw_lr / float(group["lr"])}
        super().add_param_group(param_group)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        # "split" tells the second moment from the variance, and Muon has neither.
        _require_choice(group, "variant", *(variant for variant in VARIANTS if variant != "split"))
        momentum, coefficients = group["momentum"], group["ns_coefficients"]
        _require(group, "momentum", _is_number(momentum) and 0 <= momentum < 1, "a number in [0, 1)")
        _require(group, "ns_coefficients", _are_numbers(coefficients, 3), "three numbers")
        _require(
            group, "ns_steps", _is_integer(group["ns_steps"]) and 1 <= group["ns_steps"] < 100, "1 to 99"
        )
        _require_choice(group, "adjust_lr_fn", None, "original", "match_rms_adamw")
        _require_betas(group, "adamw_betas")
        for name in ("adamw_lr", "adamw_eps", "adamw_weight_decay"):
            if group[name] is not None or name == "adamw_eps":
                _require_number(group, name, group[name])

    def _update(self, batch: Batch, group: dict[str, Any]) -> Callable[[], None]:
        lr, variant = _lr(group), VARIANTS[group["variant"]]
        if not batch.rank:
            weight_decay = group["weight_decay"]
            if group["rank"] is not None and group["adamw_weight_decay"] is not None:
                weight_decay = group["adamw_weight_decay"]
            return adam(
                batch, variant, betas=group["adamw_betas"], lr=lr * group["dense_ratio"], scale=1.0,
                eps=group["adamw_eps"], weight_decay=weight_decay,
            )  # fmt: skip
        scale = rules.adjusted_scale(group["adjust_lr_fn"], *batch.shards.size(batch.p, batch.q))
        return muon(
            batch, variant, momentum=group["momentum"], nesterov=group["nesterov"],
            newton_schulz=lambda M: rules.newton_schulz(
                M, group["ns_coefficients"], group["ns_steps"], group["eps"]
            ),
            lr=lr, scale=scale, weight_decay=group["weight_decay"],
        )  # fmt: skip


def _finish(started: list[tuple[Batch, Callable[[], None]]], *, keep: int) -> None:
    """Finish the batches that have been started, the first ones first, until `keep` of them are left."""
    while len(started) > keep:
        batch, finish = started.pop(0)
        with torch.autocast(batch.device.type, enabled=False):
            finish()


def _start(p: Tensor, group: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The state before the first step: zeros, and in A what the variant starts from."""
    flatten = group["flatten"]
    state = {
        name: sharding.zeros(p, flatten, name, shape, _state_dtype(p, name)) for name, shape in shapes.items()
    }
    shards = sharding.shards(p, flatten)
    for stream, (name, absolute) in enumerate((("m_A", False), ("v_A", True))):
        if name not in shapes:
            continue
        A, device = sharding.local(state[name]), p.device
        r, q = shapes[name][-2:]
        random = factors.gaussian(r, q, seed=4 * group["seed"] + stream).to(device)
        random = random[:, shards.columns(A.shape[-1], device)]
        start = VARIANTS[group["variant"]].start
        if start == "printed":
            A.copy_(random * 0.02)
            continue
        sketch = torch.zeros_like(A)
        if start == "sketch":
            batch = Batch(group, [p], [sharding.gradient(p)], {})
            omega = factors.gaussian(*shards.size(batch.p, r)[:1], r, seed=4 * group["seed"] + 2 + stream)
            omega = omega.to(device)[shards.rows(batch.p, device)]
            for members, rows, tiles in batch.row_tiles():
                for columns in tiles:
                    T = batch.gradient(members, rows, columns).to(A.dtype)
                    part = matmul(omega[rows].mT, T.abs() if absolute else T)
                    sketch.view(batch.N, r, -1)[members, :, columns] += part
            (sketch,) = shards.sum_rows(sketch)
        A.copy_(factors.start(sketch, random, shards))
    return state


def _state_dtype(p: Tensor, name: str) -> torch.dtype:
    """float32, whatever the weight has; only a dense moment of a float64 weight is float64."""
    return wide(p.dtype) if name in ("exp_avg", "exp_avg_sq") else torch.float32


def _waits(p: Tensor) -> bool:
    """Whether p has a gradient to step; what `lorapre.release` leaves in the place of one is none."""
    return p.grad is not None and not hasattr(p.grad, "lorapre_released")


def _lr(group: dict[str, Any]) -> float | Tensor:
    lr = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def _name(group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    return f"parameter {names[index]!r}" if names else f"parameter {index} of its group"


def _merge(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The options to go on with: those saved, where they are ours; of torch.optim.AdamW, what we know."""
    if "rank" not in saved:
        if "momentum" in own:  # Muon has options of the same names for its matrices
            theirs = ("betas", "eps") if own["rank"] is None else ("betas", "eps", "weight_decay")
            saved = {f"adamw_{k}" if k in theirs else k: v for k, v in saved.items()} | {"dense_ratio": 1.0}
        saved = {k: v for k, v in saved.items() if k in own or k == "initial_lr"}
    return {**own, **saved, "state_format": STATE_FORMAT}


def _check_fit(
    saved: dict[str, Any], state: dict[str, Any] | None, group: dict[str, Any], index: int
) -> None:
    """Raise a ValueError unless what was saved of a parameter is what its group would make, and means."""
    shape = group["params"][index].shape
    found_kind, wanted_kind = _kind(saved, shape), _kind(group, shape)
    wanted = found = state_shapes(group, shape)
    if state is not None:
        found = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    kinds_fit = found_kind == wanted_kind or "rank" not in saved
    if not kinds_fit or {**found, "skipped": ()} != {**wanted, "skipped": ()}:
        raise ValueError(
            f"state_dict does not fit {_name(group, index)} of shape {tuple(shape)}: saved was {found_kind} "
            f"with {found}, this optimizer keeps {wanted_kind} with {wanted}"
        )


def _kind(group: dict[str, Any], shape: torch.Size) -> str:
    """What the state of a weight means; other variants fill the same names and shapes with other numbers."""
    rule = "Muon" if "momentum" in group else "Adam"
    if not is_low_rank(shape, group.get("rank"), group.get("flatten", False)):
        return f"{rule} (dense)"
    options = [f"{name}={group[name]!r}" for name in ("rank", "variant", "compress") if name in group]
    return f"{rule} ({', '.join(options)})"


def _require(group: dict[str, Any], name: str, condition: bool, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, but is {group[name]!r}")


def _require_choice(group: dict[str, Any], name: str, *choices: str | bool | None) -> None:
    _require(group, name, group[name] in choices, f"one of {', '.join(map(repr, choices))}")


def _require_betas(group: dict[str, Any], name: str) -> None:
    betas = group[name]
    valid = _are_numbers(betas, 2) and all(0 <= beta < 1 for beta in betas)
    _require(group, name, valid, "two numbers in [0, 1)")


def _require_number(group: dict[str, Any], name: str, value: Any) -> None:
    _require(group, name, _is_number(value) and value >= 0, "a number >= 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)  # not "1e-3", which YAML reads as a string


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, tuple | list) and len(value) == count and all(map(_is_number, value))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
