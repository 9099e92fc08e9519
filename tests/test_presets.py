"""The presets: sizes of the models they build, and the ratios of the protocol that they keep."""

import pytest
import torch

from lorapre_recipes.config import CHOICES
from lorapre_recipes.presets import PRESETS
from lorapre_recipes.pretrain import build_model

PARAMETERS = {
    "llama-tiny": 4_212_992,
    "llama-1m": 1_053_824,
    "llama-5m": 5_004_032,
    "llama-20m": 20_010_496,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        model = build_model(PRESETS[name]("lorapre-adamw"), end_of_document=0)
    assert model.num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("optimizer", CHOICES["optimizer"])
@pytest.mark.parametrize("name", PRESETS)
def test_protocol(name: str, optimizer: str) -> None:
    config = PRESETS[name](optimizer)
    assert (config.preset, config.optimizer) == (name, optimizer)
    assert (config.weight_decay, config.warmup, config.final_lr) == (0, 0.1, 0.1)
    assert round(config.intermediate_size / config.hidden_size, 1) == 2.7


@pytest.mark.parametrize("name", ["llama-1m", "llama-5m", "llama-20m"])
def test_scaled_down(name: str) -> None:
    config = PRESETS[name]("lorapre-adamw")
    assert config.tokens_per_step == 8192
    assert config.rank == config.hidden_size // 8
