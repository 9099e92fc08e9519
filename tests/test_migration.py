"""Moments that go from AdamW or Muon to LoRA-Pre and back, or to another rank and variant."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distributed
from cases import (
    ADAM,
    CASES,
    LOW_RANK,
    RANK,
    Case,
    assert_near,
    assert_same,
    assert_unchanged,
    every_case,
    everything,
    parameters,
    state,
    train,
    weights,
)
from lorapre import LoRAPreAdamW, LoRAPreMuon, from_adamw, param_groups, to_adamw
from lorapre.groups import matrix_shape
from reference import rank_one

Optimizer = torch.optim.Optimizer
AdamW, Muon = torch.optim.AdamW, torch.optim.Muon

BOTH = [name for name in ADAM if CASES[name].rank != 0]
both_moments = pytest.mark.parametrize("case", [CASES[name] for name in BOTH], ids=BOTH)


def line(shape: Sequence[int], index: int) -> Tensor:
    """A direction for all gradients of a parameter, of rank one; that of each expert has its own length."""
    generator = torch.Generator().manual_seed(index)
    E, p, q = matrix_shape(shape)
    matrices = torch.randn(E, p, 1, generator=generator) * torch.randn(E, 1, q, generator=generator)
    return matrices.view(tuple(shape))


def descend(
    optimizer: Optimizer,
    params: Sequence[Tensor],
    steps: int,
    *,
    start: int = 0,
    even: bool = False,
) -> list[Tensor]:
    """Steps along one line in each parameter, of changing length and sign, or `even` ones."""
    for step in range(start, start + steps):
        for index, p in enumerate(params):
            size = 1.0 if even else 1.2 + torch.sin(torch.tensor(2.5 * step)).item()
            p.grad = (size * (-1) ** (not even and step % 3 == 0) * line(p.shape, index)).to(p.dtype)
        optimizer.step()
    return weights(params)


def migrated(case: Case, params: Sequence[nn.Parameter], source: Optimizer, **options: Any) -> Any:
    """A copy of the parameters, and the case's optimizer of it with the moments of `source`."""
    others = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = case.make(others, **options)
    from_adamw(optimizer, source.state_dict())
    return optimizer, others


# --- from AdamW


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_the_next_step_is_adamws_where_the_factors_can_hold_the_moments(steps: int) -> None:
    options = {"lr": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.4), "eps": 1e-8}
    params = parameters()
    adamw = AdamW(params, **options)
    before = descend(adamw, params, steps)
    optimizer, others = migrated(CASES["adam-paper"], params, adamw, **options)
    expected = descend(adamw, params, 1, start=steps)
    actual = descend(optimizer, others, 1, start=steps)
    moved = [[x - old for x, old in zip(new, before, strict=True)] for new in (actual, expected)]
    assert_near(*moved, tolerance=1e-5)


