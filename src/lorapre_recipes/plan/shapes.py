"""Models without weights, on the meta device: built in, or from a Hugging Face config."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lorapre_recipes.config import UserError


def llama(*, hidden: int, intermediate: int, heads: int, layers: int) -> LlamaConfig:
    """The Llamas of the pre-training experiments in GaLore and LoRA-Pre: 32,000 tokens, a head of its own."""
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        tie_word_embeddings=False,
    )


def llama_3(*, hidden: int, intermediate: int, heads: int, layers: int) -> LlamaConfig:
    """The published shapes of Llama 3.1: 128,256 tokens, eight heads of keys and values."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        tie_word_embeddings=False,
    )


BUILT_IN: dict[str, LlamaConfig] = {
    "llama-60m": llama(hidden=512, intermediate=1376, heads=8, layers=8),
    "llama-130m": llama(hidden=768, intermediate=2048, heads=12, layers=12),
    "llama-350m": llama(hidden=1024, intermediate=2736, heads=16, layers=24),
    "llama-1b": llama(hidden=2048, intermediate=5461, heads=32, layers=24),
    "llama-7b": llama(hidden=4096, intermediate=11008, heads=32, layers=32),
    "llama-3.1-8b": llama_3(hidden=4096, intermediate=14336, heads=32, layers=32),
    "llama-3.1-70b": llama_3(hidden=8192, intermediate=28672, heads=64, layers=80),
    "llama-3.1-405b": llama_3(hidden=16384, intermediate=53248, heads=128, layers=126),
}


def meta_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model with parameters of `dtype` on the meta device.

    Args:
        name: a name in `BUILT_IN` (meta-llama/Llama-3.1-8B means the same and does not ask the hub), a folder
            with a config.json, the file itself, or a model on the Hugging Face hub.
        dtype: of all parameters.

    Raises:
        UserError: there is no such model, or it needs code that is not in transformers.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    # It warns at every retry; the last one ends in an error of ours.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    config = config_of(name)
    try:
        with torch.device("meta"):
            model = _architecture(config)
    except (ValueError, ImportError) as error:
        raise UserError(f"MODEL {name}: transformers cannot build it: {_first_line(error)}") from error
    model.to(dtype)  # type: ignore[arg-type]
    return model


def config_of(name: str) -> transformers.PreTrainedConfig:
    """The config of a model, which is the caller's to change. Raises UserError: see `meta_model`."""
    built_in = BUILT_IN.get(name.removeprefix("meta-llama/").lower())
    path = Path(name).expanduser()
    if built_in is not None and not path.exists():
        return copy.deepcopy(built_in)
    if not path.exists() and (name.startswith((".", "/", "~")) or name.endswith(".json")):
        raise UserError(f"MODEL {name}: there is no such folder or file")
    try:
        config: transformers.PreTrainedConfig = AutoConfig.from_pretrained(path if path.exists() else name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"MODEL {name}: not built in ({', '.join(BUILT_IN)}), and no config that transformers can read: "
            f"{_first_line(error)}"
        ) from error
    return config


def _architecture(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    """The class that the config names, or what transformers takes for its type."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is not None:
        model: PreTrainedModel = named(config)
    elif type(config) in AutoModelForCausalLM._model_mapping:
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    else:
        model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    return model


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
