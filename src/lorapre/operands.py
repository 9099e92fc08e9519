"""Moments as kernels take them, of N matrices (p, q).

Where tensors are asked for as `Matrices`, each is (p, q) or, as fused experts are, (E, p, q), which counts as
E matrices; so N matrices may also come stacked, as one tensor. Per-matrix numbers are floats or tensors that
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

    def tile(self, members: slice, rows: slice, columns: slice) -> "Factors":
        """Of (rows, columns) of some members, where B and A come stacked; without the probe."""
        return Factors(
            [self.B[0][members, rows]],
            [self.A[0][members, :, columns]],
            _numbers(self.keep, members),
            _numbers(self.fresh, members),
            None if self.row is None else self.row[members, rows],
            None if self.column is None else self.column[members, columns],
        )


class Dense(NamedTuple):
    """A moment kept in full, updated in place and taken divided by `correction`."""

    ema: Matrices  # (p, q), float32
    beta: float
    correction: Numbers

    def tile(self, members: slice, rows: slice, columns: slice) -> "Dense":
        """Of (rows, columns) of some members."""
        ema = [x[rows, columns] for x in self.ema[members]]
        return Dense(ema, self.beta, _numbers(self.correction, members))


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

    def tile(self, members: slice, rows: slice, columns: slice) -> "Split":
        """Of (rows, columns) of some members, where C and W come stacked."""
        return Split(
            [self.C[0][members, rows]],
            [self.W[0][members, :, columns]],
            _numbers(self.keep, members),
            _numbers(self.fresh, members),
            self.share,
            self.row[members, rows],
            self.column[members, columns],
        )


def _numbers(x: Numbers, members: slice) -> Numbers:
    return x[members] if isinstance(x, Tensor) and x.numel() > 1 else x


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
        start = x.data_ptr()
        if x.ndim == 2:
            starts.append(start)
        else:
            starts += [start + e * x.stride(0) * x.itemsize for e in range(x.shape[0])]
    return starts
