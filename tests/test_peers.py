"""The peers of compare/peers against naive versions in float64, written from the papers' algorithms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorapre_recipes.compare.peers import MatrixOptimizer, gaussian
from lorapre_recipes.compare.peers.alice import Alice, switched
from lorapre_recipes.compare.peers.apollo import Apollo
from lorapre_recipes.compare.peers.mlorc import MLorc
from lorapre_recipes.compare.peers.mofasgd import MoFaSGD
from lorapre_recipes.compare.peers.muon import StoredMuon
from lorapre_recipes.compare.peers.racs import Racs
from lorapre_recipes.compare.peers.scale import Scale
from lorapre_recipes.train.optim import state_bytes

SHAPES = [(6, 10), (10, 6), (8, 8)]
Naive = Callable[[list[Tensor]], list[Tensor]]  # gradients to updates


def gradients(shape: tuple[int, int], count: int = 7) -> list[Tensor]:
    """Of quite different sizes, so that what limits or divides by a norm has something to do."""
    torch.manual_seed(0)
    sizes = [1e-3, 1e-4, 1e-2, 1e-3, 3e-3, 1e-5, 1e-3]
    return [size * torch.randn(shape) * torch.rand(shape[0], 1) for size in sizes[:count]]


def check(optimizer: MatrixOptimizer, naive: Naive, shape: tuple[int, int]) -> None:
    """The optimizer's updates are the naive ones."""
    state: dict[str, Any] = {}
    given = [G.double() for G in gradients(shape)]
    for G, expected in zip(given, naive(given), strict=True):
        update = optimizer.update(G, state, optimizer.param_groups[0])
        torch.testing.assert_close(update, expected, rtol=1e-6, atol=1e-6)


def weight(shape: tuple[int, int]) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(shape))


def test_a_step_is_decay_and_update() -> None:
    W, still = weight((6, 10)), weight((6, 10))
    (G,) = gradients((6, 10), 1)
    W.grad = G
    optimizer = Scale([{"params": [W, still], "lr": 0.1, "weight_decay": 0.5}])
    optimizer.step()
    torch.testing.assert_close(
        W.detach(), 1 - 0.1 * (optimizer.update(G, {}, {"momentum": 0, "dim": 1}) + 0.5)
    )
    assert torch.equal(still, weight((6, 10)))


