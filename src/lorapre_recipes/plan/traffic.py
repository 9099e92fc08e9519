"""What a training step sends between GPUs: the collectives of `lorapre.sharding`, which the tests count.

A ring is assumed on the wire, as in NCCL for large messages: of N processes each sends 2 (N - 1) / N n bytes
for an all-reduce of n bytes, and (N - 1) / N n for an all-gather or a reduce-scatter whose long side has n.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lorapre.batch import SHARED
from lorapre.groups import matrix_shape
from lorapre_recipes.plan.settings import Mesh, Settings
from lorapre_recipes.plan.weights import BF16, FLOAT32, FLOAT64, Weight


def ring(n: float, sizes: Iterable[int]) -> float:
    """Bytes that each process sends to all-reduce n bytes over groups of `sizes`, one after the other."""
    return sum(2 * (size - 1) / size * n for size in sizes)


def summed(variant: str, moment: str, means: bool, r: int, p: int, q: int) -> tuple[int, int]:
    """Bytes that a step sums over row shards, and over column shards, for one moment of one matrix.

    B (p, r) and A (r, q) are what is held here. Over rows travel L^T T (r, q) and L^T L or Q^T B (r, r); over
    columns T A^T (p, r) and A A^T (r, r). The subspace tracker adds three triangles of Y^T Y and the size of
    Y in `orth` and, where means are kept, what `match_means` or `rank_one_rest` needs. The norms of B, in the
    other trackers, and, where there is a gauge, of A are summed as one float64 each.
    """
    triangle = r * (r + 1) // 2
    rows, columns = FLOAT32 * (r * q + r * r), FLOAT32 * (p * r + r * r)
    if variant == "paper":
        return rows + FLOAT64, columns
    if variant == "calibrated":
        return rows + FLOAT64, columns + FLOAT64
    rows += FLOAT32 * (3 * triangle + 1)
    if means and moment == ("m" if variant == "split" else "v"):
        # The means over columns; the mean of what is left of the rows and the norm of B, or a Gram.
        rows += FLOAT32 * (q + (2 if variant == "split" else triangle))
        columns += FLOAT32 * p
    return rows, columns + FLOAT64


def deal_traffic(n: int, p: int, q: int, splits: Sequence[tuple[int, str]]) -> float:
    """Bytes that the busiest GPU moves to orthogonalise n matrices, of each of which it holds a part (p, q).

    The matrices are dealt out whole, in float32, and the results returned in bfloat16, each all-to-all.
    Where there are fewer matrices than GPUs, the busiest still gets one.
    """
    if not splits:
        return 0.0
    *inner, (size, role) = splits
    if role == "experts":  # whole matrices already
        return deal_traffic(n, p, q, inner)
    mine = math.ceil(n / size)
    p, q = (p * size, q) if role == "rows" else (p, q * size)
    exchanged = mine * p * q * (size - 1) / size * (FLOAT32 + BF16)
    return exchanged + deal_traffic(mine, p, q, inner)


def muon_traffic(weights: Sequence[Weight], mesh: Mesh) -> float:
    """Bytes for the Newton-Schulz of weights of one kind, in batches as `lorapre.batch` makes them."""
    part = weights[0].matrices(mesh)
    count = math.prod(size for size, _ in part.splits)
    size = max(count, SHARED * count // math.prod(weights[0].shape))
    batches = (min(size, len(weights) - start) for start in range(0, len(weights), size))
    return sum(deal_traffic(batch * part.E, part.p, part.q, part.splits) for batch in batches)


def gather_traffic(weight: Weight, item: int, mesh: Mesh) -> float:
    """Bytes that a GPU sends to gather the gradient of a weight: about p q elements."""
    part = weight.matrices(mesh)
    processes = math.prod(size for size, role in part.splits if role != "experts")
    return (processes - 1) * part.E * part.p * part.q * item


def optimizer_traffic(weights: Sequence[Weight], settings: Settings, mesh: Mesh) -> dict[str, float]:
    """Bytes that a GPU sends in a step, by name of the matrix; dense weights send nothing.

    For torch.optim.Muon one gather of each matrix, which is the least it needs.
    """
    sent: dict[str, float] = {}
    batches: dict[Any, list[Weight]] = {}
    for weight in weights:
        if weight.matrix:
            batches.setdefault((weight.group, weight.shape, weight.cuts(mesh)), []).append(weight)
    for batch in batches.values():
        one = batch[0]
        part, each = one.matrices(mesh), 0.0
        if settings.optimizer == "muon":
            each = gather_traffic(one, settings.item, mesh)
        for moment in settings.moments if one.rank is not None else ():
            means = "v_row" in one.state
            rows, columns = summed(settings.variant or "", moment, means, one.rank or 0, part.p, part.q)
            each += part.E * (ring(rows, part.over("rows")) + ring(columns, part.over("columns")))
        if settings.optimizer == "lorapre-muon":
            each += muon_traffic(batch, mesh) / len(batch)
        sent |= {weight.name: each for weight in batch}
    return sent


def fsdp_traffic(weights: Sequence[Weight], mesh: Mesh, item: int) -> float:
    """Bytes that FSDP2 itself sends from a GPU in a step, whatever the optimizer.

    Weights are gathered in the forward and again in the backward pass (reshard_after_forward=True), gradients
    of those that train are scattered, and HSDP all-reduces the shards of gradients over replicas.
    """
    held = sum(weight.held(mesh) for weight in weights) * item
    gradients = sum(weight.held(mesh) for weight in weights if not weight.frozen) * item
    return (mesh.shards - 1) * (2 * held + gradients) + ring(gradients, [mesh.replicas])


def most_row_shards(weight: Weight, settings: Settings) -> int:
    """The most row shards on which a GPU holds less state of a weight than with AdamW, its columns whole.

    With A (r, q) whole on each of N GPUs, c numbers for each row and column (k r of the k factorised moments,
    and one of the means) and d moments in full, all in float32,

        4 c (p / N + q) + 4 d p q / N  <  2 item p q / N    <=>    N < p (2 item - 4 d) / (4 c) - p / q

    which is 2 p / (r + 1) - p / q by default where AdamW's moments are float32 too.
    """
    assert weight.rank is not None
    _, p, q = matrix_shape(weight.shape, weight.flatten)
    kept = sum(name in weight.state for name in ("exp_avg", "exp_avg_sq"))
    spared = 2 * settings.item - FLOAT32 * kept
    numbers = len(settings.moments) * weight.rank + ("v_row" in weight.state)
    limit = p * spared / (FLOAT32 * numbers) - p / q
    return max(0, math.ceil(limit) - 1)
