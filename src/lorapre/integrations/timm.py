"""LoRA-Pre in timm's factory `timm.optim.create_optimizer_v2`."""

# timm exports functions that read its registry, but neither the registry nor a way to add to it.
from timm.optim._optim_factory import OptimInfo, default_registry

from lorapre.integrations.registry import RoutedAdamW, RoutedMuon

__all__ = ["register"]


def register() -> None:
    """Add "lorapreadamw" and "lorapremuon" to timm's optimizers.

    `create_optimizer_v2(model, "lorapreadamw", lr=1e-3, weight_decay=0.05,
    groups=param_groups(model, rank=16))`: timm's groups, with weight decay and layer decay, are
    split by the routes of `groups`.

    The names have no underscore: timm drops everything up to one, and "lorapre_adamw" is its AdamW.
    `create_optimizer_v2` sets a momentum of 0.9 unless told otherwise, for "lorapremuon" too.
    """
    for cls, has_momentum in ((RoutedAdamW, False), (RoutedMuon, True)):
        name = cls.__name__.replace("Routed", "lorapre").lower()
        # timm drops betas silently where has_betas is false; LoRAPreMuon refuses them by name.
        info = OptimInfo(name, cls, has_eps=True, has_betas=True, has_momentum=has_momentum)
        default_registry.register(info)
