"""The moments of a batch, dense or factorised, and their tiles."""

import math

import torch
from torch import Tensor

from lorapre import factors, rules
from lorapre.batch import Batch
from lorapre.linalg import matmul
from lorapre.tracking import Tracking


class Dense:
    """A moment of a batch kept in full."""

    def __init__(self, batch: Batch, name: str) -> None:
        self.batch, self.stored = batch, batch.matrices(batch.state[name])

    def tiles(self, members: slice, rows: slice, columns: slice) -> list[Tensor]:
        """Before the step, (rows, columns) of each member."""
        return [self.batch.work(x, rows, columns) for x in self.stored[members]]

    def store(self, members: slice, rows: slice, columns: slice, tiles: list[Tensor]) -> None:
        """After the step."""
        for x, tile in zip(self.stored[members], tiles, strict=True):
            self.batch.store(x, rows, columns, tile)


class Product:
    """A moment of a batch as the product of its factors: B A or, of the second, (B A)**2."""

    def __init__(self, tracking: Tracking, name: str) -> None:
        at = tracking.of(name)
        self.B, self.A, self.square = tracking.tracker.B[at], tracking.tracker.A[at], name == "v"
        self.rows: Tensor | None = None  # (N, p, 1) or (N, 1, 1), a factor on the rows
        self.columns: Tensor | None = None  # (N, 1, q)

    def tiles(self, members: slice, rows: slice, columns: slice) -> list[Tensor]:
        """Before the step, (rows, columns) of each member."""
        B, A = self.B[members, rows], self.A[members, :, columns]
        if self.rows is not None:
            B = B * (self.rows[members, rows] if self.rows.shape[1] > 1 else self.rows[members])
        if self.columns is not None:
            A = A * self.columns[members, :, columns]
        product = matmul(B, A)
        return list((product.square_() if self.square else product).unbind())


class Means:
    """v_row (N, p) and v_col (N, q): the EMAs of the means of g**2 over rows and columns."""

    def __init__(self, batch: Batch, beta2: float) -> None:
        self.batch, self.beta2 = batch, beta2
        self.row, self.column = batch.read("v_row"), batch.read("v_col")
        self.row_sums, self.column_sums = torch.zeros_like(self.row), torch.zeros_like(self.column)

    def gather(self, members: slice, rows: slice, columns: slice, g: Tensor) -> None:
        """Add up g**2 (n, rows, columns)."""
        square = g.square()
        # In two stages, so that each thread first sums the rows that it has squared.
        n, p, q = square.shape
        parts = square.reshape(n, math.gcd(p, 16), p // math.gcd(p, 16), q)
        self.add(members, rows, columns, square.sum(-1), parts.sum(-2).sum(-2))

    def add(self, members: slice, rows: slice, columns: slice, of_rows: Tensor, of_columns: Tensor) -> None:
        """Add sums of g**2 over the rows (n, rows) and columns (n, columns) of a tile."""
        self.row_sums[members, rows] += of_rows
        self.column_sums[members, columns] += of_columns

    def finish(self) -> None:
        """Store the new means."""
        shards = self.batch.shards
        p, q = shards.size(self.batch.p, self.batch.q)
        (rows,), (columns,) = shards.sum_columns(self.row_sums), shards.sum_rows(self.column_sums)
        # Squares of what is above 1e19 are infinite, and an EMA would stay so for ever.
        largest = torch.finfo(self.row.dtype).max
        self.batch.write("v_row", torch.lerp(self.row, (rows / q).clamp(max=largest), 1 - self.beta2))
        self.batch.write("v_col", torch.lerp(self.column, (columns / p).clamp(max=largest), 1 - self.beta2))


class Split:
    """Gradient and second moment in two parts: what the factors of the first moment can hold, and the rest.

    Of the gradient the part in the row space of A is averaged, by the factors; the rest takes effect at once
    and in full. E g**2 is (E g)**2, the square of the first moment, and a variance of rank one: that which
    has the means over rows and columns that (E g)**2 leaves of those of g**2. No estimate is so small that an
    entry of the update could exceed a bound (docs/maths.md, "The split variant").
    """

    def __init__(
        self, batch: Batch, tracking: Tracking, first: Product, means: Means, betas: tuple[float, float],
        rate: Tensor,
    ) -> None:  # fmt: skip
        """`first` holds the debiased mean, of `rate`; both moments are of before the step."""
        dtype = first.B.dtype
        assert isinstance(tracking.tracker, factors.Subspace)
        self.W, self.seen, self.beta2 = tracking.tracker.W, tracking.tracker.seen, betas[1]
        self.rate = rate.to(dtype)
        self.past = rules.debias(betas[0], batch.t - 1).to(dtype)
        self.keep = rules.debias(betas[1], batch.t - 1).to(dtype)
        self.row, self.column = factors.rank_one_rest(
            first.B, first.A, tracking.squares("m"), self.keep[:, None], means.row, means.column, batch.shards
        )

    def moments(
        self, m: list[Tensor], g: Tensor, members: slice, rows: slice, columns: slice
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Tiles for `rules.Adam`, from those of the first moment, overwritten, and of g (n, rows, columns).

        With the first, m, it makes g + beta (m - g W^T W), where beta is the debiased rate and W of the
        tracker, whose `turn` it was.
        """
        held = matmul(self.seen[members, rows], self.W[members, :, columns])
        v = []
        for k, i in enumerate(range(members.start, members.stop)):
            # Weighed before they are squared: a square may be infinite, and `keep` is zero at first.
            square = (m[k] * (self.keep[i] * self.beta2)).mul_(m[k])
            square.addcmul_(held[k] * (self.keep[i] * (1 - self.beta2)), held[k])
            v.append(square.addcmul_(self.row[i, rows], self.column[i, :, columns]))
            m[k].sub_(held[k]).add_(g[k]).mul_(self.past[i])
        return m, v
