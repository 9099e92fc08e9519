"""Same-shaped parameters as one batch of matrices, and their state as a variant takes it."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapre import rounding, sharding
from lorapre.backends import backend
from lorapre.gradient import TILE, Factors, Full, Gradient, Number, state_dtype, wide
from lorapre.groups import is_low_rank, matrix_shape, state_shapes
from lorapre.linalg import debias
from lorapre.variants import State, first_A

# Elements of the factors that a batch stacks; those of one weight may be more. On GPUs, where calls
# cost more than memory, all weights of a shape share the launches of a step.
STACK, GPU_STACK = 2**19, 2**24
RECENT = 0.05  # weight of a step in the averages of `stats`
SHARED = 2**18  # elements of sharded matrices that Muon orthogonalises together, for each process


class Member(NamedTuple):
    """A parameter to be stepped."""

    weight: Tensor
    grad: Tensor  # placed as the weight
    state: dict[str, Tensor]  # the names of `state_shapes`
    position: int  # among all parameters of the optimizer
    recent: Tensor | None = None  # the averages that `Batch.note` moves


class Batch:
    """Same-shaped parameters, stepped together as N = n E matrices (p, q), E of each.

    Of sharded parameters it holds the local part.

    Attributes:
        group: the options.
        low_rank: whether it takes the low-rank route; at rank 0 its factors are empty.
        T: the gradients as an operand.
        slow: why no compiled backend takes the batch, where one should; for a warning.
        t: (N, 1, 1), the number of the step; after `begin`.
        state: of the N matrices, before the step; after `begin`.
    """

    def __init__(self, group: dict[str, Any], members: Sequence[Member]) -> None:
        weight, flatten = members[0].weight, group["flatten"]
        self.group, self.positions = group, [m.position for m in members]
        self.low_rank = is_low_rank(weight.shape, group["rank"], flatten)
        self.experts = sharding.experts(weight, flatten)
        self.E, p, q = matrix_shape(sharding.local(weight).shape, flatten)
        self.dtype = weight.dtype
        self._matrix = (p, q), weight.ndim == 3 and not flatten
        self._tensors = {
            name: [sharding.local(m.state[name]) for m in members] for name in members[0].state
        }  # fmt: skip
        self._recent = [m.recent for m in members if m.recent is not None]
        self._copies: list[tuple[Tensor, Tensor]] = []
        weights = [sharding.local(m.weight) for m in members]
        grads = [sharding.local(m.grad) for m in members]
        self.weights, grads = self._matrices(weights, written=True), self._matrices(grads)
        kind, self.slow = backend(self.weights, grads)
        self.T = kind(
            grads, (p, q), weights[0].device, scale=-1.0 if group["maximize"] else 1.0,
            dtype=wide(weight.dtype), shards=sharding.shards(weight, flatten),
        )  # fmt: skip

    def begin(self) -> None:
        """Count the step, and read the state."""
        steps = self._tensors["step"]
        self.t = self._per_matrix(torch.stack(steps) + 1).to(
            torch.float32 if self.low_rank else self.T.dtype
        )
        if self.group["nonfinite"] == "skip":
            finite = self._finite()
            self.T.finite = self._per_matrix(finite).view(-1)
            torch._foreach_add_(steps, list(finite.to(steps[0].dtype).unbind()))
            skipped = (~finite).to(steps[0].dtype)
            torch._foreach_add_(self._tensors["skipped"], list(skipped.unbind()))
        else:
            torch._foreach_add_(steps, 1)
        self.keys: Tensor | None = None
        if self.group["stochastic_rounding"] and self.dtype == torch.bfloat16:
            self.keys = rounding.keys(self.group["seed"], self.positions, steps, self.experts)
        fields: dict[str, Any] = {
            name: Factors(self._read(f"{name}_B"), self._read(f"{name}_A"))
            for name in ("m", "v")
            if f"{name}_B" in self._tensors
        }
        if self.low_rank and not fields:  # rank 0: a momentum without directions
            (p, q), N = self.T.local_shape, len(self.T)
            fields["m"] = Factors(*(self.t.new_zeros(shape) for shape in ((N, p, 0), (N, 0, q))))
        if "v_row" in self._tensors:
            fields["v_row"] = self._read("v_row")[..., None]
            fields["v_col"] = self._read("v_col")[:, None]
        self.state = State(**fields)

    def adamw_(self, lr: Number, decay: Number) -> None:
        """Step by AdamW, both moments in full."""
        names = ("exp_avg", "exp_avg_sq")
        first, second = (self._matrices(self._tensors[name], written=True) for name in names)
        full = Full(first, second, self.t, self.group["betas"])
        self.T.adamw_(self.weights, full, lr=lr, decay=decay, eps=self.group["eps"], keys=self.keys)
        self.store(self.state)

    def store(self, new: State) -> None:
        """Write what a variant returned; the old state stays where the gradient was not finite."""
        for name, factors in (("m", new.m), ("v", new.v)):
            if factors is not None and f"{name}_B" in self._tensors:
                self._write(f"{name}_B", factors.B)
                self._write(f"{name}_A", factors.A)
        self.note(new)
        if new.v_row is not None and new.v_col is not None:
            self._write("v_row", new.v_row[..., 0])
            self._write("v_col", new.v_col[:, 0])
        for original, copy in self._copies:
            original.copy_(copy.view(original.shape))

    def note(self, new: State) -> None:
        """Move the averages over recent steps, whose quotients are what `stats` report.

        They are ||g W^T||**2 with W in the rows of A, ||g||**2, and where the state has means of
        g**2 also ||m||**2 and the sum of v; of whole weights, over all processes. All start from
        zero together, so the quotients have no bias.
        """
        T, notes = self.T, self.T.notes
        if not self._recent or "captured" not in notes:
            return
        captured = notes["captured"].square()
        if (means := notes.get("means")) is not None:
            energy = T.q * means[0].sum(-2, keepdim=True)
        else:
            energy = T.sum_q(_energy(T))
        sums = [captured, energy]
        if new.v_row is not None:
            # In the rows of A, ||m|| is `kept`; outside them m is b g.
            sums.append(notes["kept"].square() + notes["b"] ** 2 * (energy - captured))
            c2 = debias(self.group["betas"][1], self.t)
            sums.append(T.q / c2 * new.v_row.sum(-2, keepdim=True))
        x = torch.cat(sums, -1).view(len(self.positions), self.E, len(sums)).sum(1)
        x = T.shards.sum(x, "ep")
        counts = x.isfinite().all(-1, keepdim=True) & (x[:, 1:2] > 0)  # not where it is skipped
        torch._foreach_lerp_(self._recent, list(torch.where(counts, x, 0).unbind()), RECENT)

    def unless_skipped(self, value: Number, skipped: float) -> Number:
        """`value`, and `skipped` of the matrices whose gradient is not finite, (N, 1, 1) then."""
        if self.T.finite is None:
            return value
        other = torch.full((), skipped, dtype=self.T.dtype, device=self.T.device)
        return torch.where(self.T.finite[:, None, None], value, other)

    def _finite(self) -> Tensor:
        """(n,) whether the gradient of a parameter is finite, on all processes."""
        E, zero = self.E, torch.zeros((), dtype=torch.float32, device=self.T.device)
        largest = functools.partial(torch.linalg.vector_norm, ord=math.inf)
        sizes = [largest(g).float() if g.numel() else zero for g in self.T.grads]
        bad = ~torch.stack(sizes).isfinite() if sizes else zero.expand(0).bool()
        bad = bad.view(-1, E).any(1) if E else zero.expand(len(self.positions)).bool()
        return self.T.shards.sum(bad.float(), "epq") == 0

    def _per_matrix(self, x: Tensor) -> Tensor:
        """(N, 1, 1) of (n,)."""
        return x[:, None].expand(-1, self.E).reshape(-1, 1, 1)

    def _matrices(self, tensors: list[Tensor], written: bool = False) -> list[Tensor]:
        """N matrices (p, q) with contiguous rows, copies where memory has another order.

        `store` writes back those that are `written`.
        """
        (p, q), fused = self._matrix
        matrices: list[Tensor] = []
        for x in tensors:
            if x.ndim in (2, 3) and (x.ndim == 2 or fused) and x.stride(-1) == 1:
                matrices += [x] if x.ndim == 2 else x.unbind()
                continue
            copy = x.contiguous()
            if written and copy is not x:
                self._copies.append((x, copy))
            # Flat first: kernels want stride one within rows, also in rows of one number.
            matrices += copy.view(-1).view(copy.shape[0] if fused else 1, p, q).unbind()
        return matrices

    def _read(self, name: str) -> Tensor:
        """A state tensor of the batch in float32, (N, ...); of one parameter it may be a view."""
        fused = self._matrix[1]
        tensors = [x if fused else x[None] for x in self._tensors[name]]
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).float()

    def _write(self, name: str, new: Tensor) -> None:
        old, fused = self._tensors[name], self._matrix[1]
        if self.T.finite is not None:
            new = torch.where(self.T.finite.view(-1, *[1] * (new.ndim - 1)), new, self._read(name))
        torch._foreach_copy_(old, list(torch.split(new, self.E) if fused else new.unbind()))


def _energy(T: Gradient) -> Tensor:
    """The sums of g**2 over the local parts, (N, 1, 1), a tile in float32 at a time."""
    out = torch.zeros(len(T), 1, 1, dtype=torch.float32, device=T.device)
    height = T.local_shape[0] if torch.compiler.is_compiling() else TILE // max(1, T.local_shape[1])
    for total, g in zip(out, T.grads, strict=True):
        for rows in torch.split(g, max(1, height)):
            total += rows.float().square().sum()
    return out


def batches(
    group: dict[str, Any], weights: Sequence[Tensor], grads: Sequence[Tensor],
    state: Sequence[Tensor], positions: Sequence[int],
) -> Iterator[Batch]:  # fmt: skip
    """Sort parameters by shape, dtype and device into batches of STACK elements, or of one.

    `state` has the tensors of every parameter in the order of `state_shapes`, and behind a momentum
    in factors `Member.recent`; `positions` are those of the parameters among all of the optimizer.
    """
    kinds: dict[Any, list[Member]] = {}
    rest = iter(state)
    for p, g, position in zip(weights, grads, positions, strict=True):
        own = {name: next(rest) for name in state_shapes(group, p.shape)}
        recent = next(rest) if "m_B" in own else None
        if p.numel():
            kind = (p.shape, p.dtype, g.dtype, p.device, sharding.layout(p))
            kinds.setdefault(kind, []).append(Member(p, g, own, position, recent))
    for alike in kinds.values():
        size = _batch_size(group, alike[0].weight)
        if _overlap([m.weight for m in alike]):  # one after the other, so that every update arrives
            size = 1
        for start in range(0, len(alike), size):
            yield Batch(group, alike[start : start + size])


def _batch_size(group: dict[str, Any], weight: Tensor) -> int:
    """How many parameters to stack."""
    shapes = state_shapes(group, weight.shape)
    stacked = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith(("_B", "_A")))
    stacked += weight.numel() // 64  # of large weights the sums of g**2 count too
    limit = GPU_STACK if weight.is_cuda else STACK
    count = sharding.shards(weight, group["flatten"]).count
    if group["algorithm"] == "muon" and count > 1:  # it deals matrices out, one to each process
        stacked, limit = max(stacked, weight.numel()), SHARED
    return max(count, limit * count // max(1, stacked))


def transient_bytes(matrices: int, p: int, q: int, rank: int) -> int:
    """The most bytes that a step of Adam takes on a CPU beside weights, gradients and state.

    It holds some tiles, and three copies of the factors of one weight or of those it stacks.

    Args:
        matrices: how many weights, or experts, of this shape a process steps.
        p: rows that it holds of each.
        q: columns.
        rank: of the factors; zero without.
    """
    tiles = 16 * 4 * min(TILE, matrices * p * q)
    stacked = min(matrices, max(1, STACK // max(1, rank * (p + q) + p * q // 64)))
    return tiles + 3 * 4 * stacked * rank * (p + q)


def _overlap(weights: Sequence[Tensor]) -> bool:
    """Whether two of the weights share memory, as two parameters made of one tensor do."""
    if len(weights) == 1 or torch.compiler.is_compiling():
        return False
    spans = []
    for x in map(sharding.local, weights):
        last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        spans.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
    spans.sort()
    return any(end > start for (_, end), (start, _) in itertools.pairwise(spans))


def keep_freed_memory() -> None:
    """Let glibc keep the memory of a tile for the next one, instead of paging it in anew.

    glibc gives back what is free above twice the largest block that the process has mapped and
    unmapped so far. This block, never touched, has the size of all tiles that a step holds.
    """
    torch.empty(2**23 - 2**12, dtype=torch.uint8, device="cpu")


def start_state(
    p: Tensor, group: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The state before the first step: zeros, and in A what the variant starts from."""
    flatten = group["flatten"]
    state = {
        name: sharding.zeros(p, flatten, name, shape, state_dtype(group, p, name))
        for name, shape in shapes.items()
    }
    for stream, name in enumerate(("m_A", "v_A")):
        if name in shapes and p.numel():
            batch = Batch(group, [Member(p, sharding.gradient(p), {}, 0)])
            A = first_A(group["variant"], batch.T, shapes[name][-2], 4 * group["seed"] + stream)
            local = sharding.local(state[name])
            local.copy_(A.view_as(local))
    return state
