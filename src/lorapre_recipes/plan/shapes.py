"""Models without weights, on the meta device: built in, or from a Hugging Face config."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lorapre_recipes.config import NOT_LOADED, UserError, user_errors
from lorapre_recipes.console import quieten
from lorapre_recipes.plan.settings import Model, pretrain_config


def llama(hidden: int, intermediate: int, heads: int, layers: int, **fields: Any) -> LlamaConfig:
    """A Llama of GaLore's and LoRA-Pre's pre-training: 32,000 tokens, a head of its own."""
    sizes: dict[str, Any] = dict(vocab_size=32_000, hidden_size=hidden, num_hidden_layers=layers)
    sizes |= dict(intermediate_size=intermediate, num_attention_heads=heads) | fields
    return LlamaConfig(**sizes, tie_word_embeddings=False)


# The published shapes of Llama 3.1: 128,256 tokens, eight heads of keys and values.
LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}

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


def meta_model(name: Model, dtype: torch.dtype) -> PreTrainedModel:
    """A model with parameters of `dtype` on the meta device.

    `name` is one in `BUILT_IN` (meta-llama/Llama-3.1-8B means the same and does not ask the hub),
    a config, a preset or a run folder of `lorapre pretrain`, a folder with a config.json, that file
    itself, or a model on the hub. Raises UserError where there is none.
    """
    from lorapre_recipes.train.pretrain import build_model  # not for those who need a shape alone

    quieten()
    wrong = f"MODEL {name}: transformers cannot build it"
    with user_errors(wrong, ValueError, ImportError), torch.device("meta"):
        if (run := pretrain_config(name)) is not None:
            model: PreTrainedModel = build_model(run, end_of_document=0)
        else:
            model = from_config(config_of(str(name)))
    model.to(dtype)  # type: ignore[arg-type]
    return model


def from_config(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    """The model of the class that a config names, or else of what transformers takes for it."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is not None:
        model: PreTrainedModel = named(config)
        return model
    causal = type(config) in AutoModelForCausalLM._model_mapping
    kind = AutoModelForCausalLM if causal else AutoModel
    return kind.from_config(config)  # type: ignore[no-untyped-call,no-any-return]


def config_of(name: str) -> transformers.PreTrainedConfig:
    """The config of a model, for the caller to change. Raises UserError: see `meta_model`."""
    built_in = BUILT_IN.get(name.removeprefix("meta-llama/").lower())
    path = Path(name).expanduser()
    if built_in is not None and not path.exists():
        return copy.deepcopy(built_in)
    if not path.exists() and (name.startswith((".", "/", "~")) or name.endswith(".json")):
        raise UserError(f"MODEL {name}: there is no such folder or file")
    missing = f"not built in ({', '.join(BUILT_IN)}), and no config that transformers can read"
    with user_errors(f"MODEL {name}: {missing}", *NOT_LOADED):
        found: transformers.PreTrainedConfig = AutoConfig.from_pretrained(
            path if path.exists() else name
        )
    return found
