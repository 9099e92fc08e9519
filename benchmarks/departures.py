"""Why the trackers depart from the printed algorithm: the measurements that docs/maths.md quotes.

    python benchmarks/departures.py

Prints one table per departure, on synthetic gradients, in about a minute on one core; no timings.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lorapre import LoRAPreAdamW
from lorapre.gradient import Factors, Gradient
from lorapre.linalg import DAMPING, gauge_
from lorapre.variants import Follow, follow_ema, printed

BETA = 0.9


TRACKERS: dict[str, Follow] = {"printed": printed, "subspace": follow_ema}


def follow(tracker: Follow, targets: Iterator[Tensor], rank: int, beta: float = BETA) -> Iterator[Tensor]:
    """The product B A after each target."""
    generator = torch.Generator().manual_seed(1)
    f = None
    for t, target in enumerate(targets, start=1):
        p, q = target.shape
        T = Gradient([target], (p, q), target.device)
        if f is None:
            B, A = torch.zeros(1, p, rank), torch.randn(1, rank, q, generator=generator)
            f = Factors(B, 0.02 * A) if tracker is printed else Factors(*gauge_(B, A, T))
        debiased = beta * (1 - beta ** (t - 1)) / (1 - beta**t)
        f = tracker(f, T, debiased if tracker is follow_ema else beta)
        yield (f.B @ f.A)[0]


def low_rank(p: int, q: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(p, k, generator=generator) @ torch.randn(k, q, generator=generator) / math.sqrt(k)


def noisy(signal: Tensor, noise: float, steps: int, seed: int = 2) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield signal + noise * torch.randn(signal.shape, generator=generator)


def last(products: Iterator[Tensor]) -> Tensor:
    *_, end = products
    return end


def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    print(f"\n{title}\n")
    width = max(len(name) for name in rows) + 2
    print(" " * width + "".join(f"{column:>12}" for column in columns))
    for name, cells in rows.items():
        print(f"{name:<{width}}" + "".join(f"{cell:>12}" for cell in cells))


def scales() -> None:
    """Departure b: a damping that is absolute knows the size of the gradients."""
    sizes, signal = [1.0, 1e-5, 1e-6, 1e-8], low_rank(512, 1376, 8)
    rows = {}
    for name, tracker in TRACKERS.items():
        ends = [last(follow(tracker, (s * T for T in noisy(signal, 1.0, 150)), 32)) for s in sizes]
        shares = [
            ((m * signal).sum() / signal.square().sum() / s).item() for m, s in zip(ends, sizes, strict=True)
        ]
        rows[name] = [f"{share:.3f}" for share in shares]
    table(
        "b. Share of a noisy rank-8 signal in B A after 150 steps, 512 x 1376, r = 32,\n"
        "   by size of the gradients",
        [f"{s:g}" for s in sizes], rows,
    )  # fmt: skip


def resolution() -> None:
    """Departure b: what a relative damping of 1e-6 trace / r meets in float32."""
    rows = {}
    for r in (8, 32, 128, 256):
        A = torch.randn(r, 1, generator=torch.Generator().manual_seed(0)) @ low_rank(1, 1376, 1)
        gram = A @ A.mT
        trace, eye = gram.diagonal().sum(), torch.eye(r)
        damped = [gram + DAMPING * trace / r * eye, gram + DAMPING * trace * eye]
        rows[f"r = {r}"] = ["fails" if torch.linalg.cholesky_ex(G).info else "holds" for G in damped]
    title = "b. Cholesky of the damped Gram of a rank-one factor (r, 1376), float32"
    table(title, ["1e-6 tr / r", "1e-6 tr"], rows)


def ramps() -> None:
    """The debiased rate: the size of the update on stationary noise."""
    steps, p, q = [2, 5, 10, 50, 200, 1000], 256, 384
    signal = low_rank(p, q, 8)
    for beta2 in (0.95, 0.999):
        rows = {}
        for variant in ("paper", "split", "AdamW"):
            weight = torch.nn.Parameter(torch.zeros(p, q))
            rank = None if variant == "AdamW" else 32
            options = {} if rank is None else {"variant": variant}
            optimizer = LoRAPreAdamW([weight], lr=1.0, betas=(0.9, beta2), rank=rank, **options)
            cells = []
            for t, g in enumerate(noisy(signal, 1.0, steps[-1]), start=1):
                before = weight.detach().clone()
                weight.grad = g
                optimizer.step()
                if t in steps:
                    cells.append(f"{(weight.detach() - before).square().mean().sqrt().item():.2f}")
            rows[variant] = cells
        table(
            f"a. Root mean square of the update over lr, signal : noise = 1 : 1, {p} x {q},\n"
            f"   r = 32, beta2 = {beta2}, by step",
            [str(s) for s in steps], rows,
        )  # fmt: skip


def errors(products: Iterator[Tensor], target: Tensor, first: int, at: list[int]) -> list[float]:
    """Errors `at` steps after the first `first`, and the largest of all."""
    seen = [((m - target).norm() / target.norm()).item() for i, m in enumerate(products) if i >= first]
    return [*(seen[i - 1] for i in at), max(seen)]


def zeros() -> None:
    """Departures a and c: after a pause."""
    signal, at = low_rank(96, 160, 4), [1, 10, 100]
    for pause in (50, 300, 3000):
        rows = {}
        for name, tracker in TRACKERS.items():
            targets = [signal] * 60 + [torch.zeros_like(signal)] * pause + [signal] * 100
            found = errors(follow(tracker, iter(targets), 8), signal, 60 + pause, at)
            rows[name] = [f"{error:.2g}" for error in found]
        table(
            f"a, c. |B A - T| / |T| in the steps after {pause} zero gradients, rank 4, r = 8",
            [*[str(i) for i in at], "largest"], rows,
        )  # fmt: skip


def switch() -> None:
    """Departure a: a target orthogonal in rows and columns to all before."""
    at, draws = [1, 10, 50, 100], 8
    for k, rank in ((4, 8), (8, 8)):
        rows = {}
        for name, tracker in TRACKERS.items():
            found = []
            for draw in range(draws):
                before, after = orthogonal(96, 160, k, draw)
                targets = iter([before] * 60 + [after] * 100)
                found.append(errors(follow(tracker, targets, rank), after, 60, at))
            rows[name] = [f"{max(column):.2g}" for column in zip(*found, strict=True)]
        table(
            f"a. |B A - T| / |T| after a switch to orthogonal gradients, rank {k}, r = {rank}, by step;\n"
            f"   the worst of {draws} draws",
            [*[str(i) for i in at], "largest"], rows,
        )  # fmt: skip


def orthogonal(p: int, q: int, k: int, draw: int) -> tuple[Tensor, Tensor]:
    """Two (p, q) matrices of rank k whose rows and columns are orthogonal to the other's."""
    U = torch.linalg.qr(torch.randn(p, 2 * k, generator=torch.Generator().manual_seed(2 * draw))).Q
    V = torch.linalg.qr(torch.randn(q, 2 * k, generator=torch.Generator().manual_seed(2 * draw + 1))).Q
    sizes = torch.linspace(1, 2, k)
    return (U[:, :k] * sizes) @ V[:, :k].mT, (U[:, k:] * sizes) @ V[:, k:].mT


