"""`lorapre plan` against the allocator: the peak of a training step, with random weights.

    python benchmarks/predicted.py
    python benchmarks/predicted.py --model llama-3.1-8b --rank 128 --device cuda

Without a model, the table of docs/benchmarks.md: small models on the CPU.
"""

import gc
import itertools
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from allocations import peak_bytes
from common import Column, NotMeasured, Result, Row, device_of
from cyclopts import App
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
from lorapre_recipes.console import binary
from lorapre_recipes.plan.memory import moments, routed
from lorapre_recipes.plan.settings import Settings
from lorapre_recipes.plan.shapes import meta_model
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
    """A model, of MODELS or what `lorapre plan` takes, and how it trains."""

    model: str
    dtype: Any
    release: bool
    checkpointing: bool
    optimizer: Any = "lorapre-adamw"
    accumulation: int = 1
    precision: Any = "fp32"
    rank: int = 16
    ends: Any = "dense"

    def settings(self) -> Settings:
        _, size, length = MODELS.get(self.model, (None, 1, 0))
        return Settings(
            optimizer=self.optimizer,
            rank=None if self.optimizer == "adamw" else self.rank,
            ends=self.ends,
            dtype=self.dtype,
            release=self.release,
            accumulation=self.accumulation,
            precision=self.precision,
            gradient_checkpointing=self.checkpointing,
            batch_size=size,
            sequence_length=length or None,
        )

    def build(self, device: str) -> PreTrainedModel:
        if self.model in MODELS:
            config = type(MODELS[self.model][0]).from_dict(MODELS[self.model][0].to_dict())
        else:
            config = meta_model(self.model, DTYPES[self.dtype]).config
        kind = AutoModel if self.model == "ViT" else AutoModelForCausalLM
        with torch.device(device):
            return kind.from_config(config, dtype=DTYPES[self.dtype])

    def predicted(self) -> int:
        """The planned peak in bytes."""
        model, settings = self.build("meta"), self.settings()
        weights = routed(model, settings)
        return max(x.peak for x in moments(weights, settings, trace(model, settings)))

    def measured(self, device: str = "cpu") -> int:
        """The peak in bytes that torch's allocator counts, with all that is there before the step."""
        model, settings = self.build(device), self.settings()
        optimizer: Optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        if settings.low_rank:
            optimizer = LoRAPreAdamW(param_groups(model, rank=settings.rank, ends=settings.ends))
        if self.release:
            gradient_release(model, optimizer)
        if self.checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # newer transformers have another name for it
                model.gradient_checkpointing_enable()
        inputs = {name: torch.zeros_like(x, device=device) for name, x in batch(model, settings).items()}
        model.train()

        def step() -> None:
            for _ in range(self.accumulation):
                with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
                    total = loss(model(**inputs))
                total.backward()
                del total
            optimizer.step()
            optimizer.zero_grad()

        step()
        gc.collect()
        before = storage_bytes(*model.parameters(), *model.buffers(), *inputs.values())
        before += state_bytes(optimizer)
        if device == "cuda":  # with what the libraries of CUDA keep, and the allocator's own rounding
            before = torch.cuda.memory_allocated()
        return before + peak_bytes(step, device)


CASES = [
    Case(*each)
    for each in itertools.product(MODELS, DTYPES, (False, True), (False, True))
    if each[0] != "Llama, wide" or not each[-1]  # it has few activations
]
CASES += [Case("Llama, wide", dtype, False, False, "adamw") for dtype in DTYPES]
CASES += [Case("Llama, wide", dtype, False, False, accumulation=2) for dtype in DTYPES]
CASES += [Case("ViT", "fp32", False, False, precision="bf16")]


COLUMNS = [
    Column("optimizer", "optimizer"),
    Column("rank", "r"),
    Column("measured", "measured", "MiB"),
    Column("predicted", "predicted", "MiB"),
    Column("error", "error", "+.1%"),
    Column("reserved", "reserved", "MiB"),
]

app = App(help=__doc__)


@app.default
def main(
    *,
    model: str | None = None,
    rank: int = 128,
    dtype: Literal["fp32", "bf16"] = "fp32",
    ends: Literal["dense", "low-rank"] = "dense",
    release: bool = False,
    gradient_checkpointing: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    cap: float | None = None,
    out: Path | None = None,
) -> None:
    """Measure the peak of a training step of LoRAPreAdamW, beside what `lorapre plan` says.

    Args:
        model: what `lorapre plan` takes, with one sequence of as many tokens. Default: all small models.
        rank: as in `lorapre plan`.
        dtype: as in `lorapre plan`.
        ends: as in `lorapre plan`.
        release: as in `lorapre plan`.
        gradient_checkpointing: as in `lorapre plan`.
        device: cpu or cuda.
        cap: memory that the allocator may take on the GPU, in GB (10^9 bytes).
        out: folder of the result. Default: benchmarks/results/DATE_HARDWARE.
    """
    if model is None:
        table()
        return
    if cap and device != "cuda":
        raise SystemExit("predicted.py: --cap is for --device cuda")
    case = Case(model, dtype, release, gradient_checkpointing, rank=rank, ends=ends)
    row: Row = {"optimizer": "LoRA-Pre, split", "rank": rank, "predicted": case.predicted()}
    notes = [f"The prediction: `{plan(case)}`."]
    try:
        device_of(device)
        if cap:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 1e9 / total))
            notes.append(f"The allocator may take {cap:g} GB of the GPU's {total / 1e9:.1f} GB.")
        row["measured"] = case.measured(device)
        row["error"] = row["predicted"] / row["measured"] - 1
    except NotMeasured as error:
        row["reason"] = str(error)
    except torch.OutOfMemoryError:
        row["reason"] = f"out of memory, with {binary(torch.cuda.max_memory_allocated())} allocated"
    if device == "cuda" and torch.cuda.is_available():
        row["reserved"] = torch.cuda.memory_reserved()
        notes += [
            "measured: the most that torch's allocator had given out in the second step, cuBLAS's workspace "
            "included; reserved: what it held of the GPU. CUDA's own context comes on top.",
            f"Retries of the allocator: {torch.cuda.memory_stats().get('num_alloc_retries', 0)}.",
        ]
    Result(
        benchmark="predicted",
        title=f"Peak of a training step: {Path(model).name}, {dtype}, {tokens(case)}, MiB",
        device=device,
        settings={"name": [model, dtype], "rank": rank, "cap": cap},
        columns=COLUMNS,
        rows=[row],
        notes=notes,
    ).save(out)


def plan(case: Case) -> str:
    """The command that makes the same prediction."""
    switches = {"--ends low-rank": case.ends != "dense", "--release": case.release}
    switches["--gradient-checkpointing"] = case.checkpointing
    options = [f"--rank {case.rank}", f"--dtype {case.dtype}", *(x for x in switches if switches[x])]
    return " ".join(["lorapre plan", case.model, *options])


def tokens(case: Case) -> str:
    """Sequences x tokens of each."""
    settings = case.settings()
    return f"{settings.batch_size} x {settings.length(case.build('meta').config)} tokens"


def table() -> None:
    """Print the table of all small models."""
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
    app()
