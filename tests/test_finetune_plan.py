"""`lorapre plan --rules --freeze`: what a training step of a small model allocates."""

from typing import Any

import pytest
import torch
from allocations import peak_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from lorapre import gradient_release
from lorapre_recipes.config import RunConfig, parse_rules
from lorapre_recipes.plan.memory import memory, routed
from lorapre_recipes.plan.settings import Settings
from lorapre_recipes.presets import llama_tiny
from lorapre_recipes.train.optim import DTYPES, build_optimizer, freeze, state_bytes, storage_bytes
from test_recipes_plan import check_peak

ENDS = "embed_tokens|lm_head"
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "low rank": {"rules": (f"{ENDS}=8",)},
    "frozen": {"freeze": ("embed_tokens", "lm_head")},
    "first match": {"rules": ("lm_head=16", f"{ENDS}=4", "q_proj=dense")},
}


def llama(dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=16_000,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "way"), [*(("lorapre-adamw", way) for way in WAYS), ("lorapre-muon", "frozen")]
)
def test_peak_is_what_a_training_step_allocates(optimizer: Any, way: str, release: bool) -> None:
    settings = Settings(optimizer=optimizer, rank=8, release=release, dtype="bf16", **WAYS[way])
    model = llama(DTYPES["bf16"])
    weights = routed(model, settings)  # freezes as well
    config: RunConfig = llama_tiny(optimizer).replace(rank=8, dtype="bf16")
    built = build_optimizer(model, config, parse_rules(settings.rules))
    if release:
        handle = gradient_release(model, built)  # type: ignore[arg-type]
    tokens = torch.zeros(1, 2, dtype=torch.int64)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        built.step()
        built.zero_grad()

    step()
    planned = memory(weights, settings)
    assert planned.state == state_bytes(built)
    assert planned.weights == storage_bytes(*model.parameters())
    counted = peak_bytes(step) + planned.weights + planned.state
    check_peak(weights, settings, counted)
    if release:
        handle.remove()


def test_freeze_is_the_optimizers_too() -> None:
    model = llama(torch.float32)
    freeze(model, ("layers.0", "norm"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "layers.0" in name or "norm" in name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "nowhere=4"], "--rules: rules: no parameter is left for 'nowhere'"),
        (["--rules", "lm_head"], "--rules 'lm_head': write PATTERN=RANK"),
        (["--freeze", "nowhere"], "--freeze 'nowhere': found in the name of no parameter"),
        (["--freeze", "."], "--freeze: leaves nothing to train"),
        (["--freeze", "proj"], "no trainable parameter gets low-rank momenta"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], message: str, lorapre: Any) -> None:
    code, out, err = lorapre("plan", "llama-60m", "--rank", "8", *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
