"""trl's trainers with LoRA-Pre, run for a few steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lorapre import LoRAPreAdamW, param_groups

trl = pytest.importorskip("trl", reason="trl is not installed: no SFTTrainer to run")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from lorapre.integrations.transformers import lorapre_adamw  # noqa: E402

# transformers 5.23 has another name for it, which trl 1.16 and peft 0.21 do not know.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")

WORDS = ["<pad>", "<eos>", "<unk>", *"0123456789+=", "sum", "of", "and", "is"]


def tokens() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def sft(folder: Path, *, strict: bool = False, peft_config: Any = None, **options: Any) -> Any:
    rows = [
        {"prompt": f"sum of {a} and {b} is", "completion": f" {a} + {b} = {(a + b) % 10}"}
        for a in range(8)
        for b in range(8)
    ]
    args = trl.SFTConfig(
        output_dir=str(folder),
        **dict(
            max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, bf16=False,
            report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=3, logging_steps=1,
            max_length=32, dataset_num_proc=None, gradient_checkpointing=False,
        ) | options,
    )  # fmt: skip
    return trl.SFTTrainer(
        llama(),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokens(),
        peft_config=peft_config,
        optimizer_cls_and_kwargs=lorapre_adamw(args, rank=4, scale=0.5, strict=strict),
    )


def test_sft_trains_and_its_arguments_reach_the_optimizer(tmp_path: Path) -> None:
    trainer = sft(tmp_path, adam_beta2=0.97, weight_decay=0.1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is LoRAPreAdamW
    decay = set()
    for group in optimizer.param_groups:
        assert group["initial_lr"] == 1e-2
        assert (group["betas"], group["scale"]) == ((0.9, 0.97), 0.5)
        decay.add((group["rank"], group["weight_decay"]))
    assert decay == {(4, 0.1), (None, 0.1), (None, 0.0)}


@pytest.mark.parametrize("options", [{"packing": True}, {"bf16": True, "gradient_checkpointing": True}])
def test_sft_resumed_equals_uninterrupted(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, resumed = sft(tmp_path, **options), sft(tmp_path, **options)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_lora_adapters_as_the_weights_are_reported(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: no LoRA adapters to train")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    with pytest.warns(UserWarning, match=r"no trainable parameter gets low-rank momenta.*LoRA adapter"):
        sft(tmp_path, peft_config=config).create_optimizer()
    with pytest.raises(ValueError, match=r"factors would not be smaller than the matrix for .*lora_A"):
        sft(tmp_path, peft_config=config, strict=True).create_optimizer()


def test_dpo_takes_the_optimizer_itself(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")  # where the trainer finds the reference model
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    args = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=False,
    )  # fmt: skip
    optimizer = LoRAPreAdamW(param_groups(model, rank=4, strict=True), lr=args.learning_rate)
    rows = [
        {"prompt": f"sum of {a} and {b} is", "chosen": f" {(a + b) % 10}", "rejected": f" {(a + b + 1) % 10}"}
        for a in range(4)
        for b in range(8)
    ]
    trainer = trl.DPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokens(),
        optimizers=(optimizer, None),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert {group["initial_lr"] for group in optimizer.param_groups} == {1e-2}
    assert all(group["lr"] < 1e-2 for group in optimizer.param_groups), "the schedule of the arguments"
    for name, p in trainer.model.named_parameters():
        assert not torch.equal(p, before[name]), name
