"""Options, their errors, and which rule each parameter gets."""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from cases import (
    CASES,
    FACTORISED,
    LOW_RANK,
    Case,
    assert_near,
    assert_same,
    assert_unchanged,
    everything,
    gradient,
    parameters,
    set_gradients,
    train,
    weights,
)
from lorapre import LoRAPreAdamW, LoRAPreMuon, coverage, param_groups
from lorapre.groups import OPTIONS

Class = type[LoRAPreAdamW] | type[LoRAPreMuon]

BOTH: dict[str, list[Any]] = {
    "lr": [-0.1, math.nan, torch.tensor(-0.1), torch.tensor([0.1, 0.1]), "1e-3", None],
    "weight_decay": [-0.1, math.nan, "0.1", None],
    "eps": [-1e-8, math.nan, None],
    "rank": [-1, 1.5, 8.0, True, "8"],
    "variant": ["adamw", "Paper", None, 1],
    "nonfinite": ["ignore", None, True],
    "seed": [-1, 2**62, 0.5, True, None],
}
BAD: dict[Class, dict[str, list[Any]]] = {
    LoRAPreAdamW: BOTH
    | {
        "betas": [
            (1.0, 0.95),
            (0.9, 1.0),
            (-0.1, 0.95),
            (0.9, math.nan),
            (0.9,),
            (0.9, 0.95, 0.99),
            0.9,
            "ab",
        ],
        "scale": [-0.25, math.nan, None],
    },
    LoRAPreMuon: BOTH
    | {
        "momentum": [1.0, -0.1, math.nan, None],
        "ns_steps": [0, 100, 2.5, True, None],
        "ns_coefficients": [(1.0, 2.0), 1.0, None, ("a", "b", "c")],
        "adjust_lr_fn": ["rms", True],
        "nesterov": ["yes", "False", 2],
        "adamw_lr": [-1e-3, math.nan, "1e-3"],
        "adamw_betas": [(1.0, 0.95), (0.9, 1.0), (0.9,), 0.9],
        "adamw_eps": [-1e-8, math.nan, None],
        "adamw_weight_decay": [-0.1, math.nan],
    },
}
for bad in BAD.values():
    bad["stochastic_rounding"] = ["yes", None]
    bad["momentum_dtype"] = ["bf16", "float16", torch.bfloat16, None]
bad_options = pytest.mark.parametrize(
    ("cls", "name", "value"),
    [(cls, name, value) for cls, bad in BAD.items() for name, values in bad.items() for value in values],
)
both_classes = pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon])


# --- options


