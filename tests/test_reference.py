"""Both optimizers against the float64 reference, and in the limits where they equal a known optimizer."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorapre import LoRAPreAdamW, LoRAPreMuon
from lorapre.variants import gaussian
from reference import AdamReference, MuonReference, first_A

pytestmark = pytest.mark.usefixtures("arithmetic")

VARIANTS = ["split", "paper"]
MUON = ["subspace", "paper"]
RANK = 8
STEPS = 25

# Name -> the weight's shape and what it is as matrices (E, p, q).
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, int, int]]] = {
    "tall": ((72, 24), (1, 72, 24)),
    "wide": ((24, 96), (1, 24, 96)),
    "square": ((40, 40), (1, 40, 40)),
    "convolution": ((32, 5, 3, 3), (1, 32, 45)),
    "experts": ((3, 28, 36), (3, 28, 36)),
}


def relative(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def noisy(shape: tuple[int, ...], steps: int, *, signal: float = 1.0) -> list[Tensor]:
    """Gradients of a fixed signal of rank at most 4 and as much noise, per matrix."""
    _, (E, p, q) = next((s for s in SHAPES.values() if s[0] == shape), (shape, (1, *shape)))
    mean = signal * (torch.randn(E, p, 4) @ torch.randn(E, 4, q)) / 2
    return [(mean + torch.randn(E, p, q)).view(shape) for _ in range(steps)]


def starts(variant: str, q: int) -> tuple[Tensor, Tensor]:
    """(A_m, A_v) of every matrix with q columns, from the draws of an optimizer of seed 0."""
    return first_A(variant, gaussian(RANK, q, seed=0)), first_A(variant, gaussian(RANK, q, seed=1))


def descend(
    optimizer: type[torch.optim.Optimizer], weight: Tensor, gradients: list[Tensor], **options: Any
) -> list[Tensor]:
    """The weight before the first and after every step."""
    p = nn.Parameter(weight.clone())
    steps = [p.detach().clone()]
    chosen = optimizer([p], **options)
    for g in gradients:
        p.grad = g.clone()
        chosen.step()
        steps.append(p.detach().clone())
    return steps


def reference_adam(
    weight: Tensor, gradients: list[Tensor], matrix: tuple[int, int, int], *, variant: str, **options: Any
) -> list[Tensor]:
    """As `descend`, by the reference."""
    E, p, q = matrix
    A = starts(variant, q)
    references = [AdamReference(w, *A, variant=variant, **options) for w in weight.view(E, p, q)]
    steps = [weight.double()]
    for g in gradients:
        for each, slice_ in zip(references, g.view(E, p, q), strict=True):
            each.step(slice_)
        steps.append(torch.stack([each.weight for each in references]).view(weight.shape))
    return steps


# ------------------------------------------------------------------------------------- LoRAPreAdamW, 25 steps

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weight decay": {"weight_decay": 0.1},
    "scale": {"scale": 0.25},
    "scale and weight decay": {"scale": 0.25, "weight_decay": 1.0},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "slow betas": {"betas": (0.9, 0.999)},
    "no first moment": {"betas": (0.0, 0.95)},
    "large eps": {"eps": 0.1},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_adam_follows_the_reference_for_every_shape(variant: str, shape: str) -> None:
    check_adam(shape, variant=variant)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_adam_follows_the_reference_under_every_option(variant: str, name: str) -> None:
    check_adam("wide", variant=variant, **OPTIONS[name])


def check_adam(name: str, **options: Any) -> None:
    shape, matrix = SHAPES[name]
    weight, gradients = 0.1 * torch.randn(shape), noisy(shape, STEPS)
    got = descend(LoRAPreAdamW, weight, gradients, rank=RANK, lr=1e-2, **options)
    expected = reference_adam(weight, gradients, matrix, lr=1e-2, **options)
    assert relative(got[-1], expected[-1]) <= 1e-4
    for t in (1, 2, STEPS):
        assert relative(got[t] - got[0], expected[t] - expected[0]) <= 1e-3, f"step {t}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_adam_follows_the_reference_on_a_weight_of_several_tiles(variant: str) -> None:
    """A step goes through the rows in tiles of 2**17 elements: these are three, the last one short."""
    weight, gradients = 0.1 * torch.randn(700, 500), noisy((700, 500), 4)
    got = descend(LoRAPreAdamW, weight, gradients, rank=RANK, variant=variant)
    expected = reference_adam(weight, gradients, (1, 700, 500), variant=variant)
    assert relative(got[-1] - weight, expected[-1] - weight) < 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_adam_state_is_the_reference_state(variant: str) -> None:
    """The products, not the factors: a basis may rotate."""
    shape, _ = SHAPES["square"]
    gradients = noisy(shape, 10)
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = LoRAPreAdamW([weight], rank=RANK, variant=variant)
    reference = AdamReference(weight, *starts(variant, shape[1]), variant=variant)
    for g in gradients:
        weight.grad = g
        optimizer.step()
        reference.step(g)
    state = optimizer.state[weight]
    assert relative(state["m_B"] @ state["m_A"], reference.m_B @ reference.m_A) < 1e-3
    if variant == "paper":
        assert relative(state["v_B"] @ state["v_A"], reference.v_B @ reference.v_A) < 1e-3
    else:
        torch.testing.assert_close(state["v_row"].double(), reference.v_row, rtol=1e-5, atol=0)
        torch.testing.assert_close(state["v_col"].double(), reference.v_col, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adam_follows_the_reference_from_a_first_gradient_of_zero(variant: str) -> None:
    """A LoRA B starts at zero, so the gradient of its A does: the start is random then, in every variant."""
    shape, matrix = SHAPES["wide"]
    weight, gradients = 0.1 * torch.randn(shape), [torch.zeros(shape), *noisy(shape, STEPS)]
    got = descend(LoRAPreAdamW, weight, gradients, rank=RANK, variant=variant)
    expected = reference_adam(weight, gradients, matrix, variant=variant)
    assert torch.equal(got[1], got[0])
    assert relative(got[-1] - got[0], expected[-1] - expected[0]) < 1e-3


# -------------------------------------------------------------------------------------- LoRAPreMuon, 25 steps


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant", MUON)
def test_muon_follows_the_reference_for_every_shape(variant: str, shape: str) -> None:
    check_muon(shape, variant=variant)


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": True},
        {"nesterov": False},
        {"momentum": 0.8},
        {"momentum": 0.0},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"maximize": True},
        {"weight_decay": 0.0},
        {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)},
    ],
    ids=str,
)
@pytest.mark.parametrize("variant", MUON)
def test_muon_follows_the_reference_under_every_option(variant: str, options: dict[str, Any]) -> None:
    check_muon("tall", variant=variant, **options)


def check_muon(name: str, *, variant: str, **options: Any) -> None:
    """The matrix before Newton-Schulz from the state, since the iteration itself runs in bfloat16."""
    shape, (E, p, q) = SHAPES[name]
    weight, gradients = nn.Parameter(0.1 * torch.randn(shape)), noisy(shape, STEPS)
    sign = -1 if options.get("maximize") else 1
    mu, decay = options.get("momentum", 0.95), options.get("weight_decay", 0.1)
    A, _ = starts(variant, q)
    references = [
        MuonReference(w, A, variant=variant, lr=1e-2, **options) for w in weight.detach().view(E, p, q)
    ]
    optimizer = LoRAPreMuon([weight], rank=RANK, variant=variant, lr=1e-2, **options)
    cosines = []
    for g in gradients:
        state = optimizer.state[weight]
        before = state["m_B"] @ state["m_A"] if state else torch.zeros(shape).view(E, p, q)
        old = weight.detach().clone()
        weight.grad = g.clone()
        optimizer.step()
        m = mu * before + sign * g.view(E, p, q)
        m = sign * g.view(E, p, q) + mu * m if options.get("nesterov", variant != "paper") else m
        for each, slice_ in zip(references, g.view(E, p, q), strict=True):
            each.step(slice_)
        assert relative(m, torch.stack([each.matrix for each in references])) <= 1e-4
        update = (old * (1 - 1e-2 * decay) - weight.detach()).view(E, p, q).double()
        for each, mine in zip(references, update, strict=True):
            scaled = 1e-2 * each.adjust * each.update
            cosines.append(((mine * scaled).sum() / (mine.norm() * scaled.norm())).item())
            assert mine.norm().item() == pytest.approx(scaled.norm().item(), rel=2e-2)
    # bfloat16: on the reference's own matrix torch.optim.Muon's iteration comes no closer than this either,
    # where the matrix has singular values far below its norm.
    assert sorted(cosines)[len(cosines) // 2] >= 0.999
    assert min(cosines) >= 0.998
    expected = torch.stack([each.weight for each in references]).view(shape)
    assert relative(weight.detach(), expected) < 1e-2


# ------------------------------------------------------------------------------------ what departures are for


@pytest.mark.parametrize("size", [1e-12, 1e-8, 1e-4, 1e4])
def test_updates_do_not_depend_on_the_size_of_the_gradients(size: float) -> None:
    shape, _ = SHAPES["wide"]
    gradients = noisy(shape, STEPS)
    options = {"rank": RANK, "eps": 0.0, "lr": 1.0}
    one = descend(LoRAPreAdamW, torch.zeros(shape), gradients, **options)
    other = descend(LoRAPreAdamW, torch.zeros(shape), [size * g for g in gradients], **options)
    for t in range(STEPS):
        assert relative(other[t + 1] - other[t], one[t + 1] - one[t]) < 1e-2


def test_muon_factors_scale_with_the_gradients() -> None:
    shape, _ = SHAPES["wide"]
    gradients = noisy(shape, STEPS)
    products = []
    for size in (1.0, 1e-12, 1e4):
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = LoRAPreMuon([weight], rank=RANK)
        for g in gradients:
            weight.grad = size * g
            optimizer.step()
        state = optimizer.state[weight]
        products.append(state["m_B"] / size @ state["m_A"])
    assert relative(products[1], products[0]) < 1e-3
    assert relative(products[2], products[0]) < 1e-3


def update_rms(variant: str, steps: int) -> list[float]:
    """Root-mean-square of the update over lr, signal:noise 1:1, beta2 = 0.999."""
    p, q = 256, 384
    signal = torch.randn(p, 8) @ torch.randn(8, q) / math.sqrt(8)
    gradients = [signal + torch.randn(p, q) for _ in range(steps)]
    weights = descend(
        LoRAPreAdamW, torch.zeros(p, q), gradients, lr=1.0, betas=(0.9, 0.999), rank=32, variant=variant
    )
    return [(weights[t + 1] - weights[t]).square().mean().sqrt().item() for t in range(steps)]


def test_updates_at_beta2_0_999_settle_within_20_steps() -> None:
    assert max(update_rms("split", 60)[20:]) <= 1.3


def test_updates_at_beta2_0_999_overshoot_as_printed() -> None:
    """Why the debiased rate: the factors of v ramp up more slowly than v."""
    assert max(update_rms("paper", 40)[20:]) > 3


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_the_update_of_a_constant_rank_one_gradient_is_lr_at_every_step(beta2: float) -> None:
    g = torch.outer(torch.randn(40), torch.randn(60))
    options: dict[str, Any] = {"lr": 1.0, "betas": (0.9, beta2), "eps": 0.0, "rank": RANK}
    weights = descend(LoRAPreAdamW, torch.zeros(40, 60), 50 * [g], **options)
    for t in range(50):
        torch.testing.assert_close(weights[t + 1] - weights[t], -g.sign(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.5, 0.6)])
def test_no_entry_of_a_split_update_exceeds_its_bound(betas: tuple[float, float]) -> None:
    """By Cauchy and Schwarz, since v holds a share of the square of each part of m (docs/maths.md)."""
    gradients = noisy((24, 96), 12)
    gradients += [1e-4 * g for g in noisy((24, 96), 4)] + [1e5 * g for g in noisy((24, 96), 4)]
    gradients += [(-1) ** i * gradients[0] for i in range(4)] + [g * (g > 2) for g in noisy((24, 96), 4)]
    weights = descend(
        LoRAPreAdamW, torch.zeros(24, 96), gradients, lr=1.0, betas=betas, eps=0.0, rank=RANK, variant="split"
    )
    beta1, beta2 = betas
    for t in range(1, len(gradients) + 1):
        rate = beta1 * (1 - beta1 ** (t - 1)) / (1 - beta1**t)
        old = rate**2 / (beta2 * (1 - beta2 ** (t - 1))) * (1 / beta2 + 1 / (1 - beta2)) if t > 1 else 0
        bound = math.sqrt((1 - beta2**t) * (1 / (1 - beta2) + old))
        assert (weights[t] - weights[t - 1]).abs().max() <= bound * (1 + 1e-3)


# ----------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("variant", VARIANTS)
def test_adam_without_memory_is_sign_descent(variant: str) -> None:
    """betas = (0, 0): both moments are those of this gradient alone."""
    gradients = noisy((24, 96), 5)
    got = descend(
        LoRAPreAdamW,
        torch.zeros(24, 96),
        gradients,
        lr=1.0,
        betas=(0.0, 0.0),
        eps=0.0,
        rank=RANK,
        variant=variant,
    )
    for t, g in enumerate(gradients):
        torch.testing.assert_close(got[t + 1] - got[t], -g.sign(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", MUON)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
def test_muon_without_momentum_is_torch_muon(variant: str, nesterov: bool, adjust_lr_fn: str | None) -> None:
    gradients, weight = noisy((72, 24), 5), torch.randn(72, 24)
    options: dict[str, Any] = {
        "momentum": 0.0,
        "nesterov": nesterov,
        "adjust_lr_fn": adjust_lr_fn,
        "lr": 1e-2,
    }
    got = descend(LoRAPreMuon, weight, gradients, rank=RANK, variant=variant, **options)
    expected = descend(torch.optim.Muon, weight, gradients, **options)
    assert relative(got[-1] - weight, expected[-1] - weight) < 1e-2  # both iterate in bfloat16


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_in_full_sight_is_torch_muon(nesterov: bool) -> None:
    C = torch.randn(40, RANK)
    gradients, weight = [C @ torch.randn(RANK, 60) for _ in range(STEPS)], torch.randn(40, 60)
    options: dict[str, Any] = {"momentum": 0.95, "nesterov": nesterov, "lr": 1e-2}
    got = descend(LoRAPreMuon, weight, gradients, rank=RANK, variant="subspace", **options)
    expected = descend(torch.optim.Muon, weight, gradients, **options)
    # A matrix of rank 8 in bfloat16: what its rounding puts into the other directions is amplified 480-fold.
    assert relative(got[-1] - weight, expected[-1] - weight) < 0.1


@pytest.mark.parametrize("shape", [(), (7,), (9, 1), (1, 9), (6, 5), (4, 3, 3, 3)])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p, **options: LoRAPreAdamW(p, rank=None, **options),
        lambda p, **options: LoRAPreMuon(
            p,
            lr=options["lr"],
            rank=None,
            adamw_betas=options["betas"],
            adamw_eps=options["eps"],
            weight_decay=options["weight_decay"],
            maximize=options["maximize"],
        ),
    ],
    ids=["adam", "muon"],
)
@pytest.mark.parametrize("maximize", [False, True])
def test_dense_groups_are_torch_adamw(
    optimizer: Callable[..., torch.optim.Optimizer], shape: tuple[int, ...], maximize: bool
) -> None:
    gradients, weight = [torch.randn(shape) for _ in range(STEPS)], torch.randn(shape)
    options = {"lr": 1e-2, "betas": (0.8, 0.999), "eps": 1e-6, "weight_decay": 0.1, "maximize": maximize}
    got = descend(optimizer, weight, gradients, **options)  # type: ignore[arg-type]
    expected = descend(torch.optim.AdamW, weight, gradients, **options)
    torch.testing.assert_close(got[-1], expected[-1], rtol=1e-5, atol=1e-6)
