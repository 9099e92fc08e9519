"""Steps of Adam by kernels: which batches they can take, and what they are told of the moments.

On GPUs `lorapre.kernels`, which is in Triton, takes the sweeps as a whole; on CPUs `lorapre.cpu_kernels` what
is done with a tile.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from lorapre import cpu_kernels, operands, rules
from lorapre.batch import Batch
from lorapre.linalg import ALL
from lorapre.moments import Dense, Means, Product, Split
from lorapre.operands import Factors
from lorapre.tracking import Tracking


def moment_operands(
    batch: Batch, first: Product | Dense, second: Product | Dense | Split, betas: tuple[float, float],
    correction: Tensor | None,
) -> tuple[Factors | operands.Dense, Factors | operands.Dense | operands.Split]:  # fmt: skip
    """The two moments as kernels take them, after the step."""
    (beta1, beta2), c1 = betas, rules.debias(betas[0], batch.t)
    c2 = rules.debias(beta2, batch.t) if correction is None else correction
    m: Factors | operands.Dense
    if isinstance(first, Dense):
        m = operands.Dense(first.stored, beta1, c1)
    elif isinstance(second, Split):
        m = Factors([first.B], [first.A], second.rate, 1.0)
    else:
        kept = beta1 / c1 if first.rows is None else first.rows.view(-1) * beta1 / c1
        m = Factors([first.B], [first.A], kept, (1 - beta1) / c1)
    if isinstance(second, Dense):
        return m, operands.Dense(second.stored, beta2, c2)
    if isinstance(second, Product):
        row, column = (x if x is None else x.flatten(1) for x in (second.rows, second.columns))
        return m, Factors([second.B], [second.A], beta2 / c2, (1 - beta2) / c2, row, column)
    row, column = (x.flatten(1) for x in (second.row * (beta2 / c2)[:, None, None], second.column))
    return m, operands.Split(
        [second.seen], [second.W], second.keep * beta2 / c2, (1 - beta2) / c2, 1 - beta2, row, column
    )


def compiled_update(
    batch: Batch, m: Factors | operands.Dense, v: Factors | operands.Dense | operands.Split,
    means: Means | None, members: slice, rows: slice, columns: slice, g: list[Tensor], *,
    lr: float | Tensor, decay: float | Tensor, eps: float,
) -> None:  # fmt: skip
    """Step the weights of a tile."""
    row, column = _origin(batch) or (0, 0)
    at = members, rows, columns
    sums = cpu_kernels.adam(
        batch.tiles(batch.weights, *at), g, m.tile(*at), v.tile(*at), lr=lr, decay=decay,
        eps=max(eps, torch.finfo(torch.float32).tiny),
        keys=batch.keys[members] if batch.rounds_stochastically else None,
        origin=(row + rows.start, column + columns.start),
        width=batch.shards.size(batch.p, batch.q)[1], sums=means is not None, **batch.signs(members),
    )  # fmt: skip
    if means is not None and sums is not None:
        means.add(members, rows, columns, *sums)


def kernel_sweeps(
    batch: Batch, followed: list[Tracking], m: Factors | operands.Dense,
    v: Factors | operands.Dense | operands.Split, means: Means | None, *,
    lr: float | Tensor, decay: float | Tensor, eps: float,
) -> None:  # fmt: skip
    """`sweep` with the update of `rules.Adam`, in a launch or two for each sweep of the whole batch."""
    from lorapre import kernels  # loads Triton, which takes seconds

    probes: dict[str, list[Tensor]] = {}
    for tracking in followed:
        probe = tracking.tracker.probe(ALL)
        probes |= {name: [probe[tracking.of(name)]] for name in tracking.names}
    if isinstance(m, Factors):
        m = m._replace(probe=probes["m"])
    if isinstance(v, Factors):
        v = v._replace(probe=probes["v"])
    counts = [len(tracking.tracker.B) for tracking in followed]
    same: dict[str, Any] = dict(sign=float(batch.sign), finite=batch.finite)

    def follow(TAt: Tensor) -> None:
        for tracking, part in zip(followed, torch.split(TAt.flatten(0, 1), counts), strict=True):
            tracking.tracker.left(ALL, ALL, part)
            tracking.turn()

    if isinstance(v, operands.Split):  # the update needs T A^T
        rows = kernels.row_projection(batch.grads, probes["m"], row_sums=True, **same)
        follow(rows.TAt)
    swept = kernels.row_sweep(
        batch.weights, batch.grads, m, v, decay=decay, lr=lr, eps=max(eps, torch.finfo(torch.float32).tiny),
        keys=batch.keys if batch.rounds_stochastically else None, origin=_origin(batch) or (0, 0),
        width=batch.shards.size(batch.p, batch.q)[1], row_sums=means is not None, **same,
    )  # fmt: skip
    if swept is not None:
        rows = swept
        follow(rows.TAt)
    bases = {x: [y.tracker.basis(y.of(x), ALL).mT] for y in followed for x in y.names}
    columns = kernels.column_sweep(
        batch.grads, bases.get("m"), bases.get("v"), column_sums=means is not None, **same
    )
    for tracking, LtT in zip(followed, torch.split(columns.LtT.flatten(0, 1), counts), strict=True):
        tracking.tracker.right(ALL, ALL, LtT)
    if means is not None:
        assert rows.row_sums is not None
        assert columns.column_sums is not None
        means.row_sums, means.column_sums = rows.row_sums, columns.column_sums


_said: set[str] = set()  # why kernels could not take a batch


def kernels_take(batch: Batch) -> bool:
    """Whether to step a batch with Triton kernels; where it should be but cannot, a warning says so, once.

    Not within torch.compile, which makes kernels of its own of the tiles.
    """
    if not batch.rank or not batch.N or torch.compiler.is_compiling() or not _wants_kernels(batch):
        return False
    from lorapre import kernels

    return _say(batch, "Triton", _why_not(batch) or kernels.why_not(batch.weights, batch.grads, batch.rank))


def cpu_kernels_take(batch: Batch) -> bool:
    """Whether to step the tiles of a batch with compiled kernels; as `kernels_take`."""
    if not batch.rank or not batch.N or torch.compiler.is_compiling() or not _wants_cpu_kernels(batch):
        return False
    return _say(batch, "compiled", _why_not(batch) or cpu_kernels.why_not(batch.weights, batch.grads))


def _wants_kernels(batch: Batch) -> bool:
    """Tests replace this, to run kernels in Triton's interpreter on the CPU."""
    return batch.device.type == "cuda"


