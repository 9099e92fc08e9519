"""`lorapre plan` against the allocator: the peak of a training step of small models, with random weights.

python benchmarks/predicted.py
"""

import itertools
import warnings
from typing import Any, NamedTuple

import torch
from allocations import peak_bytes
from torch.optim import Optimizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
)

from lorapre import LoRAPreAdamW, gradient_release, param_groups
from lorapre_recipes.plan.memory import moments, routed
from lorapre_recipes.plan.settings import Settings
from lorapre_recipes.plan.trace import batch, loss, trace
from lorapre_recipes.train.optim import DTYPES, state_bytes, storage_bytes

LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_hidden_layers": 2}
WIDE = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 4, "num_hidden_layers": 2}
GPT2 = {"n_embd": 256, "n_head": 4, "n_layer": 2}
VIT = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2}
VIT |= {"image_size": 56, "patch_size": 4}
MODELS: dict[str, tuple[PretrainedConfig, int, int]] = {  # with a batch: sequences, and tokens of each
    "Llama": (LlamaConfig(**LLAMA, vocab_size=8_000, tie_word_embeddings=False), 1, 512),
    "Llama, wide": (LlamaConfig(**WIDE, vocab_size=8_000, tie_word_embeddings=False), 1, 64),
    "GPT-2": (GPT2Config(**GPT2, vocab_size=8_000, bos_token_id=0, eos_token_id=0), 1, 512),
    "ViT": (ViTConfig(**VIT), 48, 0),
}


class Case(NamedTuple):
    """A model and how it trains."""

    model: str
    dtype: Any
    release: bool
    checkpointing: bool
    optimizer: Any = "lorapre-adamw"
    accumulation: int = 1
    precision: Any = "fp32"

    def settings(self) -> Settings:
        _, size, length = MODELS[self.model]
        return Settings(
            optimizer=self.optimizer,
            rank=None if self.optimizer == "adamw" else 16,
            dtype=self.dtype,
            release=self.release,
            accumulation=self.accumulation,
            precision=self.precision,
            gradient_checkpointing=self.checkpointing,
            batch_size=size,
            sequence_length=length or None,
        )

    def build(self, device: str) -> PreTrainedModel:
        config = type(MODELS[self.model][0]).from_dict(MODELS[self.model][0].to_dict())
        kind = AutoModel if self.model == "ViT" else AutoModelForCausalLM
        with torch.device(device):
            return kind.from_config(config, dtype=DTYPES[self.dtype])

    def predicted(self) -> int:
        """The planned peak in bytes."""
        model, settings = self.build("meta"), self.settings()
        weights = routed(model, settings)
        return max(x.peak for x in moments(weights, settings, trace(model, settings)))

    def measured(self) -> int:
        """The peak in bytes that torch's allocator counts, with all that is there before the step."""
        model, settings = self.build("cpu"), self.settings()
        optimizer: Optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        if settings.low_rank:
            optimizer = LoRAPreAdamW(param_groups(model, rank=settings.rank))
        if self.release:
            gradient_release(model, optimizer)
        if self.checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # newer transformers have another name for it
                model.gradient_checkpointing_enable()
        inputs = {name: torch.zeros_like(x, device="cpu") for name, x in batch(model, settings).items()}
        model.train()

        def step() -> None:
            for _ in range(self.accumulation):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
                    total = loss(model(**inputs))
                total.backward()
                del total
            optimizer.step()
            optimizer.zero_grad()

        step()
        before = storage_bytes(*model.parameters(), *model.buffers(), *inputs.values())
        return peak_bytes(step) + before + state_bytes(optimizer)


CASES = [
    Case(*each)
    for each in itertools.product(MODELS, DTYPES, (False, True), (False, True))
    if each[0] != "Llama, wide" or not each[-1]  # it has few activations
]
CASES += [Case("Llama, wide", dtype, False, False, "adamw") for dtype in DTYPES]
CASES += [Case("Llama, wide", dtype, False, False, accumulation=2) for dtype in DTYPES]
CASES += [Case("ViT", "fp32", False, False, precision="bf16")]


def main() -> None:
    """Print the table."""
    print("| model | optimizer | dtype | release | checkpointing | predicted, MiB | measured, MiB | error |")
    print("|---|---|---|---|---|---:|---:|---:|")
    for case in CASES:
        predicted, measured = case.predicted(), case.measured()
        switches = ["yes" if on else "no" for on in (case.release, case.checkpointing)]
        accumulated = f", {case.accumulation} batches" if case.accumulation > 1 else ""
        model = case.model + accumulated + (", autocast" if case.precision == "bf16" else "")
        words = [model, case.optimizer, case.dtype, *switches]
        figures = f"{predicted / 2**20:.1f} | {measured / 2**20:.1f} | {predicted / measured - 1:+.1%}"
        print(f"| {' | '.join(words)} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
