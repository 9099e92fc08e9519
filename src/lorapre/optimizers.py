"""LoRAPreAdamW and LoRAPreMuon: options, state and the order of a step."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.weak import WeakTensorKeyDictionary

from lorapre import backends, checkpoints, options, report, sharding
from lorapre.batch import Batch, batches, keep_freed_memory, start_state
from lorapre.gradient import Moments
from lorapre.groups import state_shapes
from lorapre.linalg import exact_products, lr_factor, newton_schulz
from lorapre.variants import ADAM, FOLLOW, muon

__all__ = ["LoRAPreAdamW", "LoRAPreMuon"]

Part: TypeAlias = tuple[dict[str, Any], Sequence[int]]


class LoRAPreOptimizer(Optimizer):
    """What both optimizers share. Use `LoRAPreAdamW` or `LoRAPreMuon`."""

    algorithm: str

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        own = dict(algorithm=self.algorithm, flatten=False, matrices=False)
        own["state_format"] = checkpoints.STATE_FORMAT
        super().__init__(params, {**options.plain(defaults), **own})
        keep_freed_memory()
        self._prepare()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient which `gradient_release` has not used.

        Args:
            closure: evaluates the model again and returns the loss, which `step` then returns.

        Raises:
            RuntimeError: a gradient is sparse, a weight cannot be stepped as it is sharded, or a
                state does not fit its weight or options. The message names it; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for batch in self._batches():
            with exact_products(batch.T.device):
                self._update(batch)
        return loss

    def stats(self) -> dict[str, Tensor]:
        """What recent steps did, as scalars on the device: `report.stats`. It waits for nothing."""
        params = [p for group in self.param_groups for p in group["params"]]
        return report.stats([self._recent[p] for p in params if p in self._recent])

    def _batches(self, parts: Sequence[Part] = ()) -> Iterator[Batch]:
        """Yield the weights that have a gradient in batches, after all have been checked.

        Args:
            parts: copies of groups with fewer parameters, and the positions of these; or all.
        """
        count = itertools.count()
        parts = parts or [(g, [next(count) for _ in g["params"]]) for g in self.param_groups]
        for group, _ in parts:
            if not torch.compiler.is_compiling():
                checkpoints.check_step(group, self.state)
        for group, positions in parts:
            weights: list[Tensor] = []
            grads: list[Tensor] = []
            state: list[Tensor] = []
            self._init_group(group, weights, grads, state)
            found = [i for i, p in zip(positions, group["params"], strict=True) if _waits(p)]
            for batch in batches(group, weights, grads, state, found):
                yield batch
                if batch.slow is not None:
                    self._say(batch.slow)

    def _update(self, batch: Batch) -> None:
        """Step a batch by Algorithm 1, or by AdamW where it has no factors."""
        group, T = batch.group, batch.T
        batch.begin()
        lr, (beta1, beta2) = options.lr(group), group["betas"]
        rate = batch.unless_skipped(lr * group["scale"] if batch.low_rank else lr, 0.0)
        decay = batch.unless_skipped(1 - lr * group["weight_decay"], 1.0)
        if not batch.low_rank:
            return batch.adamw_(rate, decay)

        def apply(M: Moments) -> tuple[Tensor, Tensor] | None:
            sums = T.step_(
                batch.weights, M, lr=rate, decay=decay, eps=group["eps"], keys=batch.keys,
                means=batch.state.v_row is not None,
            )  # fmt: skip
            T.notes |= {"b": M.b, "means": sums}
            return sums

        variant = ADAM[group["variant"]]
        batch.store(variant(batch.state, T, batch.t, beta1, beta2, apply))

    def _init_group(
        self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], state: list[Tensor]
    ) -> bool:
        """Append weights that have a gradient, their gradients and states; make missing states.

        torch.compile runs the method of this name by itself, outside the graph, and takes the lists
        it has filled as the graph's inputs. So the check, which looks at the state, is here then.
        """
        if torch.compiler.is_compiling():
            checkpoints.check_step(group, self.state)
        shapes_of: dict[Any, dict[str, tuple[int, ...]]] = {}
        for p in group["params"]:
            if not _waits(p):
                continue
            own = self.state[p]
            if p.shape not in shapes_of:
                shapes_of[p.shape] = state_shapes(group, p.shape)
            shapes = shapes_of[p.shape]
            if "step" not in own:
                self._recent.pop(p, None)  # of a state that has been deleted
                with exact_products(p.device):
                    own.update(start_state(p, group, shapes))
            weights.append(p)
            grads.append(sharding.gradient(p))
            state.extend(own[name] for name in shapes)
            if "m_B" in shapes:
                if (sums := self._recent.get(p)) is None or sums.device != own["step"].device:
                    sums = self._recent[p] = own["step"].new_zeros(4 if "v_row" in shapes else 2)
                state.append(sums)
        return False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may set any option of the constructor for itself.

        Args:
            param_group: `params`, tensors or (name, tensor) pairs, and options (rank None: AdamW).

        Raises:
            ValueError: an option is out of range, or a parameter is complex; the message names it.
        """
        param_group = options.plain(param_group)
        group = {**self.defaults, **param_group}
        options.check(group)
        params = options.checked_params(group)
        param_group = self._implied(group) | param_group
        # torch wants names for all parameters or for none.
        if "param_names" in param_group or any(isinstance(item, tuple) for item in params):
            for number, group in enumerate(self.param_groups):
                group.setdefault("param_names", self._new_names(number, len(group["params"])))
        elif any("param_names" in group for group in self.param_groups):
            param_group["param_names"] = self._new_names(len(self.param_groups), len(params))
        super().add_param_group({**param_group, "params": params})
        added = self.param_groups[-1]
        added["matrices"] = any(p.ndim > 1 for p in added["params"])

    def _implied(self, group: dict[str, Any]) -> dict[str, Any]:
        """Options that follow from others where a group does not name them."""
        return {}

    def _new_names(self, number: int, count: int) -> list[str]:
        """Names that no parameter has, for `count` nameless ones of a group."""
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        taken = {name.rpartition(".")[0] for name in names}
        prefix = next(x for k in itertools.count(number) if (x := f"unnamed.{k}") not in taken)
        return [f"{prefix}.{index}" for index in range(count)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer; options it did not know take their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.update({**self.defaults, **group})
        self._prepare()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`: of this class, or of torch.optim.AdamW where all is dense.

        Parameters are matched by their names where both sides have them, else by their order, as in
        torch. The factors keep their dtype whatever that of the weights.

        Raises:
            ValueError: the state of a parameter does not fit it, its rank or its variant, or a
                newer lorapre has written it. The message names the parameter and what was found and
                expected, and the optimizer is as it was.
        """
        loaded: dict[Tensor, Any] = {}

        def check(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            state_dict, found = checkpoints.checked(state_dict, self.param_groups)
            loaded.update(found)
            return state_dict

        def restore(_: Optimizer) -> None:
            checkpoints.restore(self.state, self.param_groups, loaded)

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

    def _prepare(self) -> None:
        """Compile the kernels now: collectives of the first step would wait for the compiler."""
        self._said: set[str] = set()
        self._recent: Any = WeakTensorKeyDictionary()  # of `stats`; no part of the state
        on_cpu = any(p.is_cpu for group in self.param_groups for p in group["params"])
        if on_cpu and (reason := backends.library.prepare()) is not None:
            self._say(reason)

    def _say(self, reason: str) -> None:
        """Warn, once for each optimizer and reason."""
        if reason not in self._said:
            self._said.add(reason)
            backends.library.warn(f"{type(self).__name__} {reason}")


class LoRAPreAdamW(LoRAPreOptimizer):
    """AdamW whose moments live as low-rank factors, B (p, r) and A (r, q) (paper, Algorithm 1).

    The state of a (p, q) weight takes (p + q) (r + 1) float32 numbers instead of 2 p q; "paper"
    keeps factors for both moments and takes 2 (p + q) r. Weights for which that would not be less,
    and groups with `rank=None`, take AdamW; `lorapre.coverage` shows which took what.
    `lorapre.param_groups` sends embeddings, output head, norms and biases there, as the paper does.

    Args:
        params: parameters, (name, parameter) pairs or groups of either; every option may be set per
            group.
        lr: learning rate, a number or a tensor of one element.
        betas: decay of the first and the second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        rank: r, or None for dense AdamW. With 0 "split" keeps no momentum, and of the second
            moment a rank-one estimate (state: `step`, `v_row`, `v_col`).
        scale: factor on the update of the factorised weights alone (the paper trains with 0.25).
        variant: "split" or "paper" (as printed); see docs/maths.md.
        maximize: ascend instead.
        nonfinite: what a NaN or infinite gradient does: "propagate" as in torch, or "skip" the step
            of that weight, which is counted in its state as `skipped` without waiting for the
            device.
        stochastic_rounding: round bfloat16 weights up or down at random with the right mean, so
            that updates too small for bfloat16 are not lost. Takes no memory; the same seed gives
            the same weights, in a resumed run too. Weights of other dtypes are not affected.
        momentum_dtype: of `m_B` and `m_A`: "float32", or "bfloat16" in half the bytes.
        seed: of the random start, which depends on it and on the shape of the weight, on nothing
            else, and of the stochastic rounding.

    Raises:
        ValueError: an option is out of range; the message names it.

    State of a factorised weight, float32 by default: `step`, `m_B` (p, r), `m_A` (r, q), `v_row`
    (p) and `v_col` (q); in "paper" `v_B` and `v_A` instead of the last two; of a dense weight
    `step`, `exp_avg` and `exp_avg_sq`. Fused experts (E, p, q) are E matrices, and their factors
    have E in front; a convolution is the matrix (out, in * k * k).
    """

    algorithm = "adam"

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
        maximize: bool = False,
        nonfinite: str = "propagate",
        stochastic_rounding: bool = False,
        momentum_dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rank=rank, scale=scale,
            variant=variant, maximize=maximize, nonfinite=nonfinite,
            stochastic_rounding=stochastic_rounding, momentum_dtype=momentum_dtype, seed=seed,
        )  # fmt: skip
        super().__init__(params, defaults)


class LoRAPreMuon(LoRAPreOptimizer):
    """Muon whose momentum lives as low-rank factors B (p, r), A (r, q) (paper, Algorithm 2).

    The state of a (p, q) weight takes (p + q) r float32 numbers instead of p q. Groups with
    `rank=None` and weights too small for factors take AdamW; `lorapre.param_groups` makes the
    groups of a model.

    Args:
        params: parameters, (name, parameter) pairs or groups of either; every option may be set per
            group.
        lr: learning rate, a number or a tensor of one element.
        weight_decay: decoupled, as in torch.optim.Muon.
        momentum: decay of the momentum, in [0, 1).
        nesterov: as in torch.optim.Muon. None: True, but with "paper" False, as printed.
        ns_coefficients: of the Newton-Schulz iteration, three numbers.
        eps: least norm of a matrix in the Newton-Schulz iteration.
        ns_steps: Newton-Schulz iterations, 1 to 99.
        adjust_lr_fn: factor on lr by shape, as in torch.optim.Muon: None or "original" is
            sqrt(max(1, p / q)), "match_rms_adamw" is 0.2 sqrt(max(p, q)), with which AdamW's
            learning rates carry over.
        rank: r, or None for dense AdamW. With 0 "subspace" keeps no momentum: the matrix is the
            gradient alone (state: `step`).
        variant: "subspace" or "paper" (as printed); see docs/maths.md.
        adamw_lr: learning rate of the dense weights, None for lr. A group with `rank=None` takes it
            as its lr unless it names its own. Dense weights inside a factorised group keep the
            ratio adamw_lr / lr that they start with, under every scheduler (docs/choose.md).
        adamw_betas: of the dense weights.
        adamw_eps: of the dense weights.
        adamw_weight_decay: of the dense weights, None for weight_decay. A group with `rank=None`
            takes it unless it names its own, as `lorapre.param_groups` does for norms and biases.
        maximize: ascend instead.
        nonfinite: as in `LoRAPreAdamW`.
        stochastic_rounding: as in `LoRAPreAdamW`.
        momentum_dtype: as in `LoRAPreAdamW`.
        seed: as in `LoRAPreAdamW`.

    Raises:
        ValueError: an option is out of range; the message names it.

    State of a factorised weight, float32 by default: `step`, `m_B` (p, r), `m_A` (r, q).
    """

    algorithm = "muon"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool | None = None,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        rank: int | None = 128,
        variant: str = "subspace",
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        maximize: bool = False,
        nonfinite: str = "propagate",
        stochastic_rounding: bool = False,
        momentum_dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
            ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
            rank=rank, variant=variant, adamw_lr=adamw_lr, adamw_betas=adamw_betas,
            adamw_eps=adamw_eps, adamw_weight_decay=adamw_weight_decay, maximize=maximize,
            nonfinite=nonfinite, stochastic_rounding=stochastic_rounding,
            momentum_dtype=momentum_dtype, seed=seed, dense_ratio=1.0,
        )  # fmt: skip
        super().__init__(params, defaults)

    def _implied(self, group: dict[str, Any]) -> dict[str, Any]:
        names = ("lr", "weight_decay") if group["rank"] is None else ()
        own = {name: group[f"adamw_{name}"] for name in names}
        if group["rank"] is not None and group["adamw_lr"] is not None:
            own["dense_ratio"] = group["adamw_lr"] / float(group["lr"])
        return {name: value for name, value in own.items() if value is not None}

    def _update(self, batch: Batch) -> None:
        group, T = batch.group, batch.T
        if not batch.low_rank:
            batch.group = options.dense(group)
            return super()._update(batch)
        batch.begin()
        lr = options.lr(group)
        rate = batch.unless_skipped(lr * lr_factor(group["adjust_lr_fn"], T.p, T.q), 0.0)
        decay = batch.unless_skipped(1 - lr * group["weight_decay"], 1.0)

        def orthogonalise(X: Tensor) -> Tensor:
            return newton_schulz(X, group["ns_coefficients"], group["ns_steps"], group["eps"])

        def apply(M: Moments) -> None:
            T.orthogonal_step_(
                batch.weights, M, orthogonalise, lr=rate, decay=decay, keys=batch.keys
            )

        nesterov, variant = group["nesterov"], group["variant"]
        nesterov = variant != "paper" if nesterov is None else nesterov
        batch.store(muon(batch.state, T, group["momentum"], nesterov, FOLLOW[variant], apply))


def _waits(p: Tensor) -> bool:
    """Whether p has a gradient to step; a released gradient counts as missing."""
    return p.grad is not None and not hasattr(p.grad, "lorapre_released")
