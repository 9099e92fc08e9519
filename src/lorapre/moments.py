"""The step of a batch of same-shaped weights: its moments, dense or factorised, and the update.

A factorised weight is stepped in two sweeps over tiles of the gradient, and nothing of size p x q is formed
beyond a tile. The first sweep, over rows, takes T A^T, the second, over columns, L^T T for the trackers in
`lorapre.factors`, which move the factors in place. In one of them the moments of a tile are formed from the
old factors and the weight is updated: in the first or, where that needs T A^T, in the second. Where they can
take the batch, kernels do what is done with a tile on CPUs, `lorapre.cpu_kernels`, and the sweeps of Adam as
a whole on GPUs, `lorapre.kernels`, which is in Triton.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lorapre import cpu_kernels, factors, operands, rules
from lorapre.batch import GPU_BATCH, SMALL, Batch, cut
from lorapre.factors import ALL, Tracker, matmul
from lorapre.operands import Factors


class Variant(NamedTuple):
    """What tells the variants apart; they share every other line (docs/maths.md)."""

    tracker: type[Tracker]
    start: Literal["printed", "sketch", "random"]  # of A; B starts at zero
    second: Literal["printed", "ramp", "means", "split"]  # how the second moment is corrected, or made


VARIANTS = {
    "paper": Variant(factors.Printed, start="printed", second="printed"),
    "calibrated": Variant(factors.Newton, start="sketch", second="ramp"),
    "subspace": Variant(factors.Subspace, start="random", second="means"),
    "split": Variant(factors.Subspace, start="random", second="split"),
}


class Tracking:
    """Factorised moments of a batch, one after the other: B (k N, p, r), A (k N, r, q) of k moments.

    The first moment (m) follows g, the second (v) |g|. The factors of a single parameter are those of its
    state; of several, or of shards, whose sums then share collectives, they are stacked copies.
    """

    def __init__(
        self, batch: Batch, kind: type[Tracker], rates: dict[str, Tensor], gain: float = 1.0
    ) -> None:
        """`rates` (N,) of each moment, as the tracker takes them; `gain` is a factor on the targets."""
        self.batch, self.names, self.gain = batch, tuple(rates), gain
        pairs = [(batch.read(f"{name}_B"), batch.read(f"{name}_A")) for name in rates]
        if len(pairs) > 1:
            B, A = (torch.cat(pair) for pair in zip(*pairs, strict=True))
        else:
            ((B, A),) = pairs
            if batch.finite is not None:
                B, A = B.clone(), A.clone()
        # The state itself, for trackers that work in place.
        self.state = B if len(batch.state["step"]) == len(rates) == 1 and batch.finite is None else None
        rate = torch.cat(list(rates.values()))[:, None, None].to(B.dtype)
        self.tracker = kind(B, A, rate, batch.shards, whole=len(rates) > 1)
        self.sums: list[tuple[slice, Tensor]] = []
        self.probe: Tensor | None = None

    def of(self, name: str, members: slice | None = None) -> slice:
        """Where members of a moment, or all of them, are among the k N."""
        start = self.names.index(name) * self.batch.N
        if members is None:  # rather than `ALL`, which can be no default
            return slice(start, start + self.batch.N)
        return slice(
            start + (members.start or 0), start + (self.batch.N if members.stop is None else members.stop)
        )

    def squares(self, name: str) -> Tensor:
        """Sums of (B A)**2 over the rows (N, p) of a moment, of the subspace tracker before the sweeps."""
        assert isinstance(self.tracker, factors.Subspace)
        norms: Tensor = torch.linalg.vector_norm(self.tracker.BAWt[self.of(name)], dim=-1)
        return norms.square()

    def places(self, members: slice) -> list[tuple[slice, bool]]:
        """Of k moments the place, and whether the target is |g|."""
        return [(self.of(name, members), name == "v") for name in self.names]

    def targets(self, members: slice, g: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Of k moments the place and the target (n, rows, columns), one at a time."""
        g = g.to(self.batch.products) if g.is_cuda else g.float()
        for at, absolute in self.places(members):
            yield at, g.abs() if absolute else g

    def see(self, members: slice, columns: slice, g: Tensor | list[Tensor]) -> None:
        """Add up T A^T (n, rows, r) over the tiles g (n, rows, columns) of some rows."""
        probe = self.probe
        if probe is None:
            probe = self.tracker.probe(columns)
            if not self.batch.compiled:
                probe = probe.to(self.batch.products)
            if columns == slice(0, self.batch.q):
                self.probe = probe
        if isinstance(g, list):
            products = [
                (at, cpu_kernels.row_products(g, probe[at], absolute, **self.batch.signs(members)))
                for at, absolute in self.places(members)
            ]
        else:
            products = [(at, _times(T, probe[at].mT)) for at, T in self.targets(members, g)]
        self._add(products)

    def left(self, members: slice, rows: slice) -> None:
        """The left half-step of the rows whose tiles have been seen."""
        for at, TAt in self._take():
            self.tracker.left(at, rows, TAt)

    def turn(self) -> None:
        """Between the sweeps."""
        self.probe = None
        self.tracker.turn()

    def answer(self, members: slice, rows: slice, g: Tensor | list[Tensor]) -> None:
        """Add up L^T T (n, r, columns) over the tiles g (n, rows, columns) of some columns."""
        basis = self.tracker.basis
        if isinstance(g, list):
            products = [
                (at, cpu_kernels.column_products(g, basis(at, rows), absolute, **self.batch.signs(members)))
                for at, absolute in self.places(members)
            ]
        else:
            products = [
                (at, _times(basis(at, rows).to(self.batch.products), T)) for at, T in self.targets(members, g)
            ]
        self._add(products)

    def right(self, members: slice, columns: slice) -> None:
        """The right half-step of the columns whose tiles have been answered."""
        for at, LtT in self._take():
            self.tracker.right(at, columns, LtT)

    def finish(self) -> None:
        """Store the new factors."""
        self.tracker.finish()
        for name in self.names if self.tracker.B is not self.state else ():
            self.batch.write(f"{name}_B", self.tracker.B[self.of(name)])
            self.batch.write(f"{name}_A", self.tracker.A[self.of(name)])

    def _add(self, products: list[tuple[slice, Tensor]]) -> None:
        if self.sums:
            products = [(at, x.add_(y)) for (at, x), (_, y) in zip(self.sums, products, strict=True)]
        self.sums = products

    def _take(self) -> list[tuple[slice, Tensor]]:
        sums, self.sums = self.sums, []
        return [(at, x.mul_(self.gain)) for at, x in sums] if self.gain != 1 else sums


