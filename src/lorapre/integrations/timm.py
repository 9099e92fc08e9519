"""LoRA-Pre in timm's factory `timm.optim.create_optimizer_v2`."""

# timm exports the type of its registry and functions that read it, but neither the registry nor a
# way to add.
from timm.optim._optim_factory import OptimInfo, default_registry

from lorapre.integrations.registry import RoutedAdamW, RoutedMuon

__all__ = ["register"]


def register() -> None:
    """Add "lorapreadamw" and "lorapremuon" to timm's optimizers.

    `create_optimizer_v2(model, "lorapreadamw", lr=1e-3, weight_decay=0.05,
    groups=param_groups(model, rank=16))`: timm's groups, with weight decay and layer decay, are
    split by the routes of `groups`.

    The names have no underscore: timm drops what stands before one, and "lorapre_adamw" is its
        AdamW.
    `create_optimizer_v2` gives an optimizer that has a momentum 0.9 where it is not told another,
    Muon's too.
    """
    for name, optimizer_class, momentum in (
        ("lorapreadamw", RoutedAdamW, False),
        ("lorapremuon", RoutedMuon, True),
    ):
        # timm silently drops betas of an optimizer that is said to have none; LoRAPreMuon refuses
        # them.
        info = OptimInfo(name, optimizer_class, has_eps=True, has_betas=True, has_momentum=momentum)
        default_registry.register(info)
