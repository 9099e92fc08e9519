"""Moments as kernels take them, of N matrices (p, q).

Where tensors are asked for as `Matrices`, each is (p, q) or, as fused experts are, (E, p, q), which counts as E
matrices; so N matrices may also come stacked, as one tensor. Per-matrix numbers are floats or tensors that
hold one or N elements.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

Matrices: TypeAlias = Sequence[Tensor]  # of one shape each, (p, q) or (E, p, q)
Numbers: TypeAlias = float | Tensor  # one for all matrices, or one per matrix


class Factors(NamedTuple):
    """A factorised moment, keep (B A) + fresh g or, as the second, keep (row B A column)**2 + fresh g**2."""

    B: Matrices  # (p, r)
    A: Matrices  # (r, q)
    keep: Numbers
    fresh: Numbers
    row: Tensor | None = None  # (N, p), for the second moment only
    column: Tensor | None = None  # (N, q)
    probe: Matrices | None = None  # (r, q), stands for A in T A^T, if given


class Dense(NamedTuple):
    """A moment kept in full, updated in place and taken divided by `correction`."""

    ema: Matrices  # (p, q), float32
    beta: float
    correction: Numbers


class Split(NamedTuple):
    """Where h = C W is what the factors B and A of the first moment can hold of g.

    The second moment is keep ((1 - share) (B A)**2 + share h**2) + fresh g**2 + row column, and the first,
    with numbers of its own, keep (B A - h) + fresh g.
    """

    C: Matrices  # (p, r)
    W: Matrices  # (r, q)
    keep: Numbers
    fresh: Numbers
    share: float
    row: Tensor  # (N, p)
    column: Tensor  # (N, q)


def count(tensors: Matrices) -> int:
    """How many matrices there are."""
    return sum(1 if x.ndim == 2 else x.shape[0] for x in tensors)


def stride(x: Tensor) -> int:
    """Elements from a row to the next; that of a single row means nothing."""
    return x.stride(-2) if x.shape[-2] > 1 else x.shape[-1]


def addresses(tensors: Matrices) -> list[int]:
    """Where each matrix begins."""
    starts = []
    for x in tensors:
        step = (x.stride(0) if x.ndim == 3 else 0) * x.itemsize
        starts += [x.data_ptr() + step * e for e in range(1 if x.ndim == 2 else x.shape[0])]
    return starts


def tile(
    moment: Factors | Dense | Split, members: slice, rows: slice, columns: slice
) -> Factors | Dense | Split:
    """What a moment of N matrices, of which factors come stacked, is of (rows, columns) of some members."""

    def of(x: Numbers) -> Numbers:
        return x[members] if isinstance(x, Tensor) and x.numel() > 1 else x

    if isinstance(moment, Dense):
        ema = [x[rows, columns] for x in moment.ema[members]]
        return moment._replace(ema=ema, correction=of(moment.correction))
    (left,), (right,) = moment[:2]
    row, column = moment.row, moment.column
    return type(moment)(
        [left[members, rows]], [right[members, :, columns]], of(moment.keep), of(moment.fresh),
        *((moment.share,) if isinstance(moment, Split) else ()),
        None if row is None else row[members, rows], None if column is None else column[members, columns],
    )  # fmt: skip
