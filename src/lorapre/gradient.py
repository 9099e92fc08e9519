"""The gradient as an operand: nothing but this module and its backends touches a gradient.

N same-shaped gradients are one operand T (N, p, q) with three primitives: `T @ X`, `L @ T` and
`T.step_`. Here they are operations of torch on a few rows at a time, so that nothing of the size of
a weight is ever formed. `lorapre.backends` has the same three in C and in Triton.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lorapre import rounding
from lorapre.linalg import TINY, at_hand, debias, matmul
from lorapre.sharding import WHOLE, Shards

# Elements of a tile: of the gradient, and of some temporaries of its size that an update holds.
TILE = 2**17
SMALL = 2**16  # elements of matrices that are not worth a call each

Number: TypeAlias = float | Tensor  # one for all matrices, or (N, 1, 1)


class Factors(NamedTuple):
    """A product P = B A of N matrices."""

    B: Tensor  # (N, p, r)
    A: Tensor  # (N, r, q)


class Moments(NamedTuple):
    """m = sum a_i P_i + b g and v = sum c_i P_i**2 + d g**2 + row column, with P_i = B_i A_i.

    A product that is None counts nothing.
    """

    products: Sequence[Factors | None] = ()
    a: Sequence[Number] = ()
    b: Number = 0.0
    c: Sequence[Number] = ()
    d: Number = 0.0
    row: Tensor | None = None  # (N, p, 1)
    column: Tensor | None = None  # (N, 1, q)


class Full(NamedTuple):
    """Both moments of AdamW before step t, kept in full and moved in place."""

    exp_avg: Sequence[Tensor]  # N of (p, q)
    exp_avg_sq: Sequence[Tensor]
    t: Tensor  # (N, 1, 1)
    betas: tuple[float, float]


class Gradient:
    """N same-shaped gradients as one read-only operand T (N, p, q): the backend of plain torch.

    Attributes:
        grads: N of (p, q), the local part of each.
        local_shape: (p, q) of the local part.
        scale: T is the gradient times this.
        finite: (N,), False where T is zero as the gradient is not finite; None: True everywhere.
        p, q: size of the whole matrices.
        rows, columns: which of them are local.
        notes: norms and means recorded in the step, for `Batch.note`; `T / x` shares them.
        spread: whether other processes hold other parts.
        dtype: of the update, float32 or float64. Products with factors are float32.
    """

    def __init__(
        self, grads: Sequence[Tensor], shape: tuple[int, int], device: torch.device, *,
        scale: float = 1.0, finite: Tensor | None = None, dtype: torch.dtype = torch.float32,
        shards: Shards = WHOLE,
    ) -> None:  # fmt: skip
        self.grads, self.local_shape, self.device, self.scale = grads, shape, device, scale
        self.finite, self.dtype, self.shards, self.absolute = finite, dtype, shards, False
        self.p, self.q = shards.size(*shape)
        self.rows, self.columns = shards.rows(shape[0]), shards.columns(shape[1])
        self.spread = shards.count > 1
        self.notes: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.grads)

    def __abs__(self) -> "Gradient":
        """|T|."""
        T = copy.copy(self)
        T.absolute, T.scale, T.notes = True, abs(self.scale), {}
        return T

    def __truediv__(self, x: float) -> "Gradient":
        """T / x."""
        T = copy.copy(self)
        T.scale = self.scale / x
        return T

    def __matmul__(self, X: Tensor) -> Tensor:
        """T X (N, p, r) of X (N, q, r)."""
        product = self._right(X) if X.shape[-1] else X.new_zeros(len(self), self.local_shape[0], 0)
        return self.sum_q(product.mul_(self.scale) if self.scale != 1 else product)

    def __rmatmul__(self, L: Tensor) -> Tensor:
        """L T (N, r, q) of L (N, r, p)."""
        product = self._left(L) if L.shape[-2] else L.new_zeros(len(self), 0, self.local_shape[1])
        return self.sum_p(product.mul_(self.scale) if self.scale != 1 else product)

    def onto(self, W: Tensor) -> Tensor:
        """T W^T (N, p, r) of an orthonormal W (N, r, q), and a note of how much of T that is."""
        TWt = self @ W.mT
        length = torch.linalg.vector_norm(TWt, dim=(-2, -1), keepdim=True)
        self.notes["captured"] = length / self.scale
        return TWt

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """`L @ T` of a tensor L."""
        L, T = args
        # torch.compile comes here for `T @ X` too, with the two turned around; X has q rows, L has
        # r < q.
        if torch.compiler.is_compiling() and L.shape[-2] == T.q:
            return T.__matmul__(L)
        return T.__rmatmul__(L)

    def sum_p(self, x: Tensor) -> Tensor:
        """The sum of x over the processes that hold other rows."""
        return self.shards.sum(x, "p")

    def sum_q(self, x: Tensor) -> Tensor:
        """The sum of x over the processes that hold other columns."""
        return self.shards.sum(x, "q")

    def step_(
        self, weights: Sequence[Tensor], M: Moments, *, lr: Number, decay: Number, eps: float,
        keys: Tensor | None = None, means: bool = True,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """w <- decay w - lr m / (sqrt(v) + eps), in place, where g of M is T.

        Args:
            weights: N of (p, q).
            M: what m and v are made of.
            lr: the learning rate with all its factors; zero where a step is skipped.
            decay: what w keeps, 1 - lr weight_decay; one where a step is skipped.
            eps: as in Adam.
            keys: (N,), of `rounding.keys`: bfloat16 weights are rounded at random. None: nearest.
            means: whether the means are wanted.

        Returns:
            The means of T**2 over the rows (N, p, 1) and over the columns (N, 1, q).
        """
        eps = max(eps, TINY)
        M = M._replace(products=[f if f and f.B.shape[-1] else None for f in M.products])
        sums = self._step_(weights, M, lr, decay, eps, keys, means)
        _changed(weights)
        return sums and (self.sum_q(sums[0].div_(self.q)), self.sum_p(sums[1].div_(self.p)))

    def adamw_(
        self, weights: Sequence[Tensor], full: Full, *, lr: Number, decay: Number, eps: float,
        keys: Tensor | None = None,
    ) -> None:  # fmt: skip
        """AdamW of T, in place. See `step_` for the other arguments."""
        self._adamw_(weights, full, lr, decay, max(eps, TINY), keys)
        _changed(weights)

    def orthogonal_step_(
        self, weights: Sequence[Tensor], M: Moments, newton_schulz: Callable[[Tensor], Tensor], *,
        lr: Number, decay: Number, keys: Tensor | None = None,
    ) -> None:  # fmt: skip
        """w <- decay w - lr NewtonSchulz(m), in place, one matrix at a time, or some small ones.

        Of sharded matrices each process orthogonalises its share of the N. See `step_` for the
        arguments.
        """
        (p, q), N = self.local_shape, len(self)
        if N == 0:  # a process without an expert takes part in what others deal out all the same
            none = torch.empty(0, p, q, dtype=self.dtype, device=self.device)
            self.shards.whole(newton_schulz, none)
        some = N if self.spread else max(1, SMALL // max(1, p * q))
        for start in range(0, N, max(1, some)):
            n, i = slice(start, start + some), slice(0, p)
            m = self._tile(n, i).to(self.dtype) * (pick(M.b, n) * self.scale)
            for factors, a in zip(M.products, M.a, strict=True):
                if factors is not None:
                    m += matmul(factors.B[n] * pick(a, n), factors.A[n])
            update = self.shards.whole(newton_schulz, m).to(self.dtype)
            del m
            w = read(weights, n, i).to(self.dtype)
            self._move_(w, update, pick(lr, n), pick(decay, n))
            self._store_(weights, n, i, w, keys)
            del update, w  # not beside the next matrix

    # Other backends override these.

    def _right(self, X: Tensor) -> Tensor:
        """T X / scale of the local part."""
        out = X.new_empty(len(self), self.local_shape[0], X.shape[-1])
        for n, i in self._tiles(self._as_it_is):
            out[n, i] = matmul(self._tile(n, i).to(X.dtype), X[n])
        return out

    def _left(self, L: Tensor) -> Tensor:
        """L T / scale of the local part."""
        out = L.new_zeros(len(self), L.shape[-2], self.local_shape[1])
        for n, i in self._tiles(self._as_it_is):
            out[n] += matmul(L[n, :, i], self._tile(n, i).to(L.dtype))
        return out

    def _step_(
        self, weights: Sequence[Tensor], M: Moments, lr: Number, decay: Number, eps: float,
        keys: Tensor | None, sums: bool,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """`step_`, but with sums of T**2 over the local part instead of means."""
        (p, q), N = self.local_shape, len(self)
        rows = torch.zeros(N, p, 1, dtype=torch.float32, device=self.device)
        columns = torch.zeros(N, 1, q, dtype=torch.float32, device=self.device)
        for n, i in self._tiles():
            g = self._scaled(n, i)
            if sums:
                square = g * g
                rows[n, i] += square.sum(-1, keepdim=True)
                columns[n] += square.sum(-2, keepdim=True)
                del square
            w = read(weights, n, i).to(self.dtype)
            m, v = moments(M, n, i, g)
            self._move_(w, m, pick(lr, n), pick(decay, n), root=v.sqrt_().add_(eps))
            self._store_(weights, n, i, w, keys)
        return (rows, columns) if sums else None

    def _adamw_(
        self, weights: Sequence[Tensor], full: Full, lr: Number, decay: Number, eps: float,
        keys: Tensor | None,
    ) -> None:  # fmt: skip
        """`adamw_`, by torch's kernel where that can take it: in one pass over memory."""
        beta1, beta2 = full.betas
        taken = (*weights, *self.grads, *full.exp_avg, *full.exp_avg_sq)
        fused = all(at_hand(x) and x.is_contiguous() for x in taken)
        in_place = fused and self._as_it_is and self.scale == 1
        in_place = in_place and all(w.dtype == torch.float32 for w in weights)
        for n, i in self._tiles(whole=in_place, alone=fused):
            if fused and self.finite is not None and not self.finite[n]:
                continue
            w, g = read(weights, n, i).to(self.dtype), self._scaled(n, i)
            m, v = read(full.exp_avg, n, i), read(full.exp_avg_sq, n, i)
            if fused:
                # In the dtype of a masked lr, so that a mask changes nothing else.
                own_lr, keep = (
                    torch.as_tensor(pick(x, n), dtype=self.dtype, device="cpu").item()
                    for x in (lr, decay)
                )
                if own_lr == 0:
                    w.mul_(keep)
                torch._fused_adamw_(
                    w.unbind(), g.unbind(), m.unbind(), v.unbind(), [],
                    full.t[n].view(-1).float().unbind(), lr=own_lr, beta1=beta1, beta2=beta2,
                    weight_decay=(1 - keep) / own_lr if own_lr else 0.0, eps=eps, amsgrad=False,
                    maximize=False,
                )  # fmt: skip
            else:
                alive = 1.0 if self.finite is None else self.finite[n, None, None].to(self.dtype)
                for E, beta, x in ((m, beta1, g), (v, beta2, g * g)):
                    rate = alive * (1 - beta)
                    add_(E.mul_(1 - rate), rate, x)  # no difference: of an infinite x it is NaN
                c1, c2 = (debias(beta, full.t[n]) for beta in full.betas)
                self._move_(w, m / c1, pick(lr, n), pick(decay, n), root=(v / c2).sqrt_().add_(eps))
            write_(full.exp_avg, n, i, m)
            write_(full.exp_avg_sq, n, i, v)
            self._store_(weights, n, i, w, keys)

    @property
    def _as_it_is(self) -> bool:
        """Whether products need no copy of the gradient."""
        return (
            self.finite is None
            and not self.absolute
            and all(g.dtype == torch.float32 for g in self.grads)
        )

    def _tiles(self, whole: bool = False, alone: bool = False) -> Iterator[tuple[slice, slice]]:
        """(members, rows): some small matrices, or one; some rows of a large one, or all."""
        (p, q), N = self.local_shape, len(self)
        if torch.compiler.is_compiling() or (p * q <= SMALL and not alone):
            some = N if torch.compiler.is_compiling() else max(1, SMALL // max(1, p * q))
            yield from ((slice(n, n + some), slice(0, p)) for n in range(0, N, some))
            return
        height = max(1, p if whole else TILE // max(1, q))
        for n in range(N):
            yield from (
                (slice(n, n + 1), slice(i, min(i + height, p))) for i in range(0, p, height)
            )

    def _tile(self, n: slice, i: slice) -> Tensor:
        """Rows i of members n of T / scale, (n, i, q), zero where the gradient is not finite."""
        g = read(self.grads, n, i)
        if self.finite is not None:
            g = torch.where(self.finite[n, None, None], g, 0)
        return g.abs() if self.absolute else g

    def _scaled(self, n: slice, i: slice) -> Tensor:
        """Rows i of members n of T, in its dtype."""
        g = self._tile(n, i).to(self.dtype)
        return g * self.scale if self.scale != 1 else g

    @staticmethod
    def _move_(w: Tensor, m: Tensor, lr: Number, decay: Number, root: Tensor | None = None) -> None:
        """w <- decay w - lr m / root, in place."""
        if isinstance(decay, Tensor) or decay != 1:
            w.mul_(decay)
        if root is None:
            add_(w, -lr, m)
        elif isinstance(lr, Tensor):
            w.addcdiv_(m.mul_(-lr), root)
        else:
            w.addcdiv_(m, root, value=-lr)

    def _store_(
        self, weights: Sequence[Tensor], n: slice, i: slice, w: Tensor, keys: Tensor | None
    ) -> None:
        """Write back rows i of members n, `read` before and changed, rounded as `keys` say."""
        if keys is not None:
            rows, columns = (rounding.indices(x, self.device) for x in (self.rows, self.columns))
            rounding.round_(w, keys[n], rows[i], columns, self.q)
        write_(weights, n, i, w)


def _changed(weights: Sequence[Tensor]) -> None:
    """Tell autograd, which then refuses a graph of the old weights."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(weights)


def moments(M: Moments, n: slice, i: slice, g: Tensor) -> tuple[Tensor, Tensor]:
    """m and v of rows i of members n, from g (n, i, q)."""
    if M.row is not None and M.column is not None:
        v = M.row[n, i].to(g.dtype) * M.column[n].to(g.dtype)
        add_(v, pick(M.d, n), g, g)
    else:
        v = (g * g).mul_(pick(M.d, n))
    m = g * pick(M.b, n)
    for factors, a, c in zip(M.products, M.a, M.c, strict=True):
        if factors is None:
            continue
        P = matmul(factors.B[n, i], factors.A[n]).to(g.dtype)
        add_(v, pick(c, n), P, P)
        add_(m, pick(a, n), P)
    return m, v


def add_(out: Tensor, weight: Number, x: Tensor, y: Tensor | None = None) -> None:
    """out += weight x, or (weight x) y: a square may be infinite where its weight is zero."""
    if isinstance(weight, Tensor):
        out.addcmul_(x, weight) if y is None else out.addcmul_(weight * x, y)
    elif weight:
        out.add_(x, alpha=weight) if y is None else out.addcmul_(x, y, value=weight)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of dense arithmetic and dense moments: float32, of float64 weights float64."""
    return torch.promote_types(dtype, torch.float32)


def state_dtype(group: Mapping[str, Any], p: Tensor, name: str) -> torch.dtype:
    """float32; of the momentum's factors the group's; of dense moments `wide`."""
    if name in ("m_B", "m_A") and group.get("momentum_dtype") == "bfloat16":
        return torch.bfloat16
    return wide(p.dtype) if name in ("exp_avg", "exp_avg_sq") else torch.float32


def read(tensors: Sequence[Tensor], n: slice, i: slice) -> Tensor:
    """Rows i of members n, (n, i, q): of one member a view, of several a copy."""
    rows = [x[i] for x in tensors[n]]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def write_(tensors: Sequence[Tensor], n: slice, i: slice, new: Tensor) -> None:
    """Store what was `read` and changed; nothing where that was a view, and has changed already."""
    if len(new) > 1 or (len(new) and new.dtype != tensors[n][0].dtype):
        torch._foreach_copy_([x[i] for x in tensors[n]], list(new.unbind()))


def pick(x: Number, n: slice) -> Number:
    """x of members n; of one member, on a CPU, a number: operations then take fewer passes."""
    if not isinstance(x, Tensor) or x.ndim < 3:
        return x
    x = x[n]
    return x.item() if x.numel() == 1 and at_hand(x) else x
