"""pytorch_optimizer's create_optimizer and load_optimizer with LoRA-Pre."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lorapre import param_groups
from registered import NAMES, check_equals_own, check_routes

pytorch_optimizer = pytest.importorskip(
    "pytorch_optimizer", reason="pytorch_optimizer is not installed: no registry to enter"
)

from pytorch_optimizer import create_optimizer, get_supported_optimizers, load_optimizer  # noqa: E402

from lorapre.integrations.pytorch_optimizer import register  # noqa: E402

TOKENS = torch.randint(16, (4, 8), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Embedding(16, 24), nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24)),
        *(nn.LayerNorm(24), nn.Linear(24, 16)),
    )


def loss(net: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(net(TOKENS).flatten(0, 1), (3 * TOKENS + 1).flatten() % 16)


def test_the_names_are_listed() -> None:
    assert get_supported_optimizers("lorapre*") == ["lorapreadamw", "lorapremuon"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_create_optimizer(name: str, weight_decay: float) -> None:
    net = model()
    own, groups = copy.deepcopy(net), param_groups(net, rank=3)
    made = create_optimizer(net, name, lr=1e-2, weight_decay=weight_decay, groups=groups, variant="paper")
    assert isinstance(made, NAMES[name])
    check_routes(made, net, groups)
    for group in made.param_groups:
        assert (group["lr"], group["variant"]) == (1e-2, "paper")
        matrices = any(p.ndim > 1 for p in group["params"])
        assert group["weight_decay"] == (weight_decay if matrices else 0.0)
    check_equals_own(made, net, own, loss, lr=1e-2, weight_decay=weight_decay, variant="paper")


def test_its_list_of_what_is_not_decayed_counts() -> None:
    net = model()
    made = create_optimizer(
        net, "lorapreadamw", weight_decay=0.1, wd_ban_list=["1.weight"], groups=param_groups(net, rank=3)
    )
    decay = {name: group["weight_decay"] for group in made.param_groups for name in group["param_names"]}
    assert decay == {"0.weight": 0.1, "1.weight": 0, "3.weight": 0.1, "5.weight": 0.1} | {
        name: 0.0 for name, p in net.named_parameters() if p.ndim == 1
    }


def test_a_rule_counts_more() -> None:
    net = model()
    groups = param_groups(net, rank=3, rules=[(r"^1\.weight", {"weight_decay": 0.7, "lr": 1e-4})])
    made = create_optimizer(net, "lorapreadamw", lr=1e-2, weight_decay=0.1, groups=groups)
    (group,) = [group for group in made.param_groups if "1.weight" in group["param_names"]]
    assert (group["weight_decay"], group["lr"]) == (0.7, 1e-4)


def test_frozen_weights_are_left_out() -> None:
    net = model()
    net[1].requires_grad_(False)
    groups = param_groups(net, rank=3)
    check_routes(create_optimizer(net, "lorapreadamw", weight_decay=0.1, groups=groups), net, groups)


@pytest.mark.parametrize("name", NAMES)
def test_load_optimizer(name: str) -> None:
    net = model()
    own, groups = copy.deepcopy(net), param_groups(net, rank=3)
    made = load_optimizer(name)(groups, lr=1e-2)
    check_routes(made, net, groups)
    check_equals_own(made, net, own, loss, lr=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_a_route_are_refused(name: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=r"groups must be lorapre\.param_groups"):
        create_optimizer(net, name, rank=3)
    with pytest.raises(ValueError, match=r"groups must be lorapre\.param_groups"):
        load_optimizer(name)(net.parameters())
    with pytest.raises(ValueError, match=r"groups: a parameter of shape \(16, 24\) is not in them"):
        create_optimizer(net, name, groups=param_groups(model(), rank=3))


def test_state_loads_into_the_class_itself_and_copies() -> None:
    net = model()
    made = load_optimizer("lorapreadamw")(param_groups(net, rank=3), lr=1e-2)
    loss(net).backward()
    made.step()
    twin = copy.deepcopy(made)
    own = NAMES["lorapreadamw"](param_groups(net, rank=3))
    own.load_state_dict(made.state_dict())
    for other in (twin, own):
        for a, b in zip(made.state.values(), other.state.values(), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
