"""The presets: sizes of the models they build, and the ratios of the protocol that they keep."""

from typing import get_args

import pytest
import torch

from lorapre_recipes.config import OptimizerName
from lorapre_recipes.presets import PRETRAIN as PRESETS
from lorapre_recipes.train.pretrain import build_model

PARAMETERS = {
    "llama-tiny": 4_212_992,
    "llama-arithmetic": 889_984,
    "llama-1m": 1_053_824,
    "llama-5m": 5_004_032,
    "llama-20m": 20_010_496,
    "llama-60m": 58_073_600,
    "llama-130m": 134_105_856,
    "llama-350m": 367_969_280,
    "llama-1b": 1_339_082_752,
    "llama-7b": 6_738_415_616,
    "llama-7b-24gb": 6_738_415_616,
}

# rank and steps; LoRA-Pre's Table 1, for 7B GaLore's
PUBLISHED = {
    "llama-60m": (128, 10_000),
    "llama-130m": (256, 20_000),
    "llama-350m": (256, 60_000),
    "llama-1b": (512, 100_000),
    "llama-7b": (1024, 150_000),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        model = build_model(PRESETS[name]("lorapre-adamw"), end_of_document=0)
    assert model.num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
@pytest.mark.parametrize("name", PRESETS)
def test_protocol(name: str, optimizer: str) -> None:
    config = PRESETS[name](optimizer)
    assert (config.preset, config.optimizer) == (name, optimizer)
    assert (config.weight_decay, config.warmup, config.final_lr) == (0, 0.1, 0.1)
    assert round(config.intermediate_size / config.hidden_size, 1) == 2.7


@pytest.mark.parametrize(
    ("name", "steps", "tokens"),
    [("llama-1m", 160, 32_768), ("llama-5m", 1000, 8192), ("llama-20m", 2000, 8192)],
)
def test_scaled_down(name: str, steps: int, tokens: int) -> None:
    config = PRESETS[name]("lorapre-adamw")
    assert (config.steps, config.tokens_per_step) == (steps, tokens)
    assert config.rank == config.hidden_size // 8


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_published(name: str) -> None:
    config = PRESETS[name]("lorapre-adamw")
    assert (config.rank, config.steps) == PUBLISHED[name]
    assert (config.sequences_per_step, config.sequence_length, config.packed) == (512, 256, False)
    assert (config.data, config.validation_split) == ("allenai/c4:en", "validation")
    assert (config.tokenizer, config.vocab_size) == ("google-t5/t5-base", 32_000)
    assert (config.precision, config.dtype, config.scale) == ("bf16", "bf16", 0.25)
    assert config.eval_sequences % config.batch_size == 0