def trackings(
    batch: Batch, kind: type[Tracker], rates: dict[str, Tensor], gain: float = 1.0, stack: int = 0
) -> list[Tracking]:
    """Of a single parameter of more than `stack` elements one per moment, in place; else one for all."""
    size = batch.N * len(rates) * batch.rank * (batch.p + batch.q)
    if len(batch.state["step"]) == 1 and batch.shards.count == 1 and size > stack:
        return [Tracking(batch, kind, {name: rate}, gain) for name, rate in rates.items()]
    return [Tracking(batch, kind, rates, gain)] if rates else []


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


def adam(
    batch: Batch, variant: Variant, *, betas: tuple[float, float],
    lr: float | Tensor, scale: float, eps: float, weight_decay: float,
) -> Callable[[], None]:  # fmt: skip
    """Algorithm 1 of the paper on a batch; a moment without factors in the state is dense, as in AdamW.

    Returns with the last sum over processes on its way; what is returned stores the new factors.
    """
    beta1, beta2 = betas
    debiased = variant.tracker is factors.Subspace
    rates = {
        # Where a product decays by beta, each of its two factors decays by the root.
        name: rules.debiased_rate(beta, batch.t)
        if debiased
        else torch.full_like(batch.t, 1 - math.sqrt(beta))
        for name, beta in (("m", beta1), ("v", math.sqrt(beta2)))
        if f"{name}_B" in batch.state
    }
    launches, batch.compiled = _kernels_take(batch), _cpu_kernels_take(batch)
    followed = trackings(batch, variant.tracker, rates, stack=GPU_BATCH if launches else 0)
    of = {name: tracking for tracking in followed for name in tracking.names}
    first = Product(of["m"], "m") if "m" in of else Dense(batch, "exp_avg")
    second: Product | Dense | Split
    if "exp_avg_sq" in batch.state:
        second = Dense(batch, "exp_avg_sq")
    elif "v" in of:
        second = Product(of["v"], "v")
    correction: Tensor | None = None
    means = Means(batch, beta2) if "v_row" in batch.state else None
    if "v" not in of and means is not None:
        assert isinstance(first, Product)
        second = Split(batch, of["m"], first, means, betas, rates["m"])
    elif isinstance(first, Product) and debiased:
        # It follows the debiased EMA, where the rule starts from the EMA.
        first.rows = rules.debias(beta1, batch.t - 1)[:, None, None].to(first.B.dtype)
    if isinstance(second, Product) and variant.second == "ramp":
        # The product ramps up to the root of v: its square is behind the EMA of g**2.
        ramp = factors.ramp(1 - beta2**0.25, batch.t - 1)
        correction = beta2 * ramp.square() + (1 - beta2)
    elif isinstance(second, Product) and means is not None:
        second.rows, second.columns = factors.match_means(
            second.B, second.A, means.row, means.column, batch.shards, of["v"].squares("v")
        )
    same: dict[str, Any] = dict(lr=lr * scale, decay=1 - lr * weight_decay, eps=eps)
    if launches or batch.compiled:
        # So that autograd refuses a graph that was made with the old weights, as after operations of torch.
        torch.autograd.graph.increment_version(batch.weights)
        m, v = _operands(batch, first, second, betas, correction)
        if launches:
            _kernel_sweeps(batch, followed, m, v, means, **same)
        else:
            update = functools.partial(_compiled_update, batch, m, v, means, **same)
            sweep(batch, followed, update, late=isinstance(second, Split))
        return _sent(followed, means)
    rule = rules.Adam(betas, batch.t, lr * scale, eps, correction, batch.finite)
    keep = batch.per_matrix(1 - lr * weight_decay, 1.0) if weight_decay else None

    def step(members: slice, rows: slice, columns: slice, g: Tensor) -> None:
        g = g.to(batch.dtype)
        if means is not None:
            means.gather(members, rows, columns, g)
        m = first.tiles(members, rows, columns)
        if isinstance(second, Split):
            m, v = second.moments(m, g, members, rows, columns)
        else:
            v = second.tiles(members, rows, columns)
        for k, i in enumerate(range(members.start, members.stop)):
            w = batch.work(batch.weights[i], rows, columns)
            if keep is not None:
                w.mul_(keep[i])
            rule.step_(i, w, g[k].contiguous(), m[k].to(w.dtype), v[k].to(w.dtype))
            batch.store_weight(i, rows, columns, w)
        for moment, tiles in ((first, m), (second, v)):
            if isinstance(moment, Dense):
                moment.store(members, rows, columns, tiles)
        del m, v, tiles

    sweep(batch, followed, step, late=isinstance(second, Split))
    return _sent(followed, means)