def _wants_cpu_kernels(batch: Batch) -> bool:
    """Of float64 weights torch's operations keep the precision. Tests replace this, to see those."""
    return batch.device.type == "cpu" and batch.dtype == torch.float32


def _why_not(batch: Batch) -> str | None:
    """Why no kernels can take a batch, or None where they may."""
    if not batch.narrow:
        return "the memory of a convolution is not in the order of its dimensions"
    if not all(x.is_contiguous() for name in ("exp_avg", "exp_avg_sq") for x in batch.state.get(name, ())):
        return "a dense moment is not contiguous"
    if batch.rounds_stochastically and _origin(batch) is None:
        return "stochastic rounding, of shards that are not blocks of rows and columns"
    return None


def _say(batch: Batch, kind: str, reason: str | None) -> bool:
    """Whether there is no reason against kernels; the first time that there is one, a warning has it."""
    if reason is not None and reason not in _said:
        _said.add(reason)
        warnings.warn(
            f"a step of weights ({batch.p}, {batch.q}) does without {kind} kernels, slower: {reason}",
            stacklevel=2,
        )
    return reason is None


def _origin(batch: Batch) -> tuple[int, int] | None:
    """Row and column of the whole at which the block held here begins; None if it is no block."""
    if batch.shards.count == 1:
        return 0, 0
    cpu = torch.device("cpu")  # nothing waits for the GPU
    held = batch.shards.rows(batch.p, cpu), batch.shards.columns(batch.q, cpu)
    if any(len(x) and int(x[-1] - x[0]) != len(x) - 1 for x in held):
        return None
    row, column = (int(x[0]) if len(x) else 0 for x in held)
    return row, column
