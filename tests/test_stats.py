"""`stats` and the columns of `coverage` that tell what recent steps did, against the float64 reference."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from cases import CASES, RANK, gradient, parameters, set_gradients, train
from distributed import run
from lorapre import LoRAPreAdamW, LoRAPreMuon, coverage, gradient_release
from lorapre.variants import gaussian
from reference import AdamReference, MuonReference, damped_solve, first_A, relative_damping

KNOWN = ["adam-paper", "adam-split", "muon-paper", "muon-subspace"]
UNKNOWN = ["adam-dense", "muon-dense"]
STEPS = 6

Reference = AdamReference | MuonReference


def references(name: str, weight: Tensor) -> list[Reference]:
    """A reference for each matrix of a weight, with the same start as the optimizer."""
    case, (p, q) = CASES[name], weight.shape[-2:]
    cls = MuonReference if case.cls is LoRAPreMuon else AdamReference
    options = {"variant": case.make([nn.Parameter(weight)]).param_groups[0]["variant"], **case.options}
    found: list[Reference] = []
    for w in weight.view(-1, p, q):
        m, v = (first_A(options["variant"], gaussian(RANK, q, seed=i)) for i in range(2))
        starts = (m,) if cls is MuonReference else (m, v)
        found.append(cls(w, *starts, lr=0.01, weight_decay=0.1, **options))  # type: ignore[arg-type]
    return found


def sums(r: Reference, g: Tensor) -> Tensor:
    """Take a step along g; return ||g W^T||**2, ||g||**2, ||m||**2 and the sum of v in it."""
    A, g = r.m_A, g.double()
    damping = 1e-6 if r.variant == "paper" else relative_damping(A @ A.T)
    held = ((g @ A.T) * damped_solve(A @ A.T, A @ g.T, damping).T).sum()
    r.step(g)
    zero = torch.zeros((), dtype=torch.float64)
    m, v = zero, zero
    if isinstance(r, AdamReference) and r.variant == "split":
        m, v = r.m_hat.square().sum(), r.v_row.sum() * g.shape[1] / (1 - r.betas[1] ** r.t)
    return torch.stack([held, g.square().sum(), m, v])


@pytest.mark.parametrize("name", KNOWN)
def test_numbers_are_those_of_the_reference(name: str) -> None:
    """They are averages of sums over the experts of a weight; a step counts 0.95 of the next one."""
    params = parameters([(12, 20), (3, 10, 14)])
    optimizer = CASES[name].make(params)
    every = [references(name, p.detach().clone()) for p in params]
    recent = torch.zeros(2, 4, dtype=torch.float64)
    for step in range(STEPS):
        train(optimizer, params, 1, start=step)
        for i, (p, own) in enumerate(zip(params, every, strict=True)):
            g = gradient(p.shape, step, i).view(-1, *p.shape[-2:])
            recent[i] = 0.95 * recent[i] + 0.05 * sum(sums(r, x) for r, x in zip(own, g, strict=True))
    captured, update = recent[:, 0] / recent[:, 1], (recent[:, 2] / recent[:, 3]).sqrt()
    assert [row.captured for row in coverage(optimizer)] == pytest.approx(captured.tolist(), rel=1e-4)
    expected = {"captured_min": captured.min(), "captured_mean": captured.mean()}
    if name == "adam-split":
        assert [row.update for row in coverage(optimizer)] == pytest.approx(update.tolist(), rel=1e-4)
        expected |= {"update_max": update.max(), "update_mean": update.mean()}
    stats = {k: float(x) for k, x in optimizer.stats().items()}
    assert stats == pytest.approx({k: float(x) for k, x in expected.items()}, rel=1e-4)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_factors_of_the_momentum_has_no_numbers(name: str) -> None:
    params = parameters()
    optimizer = CASES[name].make(params)
    train(optimizer, params, 2)
    assert optimizer.stats() == {}
    assert all(row.captured is None and row.update is None for row in coverage(optimizer))


def test_a_gradient_of_low_rank_is_captured_and_noise_is_not() -> None:
    """The rows of A find the signal after some steps. Of noise they hold about rank / columns."""
    p, noisy = parameters([(40, 60), (40, 60)])
    optimizer = CASES["adam-split"].make([p, noisy])
    signal = torch.randn(40, 2) @ torch.randn(2, 60)
    for _ in range(60):
        p.grad, noisy.grad = signal.clone(), torch.randn(40, 60)
        optimizer.step()
    low, high = sorted(row.captured or 0 for row in coverage(optimizer))
    assert high > 0.98
    assert RANK / 60 / 2 < low < 3 * RANK / 60
    assert f"Factors capture {low:.0%} to {high:.0%} of a gradient's energy." in str(coverage(optimizer))


def test_the_update_is_near_its_rms() -> None:
    """`update_max` is sqrt(mean m**2 / mean v); the RMS is sqrt(mean (m**2 / v))."""
    (p,) = parameters([(40, 60)])
    optimizer = LoRAPreAdamW([p], lr=0.01, rank=4)
    for step in range(40):
        before = p.detach().clone()
        p.grad = gradient((40, 60), step, 0)
        optimizer.step()
    rms = (p.detach() - before).square().mean().sqrt().item() / 0.01
    assert float(optimizer.stats()["update_max"]) == pytest.approx(rms, rel=0.1)


@pytest.mark.parametrize("name", ["adam-split", "muon-subspace"])
def test_steps_without_a_gradient_or_a_finite_one_do_not_count(name: str) -> None:
    params = parameters([(12, 20), (10, 14)])
    optimizer = CASES[name].make(params, nonfinite="skip")
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.stats()["captured_min"].isnan()
    assert [row.captured for row in coverage(optimizer)] == [None, None]
    params[0].grad = gradient((12, 20), 0, 0)
    optimizer.step()  # the second weight has had no gradient but zero
    before = {k: float(x) for k, x in optimizer.stats().items()}
    assert 0 < before["captured_min"] == before["captured_mean"] < 1
    for bad in (math.nan, math.inf):
        params[0].grad = torch.full((12, 20), bad)
        optimizer.step()
    assert {k: float(x) for k, x in optimizer.stats().items()} == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("name", ["adam-split", "muon-subspace"])
def test_numbers_are_no_state_and_come_back_after_a_copy_takes_a_step(name: str) -> None:
    params = parameters()
    optimizer = CASES[name].make(params)
    train(optimizer, params, 2)
    saved = optimizer.state_dict()
    assert not {"recent", "stats", "captured"} & {key for own in saved["state"].values() for key in own}
    clone = copy.deepcopy(optimizer)
    assert clone.stats() == {}
    set_gradients([p for group in clone.param_groups for p in group["params"]], 2)
    clone.step()
    assert clone.stats().keys() == optimizer.stats().keys()
    optimizer.load_state_dict(saved)
    assert optimizer.stats() == {}  # they belong to another run


@pytest.mark.parametrize("name", ["adam-split", "muon-subspace"])
def test_released_gradients_give_the_same_numbers(name: str) -> None:
    found = []
    for release in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 20))
        optimizer = CASES[name].make(model.parameters())
        if release:
            gradient_release(model, optimizer)
        for step in range(4):
            model(gradient((8, 20), step, 0)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append({k: float(x) for k, x in optimizer.stats().items()})
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def check_sharded() -> None:
    """Every process reports the numbers of a single process."""
    shapes = [(13, 21), (13, 21), (3, 10, 14), (2, 9)]
    mesh = init_device_mesh("cpu", (2, 2))
    layouts = [(Replicate(), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Shard(1))]
    for name in ("adam-split", "muon-subspace"):
        one = numbers(name, shapes, torch.clone)
        for layout in layouts:
            many = numbers(name, shapes, lambda x, layout=layout: distribute_tensor(x, mesh, layout))
            torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-6)
            all_numbers = [torch.empty_like(many) for _ in range(dist.get_world_size())]
            dist.all_gather(all_numbers, many)
            assert all(torch.equal(x, many) for x in all_numbers)


def numbers(name: str, shapes: list[tuple[int, ...]], place: Callable[[Tensor], Tensor]) -> Tensor:
    params = [nn.Parameter(place(p.detach())) for p in parameters(shapes)]
    optimizer = CASES[name].make(params, rank=1)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = place(gradient(p.shape, step, i))
        optimizer.step()
    assert coverage(optimizer).rows[0].captured is not None
    return torch.stack(list(optimizer.stats().values()))


def test_every_process_has_the_numbers_of_the_whole() -> None:
    run(check_sharded, 4)