def test_split_takes_the_first_moment_and_the_means_of_the_second() -> None:
    params = parameters()
    adamw = AdamW(params, lr=0.01, betas=(0.9, 0.95))
    descend(adamw, params, 4)
    optimizer, others = migrated(CASES["adam-split"], params, adamw)
    for p, other in list(zip(params, others, strict=True))[:LOW_RANK]:
        full, s = adamw.state[p], optimizer.state[other]
        shape = matrix_shape(p.shape)
        m, v = (full[name].view(shape) for name in ("exp_avg", "exp_avg_sq"))
        B, A = s["m_B"].view(-1, shape[1], RANK), s["m_A"].view(-1, RANK, shape[2])
        torch.testing.assert_close(B @ A, m / (1 - 0.9**4), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(s["v_row"].view(shape[0], -1), v.mean(2))
        torch.testing.assert_close(s["v_col"].view(shape[0], -1), v.mean(1))
        assert s["step"] == 4
        # The variant needs orthogonal, equally long columns in B, and A in the gauge.
        lengths = B.square().sum(1)
        torch.testing.assert_close(
            B.mT @ B, torch.diag_embed(lengths), rtol=0, atol=1e-4 * lengths.max().item()
        )
        torch.testing.assert_close(lengths, lengths[:, :1].expand_as(lengths))
        torch.testing.assert_close(A.norm(dim=(1, 2)), torch.full((shape[0],), RANK**0.5))


def test_split_steps_as_adamw_where_all_gradients_are_alike() -> None:
    params = parameters()
    adamw = AdamW(params, lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    before = descend(adamw, params, 3, even=True)
    optimizer, others = migrated(CASES["adam-split"], params, adamw, lr=0.1, weight_decay=0.0)
    expected, actual = (descend(o, ps, 1, even=True) for o, ps in ((adamw, params), (optimizer, others)))
    moved = [[x - old for x, old in zip(new, before, strict=True)] for new in (actual, expected)]
    assert_near(*moved, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dense_weights_take_the_moments_as_they_are(dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    adamw = AdamW(params, lr=0.01, betas=(0.9, 0.95), foreach=False)
    train(adamw, params, 3)
    for case in (CASES["adam-dense"], CASES["muon-dense"]):
        optimizer, others = migrated(case, params, adamw)
        wide = torch.promote_types(dtype, torch.float32)
        for p, other in zip(params, others, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                assert_same(optimizer.state[other][name], adamw.state[p][name].to(wide))
            assert optimizer.state[other]["step"] == 3
        saved = copy.deepcopy(adamw.state_dict())
        train(optimizer, others, 1, start=3)  # which leaves the moments of adamw alone: ours are copies
        assert_same([*saved["state"].values()], [*adamw.state_dict()["state"].values()])


def test_other_betas_leave_the_means_alone() -> None:
    params = parameters([(7,), (12, 20)])
    adamw = AdamW(params, betas=(0.9, 0.999))
    train(adamw, params, 5)
    optimizer, others = migrated(CASES["adam-split"], params, adamw, betas=(0.8, 0.95))
    means = [adamw.state[p]["exp_avg_sq"] / (1 - 0.999**5) for p in params]
    torch.testing.assert_close(optimizer.state[others[0]]["exp_avg_sq"] / (1 - 0.95**5), means[0])
    torch.testing.assert_close(optimizer.state[others[1]]["v_row"] / (1 - 0.95**5), means[1].mean(1))


@every_case
def test_a_noisy_first_moment_is_near_the_best_approximation_of_its_rank(case: Case) -> None:
    p = nn.Parameter(torch.zeros(40, 64))
    adamw = AdamW([p])
    train(adamw, [p], 3)
    optimizer, (other,) = migrated(case, [p], adamw)
    s = optimizer.state[other]
    if "m_B" in s:
        m = adamw.state[p]["exp_avg"]
        direction = s["m_B"] @ s["m_A"]
        cosine = (m * direction).sum() / (m.norm() * direction.norm())
        S = torch.linalg.svdvals(m)
        assert cosine > 0.98 * S[:RANK].norm() / S.norm()


def test_moments_of_zero_leave_factors_that_can_grow() -> None:
    params = parameters()
    adamw = AdamW(params, lr=0.01)
    for p in params:
        p.grad = torch.zeros_like(p)
    adamw.step()
    for name in ADAM:
        optimizer, others = migrated(CASES[name], params, adamw)
        for moment in (x for s in state(optimizer) for key, x in s.items() if key.endswith("_A")):
            assert moment.norm() > 0
        assert all(w.isfinite().all() for w in train(optimizer, others, 3))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("variant", ["subspace", "paper"])
def test_the_next_step_is_muons_where_the_factors_can_hold_the_momentum(variant: str, nesterov: bool) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "nesterov": nesterov}
    params = parameters([(12, 20), (20, 12)])
    muon = Muon(params, **options)
    before = descend(muon, params, 6)
    optimizer, others = migrated(Case(LoRAPreMuon, {"variant": variant}), params, muon, **options)
    expected, actual = (train(o, ps, 1, start=6) for o, ps in ((muon, params), (optimizer, others)))
    for x, y, old in zip(actual, expected, before, strict=True):
        assert (x - y).norm() < 0.03 * (y - old).norm()  # Newton-Schulz runs in bfloat16


def test_muon_goes_on_from_adamw_and_adamw_beside_muon_from_its_own() -> None:
    params = parameters([(12, 20), (7,)])
    adamw, muon = AdamW(params, betas=(0.9, 0.99)), Muon(params[:1])
    descend(adamw, params, 5)
    optimizer, others = migrated(CASES["muon-subspace"], params, adamw, momentum=0.8)
    s = optimizer.state[others[0]]
    mean = adamw.state[params[0]]["exp_avg"] / (1 - 0.9**5)
    torch.testing.assert_close(s["m_B"] @ s["m_A"], mean / (1 - 0.8))
    descend(muon, params[:1], 2)
    beside = AdamW(params[1:], betas=(0.9, 0.95))
    descend(beside, params[1:], 2)
    optimizer = CASES["muon-subspace"].make(params)
    assert from_adamw(optimizer, muon.state_dict(), like=muon) == ["parameter 1 of its group"]
    assert from_adamw(optimizer, beside.state_dict(), like=beside) == ["parameter 0 of its group"]
    s = optimizer.state[params[0]]
    torch.testing.assert_close(s["m_B"] @ s["m_A"], muon.state[params[0]]["momentum_buffer"] / 0.05)
    assert_same(optimizer.state[params[1]]["exp_avg"], beside.state[params[1]]["exp_avg"])


# --- a run


def mean_loss(switch: str, variant: str = "split") -> float:
    """The mean loss of the second half of a small run, in the middle of which the optimizer changes."""
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(256, 24, generator=generator), torch.randn(24, 24, generator=generator) / 5
    noise = 0.3 * torch.randn(256, 24, generator=generator)
    target = torch.sin(x @ W) * torch.linspace(0.1, 1, 24) + noise
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 24))
    adamw = AdamW(model.named_parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer: Optimizer = adamw
    found = []
    for step in range(40):
        if step == 20 and switch != "none":
            ours = LoRAPreAdamW(param_groups(model, rank=8), lr=0.01, variant=variant)
            if switch == "migrated":
                from_adamw(ours, adamw.state_dict())
            optimizer = ours
        batch = torch.randint(256, (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x[batch]) - target[batch]).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            found.append((model(x) - target).square().mean().item())
    return sum(found[20:]) / 20


@pytest.mark.parametrize("variant", ["split", "paper"])
def test_a_switch_in_the_middle_of_a_run_costs_half_of_a_start_anew_at_most(variant: str) -> None:
    kept = mean_loss("none")
    assert mean_loss("migrated", variant) - kept < 0.5 * (mean_loss("anew", variant) - kept)


# --- back, and to another rank


@pytest.mark.parametrize("name", ["adam-split", "adam-dense"])  # "paper" starts with an error
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_adamw_goes_on_with_the_right_bias_correction(name: str, steps: int) -> None:
    """Where all gradients are alike, their mean is the gradient, and every step has the length lr."""
    params = parameters()
    optimizer = CASES[name].make(params, betas=(0.9, 0.95))
    before = descend(optimizer, params, steps, even=True)
    adamw = AdamW(params, lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    unchanged = copy.deepcopy(adamw.state_dict())
    saved = to_adamw(optimizer, adamw)
    assert adamw.state_dict() == unchanged
    adamw.load_state_dict(saved)
    assert all(adamw.state[p]["step"] == steps for p in params)
    moved = [new - old for new, old in zip(descend(adamw, params, 1, even=True), before, strict=True)]
    assert_near(moved, [-0.1 * line(p.shape, index).sign() for index, p in enumerate(params)], 0.005)


@pytest.mark.parametrize("variant", ["split", "paper"])
def test_the_second_moment_in_full_is_that_of_the_variant(variant: str) -> None:
    params = parameters([(12, 20)])
    optimizer = CASES[f"adam-{variant}"].make(params)
    train(optimizer, params, 3)
    s = {name: x.double() for name, x in optimizer.state[params[0]].items()}
    M, k = s["m_B"] @ s["m_A"], 1 - 0.95**3
    expected = {
        "paper": lambda: (s["v_B"] @ s["v_A"]).square(),
        "split": lambda: (
            k * M**2 + rank_one(s["v_row"] - k * (M**2).mean(1), s["v_col"] - k * (M**2).mean(0))
        ),
    }
    full = to_adamw(optimizer, AdamW(params, betas=(0.9, 0.95)))["state"][0]
    torch.testing.assert_close(full["exp_avg_sq"].double(), expected[variant](), rtol=1e-4, atol=1e-6)
    if variant == "paper":
        torch.testing.assert_close(full["exp_avg"].double(), M, rtol=1e-4, atol=1e-6)


@both_moments
def test_moments_come_back_from_adamw_as_they_were(case: Case) -> None:
    params = parameters()
    optimizer = case.make(params)
    (train if case.options.get("variant") == "split" else descend)(optimizer, params, 6)
    adamw = AdamW(params, betas=(0.9, 0.95))
    adamw.load_state_dict(to_adamw(optimizer, adamw))
    back, others = migrated(case, params, adamw)
    assert_near(train(back, others, 1, start=9), train(optimizer, params, 1, start=9), 2e-4)


def test_a_checkpoint_of_another_rank_or_variant_is_carried_over() -> None:
    params = parameters()
    optimizer = CASES["adam-split"].make(params)
    train(optimizer, params, 4)
    wider, others = migrated(CASES["adam-split"], params, optimizer, rank=4)
    narrower, _ = migrated(CASES["adam-split"], params, optimizer, rank=2)
    paper, last = migrated(CASES["adam-paper"], params, optimizer)
    for p, other, x in list(zip(params, others, last, strict=True))[:LOW_RANK]:
        old, new = optimizer.state[p], wider.state[other]
        M = old["m_B"] @ old["m_A"]
        torch.testing.assert_close(new["m_B"] @ new["m_A"], M, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new["v_row"], old["v_row"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(new["v_col"], old["v_col"], rtol=1e-4, atol=1e-6)
        s = paper.state[x]
        torch.testing.assert_close(s["m_B"] @ s["m_A"], M * (1 - 0.9**4), rtol=1e-4, atol=1e-5)
    for other, own in ((wider, 4), (narrower, 2)):
        assert {s["m_A"].shape[-2] for s in state(other) if "m_A" in s} == {own}
    assert all(w.isfinite().all() for w in train(paper, last, 3))


def test_rank_0_takes_no_first_moment_and_has_none_to_give() -> None:
    params = parameters([(12, 20), (3, 10, 14), (7,)])
    adamw = AdamW(params, betas=(0.9, 0.95))
    train(adamw, params, 3)
    optimizer, others = migrated(CASES["adam-rank-0"], params, adamw)
    back, _ = migrated(CASES["adam-rank-0"], params, optimizer)
    for p, other in zip(params[:2], others, strict=False):
        v, own = adamw.state[p]["exp_avg_sq"], optimizer.state[other]
        assert_near(list(own.values()), [torch.tensor(3.0), v.mean(-1), v.mean(-2)])
        assert set(own) == {"step", "v_row", "v_col"}
    for own, same in zip(state(back), state(optimizer), strict=True):
        assert_near(list(own.values()), list(same.values()))
    muon, _ = migrated(CASES["muon-rank-0"], params, adamw)
    assert [set(own) for own in state(muon)[:2]] == [{"step"}] * 2
    needs = "parameter 0 of its group needs a first moment, of which rank 0 keeps none"
    for source, case in ((optimizer, "adam-split"), (optimizer, "adam-dense"), (muon, "muon-subspace")):
        with pytest.raises(ValueError, match=needs):
            migrated(CASES[case], params, source)
    for source, theirs in ((optimizer, AdamW(others)), (muon, Muon(muon.param_groups[0]["params"][:1]))):
        with pytest.raises(ValueError, match=needs):
            to_adamw(source, theirs)


def test_muon_takes_the_momentum_back_and_another_rank() -> None:
    params = parameters([(12, 20)])
    optimizer = CASES["muon-subspace"].make(params, momentum=0.9)
    train(optimizer, params, 5)
    s = optimizer.state[params[0]]
    muon = Muon(params, momentum=0.9)
    muon.load_state_dict(to_adamw(optimizer, muon))
    assert set(muon.state[params[0]]) == {"momentum_buffer"}
    torch.testing.assert_close(muon.state[params[0]]["momentum_buffer"], s["m_B"] @ s["m_A"] * 0.1)
    other, others = migrated(CASES["muon-subspace"], params, optimizer, rank=4, momentum=0.9)
    new = other.state[others[0]]
    torch.testing.assert_close(new["m_B"] @ new["m_A"], s["m_B"] @ s["m_A"], rtol=1e-4, atol=1e-4)


@every_case
def test_a_weight_that_has_skipped_every_step_has_moments_of_zero(case: Case) -> None:
    params = parameters()
    optimizer = case.make(params, nonfinite="skip")
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    other, others = migrated(case, params, optimizer, rank=case.rank and 2)
    assert all(x.isfinite().all() for s in state(other) for x in s.values())
    assert all(w.isfinite().all() for w in train(other, others, 2))


# --- whose moments


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 24), nn.Linear(24, 16))


def learn(optimizer: Optimizer, net: nn.Module, steps: int = 2) -> None:
    for step in range(steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def assert_moments_of(optimizer: Optimizer, net: nn.Module, adamw: Optimizer) -> None:
    for p in net.parameters():
        if p.ndim < 2:
            assert_same(optimizer.state[p]["exp_avg"], adamw.state[p]["exp_avg"])
        else:
            torch.testing.assert_close(optimizer.state[p]["v_row"], adamw.state[p]["exp_avg_sq"].mean(1))


@pytest.mark.parametrize("kind", ["names", "names in other groups", "keys", "like", "order"])
def test_moments_find_their_parameter(kind: str) -> None:
    net = model()
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95)}
    groups: Any = net.named_parameters() if kind == "names" else net.parameters()
    if kind == "order":
        groups = [{k: v for k, v in group.items() if k != "rank"} for group in param_groups(net, rank=4)]
        groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    if kind == "names in other groups":
        named = list(net.named_parameters())[::-1]
        groups = [{"params": named[:3]}, {"params": named[3:]}]
    adamw = AdamW(groups, **options)
    learn(adamw, net)
    saved = get_optimizer_state_dict(net, adamw) if kind == "keys" else adamw.state_dict()
    optimizer = LoRAPreAdamW(param_groups(net, rank=4))
    from_adamw(optimizer, saved, AdamW(net.parameters()) if kind == "like" else None)
    assert_moments_of(optimizer, net, adamw)
    learn(optimizer, net)


def test_an_optimizer_goes_on_with_options_and_extra_state_of_its_own() -> None:
    params = parameters([(12, 20), (7,)])
    adamw = AdamW([{"params": params, "rank": 7}], lr=0.5)  # torch keeps foreign options
    train(adamw, params, 2)
    optimizer = CASES["adam-split"].make(params, lr=0.01)
    optimizer.state[params[0]]["slow"] = torch.ones(2)
    before = optimizer.state_dict()["param_groups"]
    from_adamw(optimizer, adamw.state_dict())
    after = optimizer.state_dict()["param_groups"]
    assert before[0].items() <= after[0].items()
    assert_same(optimizer.state[params[0]]["slow"], torch.ones(2))
    optimizer.param_groups[0]["rank"] = 2
    with pytest.raises(RuntimeError, match="its options now ask for Adam"):
        train(optimizer, params, 1)


def test_parameters_without_a_saved_state_keep_theirs() -> None:
    params = parameters([(12, 20), (12, 20)])
    adamw, optimizer = AdamW(params), CASES["adam-split"].make(params)
    train(adamw, params[:1], 2)
    params[0].grad = None
    train(optimizer, [nn.Parameter(torch.zeros(0)), params[1]], 3)
    kept = copy.deepcopy(optimizer.state[params[1]])
    from_adamw(optimizer, adamw.state_dict())
    assert optimizer.state[params[0]]["step"] == 2
    assert_same(optimizer.state[params[1]], kept)


# --- errors


def refused(optimizer: Any, saved: dict[str, Any], message: str, like: Any = None) -> None:
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        from_adamw(optimizer, saved, like)
    assert_unchanged(optimizer, before)


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing() -> None:
    net = model()
    adamw = AdamW(net.named_parameters(), lr=0.01)
    learn(adamw, net)
    optimizer = LoRAPreAdamW(param_groups(net, rank=4))
    learn(optimizer, net, 1)
    saved = adamw.state_dict()

    def spoiled(key: int, **entries: Any) -> dict[str, Any]:
        state = {k: v for k, v in {**saved["state"][key], **entries}.items() if v is not None}
        return {**saved, "state": {**saved["state"], key: state}}

    refused(optimizer, spoiled(4, exp_avg=torch.ones(3, 3)), r"parameter '2.weight' of shape \(24, 24\)")
    refused(optimizer, spoiled(4, exp_avg_sq=None), "parameter '2.weight' of shape")
    refused(optimizer, spoiled(4, step=None), "parameter '2.weight' of shape")
    from_adamw(optimizer, spoiled(4, step=2))  # torch 1 saved a plain number
    others = nn.Sequential(nn.Linear(16, 24), nn.Linear(16, 24))
    foreign = AdamW([("1.bias", others[1].bias), ("other.weight", others[0].weight)])
    for p in others.parameters():
        p.grad = torch.ones_like(p)
    foreign.step()
    refused(optimizer, foreign.state_dict(), "'other.weight', which is no parameter here")
    nameless = AdamW(net.parameters(), lr=0.01)
    learn(nameless, net)
    refused(optimizer, nameless.state_dict(), r"no names, and groups of \[8\] parameters instead of .*like=")
    refused(
        optimizer, foreign.state_dict(), r"like has a parameter of \(24,\) that optimizer lacks", like=foreign
    )
    momentum = torch.optim.SGD(net.named_parameters(), lr=0.01, momentum=0.9)
    learn(momentum, net)
    refused(optimizer, momentum.state_dict(), "does not fit parameter '0.weight'")


def test_an_argument_of_another_kind_is_refused_by_name() -> None:
    params = parameters([(6, 10)])
    ours, adamw = LoRAPreAdamW(params, rank=2), AdamW(params)
    before = everything(ours)
    with pytest.raises(TypeError, match="optimizer must be a LoRAPreAdamW or LoRAPreMuon itself, got AdamW"):
        from_adamw(adamw, adamw.state_dict())  # type: ignore[arg-type]
    for wrong in ([], {}, {"model": {}}, adamw):
        with pytest.raises(ValueError, match="state_dict must be an optimizer's, with the keys state"):
            from_adamw(ours, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be a LoRAPreAdamW or LoRAPreMuon itself, got AdamW"):
        to_adamw(adamw, adamw)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"adamw must be a .*AdamW or .*Muon, got SGD"):
        to_adamw(ours, torch.optim.SGD(params))
    assert_unchanged(ours, before)


def test_muons_have_no_second_moment() -> None:
    params = [("a", nn.Parameter(torch.zeros(12, 20))), ("b", nn.Parameter(torch.zeros(4, 5)))]
    matrices = [p for _, p in params]
    muon = Muon(params)
    train(muon, matrices, 2)
    refused(CASES["adam-split"].make(params), muon.state_dict(), "parameter 'a' needs a second moment, of")
    refused(CASES["muon-subspace"].make(params), muon.state_dict(), "parameter 'b' needs a second moment, of")
    optimizer = CASES["muon-subspace"].make(params)
    train(optimizer, matrices, 2)
    with pytest.raises(ValueError, match="parameter 'a' needs a second moment, of"):
        to_adamw(optimizer, AdamW(params))
    with pytest.raises(ValueError, match="adamw has parameter 'c', which optimizer lacks"):
        to_adamw(optimizer, AdamW([("c", nn.Parameter(torch.zeros(2)))]))


# --- several processes


def check_sharded() -> None:
    def made(shard: bool) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        net = model()
        if shard:
            fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        return net, AdamW(net.named_parameters(), lr=0.01, betas=(0.9, 0.95))

    def full(x: Any) -> Tensor:
        return x.full_tensor() if hasattr(x, "full_tensor") else x

    found = []
    for shard in (False, True):
        net, adamw = made(shard)
        learn(adamw, net)
        optimizer = LoRAPreAdamW(param_groups(net, rank=4), lr=0.01)
        from_adamw(optimizer, adamw.state_dict())
        learn(optimizer, net)
        back = AdamW(net.named_parameters(), lr=0.01)
        back.load_state_dict(to_adamw(optimizer, back))
        if shard:
            assert all(back.state[p]["exp_avg"].placements == p.placements for p in net.parameters())
        learn(back, net, 1)
        found.append([full(p.detach()) for p in net.parameters()])
    assert_near(*found, tolerance=1e-5)


def test_sharded_moments_are_carried_over() -> None:
    distributed.run(check_sharded, 2)