@bad_options
def test_the_constructor_refuses_an_option_out_of_range_and_names_it(
    cls: Class, name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*, but is"):
        cls(parameters(), **{name: value})


class Configured(Sequence[Any]):
    """A sequence of a configuration library, neither list nor tuple."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: Any) -> Any:
        return self.values[i]


@both_classes
@pytest.mark.parametrize("own", [False, True], ids=["constructor", "group"])
def test_numbers_and_lists_of_other_libraries_become_plain_ones(cls: Class, own: bool) -> None:
    numpy = pytest.importorskip("numpy")
    betas = "betas" if cls is LoRAPreAdamW else "adamw_betas"
    pair = Configured(numpy.array([0.8, 0.9]))
    given = {"rank": numpy.int64(3), "seed": numpy.uint32(5), betas: pair}
    params = parameters()
    optimizer = cls([{"params": params, **given}]) if own else cls(params, **given)
    (group,) = optimizer.param_groups
    found = [group["rank"], group["seed"], group[betas], *group[betas]]
    assert found == [3, 5, (0.8, 0.9), 0.8, 0.9]
    assert [type(x) for x in found] == [int, int, tuple, float, float]
    rules = [("weight", numpy.int64(2))]
    groups = param_groups(nn.Linear(20, 12), rank=numpy.int64(3), rules=rules)
    assert type(cls(groups).param_groups[0]["rank"]) is int


def test_rules_know_every_option() -> None:
    taken = {"flatten", *inspect.signature(LoRAPreAdamW).parameters}
    taken |= inspect.signature(LoRAPreMuon).parameters.keys()
    assert taken - {"params"} == OPTIONS


@bad_options
def test_a_new_group_with_an_option_out_of_range_is_refused_and_changes_nothing(
    cls: Class, name: str, value: Any
) -> None:
    params = parameters()
    optimizer = cls(params[:4], rank=3)
    train(optimizer, params[:4], 1)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=rf"^{name} must be .*, but is"):
        optimizer.add_param_group({"params": params[4:], name: value})
    assert len(optimizer.param_groups) == 1
    assert_unchanged(optimizer, before)


def test_muons_defaults_are_torchs_but_the_paper_has_no_nesterov() -> None:
    matrices = [p for p in parameters() if p.ndim == 2]
    ours, theirs = (cls(matrices).param_groups[0] for cls in (LoRAPreMuon, torch.optim.Muon))
    shared = (ours.keys() & theirs.keys()) - {"params", "nesterov"}
    assert {"lr", "momentum", "weight_decay", "ns_steps"} <= shared
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    for variant in ("subspace", "paper"):
        trained = []
        for nesterov in (None, variant != "paper", variant == "paper"):
            params = parameters()
            trained.append(train(LoRAPreMuon(params, rank=3, variant=variant, nesterov=nesterov), params, 2))
        assert_same(trained[0], trained[1])
        assert any(not torch.equal(x, y) for x, y in zip(trained[0], trained[2], strict=True))
    assert theirs["nesterov"]


@both_classes
def test_every_option_that_the_constructor_takes_is_checked_or_a_flag(cls: Class) -> None:
    options = inspect.signature(cls).parameters.keys()
    assert options - {"params"} == BAD[cls].keys() | {"maximize"}


@both_classes
@pytest.mark.parametrize(
    "p",
    [
        torch.zeros(4, 4, dtype=torch.complex64),
        torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
        torch.zeros(4, 4, dtype=torch.int64),
        torch.zeros(4, 4).to_sparse(),
    ],
    ids=["complex", "float8", "integer", "sparse"],
)
def test_parameters_that_are_not_dense_and_real_are_refused_by_name(cls: Class, p: Tensor) -> None:
    good = parameters([(4, 4)])
    with pytest.raises(ValueError, match="params must be dense"):
        cls([*good, p])
    optimizer = cls([("good", good[0])])
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"params must be dense.*'odd'"):
        optimizer.add_param_group({"params": [("odd", p)]})
    assert len(optimizer.param_groups) == 1
    assert_unchanged(optimizer, before)


@both_classes
def test_parameters_come_as_a_tensor_a_list_or_a_generator_but_not_as_a_set(cls: Class) -> None:
    (p,) = parameters([(12, 20)])
    for params in (p, [p], iter([p]), iter([("weight", p)])):
        (group,) = cls([{"params": params}]).param_groups
        assert len(group["params"]) == 1
        assert group["params"][0] is p
    with pytest.raises(TypeError, match="set"):
        cls([{"params": {p}}])


@both_classes
def test_mistakes_in_params_are_refused_as_by_any_optimizer(cls: Class) -> None:
    p, q, r = parameters([(4, 4)] * 3)
    with pytest.raises(ValueError, match="empty"):
        cls([])
    with pytest.raises(TypeError, match="Tensor"):
        cls([p, "weight"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="leaf"):
        cls([p * 2])
    with pytest.raises(ValueError, match="more than one"):
        cls([{"params": [p]}, {"params": [q, p]}])
    with pytest.warns(UserWarning, match="duplicate"):
        cls([p, p])
    optimizer = cls([("p", p)])
    with pytest.raises(ValueError, match="names"):
        optimizer.add_param_group({"params": [("q", q), r]})


@both_classes
def test_a_group_given_by_the_user_is_not_modified(cls: Class) -> None:
    params = parameters()
    group = {"params": params, "lr": 0.5}
    cls([group])
    assert group == {"params": params, "lr": 0.5}


class Pair(Sequence[float]):
    """As OmegaConf's ListConfig: a sequence, neither list nor tuple."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        return (0.8, 0.9)[index]


def test_a_group_takes_a_pair_of_any_type_and_the_largest_seed() -> None:
    optimizer = LoRAPreAdamW([{"params": parameters(), "betas": Pair(), "seed": 2**62 - 1}])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["seed"] == 2**62 - 1


def test_the_defaults_are_those_of_the_paper_and_of_torch() -> None:
    adam, muon = LoRAPreAdamW(parameters()).defaults, LoRAPreMuon(parameters()).defaults
    assert adam["betas"] == (0.9, 0.95)
    assert (adam["variant"], muon["variant"]) == ("split", "subspace")
    assert adam["rank"] == muon["rank"] == 128
    theirs = inspect.signature(torch.optim.Muon).parameters
    for name in ("lr", "weight_decay", "momentum", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"):
        assert muon[name] == theirs[name].default


@pytest.mark.parametrize("name", FACTORISED)
def test_hooks_around_a_step_run(name: str) -> None:
    params = parameters()
    optimizer = CASES[name].make(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, params, 1)
    assert calls == ["before", "after"]


# --- dense weights take AdamW


def adamw_pair(dtype: torch.dtype) -> tuple[list[nn.Parameter], list[nn.Parameter], torch.optim.AdamW]:
    """Two equal lists of weights, and a torch.optim.AdamW of the second."""
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    reference = torch.optim.AdamW(
        theirs, lr=0.02, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3, maximize=True, foreach=False
    )
    return ours, theirs, reference


DENSE: dict[str, tuple[Class, dict[str, Any]]] = {
    "adam": (LoRAPreAdamW, {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}),
    "adam-ignores-scale": (
        LoRAPreAdamW,
        {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3, "scale": 0.25},
    ),
    "muon": (LoRAPreMuon, {"lr": 0.02, "adamw_betas": (0.8, 0.9), "adamw_eps": 1e-3, "weight_decay": 0.3}),
    "muon-own": (
        LoRAPreMuon,
        {
            "lr": 0.5,
            "adamw_lr": 0.02,
            "adamw_betas": (0.8, 0.9),
            "adamw_eps": 1e-3,
            "weight_decay": 0.7,
            "adamw_weight_decay": 0.3,
        },
    ),
}


@pytest.mark.parametrize(("cls", "options"), DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("rank", [None, 10**6], ids=["rank-none", "rank-too-large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dense_weights_are_stepped_as_torch_adamw_does(
    cls: Class, options: dict[str, Any], rank: int | None, dtype: torch.dtype
) -> None:
    ours, theirs, reference = adamw_pair(dtype)
    optimizer = cls(ours, **options, rank=rank, maximize=True)
    for step in range(10):
        train(optimizer, ours, 1, start=step)
        train(reference, theirs, 1, start=step)
    assert_near(weights(ours), weights(theirs), 1e-6 if dtype == torch.float32 else 1e-13)


def test_dense_weights_in_a_factorised_group_of_muon_keep_their_share_of_a_scheduled_lr() -> None:
    ours, alone = parameters([(12, 20), (7,)]), parameters([(12, 20), (7,)])
    optimizer = LoRAPreMuon(ours, lr=0.1, adamw_lr=0.01, rank=3)
    reference = torch.optim.AdamW([alone[1]], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        reference.param_groups[0]["lr"] = 0.01 / (1 + step)
        set_gradients(ours, step)
        set_gradients(alone, step)
        optimizer.step()
        reference.step()
    assert_near(weights(ours[1:]), weights(alone[1:]), 1e-6)


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one-cycle": lambda x: lr_scheduler.OneCycleLR(x, max_lr=_rates(x), total_steps=9),
    "cyclic": lambda x: lr_scheduler.CyclicLR(x, [lr / 9 for lr in _rates(x)], _rates(x), step_size_up=3),
    "cosine": lambda x: lr_scheduler.CosineAnnealingLR(x, 8),
    "warm-up-from-zero": lambda x: lr_scheduler.LambdaLR(x, lambda step: min(step, 4) / 4),
    "plateau": lambda x: lr_scheduler.ReduceLROnPlateau(x, factor=0.5, patience=0),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_both_routes_of_muon_keep_their_ratio_under_a_scheduler_and_when_resumed(schedule: str) -> None:
    """Equal vectors, one in a dense group and one in a factorised group, are stepped alike."""

    def make() -> tuple[list[nn.Parameter], LoRAPreMuon, Any]:
        params = parameters([(12, 20), (7,), (7,)])
        params[2].data = params[1].detach().clone()
        groups: list[dict[str, Any]] = [
            {"params": params[:2], "rank": 3},
            {"params": params[2:], "rank": None},
        ]
        optimizer = LoRAPreMuon(groups, lr=0.1, adamw_lr=0.01)
        return params, optimizer, SCHEDULES[schedule](optimizer)

    def step(params: list[nn.Parameter], optimizer: LoRAPreMuon, scheduler: Any, number: int) -> None:
        set_gradients(params, number)
        params[2].grad = params[1].grad
        optimizer.step()
        scheduler.step(*[1.0] * (schedule == "plateau"))

    params, optimizer, scheduler = make()
    alone = parameters([(12, 20), (7,)])[1]
    reference = torch.optim.AdamW([alone], betas=(0.9, 0.95), weight_decay=0.1)
    seen = set()
    for number in range(8):
        if number in (1, 5):  # at a rate of zero, or in the middle
            saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            before, (params, optimizer, scheduler) = params, make()
            for p, q in zip(params, before, strict=True):
                p.data = q.detach().clone()
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        matrices, dense = _rates(optimizer)
        assert dense == pytest.approx(matrices / 10)
        seen.add(matrices)
        reference.param_groups[0]["lr"] = matrices / 10
        alone.grad = gradient((7,), number, 1)
        reference.step()
        step(params, optimizer, scheduler, number)
        assert_near([params[1].detach(), params[2].detach()], [alone.detach()] * 2, 1e-6)
    assert len(seen) > 3
    assert {group["adamw_betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}


def test_one_rate_for_all_groups_is_that_of_a_dense_group_of_muon_too() -> None:
    """A scheduler that sets rates instead of multiplying them knows nothing of the routes."""
    p, q = parameters([(12, 20), (7,)])
    groups: list[dict[str, Any]] = [{"params": [p], "rank": 3}, {"params": [q], "rank": None}]
    optimizer = LoRAPreMuon(groups, lr=0.1, adamw_lr=0.01)
    lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=9)
    assert _rates(optimizer) == pytest.approx([0.2 / 25] * 2)


def test_a_dense_group_of_muon_takes_the_options_of_adamw_unless_it_names_its_own() -> None:
    p, q, r = parameters([(4, 4)] * 3)
    groups: list[dict[str, Any]] = [
        {"params": [p], "rank": None},
        {"params": [q], "rank": None, "lr": 0.3, "weight_decay": 0.0},
        {"params": [r]},
    ]
    optimizer = LoRAPreMuon(groups, lr=0.1, weight_decay=0.2, adamw_lr=0.01, adamw_weight_decay=0.05)
    optimizer.add_param_group({"params": parameters([(5,)]), "rank": None})
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.3, 0.1, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0, 0.2, 0.05]


def test_a_dense_group_of_muon_without_weight_decay_has_none() -> None:
    (p,) = parameters([(4, 4)])
    group: dict[str, Any] = {"params": [p], "rank": None, "weight_decay": 0.0}
    optimizer = LoRAPreMuon([group], weight_decay=0.2, adamw_weight_decay=0.5)
    initial = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same(p.detach(), initial)


def test_muon_refuses_a_ratio_to_a_zero_learning_rate() -> None:
    with pytest.raises(ValueError, match=r"^lr must be above 0 where adamw_lr is given"):
        LoRAPreMuon(parameters(), lr=0.0, adamw_lr=0.01)


# --- factorised weights


@pytest.mark.parametrize("name", [name for name in FACTORISED if name.startswith("adam")])
def test_scale_multiplies_the_update_of_factorised_weights_but_not_their_decay(name: str) -> None:
    full, quarter = parameters([(12, 20), (7,)]), parameters([(12, 20), (7,)])
    initial = weights(full)
    train(CASES[name].make(full), full, 1)
    train(CASES[name].make(quarter, scale=0.25), quarter, 1)
    decayed = initial[0] * (1 - 0.01 * 0.1)
    assert_near([quarter[0].detach() - decayed], [0.25 * (full[0].detach() - decayed)], 1e-6)
    assert_same(quarter[1], full[1])


@pytest.mark.parametrize("shape", [(24, 12), (12, 24)], ids=str)
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_first_step_of_muon_is_that_of_torch(
    shape: tuple[int, int], adjust: str | None, nesterov: bool
) -> None:
    # Both start without momentum. torch multiplies the first gradient by 1 - momentum, but Newton-Schulz
    # does not depend on its size.
    ours, theirs = parameters([shape]), parameters([shape])
    options = {"lr": 0.1, "weight_decay": 0.3, "nesterov": nesterov, "adjust_lr_fn": adjust}
    optimizer = LoRAPreMuon(ours, rank=3, **options)  # type: ignore[arg-type]
    reference = torch.optim.Muon(theirs, **options)  # type: ignore[arg-type]
    initial = ours[0].detach().clone()
    train(optimizer, ours, 1)
    train(reference, theirs, 1)
    difference = (ours[0] - theirs[0]).norm() / (theirs[0] - initial).norm()
    assert difference < 0.02  # both iterate in bfloat16
    factor = 0.2 * 24**0.5 if adjust == "match_rms_adamw" else max(1.0, shape[0] / shape[1]) ** 0.5
    update = ours[0].detach() - initial * (1 - 0.1 * 0.3)
    assert update.norm() == pytest.approx(0.1 * factor * 12**0.5, rel=0.2)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"m_B", "m_A", "v_row", "v_col"}),
        ({"variant": "paper"}, {"m_B", "m_A", "v_B", "v_A"}),
        ({"rank": None}, {"exp_avg", "exp_avg_sq"}),
    ],
)
def test_variant_and_rank_say_how_the_moments_are_kept(options: dict[str, Any], names: set[str]) -> None:
    params = parameters([(12, 20)])
    optimizer = LoRAPreAdamW(params, **{"rank": 3, **options})
    train(optimizer, params, 1)
    assert optimizer.state[params[0]].keys() == names | {"step"}


@pytest.mark.parametrize("name", FACTORISED)
def test_coverage_reports_the_route_that_each_weight_took(name: str) -> None:
    params = parameters()
    optimizer = CASES[name].make(params)
    planned = [row.route for row in coverage(optimizer)]
    train(optimizer, params, 1)
    low_rank = ["exp_avg" not in optimizer.state[p] for p in params]
    taken = ["low-rank" if own else "dense" for own in low_rank]
    assert [row.route for row in coverage(optimizer)] == taken == planned
    count = CASES[name].low_rank
    assert taken == ["low-rank"] * count + ["dense"] * (len(params) - count)


@pytest.mark.parametrize("cls", BAD)
def test_paper_has_no_rank_0(cls: Class) -> None:
    with pytest.raises(ValueError, match="rank must be an integer >= 1, or None for dense, but is 0"):
        cls(parameters(), rank=0, variant="paper")


def test_the_ranks_of_groups_are_their_own() -> None:
    params = parameters([(12, 20)] * 3)
    groups: list[dict[str, Any]] = [
        {"params": [params[0]]},
        {"params": [params[1]], "rank": 5},
        {"params": [params[2]], "rank": None},
    ]
    optimizer = LoRAPreAdamW(groups, rank=2)
    train(optimizer, params, 1)
    assert [row.rank for row in coverage(optimizer)] == [2, 5, None]
    assert [optimizer.state[p]["m_B"].shape for p in params[:2]] == [(12, 2), (12, 5)]


@pytest.mark.parametrize("case", [CASES["adam-split"], CASES["muon-subspace"]], ids=["adam", "muon"])
def test_the_start_does_not_depend_on_the_order_of_the_parameters(case: Case) -> None:
    forward, backward = parameters()[:LOW_RANK], parameters()[:LOW_RANK]
    set_gradients(forward, 0)
    set_gradients(backward, 0)
    case.make(forward).step()
    case.make(backward[::-1]).step()
    assert_near(weights(forward), weights(backward), 1e-6)


class Table:
    """An embedding of 1,000 rows, of which 100 have a gradient in each of 100 steps at lr 1.

    300 rows never have one, 20 once, in step 50, and the others in every seventh step.
    """

    def __init__(self, rank: int | None, size: float = 1e-3, fall: float = 1.0, **options: Any) -> None:
        drawn = torch.Generator().manual_seed(1)
        self.never, self.rare, self.common = torch.randperm(1000, generator=drawn).split([300, 20, 680])
        tokens = torch.randn(1000, 8, generator=drawn) * fall ** torch.arange(8)
        p = nn.Parameter(torch.randn(1000, 32, generator=drawn))
        optimizer = LoRAPreAdamW([p], lr=1.0, rank=rank, weight_decay=0.0, **options)
        path = [p.detach().clone()]
        for step in range(100):
            rows = self.common[torch.randperm(680, generator=drawn)[:100]]
            rows = torch.cat([rows, self.rare]) if step == 50 else rows
            p.grad = torch.zeros(1000, 32)
            p.grad[rows] = size * tokens[rows] @ torch.randn(8, 32, generator=drawn)
            if fall == 1:
                p.grad[rows] += size * torch.randn(len(rows), 32, generator=drawn)
            optimizer.step()
            path.append(p.detach().clone())
        self.path = torch.stack(path)  # (101, 1000, 32)
        self.steps = self.path.diff(dim=0)

    def moved(self, rows: Tensor, since: int = 0) -> float:
        """Root mean square of how far entries have come from where they were."""
        return (self.path[-1] - self.path[since])[rows].square().mean().sqrt().item()


@pytest.mark.usefixtures("arithmetic")
def test_rows_of_a_table_that_are_idle_in_most_steps_move_as_far_as_with_dense_moments() -> None:
    """Rows that never had a gradient stay. A rare row comes as far, but most of it in one step."""
    dense, table = Table(None), Table(8)
    assert table.steps.abs().max() <= 6.2  # docs/maths.md, "How large an update can be"
    assert (table.path[-1] - table.path[0])[table.never].abs().max() < 0.02
    assert table.path[50].sub(table.path[0])[table.rare].abs().max() < 0.02
    assert table.moved(table.common) == pytest.approx(dense.moved(dense.common), rel=0.05)
    assert table.moved(table.rare, 50) == pytest.approx(dense.moved(dense.rare, 50), rel=0.2)
    first, least = (x.steps[50][x.rare].square().mean().sqrt() for x in (table, dense))
    assert 6 * least < first < 12 * least


def test_rows_of_a_table_without_gradients_stay_where_gradients_almost_lack_rank() -> None:
    """Rounding errors reach all rows, but eps is larger where gradients are small."""
    table = Table(8, size=1e-5, fall=0.1)
    assert (table.path[-1] - table.path[0])[table.never].abs().max() < 0.5
    assert table.steps.abs().max() <= 6.2


@pytest.mark.parametrize("rank", [None, 8])
def test_weight_decay_works_on_rows_without_gradients(rank: int | None) -> None:
    p = nn.Parameter(torch.randn(100, 32))
    before = p.detach().clone()
    optimizer = LoRAPreAdamW([p], lr=0.1, rank=rank, weight_decay=0.5)
    for _ in range(10):
        p.grad = torch.cat([torch.randn(50, 32), torch.zeros(50, 32)])
        optimizer.step()
    torch.testing.assert_close(p[50:].detach(), 0.95**10 * before[50:])
