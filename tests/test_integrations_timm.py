"""timm's create_optimizer_v2 with LoRA-Pre, on a small vision transformer."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorapre import param_groups
from registered import NAMES, check_equals_own, check_routes

timm = pytest.importorskip("timm", reason="timm is not installed: it needs the torchvision of torch's build")

from timm.optim import create_optimizer_v2, list_optimizers  # noqa: E402

from lorapre.integrations.timm import register  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


def vit() -> nn.Module:
    torch.manual_seed(1)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=10
    )


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def loss(net: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(net(IMAGES), torch.arange(4))


def test_the_names_are_listed() -> None:
    assert list_optimizers("lorapre*") == ["lorapreadamw", "lorapremuon"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("lorapreadamw", dict(betas=(0.8, 0.9), eps=1e-6)), ("lorapremuon", dict(momentum=0.8, eps=1e-6))],
)
def test_arguments_reach_both_routes(name: str, options: dict[str, Any]) -> None:
    net = vit()
    groups = param_groups(net, rank=3, rules=[("^head", None)])
    made = create_optimizer_v2(net, name, lr=1e-2, weight_decay=0.05, groups=groups, **options)
    assert isinstance(made, NAMES[name])
    check_routes(made, net, groups)
    ranks = {name: g["rank"] for g in made.param_groups for name in g["param_names"]}
    assert ranks["head.weight"] is ranks["patch_embed.proj.weight"] is ranks["pos_embed"] is None
    assert ranks["blocks.0.attn.qkv.weight"] == 3
    decay = {name: g["weight_decay"] for g in made.param_groups for name in g["param_names"]}
    assert decay["pos_embed"] == decay["cls_token"] == decay["norm.weight"] == 0, "timm's list counts"
    assert decay["head.weight"] == decay["blocks.0.attn.qkv.weight"] == 0.05
    for group in made.param_groups:
        assert {key: group[key] for key in options} == options
        assert group["lr"] == 1e-2


@pytest.mark.parametrize(("name", "momentum"), [("lorapreadamw", {}), ("lorapremuon", {"momentum": 0.9})])
def test_it_trains_as_the_class_itself(name: str, momentum: dict[str, float]) -> None:
    net = vit()
    own = copy.deepcopy(net)
    made = create_optimizer_v2(net, name, lr=1e-3, groups=param_groups(net, rank=3))
    check_equals_own(made, net, own, loss, lr=1e-3, weight_decay=0.0, **momentum)


def test_layer_decay() -> None:
    net = vit()
    groups = param_groups(net, rank=3)
    made = create_optimizer_v2(net, "lorapreadamw", lr=1e-2, weight_decay=0.1, layer_decay=0.5, groups=groups)
    check_routes(made, net, groups)
    scales = {name: g["lr_scale"] for g in made.param_groups for name in g["param_names"]}
    assert scales["blocks.0.attn.qkv.weight"] == scales["blocks.1.attn.qkv.weight"] / 2
    loss(net).backward()
    made.step()


def test_param_group_fn_can_give_the_routes() -> None:
    net = vit()
    made = create_optimizer_v2(
        net, "lorapreadamw", weight_decay=0.1, param_group_fn=lambda net: param_groups(net, rank=3)
    )
    check_routes(made, net, param_groups(net, rank=3))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_a_route_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"groups must be lorapre\.param_groups"):
        create_optimizer_v2(vit(), name)
