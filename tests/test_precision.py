"""How tracking changes when factors are rounded to bfloat16 for products with bfloat16 gradients.

Kernels for processors with units for such products round them; here it is written out.

    python tests/test_precision.py

prints what LOG.md quotes for "Precision" in docs/maths.md.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lorapre.batch
from lorapre import LoRAPreAdamW, linalg
from lorapre.gradient import Gradient

P, Q, RANK, BETA = 256, 384, 32, 0.9
VARIANTS = ["split", "paper"]


def gradients(noise: float, steps: int) -> list[Tensor]:
    """A signal of rank 8 in noise of `noise` times its size, float32."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(P, 8, generator=generator) @ torch.randn(8, Q, generator=generator) / math.sqrt(8)
    return [signal + noise * torch.randn(P, Q, generator=generator) for _ in range(steps)]


class Rounding(Gradient):
    """The gradient whose products round the other operand to bfloat16, and sum in float32."""

    def _right(self, X: Tensor) -> Tensor:
        return super()._right(X.bfloat16().float())

    def _left(self, L: Tensor) -> Tensor:
        return super()._left(L.bfloat16().float())


def products(grads: list[Tensor], variant: str, kind: type[Gradient]) -> Iterator[dict[str, Tensor]]:
    """B A of each moment that has factors after each step, with this kind of gradient."""
    weight = nn.Parameter(torch.zeros(P, Q, dtype=grads[0].dtype))
    optimizer = LoRAPreAdamW([weight], lr=0.0, betas=(BETA, 0.95), rank=RANK, variant=variant)
    for g in grads:
        weight.grad = g
        optimizer._init_group(optimizer.param_groups[0], [], [], [])  # the same start for every kind
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lorapre.batch, "backend", lambda *_, **__: (kind, None))
            optimizer.step()
        state = optimizer.state[weight]
        yield {
            name: state[f"{name}_B"].double() @ state[f"{name}_A"].double()
            for name in "mv"
            if f"{name}_B" in state
        }


def relative(x: Tensor, y: Tensor) -> float:
    return ((x - y).norm() / y.norm()).item()


def compare(variant: str, noise: float, steps: int = 100) -> dict[str, list[float]]:
    """What rounding changes, by step.

    Of "m" and, where it has factors, "v" the change of B A, relative to B A; as a yardstick "gradient",
    what gradients' own rounding has changed in that of m; and the distance of that of m from the EMA,
    relative to the EMA, with rounded factors ("rounded") and without ("exact").
    """
    full = gradients(noise, steps)
    grads = [g.bfloat16() for g in full]
    names = ("m", "v") if variant == "paper" else ("m",)
    found: dict[str, list[float]] = {name: [] for name in (*names, "gradient", "rounded", "exact")}
    ema = torch.zeros(P, Q, dtype=torch.float64)
    runs = [
        products(run, variant, kind) for run, kind in ((grads, Rounding), (grads, Gradient), (full, Gradient))
    ]
    for t, (g, rounded, exact, better) in enumerate(zip(grads, *runs, strict=True), start=1):
        ema.lerp_(g.double(), 1 - BETA)
        target = ema / (1 - BETA**t) if variant == "split" else ema
        for name in names:
            found[name].append(relative(rounded[name], exact[name]))
        found["gradient"].append(relative(exact["m"], better["m"]))
        found["rounded"].append(relative(rounded["m"], target))
        found["exact"].append(relative(exact["m"], target))
    return found


@pytest.mark.parametrize(("variant", "largest"), [("split", 2e-3), ("paper", 1e-2)])
def test_rounding_the_factors_changes_the_products_little_where_gradients_lack_rank(
    variant: str, largest: float
) -> None:
    """Rank 8 at r = 32: the Newton steps divide by singular values near zero, before they round."""
    found = compare(variant, 0.0)
    assert 0 < max(found["m"]) < largest
    assert max(found["m"][50:]) < 1e-3
    assert variant != "paper" or 0 < max(found["v"]) < 2e-3


@pytest.mark.parametrize("noise", [1.0, 10.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_with_rounded_factors_the_distance_to_the_ema_of_noisy_gradients_is_the_same(
    variant: str, noise: float
) -> None:
    """Nothing accumulates. What differs is no more than the gradients' own rounding has changed."""
    found = compare(variant, noise, 100)
    for rounded, exact in zip(found["rounded"], found["exact"], strict=True):
        assert rounded == pytest.approx(exact, rel=5e-3)
    assert max(found["m"]) < 1.5 * max(found["gradient"])
    assert variant != "paper" or max(found["v"]) < 2e-3


@pytest.mark.parametrize(("r", "k"), [(32, 8), (256, 16), (256, 64)])
def test_two_products_with_the_root_are_as_accurate_as_a_solve_and_an_inverse_is_not(r: int, k: int) -> None:
    """T A^T (A A^T + lambda I)^-1 A where A has rank k < r; large roots are found by halves."""
    A = torch.randn(r, k) @ torch.randn(k, 300)
    T = torch.randn(200, k) @ torch.randn(k, 300)
    lam = linalg.DAMPING * A.square().sum().double()
    inverse = torch.linalg.inv(A.double() @ A.double().mT + lam * torch.eye(r))
    expected = T.double() @ A.double().mT @ inverse @ A.double()
    R = linalg.damped_root((A @ A.mT)[None])[0]
    assert relative((T @ A.mT @ R.mT @ R @ A).double(), expected) < 1e-5
    assert relative((T @ A.mT @ (R.mT @ R) @ A).double(), expected) > 1e-4


def main() -> None:
    torch.set_num_threads(1)
    steps = [1, 2, 10, 30, 100, 300]
    print(f"{'by step':<24}", *(f"{t:>8}" for t in steps), f"{'largest':>8}")
    for noise in (0.0, 1.0, 3.0, 10.0):
        for variant in VARIANTS:
            print(f"noise {noise:g}, {variant}")
            for name, errors in compare(variant, noise, steps[-1]).items():
                cells = [errors[t - 1] for t in steps]
                print(f"    {name:<20}", *(f"{error:8.1e}" for error in (*cells, max(errors))))


if __name__ == "__main__":
    main()
