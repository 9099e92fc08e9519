"""Commands that train nothing: `lorapre plan` and `lorapre arithmetic`."""

from pathlib import Path
from typing import Any

from lorapre_recipes.cli.options import options
from lorapre_recipes.config import ArithmeticConfig, UserError
from lorapre_recipes.plan.settings import Mesh, Settings


@options(Settings, preset=True)
def plan(
    model: str, /, *, mesh: list[str] | None = None, against: bool = False, changes: dict[str, Any]
) -> int:
    """Compute the peak memory of a training step of a model, without its weights.

    A forward and backward pass is traced on one GPU. With --mesh activations are left out. The exit
    code is 3 for a plan that does not fit into the budget. A run folder has its optimizer and
    options, a preset its rank; without them it is lorapre-adamw in float32.

    Args:
        model: a Hugging Face config (a name on the hub, a folder, a config.json), a run folder or a
            preset of `lorapre pretrain`, or one that is built in: llama-60m, -130m, -350m, -1b,
            -7b, llama-3.1-8b, -70b, -405b.
        mesh: GPUs: fsdp=8 (FSDP2), hsdp=4x8 (four replicas of eight shards), tp=8 (tensor
            parallel), or both kinds with a comma: fsdp=128,tp=8. May be given three times.
        against: print a second table, with AdamW, 8-bit AdamW, GaLore and LoRA at the same rank.
        changes: the other options.
    """
    settings = Settings.complete(model, changes)
    meshes = [Mesh.parse(text) for text in mesh or ()]
    if against and meshes:
        raise UserError("--against: plans one GPU; leave out --mesh")
    from lorapre_recipes.plan.tables import render

    text, fits = render(model, settings, meshes)
    if against:
        from lorapre_recipes.plan import against as comparison

        text += f"\n\n{comparison.against(model, settings)}"
    print(text)
    return 0 if fits else 3


@options(ArithmeticConfig)
def arithmetic(out: Path, /, *, changes: dict[str, Any]) -> None:
    """Write a small arithmetic reasoning task: stories with a question, and worked-out answers.

    It is for models of a million parameters, which a CPU can train from nothing: see
    docs/finetuning-results.md. The folder then holds train.jsonl and test.jsonl with GSM8K's
    fields, and to pre-train with a tokenizer and text.jsonl, where stories have no answers.

    Args:
        out: a folder, new or empty.
        changes: the other options.
    """
    sizes = ArithmeticConfig(**changes)
    from lorapre_recipes.data.arithmetic import write_task

    write_task(out, sizes)
    problems = f"{sizes.train:,} problems to train on, {sizes.test:,} to test"
    print(f"{problems}, {sizes.text:,} documents to pre-train on: {out}")
