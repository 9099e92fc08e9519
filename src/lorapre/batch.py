"""Same-shaped parameters as one batch of matrices: their tiles and their state, and how batches are made."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lorapre import rounding, sharding
from lorapre.groups import is_low_rank, matrix_shape, state_shapes

# Elements of what a step holds at a time: tiles of gradient and weight, what several weights stack, and parts
# of factors. Large enough for products of matrices at full speed, small enough for the caches.
TILE = 2**20
BATCH = 2**19
SHARED = 2**18  # of sharded matrices that Muon orthogonalises together
PART = 2**18
SMALL = 2**16  # elements of matrices that are not worth a call each
# On GPUs calls cost more than memory: Adam stacks up to 64 MiB of factors there, so that all weights of a
# shape share the launches of a step, those that factorise small matrices above all.
GPU_BATCH = 2**24


class Batch:
    """Same-shaped parameters, stepped together as N = n E matrices (p, q).

    Of sharded parameters it holds, and (E, p, q) is, what is local; `shards` sums over the rest.

    Attributes:
        weights: N views (p, q); (p, ...) of a convolution whose memory has another order.
        grads: likewise.
        state: of each state tensor the n of the parameters.
        rank: of the factors; zero if there are none.
        dtype: of the update.
        products: dtype in which gradients and factors are multiplied; sums are float32 (docs/maths.md,
            "Precision").
        t: step count (N,), this step included; after `begin`.
        finite: (N,) whether the gradient is, or None if it may be anything; after `begin`.
        compiled: whether `lorapre.cpu_kernels` steps its tiles, which can be larger then.
    """

    compiled = False

    def __init__(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        state: dict[str, list[Tensor]],
        positions: list[int] | None = None,
    ) -> None:
        shape, self.flatten = weights[0].shape, group["flatten"]
        self.fused = len(shape) == 3 and not self.flatten
        self.rank: int = group["rank"] if is_low_rank(shape, group["rank"], self.flatten) else 0
        self.shards = sharding.shards(weights[0], self.flatten)
        self.experts = sharding.experts(weights[0], self.flatten)
        weights, grads = [sharding.local(x) for x in weights], [sharding.local(x) for x in grads]
        self.E, self.p, self.q = matrix_shape(weights[0].shape, self.flatten)
        self.device = weights[0].device
        self.dtype = wide(weights[0].dtype)
        # The matrix units take bfloat16 as it is; float16 has too little range for the factors.
        self.products = torch.bfloat16 if grads[0].dtype == torch.bfloat16 else torch.float32
        self.sign = -1 if group["maximize"] else 1
        self.weights, self.grads = self.matrices(weights), self.matrices(grads)
        self.N = len(self.weights)
        self.state = {name: [sharding.local(x) for x in tensors] for name, tensors in state.items()}
        self.finite: Tensor | None = None
        self.seed, self.positions = group["seed"], positions
        rounds = group["stochastic_rounding"] and weights[0].dtype == torch.bfloat16
        self.rounds_stochastically = rounds and positions is not None
        self.narrow = all(x.ndim == 2 for x in (*self.weights, *self.grads))
        # Weight and gradient are worked on as they are, or in two tiles more; r x r matrices want room too.
        room = TILE // 4 if self.rank > 256 else TILE
        as_they_are = self.narrow and weights[0].dtype == grads[0].dtype == self.dtype
        whole_rows = self.rank == 0 or self.q <= self._side()
        self.row_tile = max(1, room * 3 // 8 if as_they_are and whole_rows else room // 4)
        self.column_tile = max(1, room if as_they_are else room // 2)
        if not self.rank:  # four tiles in float32 of an embedding are 2 % of it and fewer calls
            self.row_tile = max(self.row_tile, self.p * self.q * weights[0].element_size() // 1024)

    def begin(self, nonfinite: str) -> None:
        """Count the step: sets `t` and, if asked for, `finite`, whether a weight takes part in it."""
        steps = torch.stack(self.state["step"])
        self.t = self._per_matrix(steps + 1).to(self.dtype)
        if nonfinite == "skip":
            largest = torch.stack([
                torch.linalg.vector_norm(g, ord=math.inf) if g.numel() else g.new_zeros(()) for g in
                self.grads
            ])  # fmt: skip
            bad = (~largest.isfinite()).to(steps.dtype).view(-1, self.E).amax(1)
            finite = self.shards.sum_all(bad) == 0
            self.finite = self._per_matrix(finite)
            torch._foreach_add_(self.state["step"], list(finite.to(steps.dtype)))
            torch._foreach_add_(self.state["skipped"], list((~finite).to(steps.dtype)))
        else:
            torch._foreach_add_(self.state["step"], 1)
        if self.rounds_stochastically:
            assert self.positions is not None
            self.keys = rounding.keys(self.seed, self.positions, self.state["step"], self.experts)
            self.row_indices = self.shards.rows(self.p, self.device)
            self.column_indices = self.shards.columns(self.q, self.device)

    def signs(self, members: slice) -> dict[str, Any]:
        """What kernels make of the gradients of members before they take them."""
        return {"sign": float(self.sign), "finite": None if self.finite is None else self.finite[members]}

    def matrices(self, tensors: list[Tensor]) -> list[Tensor]:
        """Views (p, q), one for each matrix; (p, ...) where the memory of a convolution has another order."""
        if self.fused:
            return [matrix for x in tensors for matrix in x.unbind()]
        if tensors[0].ndim < 2:
            return [x.view(1, -1) for x in tensors]
        if tensors[0].ndim == 2:
            return tensors
        return [x.view(self.p, self.q) if x.is_contiguous() else x for x in tensors]

    def _per_matrix(self, x: Tensor) -> Tensor:
        return x[:, None].expand(-1, self.E).reshape(-1)

    def per_matrix(self, value: Any, skipped: float) -> list[Any]:
        """`value`, and `skipped` of the matrices whose gradient is not finite, N times."""
        if self.finite is None:
            return [value] * self.N
        return list(torch.where(self.finite, value, skipped).unbind())

    def row_tiles(self) -> Iterator[tuple[slice, slice, list[slice]]]:
        """Tiles (members, rows, columns) by rows of columns; of one matrix, or of all of small ones."""
        if (small := self._small()) is not None:
            yield from ((members, slice(0, self.p), [slice(0, self.q)]) for members in small)
            return
        columns = cut(self.q, self._side() if self.narrow else self.q)
        height = self._side()
        if not self.compiled:
            height = max(1, min(self.row_tile // (columns[0].stop - columns[0].start), self._side(64)))
        for i in range(self.N):
            for rows in cut(self.p, height):
                yield slice(i, i + 1), rows, columns

    def column_tiles(self, update: bool = False) -> Iterator[tuple[slice, slice, list[slice]]]:
        """Tiles (members, columns, rows) by columns of rows; with room for an `update` of the weight."""
        if (small := self._small()) is not None:
            yield from ((members, slice(0, self.q), [slice(0, self.p)]) for members in small)
            return
        rows = cut(self.p, self._side())
        width = self._side() if self.compiled else self.q
        if self.narrow and not self.compiled:
            room = self.row_tile if update else self.column_tile
            width = max(1, min(room // (rows[0].stop - rows[0].start), self._side(64)))
        for i in range(self.N):
            for columns in cut(self.q, width):
                yield slice(i, i + 1), columns, rows

    def _small(self) -> list[slice] | None:
        """Members that make up a tile together, where the matrices are small."""
        if self.compiled:  # which has no temporaries but of the size of factors
            fits = max(self.p, self.q) <= self._side()
            return cut(self.N, max(1, BATCH // max(1, self.rank * (self.p + self.q)))) if fits else None
        return cut(self.N, max(1, SMALL // max(1, self.p * self.q))) if self.p * self.q <= SMALL else None

    def _side(self, least: int = 512) -> int:
        """How long a tile may be, so that what is cut of a factor stays small, but long enough for speed."""
        return min(4096, max(least, PART // max(1, self.rank)))

    def gradient(self, members: slice, rows: slice, columns: slice) -> Tensor:
        """A tile of the gradient (n, rows, columns), to be minimised along, zero where it was not finite.

        It may share memory with the gradient.
        """
        tiles = [_tile(g, rows, columns) for g in self.grads[members]]
        if not tiles:  # a process that holds no expert
            g = torch.empty(0, self.p, self.q, device=self.device)
        else:
            g = tiles[0][None] if len(tiles) == 1 else torch.stack(tiles)
        if self.finite is not None:
            g = torch.where(self.finite[members, None, None], g, 0)
        return -g if self.sign < 0 else g

    def tiles(self, tensors: list[Tensor], members: slice, rows: slice, columns: slice) -> list[Tensor]:
        """Tiles (rows, columns) of matrices, sharing their memory."""
        whole = rows == slice(0, self.p) and columns == slice(0, self.q)
        return tensors[members] if whole else [x[rows, columns] for x in tensors[members]]

    def work(self, x: Tensor, rows: slice, columns: slice) -> Tensor:
        """A tile of a matrix, contiguous and in the dtype of the update; a view if that is what it is."""
        return _tile(x, rows, columns).to(self.dtype).contiguous()

    def store(self, x: Tensor, rows: slice, columns: slice, tile: Tensor) -> None:
        """Write back what `work` gave, unless it was a view."""
        old = x[rows, columns] if x.ndim == 2 else x[rows]
        if x.ndim > 2 or x.dtype != self.dtype or not old.is_contiguous():
            old.copy_(tile.view(old.shape))

    def store_weight(self, i: int, rows: slice, columns: slice, tile: Tensor) -> None:
        """`store` of weight i, rounded as asked for."""
        if self.rounds_stochastically:
            key, width = self.keys[i : i + 1], self.shards.size(self.p, self.q)[1]
            held = self.row_indices[rows], self.column_indices[columns]
            # In parts, since the noise takes several times its room.
            size = max(1, SMALL // max(1, tile.shape[1]))
            for part, indices in zip(torch.split(tile, size), torch.split(held[0], size), strict=True):
                rounding.round_(part[None], key, indices, held[1], width)
        self.store(self.weights[i], rows, columns, tile)

    def read(self, name: str) -> Tensor:
        """A state tensor of the whole batch, (N, ...); shares memory with that of a single parameter."""
        tensors = self.state[name]
        if self.fused:
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)

    def write(self, name: str, new: Tensor) -> None:
        """Write a state tensor (N, ...) back; the old one stays where the gradient was not finite."""
        tensors = self.state[name]
        if self.finite is not None:
            new = torch.where(self.finite.view(-1, *[1] * (new.ndim - 1)), new, self.read(name))
        torch._foreach_copy_(tensors, list(torch.split(new, self.E) if self.fused else new.unbind()))


def batches(
    group: dict[str, Any],
    weights: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    positions: list[int],
) -> Iterator[Batch]:
    """Sort parameters by shape, dtype and device into batches of what BATCH elements hold, or one parameter.

    `positions` are those of the parameters among all of the optimizer.
    """
    kinds: dict[Any, list[int]] = {}
    starts, offset = [], 0
    shapes_of: dict[Any, dict[str, tuple[int, ...]]] = {}
    for i, (p, g) in enumerate(zip(weights, grads, strict=True)):
        kinds.setdefault((p.shape, p.dtype, g.dtype, p.device, sharding.layout(p)), []).append(i)
        if p.shape not in shapes_of:
            shapes_of[p.shape] = state_shapes(group, p.shape)
        starts.append(offset)
        offset += len(shapes_of[p.shape])
    for (shape, *_), members in kinds.items():
        if 0 in shape:
            continue  # no elements, nothing to step
        shapes = shapes_of[shape]
        # Factors are stacked; of sharded weights, of which a part counts, Muon stacks the matrices: it wants
        # one for every process.
        stacked = sum(math.prod(s) for name, s in shapes.items() if name.endswith(("_B", "_A")))
        limit = GPU_BATCH if weights[members[0]].device.type == "cuda" else BATCH
        count = sharding.shards(weights[members[0]], group["flatten"]).count
        if "momentum" in group and count > 1:
            stacked, limit = max(stacked, math.prod(shape)), SHARED
        size = max(count, limit * count // max(1, stacked))
        for chunk in (members[i : i + size] for i in range(0, len(members), size)):
            yield Batch(
                group,
                [weights[i] for i in chunk],
                [grads[i] for i in chunk],
                {name: [state[starts[i] + k] for i in chunk] for k, name in enumerate(shapes)},
                [positions[i] for i in chunk],
            )


def keep_freed_memory() -> None:
    """Let glibc keep the memory of a tile for the next one; else every tile may page its memory in anew.

    From then on: it gives back what is free above twice the largest block that the process has mapped and
    unmapped so far. This one, never touched, is of the size of all tiles that a step has at a time.
    """
    torch.empty(2**23 - 2**12, dtype=torch.uint8)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype dense arithmetic and dense moments have: float32, or float64 for float64 weights."""
    return torch.promote_types(dtype, torch.float32)


def _tile(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """(rows, columns) of a matrix; of (p, ...), a convolution in another order, a copy of all columns."""
    return x[rows, columns] if x.ndim == 2 else x[rows].flatten(1)


def cut(total: int, size: int) -> list[slice]:
    """Slices of equal length, at most `size` and the last one shorter, that cover `total`."""
    if total == 0:
        return []
    size = -(-total // -(-total // size))
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
