"""The coverage report against the state that the optimizers really hold."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from lorapre import LoRAPreAdamW, LoRAPreMuon, coverage, param_groups


def held(optimizer):
    return sum(
        tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for tensor in state.values()
    )


def step(optimizer, parameters):
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def network(dtype=None):
    """Vectors, matrices, experts, convolutions, and a matrix too small for factors."""
    model = nn.Sequential(
        nn.Linear(24, 16), nn.Conv1d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(4, 4), nn.LayerNorm(16)
    )
    model.experts = nn.Parameter(torch.randn(3, 16, 24))
    return model.to(dtype)


class Deep(nn.Module):
    """Repeated layers under long names."""

    def __init__(self, layers=12):
        super().__init__()
        self.embedding_of_the_vocabulary = nn.Embedding(64, 32)
        self.a_transformer_with_a_very_long_name = nn.ModuleList(
            nn.ModuleDict(
                {
                    "self_attention_of_this_layer": nn.Linear(32, 32),
                    "feed_forward_network_of_this_layer": nn.Linear(32, 64),
                }
            )
            for _ in range(layers)
        )


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (LoRAPreAdamW, {}),
        (LoRAPreAdamW, {"variant": "paper"}),
        (LoRAPreMuon, {}),
    ],
)
def test_planned_bytes_are_what_the_first_step_allocates(optimizer_class, options, dtype, nonfinite):
    model = network(dtype)
    optimizer = optimizer_class(param_groups(model, rank=2), nonfinite=nonfinite, **options)
    before = coverage(optimizer)
    assert before.state_bytes == held(optimizer) == 0
    step(optimizer, model.parameters())
    after = coverage(optimizer)
    assert after.state_bytes == held(optimizer)
    assert [row.planned_bytes for row in before] == [row.state_bytes for row in after]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adamw_bytes_are_what_torch_holds(dtype):
    model = network(dtype)
    optimizer = torch.optim.AdamW(model.named_parameters())
    step(optimizer, model.parameters())
    report = coverage(optimizer)
    assert [row.adamw_bytes for row in report] == [row.state_bytes for row in report]
    assert {row.route for row in report} == {"dense"}


def test_state_of_a_factorised_weight():
    model = nn.Linear(48, 32, bias=False)
    optimizer = LoRAPreAdamW(param_groups(model, rank=4))
    (row,) = coverage(optimizer)
    assert (row.name, row.shape, row.route, row.rank) == ("weight", (32, 48), "low-rank", 4)
    assert row.planned_bytes == 4 * (32 + 48) * (4 + 1) + 4
    assert row.adamw_bytes == 4 * 2 * 32 * 48 + 4


def test_routes_and_notes():
    model = network()
    model[0].weight.requires_grad_(False)
    rows = {row.name: row for row in coverage(LoRAPreAdamW(param_groups(model, rank=2)))}
    assert (rows["0.weight"].note, rows["0.weight"].planned_bytes, rows["0.weight"].adamw_bytes) == (
        "frozen",
        0,
        0,
    )
    assert (rows["3.weight"].route, rows["3.weight"].rank, rows["3.weight"].note) == (
        "dense",
        None,
        "factors not smaller",
    )
    assert rows["4.weight"].note == ""
    assert {name for name, row in rows.items() if row.route == "low-rank"} == {
        "0.weight",
        "1.weight",
        "2.weight",
        "experts",
    }


def test_names_of_parameters_without_a_name():
    optimizer = LoRAPreAdamW([{"params": [torch.zeros(2, requires_grad=True)]}] * 1, rank=2)
    optimizer.add_param_group(
        {"params": [torch.zeros(1, requires_grad=True), torch.zeros(3, requires_grad=True)]}
    )
    assert [row.name for row in coverage(optimizer)] == ["0.0", "1.0", "1.1"]


def test_skipped_steps_are_counted():
    model = nn.Linear(16, 16)
    optimizer = LoRAPreAdamW(param_groups(model, rank=2), nonfinite="skip")
    step(optimizer, model.parameters())
    assert [row.skipped for row in coverage(optimizer)] == [0, 0]
    assert "non-finite" not in str(coverage(optimizer))
    for gradient in (model.weight.grad, model.bias.grad):
        gradient.fill_(torch.nan)
    optimizer.step()
    assert [row.skipped for row in coverage(optimizer)] == [1, 1]
    assert "Steps skipped for non-finite gradients: at most 1 " in str(coverage(optimizer))


def test_table_before_and_after_the_first_step():
    model = Deep()
    optimizer = LoRAPreAdamW(param_groups(model, rank=4))
    before = str(coverage(optimizer))
    assert "planned" in before.splitlines()[0]
    assert "No state is held yet" in before
    step(optimizer, list(model.parameters())[:3])
    during = str(coverage(optimizer))
    assert "state" in during.splitlines()[0]
    assert "46 parameters have had no gradient yet" in during
    step(optimizer, model.parameters())
    assert "gradient yet" not in str(coverage(optimizer))


def test_table_folds_layers_and_keeps_to_80_columns():
    model = Deep()
    report = coverage(LoRAPreAdamW(param_groups(model, rank=4)))
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 14
    assert text.count(".0-11.") == 2
    assert text.count("x12") == 2
    assert "vectors and scalars" in text
    (line,) = [line for line in text.splitlines() if "64x32" in line and "x12" in line]
    assert line.split()[-5:] == ["4", "22.5", "KiB", "192", "KiB"]


def test_table_marks_what_has_a_rank_and_is_dense():
    report = str(coverage(LoRAPreAdamW(param_groups(network(), rank=2))))
    assert "dense*" in report
    assert "* dense although the group has a rank" in report


def test_totals_and_json():
    model = network()
    report = coverage(LoRAPreAdamW(param_groups(model, rank=2)))
    assert len(report) == len(list(model.parameters()))
    plain = json.loads(json.dumps(dataclasses.asdict(report)))["rows"]
    for total in ("state_bytes", "planned_bytes", "adamw_bytes"):
        assert sum(row[total] for row in plain) == getattr(report, total)


def test_of_a_frozen_model():
    model = network().requires_grad_(False)
    report = coverage(LoRAPreAdamW(param_groups(model, rank=2)))
    assert report.adamw_bytes == report.planned_bytes == 0
    assert "frozen" in str(report)
