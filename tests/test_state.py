"""State: its names and sizes, checkpoints, what is refused, and what users may change in a run."""

import contextlib
import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from cases import (
    CASES,
    FACTORISED,
    RANK,
    SHAPES,
    Case,
    assert_near,
    assert_same,
    assert_unchanged,
    every_case,
    everything,
    factorised,
    gradient,
    parameters,
    set_gradients,
    shaped,
    state,
    train,
    weights,
)
from lorapre import LoRAPreAdamW, LoRAPreMuon, coverage, gradient_release

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)

Optimizer = torch.optim.Optimizer
Params = list[nn.Parameter]


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` saved, and loaded as safely as torch can."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def named(params: Params) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer.{i}", p) for i, p in enumerate(params)]


# --- names, types, sizes


def expected_shapes(case: Case, batch: tuple[int, ...], p: int, q: int) -> dict[str, Any]:
    """The documented state of a factorised weight, seen as matrices (*batch, p, q)."""
    names: dict[str, Any] = {"step": ()}
    if case.rank:
        names |= {"m_B": (*batch, p, RANK), "m_A": (*batch, RANK, q)}
    if case.cls is LoRAPreMuon:
        return names
    if case.options.get("variant") == "paper":
        return names | {"v_B": (*batch, p, RANK), "v_A": (*batch, RANK, q)}
    return names | {"v_row": (*batch, p), "v_col": (*batch, q)}


@factorised
@every_dtype
def test_state_has_the_documented_names_shapes_and_types(case: Case, dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    optimizer = case.make(params)
    train(optimizer, params, 1)
    matrices: list[tuple[tuple[int, ...], int, int]] = [((), 12, 20)] * 3
    matrices += [
        ((), 20, 12),
        ((3,), 10, 14),
        ((3,), 10, 14),
        ((), 8, 27),
        ((), 4, 5),
        ((), 9, 1),
        ((), 1, 9),
    ]
    matrices = matrices[: case.low_rank]
    wanted = [expected_shapes(case, *matrix) for matrix in matrices]
    wanted += [{"step": (), "exp_avg": shape, "exp_avg_sq": shape} for shape in SHAPES[len(matrices) :]]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for own, shapes in zip(state(optimizer), wanted, strict=True):
        assert {name: tuple(value.shape) for name, value in own.items()} == shapes
        for name, value in own.items():
            assert type(value) is Tensor
            assert not value.requires_grad
            assert value.dtype == (wide if name.startswith("exp") else torch.float32)


@factorised
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_state_takes_exactly_the_bytes_of_its_factors_and_counters(
    case: Case, dtype: torch.dtype, nonfinite: str
) -> None:
    p, q, r = 24, 40, 5 if case.rank else 0
    params = parameters([(p, q)], dtype)
    optimizer = case.make(params, rank=r, nonfinite=nonfinite)
    train(optimizer, params, 2)
    second = (p + q) * r if case.options.get("variant") == "paper" else p + q
    numbers = (p + q) * r + (0 if case.cls is LoRAPreMuon else second)
    counters = 2 if nonfinite == "skip" else 1
    held = sum(value.untyped_storage().nbytes() for value in optimizer.state[params[0]].values())
    assert held == 4 * (numbers + counters)
    assert coverage(optimizer).state_bytes == held == coverage(optimizer).planned_bytes


@every_case
def test_a_fresh_optimizer_has_an_empty_state_that_loads(case: Case) -> None:
    params, expected = parameters(), parameters()
    optimizer = case.make(params)
    saved = through_a_file(optimizer.state_dict())
    assert saved["state"] == {}
    optimizer.load_state_dict(saved)
    assert_same(train(optimizer, params, 2), train(case.make(expected), expected, 2))


# --- resuming


@every_case
@pytest.mark.parametrize(
    ("dtype", "nonfinite"),
    [
        (torch.float32, "propagate"),
        (torch.float32, "skip"),
        (torch.bfloat16, "skip"),
        (torch.float64, "skip"),
    ],
    ids=str,
)
def test_resuming_from_a_file_continues_bit_for_bit(case: Case, dtype: torch.dtype, nonfinite: str) -> None:
    def make(params: Params) -> Optimizer:
        late = {"params": params[4:], "lr": 0.003, "rank": case.options.get("rank", 2)}
        return case.make([{"params": params[:4]}, late], nonfinite=nonfinite)

    def step(optimizer: Optimizer, params: Params, number: int) -> None:
        set_gradients(params, number)
        if number < 2:  # a first gradient that comes late, or not at all before the checkpoint
            params[1].grad = params[7].grad = None
        if number < 4:
            params[2].grad = params[5].grad = None
        if number == 1 and nonfinite == "skip":
            for index in (0, 4, 8):
                params[index].grad = torch.full_like(params[index], math.inf)
        optimizer.step()

    params = parameters(dtype=dtype)
    optimizer = make(params)
    for number in range(3):
        step(optimizer, params, number)
    saved = through_a_file({"optimizer": optimizer.state_dict(), "weights": weights(params)})
    resumed_params = parameters(dtype=dtype)
    for p, value in zip(resumed_params, saved["weights"], strict=True):
        p.data = value
    resumed = make(resumed_params)
    resumed.load_state_dict(saved["optimizer"])
    assert_same(state(resumed), state(optimizer))
    assert [len(own) for own in state(resumed)] == [len(own) for own in state(optimizer)]
    for number in range(3, 6):
        step(optimizer, params, number)
        step(resumed, resumed_params, number)
    assert_same([weights(resumed_params), state(resumed)], [weights(params), state(optimizer)])


@factorised
def test_loading_does_not_round_the_float32_state_of_bfloat16_weights(case: Case) -> None:
    params, others = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    optimizer, resumed = case.make(params), case.make(others)
    train(optimizer, params, 3)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same(state(resumed), state(optimizer))
    values = [v for own in state(resumed) for v in own.values() if v.ndim]
    assert all(v.dtype == torch.float32 for v in values)
    assert any(not torch.equal(v, v.bfloat16().float()) for v in values)  # or the test would show nothing


@every_case
def test_loading_replaces_what_an_optimizer_has_gathered(case: Case) -> None:
    params, others, fresh = parameters(), parameters(), parameters()
    optimizer, used, unused = case.make(params), case.make(others, lr=0.5), case.make(fresh)
    train(optimizer, params, 2)
    train(used, others, 3, start=7)
    used.load_state_dict(optimizer.state_dict())
    unused.load_state_dict(optimizer.state_dict())
    assert used.param_groups[0]["lr"] == 0.01
    for p, q in zip(others, fresh, strict=True):
        p.data = q.detach().clone()
    assert_same(train(used, others, 2), train(unused, fresh, 2))


@every_case
def test_loaded_tensors_are_copies_and_the_loaded_dictionary_is_left_alone(case: Case) -> None:
    params, others = parameters(), parameters()
    optimizer = case.make(params, lr=torch.tensor(0.01))
    train(optimizer, params, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    resumed = case.make(others)
    resumed.load_state_dict(saved)
    resumed.param_groups[0]["lr"].fill_(0.5)
    train(resumed, others, 2, start=2)
    assert_same(saved["state"], before["state"])
    assert saved["param_groups"] == before["param_groups"]
    assert optimizer.param_groups[0]["lr"] == 0.01


@every_case
def test_coverage_is_right_after_loading(case: Case) -> None:
    params, others = parameters(), parameters()
    optimizer = case.make(named(params))
    train(optimizer, params, 2)
    resumed = case.make(named(others))
    assert coverage(resumed).state_bytes == 0
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert coverage(resumed).rows == coverage(optimizer).rows
    assert coverage(resumed).state_bytes == coverage(resumed).planned_bytes > 0


@every_case
def test_options_that_were_saved_win_as_in_torch_and_new_ones_take_their_default(case: Case) -> None:
    params, others = parameters(), parameters()
    optimizer = case.make(params, lr=0.07, maximize=True)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["seed"], saved["param_groups"][0]["nonfinite"]  # an older version's
    resumed = case.make(others, seed=3, nonfinite="skip")
    resumed.load_state_dict(saved)
    (group,) = resumed.param_groups
    assert (group["lr"], group["maximize"], group["seed"], group["nonfinite"]) == (0.07, True, 3, "skip")


@every_case
@pytest.mark.parametrize("order", [("skip", "propagate"), ("propagate", "skip")], ids=str)
def test_the_count_of_skipped_steps_is_no_reason_to_refuse_a_checkpoint(
    case: Case, order: tuple[str, str]
) -> None:
    params, others = parameters(), parameters()
    optimizer, resumed = case.make(params, nonfinite=order[0]), case.make(others, nonfinite=order[1])
    train(optimizer, params, 2)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.param_groups[0]["nonfinite"] = order[1]
    for p, q in zip(params, others, strict=True):
        q.data = p.detach().clone()
    assert_same(train(resumed, others, 2, start=2), train(optimizer, params, 2, start=2))


@every_case
def test_a_step_that_was_saved_as_an_integer_loads(case: Case) -> None:
    params, others = parameters(), parameters()
    optimizer, resumed = case.make(params), case.make(others)
    train(optimizer, params, 2)
    saved = optimizer.state_dict()
    for own in saved["state"].values():
        own["step"] = int(own["step"])
    resumed.load_state_dict(saved)
    assert {int(own["step"]) for own in state(resumed)} == {2}
    assert {own["step"].dtype for own in state(resumed)} == {torch.float32}


@every_case
def test_distributed_checkpoint_saves_and_restores_by_name(case: Case) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 12), nn.LayerNorm(12), nn.Linear(12, 20)).bfloat16()

    one, two = model(), model()
    optimizer, resumed = case.make(one.parameters()), case.make(two.parameters())
    train(optimizer, list(one.parameters()), 2)
    saved = through_a_file(get_optimizer_state_dict(one, optimizer))  # type: ignore[arg-type]
    assert "0.weight" in saved["state"]
    before = weights(two.parameters())
    set_optimizer_state_dict(two, resumed, saved)
    assert_same(weights(two.parameters()), before)
    assert_same(state(resumed), state(optimizer))


# --- checkpoints that do not fit


Others = dict[str, tuple[dict[str, Any], list[Any]]]
OTHERS: Others = {
    "rank": ({"rank": 2}, [(12, 2), (12, RANK)]),
    "rank-0": ({"rank": 0}, ["rank=0", (12, RANK)]),
    "rank-none": ({"rank": None}, [(12, 20), (12, RANK)]),
    "shape": ({"shape": (20, 12)}, [(20, RANK), (12, RANK)]),
    "experts": ({"shape": (2, 12, 20)}, [(2, 12, RANK), (12, RANK)]),
    "paper": ({"variant": "paper"}, ["variant='paper'"]),
    "subspace": ({"variant": "subspace"}, ["variant='subspace'"]),
    "split": ({"variant": "split"}, ["variant='split'"]),
}


def differing() -> list[Any]:
    """(case, what differs in the checkpoint, parts of the message, stepped) for every pair that does not fit.

    An optimizer that has not been stepped saves options but no state.
    """
    pairs = []
    for name in FACTORISED:
        defaults = CASES[name].make(parameters()).defaults
        foreign = "split" if CASES[name].cls is LoRAPreMuon else "subspace"
        for other, (change, message) in OTHERS.items():
            if change.items() <= defaults.items() or other == foreign:
                continue
            both = {**defaults, **change}
            if both["variant"] == "paper" and 0 in (both["rank"], defaults["rank"]):
                continue  # it has no rank 0
            if name == "muon-rank-0" and "shape" in change:
                continue  # nothing of its state has a shape
            if not CASES[name].rank:  # its own state has no factors
                message = [part for part in message if RANK not in part]
            pairs.append(pytest.param(CASES[name], change, message, True, id=f"{name}-{other}"))
            if "shape" not in change:
                pairs.append(pytest.param(CASES[name], change, [], False, id=f"{name}-{other}-fresh"))
    return pairs


@pytest.mark.parametrize(("case", "change", "message", "stepped"), differing())
def test_a_checkpoint_of_another_kind_is_refused_by_name_and_changes_nothing(
    case: Case, change: dict[str, Any], message: list[Any], stepped: bool
) -> None:
    options = dict(change)
    last = options.pop("shape", (12, 20))
    saved_params = parameters([(7,), (20, 12), last])
    optimizer = case.make([{"params": saved_params[:2]}, {"params": saved_params[2:], **options}], lr=0.5)
    if stepped:
        train(optimizer, saved_params, 2)
    params = parameters([(7,), (20, 12), (12, 20)])
    own = case.make([{"params": named(params)[:2]}, {"params": named(params)[2:]}])
    train(own, params, 1)
    before = everything(own)
    with pytest.raises(ValueError, match=r"does not fit parameter 'layer\.2' of shape \(12, 20\)") as error:
        own.load_state_dict(through_a_file(optimizer.state_dict()))
    for part in message:
        assert str(part) in str(error.value)
    assert_unchanged(own, before)
    assert_same(train(own, params, 1, start=1), _undisturbed(case))


def _undisturbed(case: Case) -> list[Tensor]:
    """Weights after two steps that no checkpoint has come between."""
    params = parameters([(7,), (20, 12), (12, 20)])
    return train(case.make([{"params": params[:2]}, {"params": params[2:]}]), params, 2)


@pytest.mark.parametrize("rank", [RANK, None])
@pytest.mark.parametrize("stepped", [True, False], ids=["stepped", "fresh"])
@pytest.mark.parametrize("classes", [(LoRAPreAdamW, LoRAPreMuon), (LoRAPreMuon, LoRAPreAdamW)])
def test_a_checkpoint_of_the_other_class_is_refused(rank: int | None, stepped: bool, classes: Any) -> None:
    saved_params, params = parameters(), parameters()
    optimizer, own = classes[0](saved_params, rank=rank), classes[1](params, rank=rank)
    if stepped:
        train(optimizer, saved_params, 1)
    before = everything(own)
    with pytest.raises(ValueError, match=r"saved was .*, this optimizer keeps"):
        own.load_state_dict(optimizer.state_dict())
    assert_unchanged(own, before)


@every_case
def test_a_checkpoint_with_missing_state_is_refused(case: Case) -> None:
    params = parameters()
    optimizer = case.make(params)
    train(optimizer, params, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][len(params) - 1]["exp_avg_sq"]
    before = everything(optimizer)
    with pytest.raises(ValueError, match=f"parameter {len(params) - 1} of its group of shape"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@every_case
def test_a_checkpoint_with_other_groups_is_refused(case: Case) -> None:
    params, others = parameters(), parameters()
    optimizer, own = case.make(params), case.make([{"params": others[:3]}, {"params": others[3:]}])
    train(optimizer, params, 1)
    train(own, others, 1)
    before = everything(own)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        own.load_state_dict(optimizer.state_dict())
    fewer = case.make(parameters()[:-1])
    with pytest.raises(ValueError, match="match the size"):
        fewer.load_state_dict(optimizer.state_dict())
    assert_unchanged(own, before)


# --- from torch.optim.AdamW


@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_of_torch_adamw_continues_in_the_dense_groups(cls: Any, dtype: torch.dtype) -> None:
    theirs, ours = parameters(dtype=dtype), parameters(dtype=dtype)
    reference = torch.optim.AdamW(
        [{"params": theirs[:4]}, {"params": theirs[4:], "lr": 0.02}],
        lr=0.01, betas=(0.7, 0.8), eps=1e-3, weight_decay=0.3, maximize=True, foreach=False,
    )  # fmt: skip
    train(reference, theirs, 3)
    # The options come from the checkpoint alone.
    optimizer = cls([{"params": ours[:4]}, {"params": ours[4:]}], rank=None)
    for p, q in zip(ours, theirs, strict=True):
        p.data = q.detach().clone()
    optimizer.load_state_dict(through_a_file(reference.state_dict()))
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]
    assert {value.dtype for own in state(optimizer) for value in own.values()} == {torch.float32}
    for step in range(3, 6):
        train(optimizer, ours, 1, start=step)
        train(reference, theirs, 1, start=step)
    # In bfloat16 torch rounds the moments and every operation, and we only the weights.
    assert_near(weights(ours), weights(theirs), 1e-6 if dtype == torch.float32 else 0.02)


def test_a_loaded_adamw_sets_the_dense_weights_of_muon_alone() -> None:
    # A matrix that had no gradient yet, and a vector, in one group.
    theirs, ours = parameters([(12, 20), (7,)]), parameters([(12, 20), (7,)])
    reference = torch.optim.AdamW(theirs, lr=0.01, eps=1e-3, weight_decay=0.3)
    optimizer = LoRAPreMuon(ours, lr=0.1, adamw_lr=0.001, adamw_weight_decay=0.7, weight_decay=0.2, rank=3)
    for step in range(2):
        theirs[1].grad = gradient((7,), step, 1)
        reference.step()
    ours[1].data = theirs[1].detach().clone()
    optimizer.load_state_dict(reference.state_dict())
    (group,) = optimizer.param_groups
    assert (group["eps"], group["weight_decay"]) == (1e-7, 0.2)
    assert_near(train(optimizer, ours, 2, start=2)[1:], train(reference, theirs, 2, start=2)[1:], 1e-6)


@factorised
def test_a_state_dict_of_torch_adamw_is_refused_where_a_weight_is_factorised(case: Case) -> None:
    theirs, ours = parameters(), parameters()
    reference = torch.optim.AdamW(theirs)
    train(reference, theirs, 1)
    optimizer = case.make(ours)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"of shape \(12, 20\).*exp_avg.*, this optimizer keeps"):
        optimizer.load_state_dict(reference.state_dict())
    assert_unchanged(optimizer, before)


# --- hooks


@factorised
def test_hooks_adapt_a_checkpoint_before_it_is_checked_and_see_the_state_after(case: Case) -> None:
    shapes = [(12, 20), (7,)]
    saved_params = parameters(shapes, torch.bfloat16)
    params = parameters(shapes[::-1], torch.bfloat16)  # in another order
    optimizer, own = case.make(saved_params), case.make(params)
    train(optimizer, saved_params, 2)
    seen = []

    def reorder(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": {1 - key: value for key, value in state_dict["state"].items()}}

    def look(optimizer: Optimizer) -> None:
        seen.extend(state(optimizer))
        optimizer.state[params[0]]["step"] += 10

    own.register_load_state_dict_pre_hook(reorder)  # type: ignore[arg-type]
    own.register_load_state_dict_post_hook(look)
    own.load_state_dict(optimizer.state_dict())
    assert_same(seen, state(optimizer)[::-1])
    assert [int(values["step"]) for values in state(own)] == [12, 2]


@factorised
def test_hooks_of_one_load_do_not_stay_for_the_next(case: Case) -> None:
    params, others = parameters(), parameters()
    optimizer, resumed = case.make(params), case.make(others)
    for step in range(3):
        train(optimizer, params, 1, start=step)
        with pytest.raises(ValueError, match="does not fit"):
            resumed.load_state_dict(case.make(parameters(), rank=2).state_dict())
        resumed.load_state_dict(optimizer.state_dict())
        assert_same(state(resumed), state(optimizer))
    assert not resumed._optimizer_load_state_dict_pre_hooks
    assert not resumed._optimizer_load_state_dict_post_hooks


@every_case
def test_saving_hooks_run(case: Case) -> None:
    optimizer = case.make(parameters())
    calls = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": 1})
    assert optimizer.state_dict()["note"] == 1
    assert calls == ["before"]


# --- what users do to weights, state, options and groups


@shaped
@pytest.mark.parametrize("shape", [(30, 20), (6, 20)], ids=["grown", "shrunk"])
def test_a_weight_of_another_shape_is_refused_by_name_before_anything_is_written(
    case: Case, shape: tuple[int, int]
) -> None:
    params = parameters([(12, 20), (7,)])
    optimizer = case.make(named(params))
    train(optimizer, params, 2)
    params[0].grad = None
    params[0].data = parameters([shape])[0].data
    set_gradients(params, 2)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=r"of parameter 'layer\.0' has shape"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    del optimizer.state[params[0]]  # as the message says
    train(optimizer, params, 1, start=2)
    assert case.cls is LoRAPreMuon or len(optimizer.state[params[0]]) > 2
    assert params[0].isfinite().all()


@every_case
def test_a_gradient_of_the_shape_before_is_refused_by_name(case: Case) -> None:
    params = parameters([(12, 20)])
    optimizer = case.make(named(params))
    set_gradients(params, 0)
    gradient, params[0].data = params[0].grad, parameters([(6, 20)])[0].data
    assert gradient is not None
    with pytest.raises(
        RuntimeError, match=r"parameter 'layer\.0' has shape \(6, 20\), but its gradient \(12, 20\)"
    ):
        optimizer.step()


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_state_that_was_cast_is_cast_back(case: Case, dtype: torch.dtype) -> None:
    params, others = parameters(), parameters()
    optimizer, same = case.make(params), case.make(others)
    train(optimizer, params, 3)
    train(same, others, 3)
    for own in optimizer.state.values():
        own.update({name: value.to(dtype) for name, value in own.items()})
    if dtype == torch.bfloat16:  # the same values, rounded
        for own in same.state.values():
            for value in own.values():
                value.copy_(value.bfloat16())
    assert_same(train(optimizer, params, 2, start=3), train(same, others, 2, start=3))
    assert {value.dtype for own in state(optimizer) for value in own.values()} == {torch.float32}


@every_case
@pytest.mark.usefixtures("arithmetic")
def test_two_parameters_that_share_storage_both_move_it(case: Case) -> None:
    """The result is as if each of them were stepped alone, one after the other."""
    for shape in ((48, 40), (5,)):
        (whole,) = parameters([shape])
        expected = nn.Parameter(whole.detach().clone())
        tied = [nn.Parameter(whole.detach()) for _ in range(2)]
        optimizer, first, second = case.make(tied), case.make([expected]), case.make([expected])
        for step in range(3):
            set_gradients(tied, step)
            optimizer.step()
            for index, one in enumerate((first, second)):
                expected.grad = gradient(shape, step, index)
                one.step()
        assert_near([whole], [expected.detach()])


@every_case
@pytest.mark.parametrize("shape", [(12, 20), (7,)], ids=str)
def test_an_expanded_weight_is_refused_by_name(case: Case, shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.zeros(shape[1:] or 1).expand(shape))
    optimizer = case.make(named([p]))
    p.grad = torch.ones(shape)
    with pytest.raises(RuntimeError, match=r"parameter 'layer\.0' is expanded: more than one element"):
        optimizer.step()
    assert not p.any()


@every_case
def test_tensors_that_a_wrapper_keeps_in_the_state_are_carried_saved_and_loaded(case: Case) -> None:
    params, others, plain = parameters(), parameters(), parameters()
    optimizer, resumed = case.make(params), case.make(others)
    for p in params:  # before there is any state of ours
        optimizer.state[p]["slow"] = p.detach().clone()
    assert_same(train(optimizer, params, 2), train(case.make(plain), plain, 2))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(params, others, strict=True):
        assert_same(resumed.state[q]["slow"], optimizer.state[p]["slow"])
        q.data = p.detach().clone()
    assert_same(train(resumed, others, 2, start=2), train(optimizer, params, 2, start=2))


@shaped
def test_missing_state_is_refused_by_name(case: Case) -> None:
    params = parameters([(12, 20)])
    optimizer = case.make(named(params))
    train(optimizer, params, 2)
    name = list(optimizer.state[params[0]])[-1]
    del optimizer.state[params[0]][name]
    set_gradients(params, 2)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=rf"state '{name}' of parameter 'layer\.0' is missing"):
        optimizer.step()
    assert_unchanged(optimizer, before)


EDITS: list[Any] = [
    pytest.param(CASES[name], edit, id=f"{name}-{edit}")
    for name in FACTORISED
    for edit in ({"rank": 2}, {"rank": 0}, {"rank": None}, {"variant": "paper"}, {"variant": "split"})
    if not ("variant" in edit and ("muon" in name or name in (f"adam-{edit['variant']}", "adam-rank-0")))
    and not (edit == {"rank": 0} and ("paper" in name or "rank-0" in name))
]


@pytest.mark.parametrize(("case", "edit"), EDITS)
def test_options_that_are_edited_in_a_run_are_refused_at_the_next_step(
    case: Case, edit: dict[str, Any]
) -> None:
    params = parameters([(12, 20)])
    optimizer = case.make(named(params))
    train(optimizer, params, 2)
    (group,) = optimizer.param_groups
    held = coverage(optimizer).rows[0]
    group.update(edit)
    assert (coverage(optimizer).rows[0].rank, coverage(optimizer).rows[0].route) == (
        held.rank,
        held.route,
    )
    set_gradients(params, 2)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=r"the state '.*' of parameter 'layer\.0' .*; its options now ask"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    del optimizer.state[params[0]]
    optimizer.step()
    assert coverage(optimizer).rows[0].rank == group["rank"]


@pytest.mark.parametrize("release", [False, True], ids=["step", "release"])
def test_an_edited_variant_is_refused_where_a_weight_has_the_state_of_another(release: bool) -> None:
    """A weight without state starts with the new variant. One with state is refused at its next gradient."""
    params = parameters([(12, 20), (12, 20), (7,)])
    optimizer = LoRAPreAdamW(named(params), rank=RANK)
    handle = gradient_release(nn.ParameterList(params), optimizer) if release else None

    def step(*indices: int) -> None:
        sum((params[i] * gradient(params[i].shape, 0, i)).sum() for i in indices).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()

    step(0, 2)
    optimizer.param_groups[0]["variant"] = "paper"
    step(1, 2)
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=r"the state 'v_B' of parameter '(layer\.)?0' is missing"):
        step(0)
    optimizer.zero_grad()
    assert_unchanged(optimizer, before)
    del optimizer.state[params[0]]  # as the message says
    step(0, 1, 2)
    if handle is not None:
        handle.remove()


@pytest.mark.parametrize("names", [("subspace", "paper"), ("paper", "subspace")])
def test_the_variant_of_muon_may_be_edited_in_a_run(names: tuple[str, str]) -> None:
    """Both follow the same average, in the same state."""
    params, others = parameters([(12, 20)]), parameters([(12, 20)])
    optimizer, other = (
        LoRAPreMuon(weights, rank=RANK, variant=name)
        for weights, name in zip((params, others), names, strict=True)
    )
    others[0].data = train(optimizer, params, 2)[0]
    other.state[others[0]] = state(optimizer)[0]
    optimizer.param_groups[0]["variant"] = names[1]
    assert_same(train(optimizer, params, 3, start=2), train(other, others, 3, start=2))
    assert_same(state(optimizer), state(other))


@every_case
@pytest.mark.parametrize("release", [False, True], ids=["step", "release"])
def test_groups_may_lose_gain_and_exchange_parameters(case: Case, release: bool) -> None:
    """A parameter keeps its state and takes the options of its present group."""
    params, others = parameters(), parameters()
    optimizer = case.make([{"params": named(params)[:5]}, {"params": named(params)[5:], "lr": 0.0}])
    one_by_one = [case.make([q], lr=0.0 if i >= 5 else 0.01) for i, q in enumerate(others)]
    handle = gradient_release(nn.ParameterList(params), optimizer) if release else None

    def step(number: int) -> None:
        if release:
            loss = torch.zeros(())
            for i, p in enumerate(params):
                loss = loss + (p * gradient(p.shape, number, i)).sum()
            loss.backward()
        else:
            set_gradients(params, number)
        optimizer.step()
        optimizer.zero_grad()
        for i, (q, own) in enumerate(zip(others, one_by_one, strict=True)):
            q.grad = gradient(q.shape, number, i)
            own.step()
        assert_near(weights(params), weights(others), 1e-4)  # Newton-Schulz rounds to bfloat16

    step(0)
    optimizer.param_groups.reverse()  # the first has lr 0 now
    step(1)
    slow, fast = optimizer.param_groups
    moved = fast["params"].pop(0)  # its name stays in the old group, as in torch
    slow["params"].insert(0, moved)
    one_by_one[0].param_groups[0]["lr"] = 0.0
    step(2)
    fast["params"].reverse()
    step(3)
    assert len(coverage(optimizer)) == len(params)
    gone = next(i for i, p in enumerate(params) if p is fast["params"][0])
    fast["params"] = fast["params"][1:]
    one_by_one[gone].param_groups[0]["lr"] = 0.0
    one_by_one[gone].param_groups[0]["adamw_lr"] = 0.0
    step(4)
    assert len(coverage(optimizer)) == len(params) - 1
    if handle is not None:
        handle.remove()


@every_case
def test_messages_use_positions_where_names_no_longer_fit(case: Case) -> None:
    params = parameters([(12, 20), (12, 20), (7,)])
    optimizer = case.make(named(params))
    del optimizer.param_groups[0]["params"][0]
    assert [row.name for row in coverage(optimizer)] == ["0.0", "0.1"]
    params[2].grad = torch.zeros(7).to_sparse()
    with pytest.raises(RuntimeError, match="that of parameter 1 of its group is"):
        optimizer.step()


@every_case
@pytest.mark.parametrize("first", ["named", "nameless"])
def test_groups_with_and_without_names_go_together(case: Case, first: str) -> None:
    params, others = parameters(), parameters()
    with_names: Any = {"params": named(params)[:5]}
    without: Any = {"params": params[5:8]}
    groups = [with_names, without] if first == "named" else [without, with_names]
    optimizer = case.make([groups[0]])
    optimizer.add_param_group(groups[1])
    optimizer.param_groups.remove(optimizer.param_groups[0 if first == "nameless" else 1])  # frozen again
    optimizer.add_param_group({"params": params[5:8]})
    optimizer.add_param_group({"params": params[8:]})
    names = [row.name for row in coverage(optimizer)]
    assert len(set(names)) == len(names) == len(params)
    assert names[:5] == [f"layer.{i}" for i in range(5)]
    assert_near(train(optimizer, params, 2), train(case.make(others), others, 2))  # in other batches
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


@every_case
def test_names_in_another_order_are_matched_by_name(case: Case) -> None:
    params, others = parameters(), parameters()
    optimizer, resumed = case.make(named(params)), case.make(named(others)[::-1])
    train(optimizer, params, 2)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert resumed.param_groups[0]["param_names"] == [name for name, _ in named(others)[::-1]]
    assert_same(state(resumed), state(optimizer)[::-1])
    for p, q in zip(params, others, strict=True):
        q.data = p.detach().clone()
    assert_near(train(resumed, others, 2, start=2), train(optimizer, params, 2, start=2))


@every_case
def test_names_in_other_groups_are_refused(case: Case) -> None:
    params, others = parameters([(12, 20)] * 4), parameters([(12, 20)] * 4)
    optimizer = case.make([{"params": named(params)[:2]}, {"params": named(params)[2:]}])
    swapped = [named(others)[0], named(others)[2], named(others)[1], named(others)[3]]
    resumed = case.make([{"params": swapped[:2]}, {"params": swapped[2:]}])
    train(optimizer, params, 1)
    train(resumed, others, 1)
    before = everything(resumed)
    with pytest.raises(ValueError, match=r"has the parameter 'layer\.2', but 'layer\.1' in its place"):
        resumed.load_state_dict(optimizer.state_dict())
    assert_unchanged(resumed, before)


@every_case
def test_the_generator_of_a_gan_leaves_the_discriminator_alone(case: Case) -> None:
    """Its loss passes through the discriminator, whose updates are paused meanwhile."""

    def run(release: bool) -> list[Tensor]:
        torch.manual_seed(0)
        generator, discriminator = (
            nn.Linear(8, 20),
            nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 12)),
        )
        ours, theirs = case.make(generator.parameters()), case.make(discriminator.parameters())
        handle = gradient_release(discriminator, theirs) if release else None
        for _ in range(3):
            z, real = torch.randn(16, 8), torch.randn(16, 20)
            theirs.zero_grad()
            (discriminator(generator(z).detach()).mean() - discriminator(real).mean()).backward()
            theirs.step()
            ours.zero_grad()
            theirs.zero_grad()
            before = weights(discriminator.parameters())
            with handle.paused() if handle is not None else contextlib.nullcontext():
                (-discriminator(generator(z)).mean()).backward()
            ours.step()
            assert_same(weights(discriminator.parameters()), before)
        return weights([*generator.parameters(), *discriminator.parameters()])

    assert_near(run(release=True), run(release=False))
