"""Lightning's Trainer with LoRA-Pre in configure_optimizers, run for a few steps."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorapre import LoRAPreAdamW, LoRAPreMuon, param_groups

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: no Trainer to run")

from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from lorapre.integrations.lightning import CoverageLogger  # noqa: E402

# Warnings of Lightning about itself and this machine.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec.*is deprecated",
    "ignore:.*isinstance.treespec, LeafSpec.. is deprecated",
    "ignore:Checkpoint directory .* exists and is not empty",
)


class Model(LightningModule):
    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.cls = cls
        self.embedding = nn.Embedding(16, 24)
        self.hidden = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 16)

    def training_step(self, tokens: Tensor, batch_index: int) -> Tensor:
        logits = self.head(self.norm(self.hidden(self.embedding(tokens))))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), (3 * tokens + 1).flatten() % 16)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.cls(param_groups(self, rank=3), lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Loader:
    """Batches in order, resumed at the saved position. PyTorch's loader starts the epoch anew."""

    def __init__(self, batches: Tensor) -> None:
        self.batches, self.position = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < len(self):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def train(
    folder: Path, cls: Any = LoRAPreAdamW, resume: str | None = None, **options: Any
) -> tuple[Trainer, Model]:
    torch.manual_seed(1)
    model = Model(cls)
    tokens = torch.randint(16, (12, 4, 8), generator=torch.Generator().manual_seed(2))
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, max_steps=6, accumulate_grad_batches=2,
        gradient_clip_val=0.5, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            CoverageLogger(),
            ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1),
        ],
        **options,
    )  # fmt: skip
    trainer.fit(model, Loader(tokens), ckpt_path=resume)
    return trainer, model


@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon])
def test_training_with_accumulation_clipping_and_bf16(tmp_path: Path, cls: Any) -> None:
    trainer, model = train(tmp_path, cls, precision="bf16-mixed")
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is cls
    for p in model.parameters():
        assert optimizer.state[p]["step"] == 6
        assert all(value.dtype == torch.float32 for value in optimizer.state[p].values())
    assert trainer.callback_metrics["loss"] < 2.7  # log(16) is 2.77


@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon])
def test_resumed_equals_uninterrupted(tmp_path: Path, cls: Any) -> None:
    trainer, whole = train(tmp_path, cls)
    resumed_trainer, resumed = train(tmp_path, cls, resume=str(tmp_path / "step=3.ckpt"))
    assert resumed_trainer.global_step == 6
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        state, other = trainer.optimizers[0].state[p], resumed_trainer.optimizers[0].state[q]
        assert state.keys() == other.keys()
        assert all(torch.equal(state[key], other[key]) for key in state)


def test_coverage_is_logged_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(tmp_path)
    (message,) = [text for text in caplog.messages if text.startswith("LoRAPreAdamW\nparameter")]
    assert "2 low-rank weights hold" in message


def test_numbers_of_the_steps_reach_the_metrics(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, log_every_n_steps=2)
    (optimizer,) = trainer.optimizers
    stats = {f"lorapre/{name}": float(x) for name, x in optimizer.stats().items()}
    logged = {name: float(x) for name, x in trainer.logged_metrics.items()}
    assert len(stats) == 4
    assert stats.items() <= logged.items()
