"""A training loop in plain PyTorch, after nanoGPT, with LoRAPreAdamW.

    python examples/nanogpt.py nanogpt.pt

It trains a small GPT on the bytes of this file. Started again, it goes on from its last checkpoint.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorapre import LoRAPreAdamW, coverage, param_groups

STEPS, WARMUP, SAVE_EVERY, LR, RANK, CLIP = 200, 20, 50, 1e-3, 16, 1.0
BATCH, LENGTH, WIDTH, HEADS, LAYERS = 16, 64, 128, 4, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DATA = torch.tensor(list(Path(__file__).read_bytes()))  # your tokens, such as np.memmap("train.bin")


class GPT(nn.Module):  # your model
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True, bias=False)
        blocks = [nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **options) for _ in range(LAYERS)]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=x.device)
        h = self.tokens(x) + self.positions.weight
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return F.cross_entropy(self.head(self.norm(h)).flatten(0, 1), targets.flatten())


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens, and the token after each, by the step alone: a run that goes on sees what is next."""
    starts = torch.randint(len(DATA) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    rows = torch.stack([DATA[i : i + LENGTH + 1] for i in starts]).to(DEVICE)
    return rows[:, :-1], rows[:, 1:]


def share(step: int) -> float:
    """The learning rate as a share of LR: a linear rise, then a cosine down to a tenth."""
    progress = (step - WARMUP) / max(1, STEPS - WARMUP)
    return (step + 1) / WARMUP if step < WARMUP else 0.55 + 0.45 * math.cos(math.pi * progress)


def main(checkpoint: Path) -> None:
    torch.manual_seed(0)
    model = GPT().to(DEVICE)
    optimizer = LoRAPreAdamW(param_groups(model, rank=RANK), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    print(coverage(optimizer))  # which weights have factors, and the bytes of state
    start, parts = 0, (model, optimizer, schedule)
    if checkpoint.exists():
        start, states = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    for step in range(start, STEPS):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = model(*batch(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            torch.save((step + 1, [part.state_dict() for part in parts]), f"{checkpoint}.new")
            Path(f"{checkpoint}.new").replace(checkpoint)  # whole, or not there
            print(f"step {step + 1}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
