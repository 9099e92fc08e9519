"""LoRA-Pre in Lightning, whose `configure_optimizers` takes the optimizers as they are."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lorapre.report import coverage

__all__ = ["CoverageLogger"]


class CoverageLogger(Callback):
    """Log `lorapre.coverage` of every optimizer, on rank 0, when training starts.

    The weights are where the strategy has put them by then: bytes are those of this process.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log which parameter took which route."""
        for optimizer in trainer.optimizers:
            rank_zero_info(f"{type(optimizer).__name__}\n{coverage(optimizer)}")
