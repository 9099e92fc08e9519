"""accelerate takes the optimizers as they are: the same weights as a loop without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorapre import LoRAPreAdamW, LoRAPreMuon, coverage, param_groups

pytest.importorskip("accelerate", reason="accelerate is not installed: nothing to prepare")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """Accelerators of one process share their state, mixed precision included."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Embedding(16, 24),
        *(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24)),
        *(nn.LayerNorm(24), nn.Linear(24, 16)),
    )


BATCHES = torch.randint(16, (12, 4, 8), generator=torch.Generator().manual_seed(2))


def optimizer(net: nn.Module, cls: Any) -> torch.optim.Optimizer:
    return cls(param_groups(net, rank=3), lr=1e-2, weight_decay=0.1)


def loss(net: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(net(tokens).flatten(0, 1), (3 * tokens + 1).flatten() % 16)


class Run:
    """Model, optimizer and scheduler, prepared, and a loop over some of the batches."""

    def __init__(self, cls: Any, **options: Any) -> None:
        fresh = model()
        made = optimizer(fresh, cls)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(
            fresh, made, torch.optim.lr_scheduler.ExponentialLR(made, 0.9)
        )

    def train(self, batches: Tensor) -> list[float]:
        losses = []
        for tokens in batches:
            with self.accelerator.accumulate(self.model):
                value = loss(self.model, tokens)
                self.accelerator.backward(value)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(value.item())
        return losses


@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon])
def test_a_prepared_loop_is_the_plain_loop(cls: Any) -> None:
    run = Run(cls)
    run.train(BATCHES)
    plain = model()
    own = optimizer(plain, cls)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(own, 0.9)
    for pair in BATCHES.view(6, 2, 4, 8):
        for tokens in pair:
            (loss(plain, tokens) / 2).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        own.step()
        scheduler.step()
        own.zero_grad()
    for p, q in zip(run.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert str(coverage(run.optimizer)) == str(coverage(own))


@pytest.mark.parametrize("cls", [LoRAPreAdamW, LoRAPreMuon])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loaded_state_goes_on_as_if_uninterrupted(tmp_path: Path, cls: Any, precision: str) -> None:
    whole = Run(cls, mixed_precision=precision)
    losses = whole.train(BATCHES[:6])
    whole.accelerator.save_state(str(tmp_path))
    losses += whole.train(BATCHES[6:])
    resumed = Run(cls, mixed_precision=precision)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.train(BATCHES[6:]) == losses[6:]
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