def _sent(followed: list[Tracking], means: Means | None = None) -> Callable[[], None]:
    """Start the last sum over processes; what is returned stores the new factors, and means."""
    for tracking in followed:
        tracking.tracker.send()

    def finish() -> None:
        for tracking in followed:
            tracking.finish()
        if means is not None:
            means.finish()

    return finish


def muon(
    batch: Batch, variant: Variant, *, momentum: float, nesterov: bool,
    newton_schulz: Callable[[Tensor], Tensor], lr: float | Tensor, scale: float, weight_decay: float,
) -> Callable[[], None]:  # fmt: skip
    """Algorithm 2 of the paper on a batch; returns as `adam` does.

    `newton_schulz` orthogonalises whole matrices (N, p, q).
    """
    # The sum m is the EMA of g / (1 - mu), which the factors follow; the sum is never debiased.
    rate = momentum if variant.tracker is factors.Subspace else 1 - math.sqrt(momentum)
    followed = trackings(batch, variant.tracker, {"m": torch.full_like(batch.t, rate)}, 1 / (1 - momentum))
    (tracking,) = followed
    batch.compiled = _cpu_kernels_take(batch)
    everything = slice(0, batch.p), slice(0, batch.q)
    lrs = batch.per_matrix(batch.t.new_zeros(()) + lr * scale, 0.0)
    keep = batch.per_matrix(1 - lr * weight_decay, 1.0)
    # One dense matrix at a time, or some small ones; of sharded ones every process takes its share.
    count = SMALL // max(1, batch.p * batch.q) if batch.shards.count == 1 else batch.N
    for members in cut(batch.N, max(1, count)) or [slice(0, 0)]:
        g = batch.gradient(members, *everything).to(batch.dtype)
        m = matmul(tracking.tracker.B[members] * momentum, tracking.tracker.A[members]).add_(g)
        if nesterov:
            m.mul_(momentum).add_(g)
        del g
        update = batch.shards.whole(newton_schulz, m)
        del m
        for k, i in enumerate(range(batch.N)[members]):
            w = batch.work(batch.weights[i], *everything)
            if weight_decay:
                w.mul_(keep[i])
            w.addcmul_(update[k].to(w.dtype), lrs[i], value=-1)
            batch.store_weight(i, *everything, w)
        del update
    sweep(batch, followed)
    return _sent(followed)