def noise() -> None:
    """How well B A follows the dense EMA of noisy gradients."""
    signal, steps, rank = low_rank(256, 384, 8), 200, 32
    for title, target in (("g", lambda g: g), ("|g|", torch.abs)):
        columns, rows = [], {name: [] for name in [*TRACKERS, "best rank r"]}
        for strength in (1.0, 3.0, 10.0):
            compare(signal, strength, steps, rank, target, columns, rows)
        table(
            f"Cosine of B A to the dense EMA of {title} after {steps} steps, r = {rank}, by |g| / |EMA|",
            columns, rows,
        )  # fmt: skip


def compare(
    signal: Tensor, strength: float, steps: int, rank: int, target: Callable[[Tensor], Tensor],
    columns: list[str], rows: dict[str, list[str]],
) -> None:  # fmt: skip
    ema = torch.zeros_like(signal)
    for g in noisy(signal, strength, steps):
        ema.lerp_(target(g), 1 - BETA)
    columns.append(f"{(target(g).norm() / ema.norm()).item():.1f}")
    U, S, Vh = torch.linalg.svd(ema, full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    ends = {name: last(follow(tracker, map(target, noisy(signal, strength, steps)), rank))
            for name, tracker in TRACKERS.items()}  # fmt: skip
    for name, m in {**ends, "best rank r": best}.items():
        rows[name].append(f"{((m * ema).sum() / m.norm() / ema.norm()).item():.3f}")


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, float32, CPU")
    for measure in (scales, resolution, ramps, zeros, switch, noise):
        measure()


if __name__ == "__main__":
    main()
