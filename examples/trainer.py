"""transformers.Trainer with LoRAPreAdamW.

    python examples/trainer.py runs/trainer

It trains a small Llama on the bytes of this file. Started again, it goes on from its last checkpoint.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lorapre.integrations.transformers import lorapre_adamw

LENGTH = 64


def build_model() -> LlamaForCausalLM:
    # Your model: AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B", dtype=torch.bfloat16).
    # With weights in bfloat16 give lorapre_adamw stochastic_rounding=True as well.
    shape = dict(vocab_size=256, hidden_size=128, intermediate_size=344, num_hidden_layers=2)
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4))


def load_data() -> list[dict[str, torch.Tensor]]:
    # Your data: a datasets.Dataset with input_ids and labels, and a data_collator that pads them.
    tokens = torch.tensor(list(Path(__file__).read_bytes()))
    return [{"input_ids": row, "labels": row} for row in tokens.unfold(0, LENGTH, 8)]


def main(folder: str, steps: int = 200) -> Trainer:
    torch.manual_seed(0)
    args = TrainingArguments(
        folder,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        per_device_train_batch_size=16,
        max_steps=steps,
        logging_steps=steps // 4,
        save_steps=steps // 4,
        save_total_limit=2,
        bf16=torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        log_level="info",  # prints lorapre.coverage: which weights have factors, and the bytes of state
    )
    trainer = Trainer(
        build_model(),
        args,
        train_dataset=load_data(),
        optimizer_cls_and_kwargs=lorapre_adamw(args, rank=16),
    )
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
