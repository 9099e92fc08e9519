"""LoRA-Pre in Lightning, whose `configure_optimizers` takes the optimizers as they are."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lorapre.optimizers import LoRAPreOptimizer
from lorapre.report import coverage

__all__ = ["CoverageLogger"]


class CoverageLogger(Callback):
    """Log `lorapre.coverage` of every optimizer, on rank 0, when training starts, then its `stats`.

    The weights are where the strategy has put them by then: bytes are those of this process.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log which parameter took which route."""
        for optimizer in trainer.optimizers:
            rank_zero_info(f"{type(optimizer).__name__}\n{coverage(optimizer)}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log "lorapre/captured_min" and so on; of a second optimizer "lorapre1/captured_min"."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or trainer.global_step % every:
            return
        for number, optimizer in enumerate(trainer.optimizers):
            stats = optimizer.stats() if isinstance(optimizer, LoRAPreOptimizer) else {}
            pl_module.log_dict({f"lorapre{number or ''}/{name}": x for name, x in stats.items()})
