"""`lorapre plan`."""

from __future__ import annotations

from lorapre_recipes.config import Compress, PlannedOptimizer, Precision, Variant


def plan(
    model: str,
    /,
    *,
    rank: int | None = None,
    optimizer: PlannedOptimizer = "lorapre-adamw",
    variant: Variant | None = None,
    compress: Compress | None = None,
    dtype: Precision = "fp32",
    release: bool = False,
    rules: list[str] | None = None,
    freeze: list[str] | None = None,
    mesh: list[str] | None = None,
) -> None:
    """Compute memory and traffic of a training step of a model, without loading its weights.

    The peak is that of weights, gradients, optimizer state and what the step allocates for its own use;
    activations, which depend on the batch and on checkpointing, come on top.

    Args:
        model: a Hugging Face config (a name on the hub, a folder, a config.json), or one that is built in:
            llama-60m, -130m, -350m, -1b, -7b, llama-3.1-8b, -70b, -405b.
        rank: rank of the momenta (lorapre-* only).
        optimizer: what to train with.
        variant: of the algorithm (lorapre-* only). Default: split; of Muon calibrated.
        compress: which moments are low rank (lorapre-adamw only). Default: both.
        dtype: of weights and gradients.
        release: lorapre.gradient_release, which frees each gradient at once (lorapre-* only).
        rules: PATTERN=RANK or PATTERN=dense, for parameters in whose names the regular expression is found:
            embed_tokens=8. May be repeated; the first match wins (lorapre-* only).
        freeze: parameters in whose names this regular expression is found do not train. May be repeated.
        mesh: GPUs: fsdp=8 (FSDP2), hsdp=4x8 (four replicas of eight shards), tp=8 (tensor parallel), or
            both kinds with a comma: fsdp=128,tp=8. May be given three times, to compare.
    """
    from lorapre_recipes.plan.footprint import Mesh, Settings
    from lorapre_recipes.plan.tables import render

    settings = Settings(
        optimizer=optimizer,
        rank=rank,
        variant=variant,
        compress=compress,
        dtype=dtype,
        release=release,
        rules=tuple(rules or ()),
        freeze=tuple(freeze or ()),
    )
    print(render(model, settings, [Mesh.parse(text) for text in mesh or ()]))
