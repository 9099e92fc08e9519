"""Pre-train a Llama from a config and leave a run folder: `lorapre pretrain`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from lorapre_recipes.config import PretrainConfig, parse_rules
from lorapre_recipes.data.stream import load_data
from lorapre_recipes.data.tokens import PADDING
from lorapre_recipes.train import distributed
from lorapre_recipes.train.optim import DTYPES, build_optimizer, freeze
from lorapre_recipes.train.session import check_machine, train
from lorapre_recipes.train.summary import Summary


def pretrain(config: PretrainConfig, out: Path, *, resume: bool = False, **session: Any) -> Summary:
    """Train from scratch, evaluate as it goes, fill the run folder `out`, and print the table.

    Arguments and errors are those of `session.train`, and StreamLost where a stream of data broke
    off for good.
    """
    distributed.join()
    check_machine(config)
    with distributed.first_on_its_machine():
        data = load_data(config, out if resume else None)
    set_seed(config.seed)
    model = build_model(config, data.tokenizer.eos_token_id)
    freeze(model, config.freeze)
    return train(
        config,
        out,
        model=model,
        optimizer=build_optimizer(model, config, parse_rules(config.rules)),
        tokenizer=data.tokenizer,
        data=data,
        collate=collate,
        resume=resume,
        **session,
    )


def build_model(config: PretrainConfig, end_of_document: int) -> LlamaForCausalLM:
    """A Llama with fresh weights, the same whatever the dtype but for rounding."""
    # The backward pass of torch's fused attention is slow on CPUs in bfloat16.
    slow = config.precision == "bf16" and not torch.accelerator.is_available()
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.sequence_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end_of_document,
        pad_token_id=None,
        attn_implementation="eager" if slow else "sdpa",  # type: ignore[call-arg]
    )
    model = LlamaForCausalLM(shape)
    model.to(DTYPES[config.dtype])  # type: ignore[arg-type]
    return model


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack sequences to (batch, length); the model shifts the labels itself.

    Padding is no label. As tokens it needs no mask: it stands at the end, where no other looks.
    """
    tokens = torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows])
    return {"input_ids": torch.where(tokens == PADDING, 0, tokens), "labels": tokens}
