"""Fine-tune a causal language model on questions and answers: `lorapre finetune`.

All weights with one of the optimizers, or adapters of peft with AdamW. The loss is that of the
answers' tokens.
"""

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.optim import AdamW, Optimizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from lorapre_recipes.config import NOT_LOADED, FinetuneConfig, UserError, parse_rules, user_errors
from lorapre_recipes.data import tokens
from lorapre_recipes.data.examples import labels_per_batch, load_examples
from lorapre_recipes.train import distributed
from lorapre_recipes.train.optim import DTYPES, build_optimizer, freeze
from lorapre_recipes.train.runs import MERGED, PARTIAL, model_folder
from lorapre_recipes.train.session import check_machine, train
from lorapre_recipes.train.summary import Summary

ALPHA = 2  # times the rank: 16 at rank 8
LORA_PLUS_RATIO = 16  # learning rate of B over that of A, as the paper of LoRA+ has it


def finetune(config: FinetuneConfig, out: Path, **session: Any) -> Summary:
    """Train, evaluate as it goes, fill the run folder `out`, and print the table.

    The arguments and errors are those of `session.train`.
    """
    distributed.join()
    if distributed.processes() > 1:
        raise UserError("lorapre finetune: runs on one process; start it without torchrun")
    check_machine(config)
    folder = model_folder(config.model)
    tokenizer = load_tokenizer(config.model, folder)
    with no_model(config.model):
        shape = AutoConfig.from_pretrained(folder).get_text_config()
    longest = getattr(shape, "max_position_embeddings", math.inf)
    if config.sequence_length > longest:
        option = f"--sequence-length {config.sequence_length}"
        raise UserError(f"{option}: the model reads at most {longest} tokens")
    data = load_examples(config, tokenizer)
    set_seed(config.seed)
    base = load_model(config.model, folder, DTYPES[config.dtype])
    freeze(base, config.freeze)
    model, optimizer = with_optimizer(base, config)
    summary = train(
        config,
        out,
        model=model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        data=data._replace(facts=data.facts | {"model": folder}),
        collate=collator(tokenizer, packing=config.packing),
        eval_on_start=not session.get("resume"),
        eval_items=labels_per_batch(data.validation, config.batch_size),
        include_num_input_tokens_seen="all" if config.packing else "non_padding",
        **session,
    )
    if isinstance(model, PeftModel):
        model.merge_and_unload().save_pretrained(out / PARTIAL)
        tokenizer.save_pretrained(out / PARTIAL)
        shutil.rmtree(out / MERGED, ignore_errors=True)
        (out / PARTIAL).rename(out / MERGED)
    return summary


def no_model(name: str) -> AbstractContextManager[None]:
    """Raises UserError where transformers finds no model in the block."""
    missing = f"--model {name}: no causal language model here, nor found on the Hugging Face Hub"
    return user_errors(missing, *NOT_LOADED)


def load_tokenizer(name: str, folder: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model, with a token to pad with. Raises UserError."""
    tokenizer = tokens.load_tokenizer(f"--model {name}", folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # the mask and the labels say what is padding
    return tokenizer


def load_model(name: str, folder: str, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """The model with its weights in this dtype ("auto": as stored). Raises UserError without it."""
    with no_model(name):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model


def with_optimizer(
    model: PreTrainedModel, config: FinetuneConfig
) -> tuple[PreTrainedModel | PeftModel, Optimizer]:
    """The model, with its adapters where the method has them, and the optimizer of what trains."""
    if config.adapter is None:
        return model, build_optimizer(model, config, parse_rules(config.rules))
    assert config.rank is not None
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=ALPHA * config.rank,
        target_modules="all-linear",  # but for the head
        use_rslora=config.adapter == "rslora",
        use_dora=config.adapter == "dora",
    )
    refusal = user_errors(f"--method {config.adapter}: peft refuses", ValueError)
    with refusal, warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, lora)
    adam: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    decay = config.weight_decay
    if config.adapter == "lora+":
        adam |= {"loraplus_lr_ratio": LORA_PLUS_RATIO, "loraplus_weight_decay": decay}
        return adapted, create_loraplus_optimizer(adapted, AdamW, **adam)
    trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    return adapted, AdamW(trained, weight_decay=decay, **adam)


def collator(
    tokenizer: PreTrainedTokenizerFast, *, packing: bool
) -> Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]:
    """What makes a batch of rows: padded on the right, or all in one row.

    There positions that begin anew tell the model where an example begins: each sees itself alone.
    """
    if not packing:
        return DataCollatorForSeq2Seq(tokenizer)
    flatten = DataCollatorWithFlattening()  # type: ignore[no-untyped-call]
    # A cache would hide from the model that the row holds more than one sequence.
    return lambda rows: {**flatten(rows), "use_cache": False}
