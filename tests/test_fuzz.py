"""Random odd gradients: finite ones never make a NaN, and no update exceeds its bound.

The bounds are derived in docs/maths.md, "How large an update can be".

    FUZZ_EXAMPLES=2000 python -m pytest tests/test_fuzz.py      as many examples a row, drawn anew each time
    python tests/test_fuzz.py 2000                              prints the largest updates seen

In the suite the examples are few and always the same.
"""

import math
import os
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cases import CASES, Case
from lorapre import LoRAPreAdamW

LR = 2.0**-7  # a power of two, so that the division by it is exact
TINY, HUGE = -30, 20  # powers of ten that gradients stay within
LARGEST = {torch.float16: 4, torch.bfloat16: HUGE, torch.float32: HUGE, torch.float64: HUGE}


@dataclass(frozen=True)
class Plan:
    """Gradients of a few steps of one weight."""

    shape: tuple[int, ...]
    rank: int
    dtype: torch.dtype
    kind: str
    signs: str
    powers: tuple[int, ...]  # of ten: the size of the gradient at each step
    betas: tuple[float, float]
    seed: int

    def gradients(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        p = self.shape[-2] if len(self.shape) < 4 else self.shape[0]
        q = math.prod(self.shape[1:]) if len(self.shape) == 4 else self.shape[-1]
        E = self.shape[0] if len(self.shape) == 3 else 1
        fixed = noise(E, p, q)
        mask = torch.rand(E, p, q, generator=generator) < 0.2
        grads = []
        for step, power in enumerate(self.powers):
            g = {
                "noise": lambda: noise(E, p, q),
                "fixed": lambda: fixed,
                "rank one": lambda: noise(E, p, 1) * noise(E, 1, q),
                "rank two": lambda: noise(E, p, 2) @ fixed[:, :1].expand(E, 2, q) + fixed[:, :, :1],
                "ones": lambda: torch.ones(E, p, q),
                "one entry": lambda: torch.zeros(E, p, q).index_fill_(2, torch.tensor(q - 1), 1.0) * mask,
                "masked": lambda: noise(E, p, q) * mask,
                "rows": lambda: noise(E, p, q) * mask[:, :, :1],
                "columns": lambda: noise(E, p, q) * mask[:, :1],
                "other mask": lambda: noise(E, p, q) * (torch.rand(E, p, q, generator=generator) < 0.1),
                "sizes": lambda: noise(E, p, q) * 10 ** (3 * fixed),
                "zero": lambda: torch.zeros(E, p, q),
            }[self.kind]()
            sign = {"same": 1.0, "alternating": (-1.0) ** step, "absolute": 1.0}[self.signs]
            g = g.abs() if self.signs == "absolute" else g * sign
            largest = min(torch.finfo(self.dtype).max, torch.finfo(torch.float32).max) / 4
            g = (g.double() * 10.0**power).clamp(-largest, largest).to(self.dtype)
            grads.append(g.view(self.shape))
        return grads


KINDS = ("noise", "fixed", "rank one", "rank two", "ones", "one entry", "masked", "rows", "columns")
KINDS += ("other mask", "sizes", "zero")


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    side = st.integers(1, 24)
    shape = draw(
        st.one_of(
            st.tuples(side, side),
            st.tuples(st.integers(1, 3), side, side),
            st.tuples(side, st.integers(1, 4), st.just(3), st.just(3)),
        )
    )
    dtype = draw(st.sampled_from(list(LARGEST)))
    low = -4 if dtype == torch.float16 else TINY
    power = draw(st.integers(low, LARGEST[dtype]))
    powers = []
    for _ in range(draw(st.integers(2, 10))):
        powers.append(power)
        jump = draw(st.sampled_from((0, 0, 0, 0, -8, 8, -1, 1)))
        power = max(low, min(LARGEST[dtype], power + jump))
    return Plan(
        shape=shape,
        rank=draw(st.integers(1, 12)),
        dtype=dtype,
        kind=draw(st.sampled_from(KINDS)),
        signs=draw(st.sampled_from(("same", "alternating", "absolute"))),
        powers=tuple(powers),
        betas=draw(st.sampled_from(((0.9, 0.95), (0.9, 0.999), (0.0, 0.95), (0.99, 0.99), (0.5, 0.9)))),
        seed=draw(st.integers(0, 2**31)),
    )


@dataclass(frozen=True)
class Step:
    """The results of a step."""

    update: Tensor  # what the weight moved by, over lr
    kept: Tensor | None  # B A of the first moment before the step, (E, p, q), zero before the first
    low_rank: bool


def steps_of(case: Case, plan: Plan) -> list[Step]:
    """Step from a weight of zero along each gradient, and assert that no NaN appears."""
    adam = case.cls is LoRAPreAdamW
    rank = {"rank": plan.rank} if case.options.get("rank", plan.rank) is not None else {}
    p = nn.Parameter(torch.zeros(plan.shape, dtype=plan.dtype))
    optimizer = case.make(
        [p], lr=LR, weight_decay=0.0, **{case.decay: plan.betas if adam else plan.betas[0]}, **rank
    )
    steps = []
    kept = None
    for g in plan.gradients():
        p.data.zero_()
        p.grad = g
        optimizer.step()
        own = optimizer.state[p]
        assert not p.isnan().any()
        assert not any(value.isnan().any() for value in own.values())
        steps.append(Step(p.detach().double() / LR, kept, any(name.endswith("_B") for name in own)))
        if "m_B" in own:
            kept = own["m_B"].double() @ own["m_A"].double()
        elif "exp_avg" in own:
            kept = own["exp_avg"].double().clone()
    return steps


def dense_bound(betas: tuple[float, float], t: int) -> float:
    """The largest |m'| / sqrt(v') of EMAs in step t, by the inequality of Cauchy and Schwarz."""
    beta1, beta2 = betas
    ratio = sum(((1 - beta1) * beta1**k) ** 2 / ((1 - beta2) * beta2**k) for k in range(t))
    return math.sqrt(ratio * (1 - beta2**t)) / (1 - beta1**t)


def split_bound(betas: tuple[float, float], t: int) -> float:
    """The same for "split", whose v' contains a part of g**2 and of the square of the rest of m'."""
    beta1, beta2 = betas
    rate = beta1 * (1 - beta1 ** (t - 1)) / (1 - beta1**t)
    old = rate**2 / (beta2 * (1 - beta2 ** (t - 1))) * (1 / beta2 + 1 / (1 - beta2)) if t > 1 else 0
    return math.sqrt((1 - beta2**t) * (1 / (1 - beta2) + old))


def check(case: Case, plan: Plan) -> None:
    """The bounds of docs/maths.md, "How large an update can be", for each step of a plan."""
    largest = 0.0  # Frobenius norm of a gradient so far
    for t, (step, g) in enumerate(zip(steps_of(case, plan), plan.gradients(), strict=True), start=1):
        adam = case.cls is LoRAPreAdamW
        betas = plan.betas if adam else (0.9, 0.95)
        if not step.low_rank:
            bound = dense_bound(betas, t)
        elif not adam:
            shape = (plan.shape[0], math.prod(plan.shape[1:])) if len(plan.shape) == 4 else plan.shape[-2:]
            bound = 1.25 * math.sqrt(max(1, shape[0] / shape[1]))
        elif case.options.get("variant", "split") == "split":
            bound = split_bound(betas, t)
        else:
            beta1, beta2 = betas
            kept = 0.0 if step.kept is None else step.kept.abs().max().item()
            fresh = (1 - beta1) * math.sqrt((1 - beta2**t) / (1 - beta2))
            bound = (fresh + beta1 * kept / 1e-8) / (1 - beta1**t)
        if 1.01 * bound * LR < torch.finfo(plan.dtype).max:
            assert step.update.abs().max().item() <= 1.01 * bound + 1e-6
        if step.low_rank and step.kept is not None and case.options.get("variant") != "paper":
            gain = 1.0 if adam else 1 / (1 - plan.betas[0])
            norm = step.kept.norm(dim=(-2, -1)).max().item() if step.kept.ndim > 1 else 0.0
            assert norm <= 1.01 * gain * largest
        E = plan.shape[0] if len(plan.shape) == 3 else 1
        largest = max(largest, g.double().reshape(E, -1).norm(dim=1).max().item())


FEW = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20")),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", CASES)
@FEW
# Squares that are infinite.
@example(plan=Plan((8, 2), 1, torch.bfloat16, "noise", "same", (19, 19), (0.9, 0.95), 0))
@given(plan=plans())
def test_no_gradient_makes_a_nan_or_an_update_above_its_bound(name: str, plan: Plan) -> None:
    check(CASES[name], plan)


def look(name: str, count: int) -> None:
    """Print the largest update over lr, and root-mean-square of one, of each kind of gradients."""
    largest: dict[str, list[float]] = {}

    @settings(FEW, max_examples=count, derandomize=False)
    @given(plan=plans())
    def see(plan: Plan) -> None:
        for step in steps_of(CASES[name], plan):
            if step.low_rank:
                u = step.update.abs()
                entry, rms = largest.setdefault(plan.kind, [0.0, 0.0])
                largest[plan.kind] = [max(entry, u.max().item()), max(rms, u.square().mean().sqrt().item())]

    see()
    for kind, (entry, rms) in sorted(largest.items()):
        print(f"{name:24} {kind:12} {entry:10.3g} {rms:10.3g}", flush=True)


if __name__ == "__main__":
    for case in sys.argv[2:] or CASES:
        look(case, int(sys.argv[1]))
