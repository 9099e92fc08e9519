"""How a process holds its part of some matrices: here, all of it."""

from collections.abc import Callable

from torch import Tensor


class Shards:
    """The part of its matrices that a process holds: here all of it."""

    count = 1  # processes that hold parts of the same parameters

    def size(self, p: int, q: int) -> tuple[int, int]:
        """Size of a whole matrix, of which (p, q) is held here."""
        return p, q

    def rows(self, p: int) -> range | Tensor:
        """Which rows of the whole are the p held here."""
        return range(p)

    def columns(self, q: int) -> range | Tensor:
        """Which columns of the whole are the q held here."""
        return range(q)

    def sum_rows(self, x: Tensor) -> Tensor:
        """Sum over the processes that hold other rows of the same matrices."""
        return x

    def sum_columns(self, x: Tensor) -> Tensor:
        """Sum over the processes that hold other columns of the same matrices."""
        return x

    def sum_all(self, x: Tensor) -> Tensor:
        """Sum over the processes that hold other parts of the same parameters."""
        return x

    def whole(self, function: Callable[[Tensor], Tensor], M: Tensor) -> Tensor:
        """What is held here of `function` of whole matrices, of which M (N, p, q) is held here."""
        return function(M)


WHOLE = Shards()
