"""Models without weights, on the meta device: built in, or from a Hugging Face config."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lorapre_recipes.config import NOT_LOADED, UserError, user_errors
from lorapre_recipes.console import quieten


def llama(hidden: int, intermediate: int, heads: int, layers: int, **fields: Any) -> LlamaConfig:
    """The Llamas of the pre-training experiments in GaLore and LoRA-Pre: 32,000 tokens, a head of its own."""
    return LlamaConfig(
        vocab_size=fields.pop("vocab_size", 32_000),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        tie_word_embeddings=False,
        **fields,
    )


# The published shapes of Llama 3.1: 128,256 tokens, eight heads of keys and values.
LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8}

BUILT_IN: dict[str, LlamaConfig] = {
    "llama-60m": llama(512, 1376, heads=8, layers=8),
    "llama-130m": llama(768, 2048, heads=12, layers=12),
    "llama-350m": llama(1024, 2736, heads=16, layers=24),
    "llama-1b": llama(2048, 5461, heads=32, layers=24),
    "llama-7b": llama(4096, 11008, heads=32, layers=32),
    "llama-3.1-8b": llama(4096, 14336, heads=32, layers=32, **LLAMA_3),
    "llama-3.1-70b": llama(8192, 28672, heads=64, layers=80, **LLAMA_3),
    "llama-3.1-405b": llama(16384, 53248, heads=128, layers=126, **LLAMA_3),
}


def meta_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model with parameters of `dtype` on the meta device.

    `name` is one in `BUILT_IN` (meta-llama/Llama-3.1-8B means the same and does not ask the hub), a folder
    with a config.json, the file itself, or a model on the hub. Raises UserError where there is none.
    """
    quieten()
    config = config_of(name)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    wrong = f"MODEL {name}: transformers cannot build it"
    with user_errors(wrong, ValueError, ImportError), torch.device("meta"):
        if named is not None:
            model: PreTrainedModel = named(config)
        else:  # what transformers takes for the type
            causal = type(config) in AutoModelForCausalLM._model_mapping
            kind = AutoModelForCausalLM if causal else AutoModel
            model = kind.from_config(config)  # type: ignore[no-untyped-call]
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
    missing = f"not built in ({', '.join(BUILT_IN)}), and no config that transformers can read"
    with user_errors(f"MODEL {name}: {missing}", *NOT_LOADED):
        config: transformers.PreTrainedConfig = AutoConfig.from_pretrained(
            path if path.exists() else name
        )
    return config