def sweep(
    batch: Batch,
    followed: list[Tracking],
    update: Callable[[slice, slice, slice, Any], None] | None = None,
    late: bool = False,
) -> None:
    """Take the factors through a step.

    Args:
        batch: whose gradient is swept.
        followed: the factors.
        update: sees each tile of the gradient once, before the factors move.
        late: whether it does in the second sweep, with T A^T known.
    """
    g: Tensor | list[Tensor]
    for members, rows, tiles in batch.row_tiles():
        for columns in tiles:
            g = _gradient(batch, members, rows, columns)
            if update is not None and not late:
                update(members, rows, columns, g)
            for tracking in followed:
                tracking.see(members, columns, g)
        for tracking in followed:
            tracking.left(members, rows)
    for tracking in followed:
        tracking.turn()
    if followed:
        for members, columns, tiles in batch.column_tiles(late):
            for rows in tiles:
                g = _gradient(batch, members, rows, columns)
                if update is not None and late:
                    update(members, rows, columns, g)
                for tracking in followed:
                    tracking.answer(members, rows, g)
            for tracking in followed:
                tracking.right(members, columns)


def _gradient(batch: Batch, members: slice, rows: slice, columns: slice) -> Tensor | list[Tensor]:
    """A tile of the gradient (n, rows, columns) or, for compiled kernels, n of them as they are."""
    if batch.compiled:
        return batch.tiles(batch.grads, members, rows, columns)
    g = batch.gradient(members, rows, columns)
    return g if g.is_cuda else g.to(batch.dtype)  # once for all that is done with it; GPUs convert on the way


def _compiled_update(
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


def _operands(
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


def _kernel_sweeps(
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


def _kernels_take(batch: Batch) -> bool:
    """Whether to step a batch with Triton kernels; where it should be but cannot, a warning says so, once.

    Not within torch.compile, which makes kernels of its own of the tiles.
    """
    if not batch.rank or not batch.N or torch.compiler.is_compiling() or not _wants_kernels(batch):
        return False
    from lorapre import kernels

    return _say(batch, "Triton", _why_not(batch) or kernels.why_not(batch.weights, batch.grads, batch.rank))


def _cpu_kernels_take(batch: Batch) -> bool:
    """Whether to step the tiles of a batch with compiled kernels; as `_kernels_take`."""
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


def _times(X: Tensor, Y: Tensor) -> Tensor:
    """X Y in float32 of two in the dtype of products: float32, or bfloat16 accumulated in float32."""
    if X.is_cuda and X.dtype == torch.bfloat16:
        return torch.bmm(X, Y, out_dtype=torch.float32)
    return matmul(X.float(), Y.float())
