"""LoRA-Pre in pytorch_optimizer's `create_optimizer` and `load_optimizer`."""

from pytorch_optimizer.optimizer import OPTIMIZERS

from lorapre.integrations.registry import RoutedAdamW, RoutedMuon

__all__ = ["register"]


def register() -> None:
    """Add "lorapreadamw" and "lorapremuon" to pytorch_optimizer's optimizers.

    `create_optimizer(model, "lorapreadamw", lr=1e-3, groups=param_groups(model, rank=8))` splits
    its groups, with and without weight decay, by the routes of `groups`.
    `load_optimizer("lorapreadamw")` takes the groups in the place of the parameters.
    """
    OPTIMIZERS.update(lorapreadamw=RoutedAdamW, lorapremuon=RoutedMuon)