def limit(update: Tensor, last: float) -> tuple[Tensor, float]:
    norm = float(update.norm())
    eta = 1.01 / max(norm / last, 1.01) if last > 0 else 1.0
    return eta * update, eta * norm


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("momentum", "dim"), [(0.0, 1), (0.9, 1), (0.0, 0)])
def test_scale(shape: tuple[int, int], momentum: float, dim: int) -> None:
    def naive(gradients: list[Tensor]) -> list[Tensor]:
        M, updates = torch.zeros(shape, dtype=torch.float64), []
        for G in gradients:
            M = momentum * M + (1 - momentum) * G
            lines = M if dim == 1 else M.T
            lines = torch.stack([line / (line @ line / len(line)) ** 0.5 for line in lines])
            updates.append(lines if dim == 1 else lines.T)
        return updates

    check(Scale([weight(shape)], momentum=momentum, dim=dim), naive, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_racs(shape: tuple[int, int]) -> None:
    def naive(gradients: list[Tensor]) -> list[Tensor]:
        p, q = shape
        a, b = torch.zeros(p, dtype=torch.float64), torch.zeros(q, dtype=torch.float64)
        last, updates = 0.0, []
        for G in gradients:
            Q = torch.eye(p, dtype=torch.float64)
            for _ in range(5):
                S = (G.T @ Q @ G).diag().diag() / Q.norm() ** 2
                Q = (G @ S @ G.T).diag().diag() / S.norm() ** 2
            a, b = 0.9 * a + 0.1 * Q.diag(), 0.9 * b + 0.1 * S.diag()
            update, last = limit((a**-0.5).diag() @ G @ (b**-0.5).diag(), last)
            updates.append(update)
        return updates

    check(Racs([weight(shape)]), naive, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_alice_without_drawn_directions(shape: tuple[int, int]) -> None:
    r, refresh = 4, 3
    b1, b2, b3 = 0.9, 0.8, 0.7

    def naive(gradients: list[Tensor]) -> list[Tensor]:
        tall = shape[0] > shape[1]
        m, n = sorted(shape)
        zeros: Any = dict(dtype=torch.float64)
        S, M, V, v = torch.zeros(r, r, **zeros), *torch.zeros(2, r, n, **zeros), torch.zeros(n, **zeros)
        U, last, updates = torch.zeros(m, r, **zeros), 0.0, []
        for t, given in enumerate(gradients, start=1):
            G = given.T if tall else given
            if t == 1:
                U = torch.linalg.eigh(G @ G.T).eigenvectors[:, -r:].flip(1)
            elif t % refresh == 0:
                Q = b3 * U @ S @ U.T + (1 - b3) * G @ G.T
                basis = torch.linalg.qr(Q @ U).Q
                values, vectors = torch.linalg.eigh(basis.T @ Q @ basis)
                U = basis @ vectors[:, values.argsort(descending=True)]
            low = U.T @ G
            S = b3 * S + (1 - b3) * low @ low.T
            M = b1 * M + (1 - b1) * low
            V = b2 * V + (1 - b2) * low**2
            v = b1 * v + (1 - b1) * ((G**2).sum(0) - (low**2).sum(0))
            C, last = limit((m - r) ** 0.5 * (G - U @ low) @ (v**-0.5).diag(), last)
            update = U @ (M / (V**0.5 + 1e-8)) + 0.4 * C
            updates.append(update.T if tall else update)
        return updates

    check(Alice([weight(shape)], rank=r, refresh=refresh, betas=(b1, b2, b3), leading=1.0), naive, shape)


def test_alice_keeps_the_leading_eigenvectors_and_draws_the_others() -> None:
    torch.manual_seed(0)
    m, r, leading = 12, 5, 2
    basis = torch.linalg.qr(torch.randn(m, m)).Q
    drawn = [switched(basis[:, :r], leading / r, seed=seed) for seed in range(2)]
    for U in drawn:
        torch.testing.assert_close(U.T @ U, torch.eye(r))
        torch.testing.assert_close(U[:, :leading], basis[:, :leading])
        torch.testing.assert_close(U[:, leading:].T @ basis[:, :r], torch.zeros(r - leading, r))
    assert not torch.allclose(*drawn)
    # The complement has one direction, and three are wanted.
    U = switched(torch.eye(6)[:, :r], leading / r, seed=0)
    torch.testing.assert_close(U.abs(), torch.eye(6)[:, [0, 1, 5, 2, 3]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mini", [False, True])
def test_apollo(shape: tuple[int, int], mini: bool) -> None:
    b1, b2, eps, refresh, r = 0.9, 0.99, 1e-8, 3, 1 if mini else 2

    def naive(gradients: list[Tensor]) -> list[Tensor]:
        M, V = torch.zeros(2, r, max(shape), dtype=torch.float64)
        last, updates = 0.0, []
        for t, given in enumerate(gradients, start=1):
            G = given.T if shape[0] > shape[1] else given
            R = gaussian(r, len(G), (t - 1) // refresh, G) / r**0.5 @ G
            M, V = b1 * M + (1 - b1) * R, b2 * V + (1 - b2) * R**2
            A = (M / (1 - b1**t)) / ((V / (1 - b2**t)) ** 0.5 + eps)
            scaled = G @ torch.stack([a.norm() / x.norm() for a, x in zip(A.T, R.T, strict=True)]).diag()
            if mini:
                scaled = 128**0.5 * G * A.norm() / R.norm()
            update, last = limit(scaled, last)
            updates.append(update if G is given else update.T)
        return updates

    options: Any = dict(betas=(b1, b2), eps=eps)
    check(Apollo([weight(shape)], rank=2, refresh=refresh, mini=mini, **options), naive, shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [2, 6])
def test_mlorc(shape: tuple[int, int], rank: int) -> None:
    b1, b2, eps = 0.9, 0.99, 1e-8

    def compressed(X: Tensor, t: int) -> Tensor:
        Q = torch.linalg.qr(X @ gaussian(X.shape[1], min(rank, *X.shape), t, X)).Q
        U, S, Vt = torch.linalg.svd(Q.T @ X, full_matrices=False)
        return Q @ U @ S.diag() @ Vt

    def naive(gradients: list[Tensor]) -> list[Tensor]:
        M, V = torch.zeros(2, *shape, dtype=torch.float64)
        updates, repaired = [], 0
        for t, G in enumerate(gradients, start=1):
            if (V < 0).any():
                V[V < 0] = -V[V < 0].mean()
                repaired += 1
            M, V = b1 * M + (1 - b1) * G, b2 * V + (1 - b2) * G**2
            updates.append((M / (1 - b1**t)) / ((V / (1 - b2**t)) ** 0.5 + eps))
            M, V = compressed(M, t), compressed(V, t)
        assert (repaired > 0) == (rank == 2 or shape == (8, 8))
        return updates

    check(MLorc([weight(shape)], rank=rank, betas=(b1, b2), eps=eps), naive, shape)


def test_mlorc_of_full_rank_is_adam() -> None:
    weights = [weight((6, 10)) for _ in range(2)]
    options: Any = dict(betas=(0.9, 0.99), eps=1e-8, lr=0.1)
    ours = MLorc([weights[0]], rank=6, weight_decay=0.1, **options)
    adamw = torch.optim.AdamW([weights[1]], weight_decay=0.1, **options)
    for G in gradients((6, 10)):
        for W, optimizer in zip(weights, (ours, adamw), strict=True):
            W.grad = G.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0].detach(), weights[1].detach(), rtol=1e-3, atol=1e-3)
    ours = MLorc([weights[0]], rank=2, **options)
    ours.step()
    assert state_bytes(ours) == 4 * 2 * 2 * (6 + 10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [2, 5])  # twice 5 is more than there are rows
def test_mofasgd(shape: tuple[int, int], rank: int) -> None:
    def naive(gradients: list[Tensor]) -> list[Tensor]:
        updates = []
        U = S = V = torch.empty(0)
        for t, G in enumerate(gradients):
            M = G
            if t > 0:
                left, right = U @ U.T, V @ V.T
                M = 0.9 * U @ S.diag() @ V.T + left @ G + G @ right - left @ G @ right
            U, S, Vt = torch.linalg.svd(M, full_matrices=False)
            U, S, V = U[:, :rank], S[:rank], Vt[:rank].T
            updates.append(0.2 * max(shape) ** 0.5 * U @ V.T)
        return updates

    optimizer = MoFaSGD([weight(shape)], rank=rank, momentum=0.9)
    check(optimizer, naive, shape)
    (W,) = optimizer.param_groups[0]["params"]
    for G in gradients(shape):
        W.grad = G
        optimizer.step()
    assert state_bytes(optimizer) == 4 * rank * (sum(shape) + 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_muon_in_float32_is_torchs(shape: tuple[int, int], momentum: float) -> None:
    weights = [torch.nn.Parameter(torch.ones(shape)) for _ in range(2)]
    stored = StoredMuon([weights[0]], lr=0.1, momentum=momentum)
    optimizers = [
        stored,
        torch.optim.Muon(
            [weights[1]], lr=0.1, momentum=momentum, weight_decay=0, adjust_lr_fn="match_rms_adamw"
        ),
    ]
    for G in gradients(shape):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = G.clone()
            optimizer.step()
    torch.testing.assert_close(*(weight.detach() for weight in weights), rtol=0.01, atol=0.01)
    assert bool(stored.state[weights[0]]) == (momentum > 0)


@pytest.mark.parametrize(
    ("store", "number", "tolerance", "block", "codes"),
    [("bf16", 2.0, 0.03, None, 0), ("8bit", 1.0, 0.05, 256, 256), ("4bit", 0.5, 0.3, 128, 16)],
)
def test_muon_in_few_bits(store: str, number: float, tolerance: float, block: int | None, codes: int) -> None:
    pytest.importorskip("torchao")
    weights = [torch.nn.Parameter(torch.zeros(64, 96)) for _ in range(2)]
    optimizers = [StoredMuon([weights[0]], lr=1.0, store=store), StoredMuon([weights[1]], lr=1.0)]
    for G in gradients((64, 96)):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = G
            optimizer.step()
    error = (weights[0] - weights[1]).norm() / weights[1].norm()
    assert 0 < error < tolerance
    scales = 4 * 64 * 96 / block if block else 0  # of each block; and the numbers of the code
    assert state_bytes(optimizers[0]) == pytest.approx(number * 64 * 96 + scales + 4 * codes)
