"""`lorapre plan` on one GPU: the traced peak against the allocator, the verdict and its advice."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from predicted import CASES, Case
from transformers import (
    BertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    ViTConfig,
)

from lorapre_recipes.plan.against import contenders
from lorapre_recipes.plan.settings import Settings
from lorapre_recipes.plan.shapes import meta_model
from lorapre_recipes.plan.trace import Trace, trace
from lorapre_recipes.presets import PRETRAIN
from lorapre_recipes.train.optim import build_optimizer, state_bytes, storage_bytes

Run = Callable[..., tuple[int, str, str]]
EIGHT_B = ["meta-llama/Llama-3.1-8B", "--rank", 128, "--dtype", "bf16"]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_peak_is_within_five_percent_of_the_allocator_s(case: Case) -> None:
    assert case.predicted() == pytest.approx(case.measured(), rel=0.05)


def traced(**options: Any) -> tuple[Trace, Settings, int]:
    """The trace of Llama-60M on 256 tokens, and the bytes of its largest weight."""
    settings = Settings(rank=16, **options)
    model = meta_model("llama-60m", torch.float32)
    largest = max(p.nbytes for p in model.parameters())
    return trace(model, settings), settings, largest


def test_released_gradients_are_never_there_all_at_once() -> None:
    found, _, largest = traced()
    weights = sum(p.nbytes for p in meta_model("llama-60m", torch.float32).parameters())
    kept = [moment["gradients"] for moment in found.moments()]
    assert max(kept) == kept[-1] == weights
    steps = {weight: 7 for _, _, weight in found.events if weight}
    released = list(found.moments(steps))
    assert largest <= max(moment["gradients"] for moment in released) < 1.5 * largest
    assert released[-1]["gradients"] == 0
    assert {moment["transient"] for moment in released} == {0, 7}


def test_logits_are_those_of_every_token() -> None:
    found, *_ = traced()
    logits = max(moment["logits"] for moment in found.moments())
    assert logits % (256 * 32_000 * 4) == 0
    assert logits >= 2 * 256 * 32_000 * 4
    assert list(found.moments())[-1]["logits"] == 0


def test_an_8b_model_fits_into_24_gib_or_says_what_is_missing(lorapre: Run) -> None:
    code, out, err = lorapre("plan", *EIGHT_B, "--budget", "24GiB")
    assert (code, err) == (3, "")
    assert max(map(len, out.splitlines())) <= 80
    saved = re.findall(r"^  (.*?) saves? ([\d.]+) \w*B$", out, re.MULTILINE)
    (*alone, (_, together)) = saved
    options = [word.replace("'", "") for option, _ in alone for word in option.split()]
    assert "--release" in options
    peak, much = (float(re.findall(rf"{key}: ([\d.]+) GiB", out)[0]) for key in ("peak", "does not fit"))
    assert peak - 24 == pytest.approx(much, abs=0.11)
    # The advice is what the plan with these options says.
    code, out, _ = lorapre("plan", *EIGHT_B, "--budget", "24GiB", *options)
    assert code == 0
    fits = re.findall(r"^fits: ([\d.]+) of 24 GiB$", out, re.MULTILINE)
    assert float(fits[0]) == pytest.approx(peak - float(together), abs=0.11)


@pytest.mark.parametrize(
    ("config", "batch"),
    [(BertConfig(), "1 x 512"), (GPT2Config(), "1 x 1024"), (ViTConfig(), "1 x 3 x 224 x 224")],
    ids=lambda x: getattr(x, "model_type", ""),
)
def test_other_models_are_traced(config: Any, batch: str, tmp_path: Path, lorapre: Run) -> None:
    config.save_pretrained(tmp_path)
    code, out, _ = lorapre("plan", tmp_path, "--rank", 8)
    assert code == 0
    assert f"a batch of {batch}, attention" in out


def test_a_model_that_looks_at_data_is_planned_without_activations(tmp_path: Path, lorapre: Run) -> None:
    sizes: Any = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
    }
    MixtralConfig(**sizes, experts_implementation="eager").save_pretrained(tmp_path)
    code, out, _ = lorapre("plan", tmp_path, "--rank", 8)
    assert code == 0
    assert "activations are not counted: MODEL" in out
    assert "peak, no activations" in out
    code, _, err = lorapre("plan", tmp_path, "--rank", 8, "--budget", "1GiB")
    assert code == 2
    assert "cannot be followed without data" in err


def test_a_model_that_changes_its_logits_is_planned_with_its_own_loss(tmp_path: Path, lorapre: Run) -> None:
    sizes: Any = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 512}
    Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1).save_pretrained(
        tmp_path
    )
    plain, chunked = (lorapre("plan", tmp_path, "--rank", 8, *more) for more in ((), ("--chunked-loss",)))
    assert (plain[0], plain[2]) == (0, "")
    assert chunked[:2] == plain[:2]
    assert chunked[2].startswith("lorapre: the model changes its logits before the loss")


def test_contenders_hold_what_their_optimizers_allocate(tmp_path: Path) -> None:
    for package in ("torchao", "pytorch_optimizer"):  # of the extra bench
        pytest.importorskip(package)
    sizes: Any = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    config = LlamaConfig(**sizes, vocab_size=300, max_position_embeddings=64)
    config.save_pretrained(tmp_path)
    columns = dict(contenders(str(tmp_path), Settings(rank=4)))
    for name, method in {"AdamW": "adamw", "GaLore": "galore"}.items():
        model = LlamaForCausalLM(config)
        run: Any = PRETRAIN["llama-tiny"](method)  # type: ignore[arg-type]
        optimizer = build_optimizer(model, run.replace(rank=4, refresh=200) if name == "GaLore" else run)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert columns[name]["state"] == state_bytes(optimizer), name
        assert columns[name]["weights"] == storage_bytes(*model.parameters())
    matrices = [p.shape for name, p in model.named_parameters() if "_proj" in name]
    adapters = sum(4 * 4 * (p + q) for p, q in matrices)
    assert columns["LoRA"]["weights"] == columns["AdamW"]["weights"] + adapters
    assert columns["LoRA"]["state"] == 2 * adapters
    eighth = columns["8-bit AdamW"]["state"] / columns["AdamW"]["state"]
    assert 0.25 < eighth < 0.3  # a byte in place of four, scales, and small weights in float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "--mesh", "fsdp=2"], "--against: plans one GPU; leave out --mesh"),
        (["--budget", "24"], "--budget '24': write a size, as in 24GiB or 80GB"),
        (["--budget", "0GiB"], "--budget '0GiB'"),
        (["--budget", "24GiB", "--mesh", "fsdp=2"], "--budget: activations of sharded weights"),
        (["--accumulation", "2", "--release"], "--release: gradients cannot be accumulated"),
        (["--accumulation", "2", "--against"], "--against: has no gradients to add to"),
        (["--sequence-length", "100000"], "--sequence-length 100000: the model reads"),
        (["--sequence-length", "1"], "--sequence-length: must be at least 2"),
        (["--batch-size", "0"], "--batch-size: must be at least 1"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], message: str, lorapre: Run) -> None:
    code, out, err = lorapre("plan", "llama-60m", "--rank", "8", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
