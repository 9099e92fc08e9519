"""transformers.Trainer and trl.SFTTrainer with LoRA-Pre, run for a few steps."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorapre import LoRAPreAdamW, LoRAPreMuon, param_groups

transformers = pytest.importorskip("transformers", reason="transformers is not installed: no Trainer to run")

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

from lorapre.integrations.transformers import StatsCallback, lorapre_adamw, lorapre_muon  # noqa: E402

# transformers 5.23 has another name for it, which 5.2 and peft 0.21 do not know.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=64)
FACTORIES = {"adamw": lorapre_adamw, "muon": lorapre_muon}


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """A Trainer sets the level of transformers' logger, which outlives it."""
    logger = logging.getLogger("transformers")
    level = logger.level
    yield
    logger.setLevel(level)


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            **SMALL,
            **{"max_position_embeddings": 32, "attention_dropout": 0.1, "use_cache": False, **options},
        )
    )


def data(count: int = 64) -> list[dict[str, Tensor]]:
    # Half of the symbols, so that there is something to learn.
    tokens = torch.randint(32, (count, 12), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = dict(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    return TrainingArguments(**defaults | options)


def trainer(
    folder: Path,
    factory: str = "adamw",
    options: dict[str, Any] | None = None,
    model: nn.Module | None = None,
    trainer_class: type[Trainer] = Trainer,
    **training: Any,
) -> Trainer:
    args = arguments(folder, **training)
    chosen = FACTORIES[factory](args, **{"rank": 4, **(options or {})})
    return trainer_class(
        llama() if model is None else model, args, train_dataset=data(), optimizer_cls_and_kwargs=chosen
    )


def optimizer_of(trainer: Trainer) -> Any:
    return trainer.optimizer.optimizer  # accelerate wraps it


def assert_same(a: Trainer, b: Trainer) -> None:
    """Weights and state are equal to the last bit."""
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), name
        state, other = optimizer_of(a).state[p], optimizer_of(b).state[q]
        assert state.keys() == other.keys()
        assert all(torch.equal(state[key], other[key]) for key in state), name


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_callback_logs_the_numbers_behind_every_loss(tmp_path: Path, factory: str) -> None:
    training = trainer(tmp_path, factory, max_steps=4, logging_steps=2)
    training.add_callback(StatsCallback(training))
    training.train()
    stats = {f"lorapre/{name}": float(x) for name, x in optimizer_of(training).stats().items()}
    found = [entry for entry in training.state.log_history if "lorapre/captured_min" in entry]
    assert [entry["step"] for entry in found] == [2, 4]
    assert stats.items() <= found[-1].items()
    assert len(losses(training)) == 2


GIVEN = dict(learning_rate=3e-3, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.97, adam_epsilon=1e-5)


def test_arguments_reach_both_routes_of_adamw(tmp_path: Path) -> None:
    optimizer = trainer(tmp_path, **GIVEN).create_optimizer()
    assert type(optimizer) is LoRAPreAdamW
    low_rank, dense, vectors = routes(optimizer)
    for group in (low_rank, dense, vectors):
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.97), 1e-5)
    assert low_rank["rank"] == 4
    assert (low_rank["weight_decay"], dense["weight_decay"], vectors["weight_decay"]) == (0.2, 0.2, 0.0)


def test_arguments_reach_both_routes_of_muon(tmp_path: Path) -> None:
    optimizer = trainer(tmp_path, "muon", **GIVEN).create_optimizer()
    assert type(optimizer) is LoRAPreMuon
    low_rank, dense, vectors = routes(optimizer)
    for group in (low_rank, dense, vectors):
        assert (group["lr"], group["adamw_betas"], group["adamw_eps"]) == (3e-3, (0.8, 0.97), 1e-5)
        assert group["eps"] == 1e-7  # that of Newton-Schulz, not adam_epsilon
    assert low_rank["dense_ratio"] == 1
    assert (low_rank["weight_decay"], dense["weight_decay"], vectors["weight_decay"]) == (0.2, 0.2, 0.0)
    assert low_rank["adamw_weight_decay"] == 0.2  # of matrices of that group that stay dense


def routes(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The groups of the matrices, of the embedding and the head, and of the norms."""
    holding = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert len(holding) == 2 + 2 * 9 + 1
    layer = holding["model.layers.0.self_attn.q_proj.weight"]
    assert holding["model.embed_tokens.weight"] is holding["lm_head.weight"]
    assert holding["model.norm.weight"] is holding["model.layers.1.input_layernorm.weight"]
    return layer, holding["lm_head.weight"], holding["model.norm.weight"]


def test_what_is_given_wins(tmp_path: Path) -> None:
    given = dict(lr=5e-3, betas=(0.5, 0.6), eps=1e-6, weight_decay=0.3, scale=0.25, variant="paper")
    low_rank, dense, _ = routes(trainer(tmp_path, options=given, **GIVEN).create_optimizer())
    for group in (low_rank, dense):
        assert {key: group[key] for key in given} == given

    given = dict(lr=2e-2, momentum=0.9, adjust_lr_fn="match_rms_adamw", rules=[("mlp", 2)])
    low_rank, dense, _ = routes(trainer(tmp_path, "muon", given, **GIVEN).create_optimizer())
    assert (low_rank["lr"], low_rank["momentum"]) == (2e-2, 0.9)
    assert dense["lr"] == 3e-3, "the dense weights stay at the learning rate of the arguments"
    low_rank, dense, _ = routes(trainer(tmp_path, "muon", {"adamw_lr": 1e-4}, **GIVEN).create_optimizer())
    assert (low_rank["lr"], dense["lr"]) == (3e-3, 1e-4)


@pytest.mark.parametrize("factory", FACTORIES)
def test_embedding_and_head_can_be_low_rank(tmp_path: Path, factory: str) -> None:
    _, ends, _ = routes(trainer(tmp_path, factory, {"ends": "low-rank"}).create_optimizer())
    assert ends["rank"] == 4


@pytest.mark.parametrize("factory", FACTORIES)
def test_an_option_that_is_none_is_refused_at_once(tmp_path: Path, factory: str) -> None:
    with pytest.raises(TypeError, match="rnak"):
        FACTORIES[factory](arguments(tmp_path), rnak=8)
    with pytest.raises(ValueError, match="rank must be an integer >= 0"):
        trainer(tmp_path, factory, {"rank": -1}).create_optimizer()


def test_arguments_are_read_when_the_optimizer_is_made(tmp_path: Path) -> None:
    # hyperparameter_search sets the arguments of its trial in between.
    late = trainer(tmp_path)
    late.args.learning_rate = 7e-4
    assert {group["lr"] for group in late.create_optimizer().param_groups} == {7e-4}


MODELS = {
    "Llama": dict(SMALL),
    "Qwen3": dict(SMALL, head_dim=16),
    "Bert": dict(SMALL),
    "GPT2": dict(n_embd=32, n_layer=2, n_head=2, vocab_size=64),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_has_no_weight_decay_is_what_the_trainer_says(tmp_path: Path, name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = getattr(transformers, f"{name}Model")(config)
    made = trainer(tmp_path, model=model, weight_decay=0.1)
    decayed = {
        parameter
        for group in made.create_optimizer().param_groups
        for parameter in group["param_names"]
        if group["weight_decay"]
    }
    assert decayed == set(made.get_decay_parameter_names(model)) & {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_trainer_does_what_a_loop_does(tmp_path: Path, factory: str) -> None:
    # With warm-up, cosine, accumulation, clipping (which bites) and weight decay.
    model = llama(attention_dropout=0.0)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = trainer(
        tmp_path, factory, model=model, gradient_accumulation_steps=2, max_grad_norm=0.2, weight_decay=0.1,
        lr_scheduler_type="cosine", warmup_steps=2, adam_beta2=0.95,
    )  # fmt: skip
    made.model_accepts_loss_kwargs = False  # average the means of batches, not the tokens of all batches
    batches = list(made.get_train_dataloader())
    made.train()
    norms = [entry["grad_norm"] for entry in made.state.log_history if "grad_norm" in entry]
    assert min(norms) > 0.2

    # transformers 5.2 divides by the accumulated batches twice: 2 there, 1 since that was mended.
    twice = made.accelerator.gradient_accumulation_steps
    copy = llama(attention_dropout=0.0)
    copy.load_state_dict(expected)
    cls = {"adamw": LoRAPreAdamW, "muon": LoRAPreMuon}[factory]
    optimizer = cls(
        param_groups(copy, rank=4), lr=1e-2, weight_decay=0.1, **{"betas" if cls is LoRAPreAdamW else
        "adamw_betas": (0.9, 0.95)}
    )  # fmt: skip
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 6)
    for step in range(6):
        for batch in batches[2 * step : 2 * step + 2]:
            (copy(**batch).loss / 2 / twice).backward()
        nn.utils.clip_grad_norm_(copy.parameters(), 0.2)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    for name, p in made.model.named_parameters():
        assert (p - expected[name]).norm() > 0.01, name
        assert torch.equal(p, copy.get_parameter(name)), name


@pytest.mark.parametrize(
    ("factory", "options", "dtype"),
    [
        ("adamw", {}, torch.float32),
        ("adamw", {"variant": "paper", "stochastic_rounding": True}, torch.bfloat16),
        ("muon", {}, torch.float32),
    ],
)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, factory: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    training = dict(save_strategy="steps", save_steps=3, weight_decay=0.1, lr_scheduler_type="cosine")
    whole = trainer(tmp_path, factory, options, llama().to(dtype), **training)
    whole.train()
    resumed = trainer(tmp_path, factory, options, llama().to(dtype), **training)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(whole, resumed)
    assert losses(whole) == losses(resumed)
    assert losses(whole)[-1] < losses(whole)[0]


def test_bf16(tmp_path: Path) -> None:
    made = trainer(tmp_path, bf16=True)
    made.train()
    assert losses(made)[-1] < losses(made)[0] - 0.1
    for p in made.model.parameters():
        assert p.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in optimizer_of(made).state[p].values())


class ScalingTrainer(Trainer):
    """Trainer with a GradScaler on the CPU, where accelerate leaves it out."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        # The first step overflows, and is skipped; the scale then is 1.
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-60)


def test_fp16_with_its_scaler(tmp_path: Path) -> None:
    made = trainer(tmp_path, trainer_class=ScalingTrainer, fp16=True, max_grad_norm=0.5)
    made.train()
    assert losses(made)[-1] < losses(made)[0] - 0.1
    for p in made.model.parameters():
        state = optimizer_of(made).state[p]
        assert state["step"] == made.state.max_steps - 1
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 as accelerate does it by itself needs a GPU")
def test_fp16_on_a_gpu(tmp_path: Path) -> None:
    made = trainer(tmp_path, fp16=True, use_cpu=False)
    made.train()
    assert made.accelerator.scaler is not None
    assert losses(made)[-1] < losses(made)[0] - 0.1


def test_gradient_checkpointing(tmp_path: Path) -> None:
    plain = trainer(tmp_path)
    plain.train()
    checkpointing = trainer(tmp_path, gradient_checkpointing=True)  # which seeds dropout
    checkpointing.train()
    assert all(layer.gradient_checkpointing for layer in checkpointing.model.model.layers)
    assert not any(layer.gradient_checkpointing for layer in plain.model.model.layers)
    assert_same(plain, checkpointing)


class Records(logging.Handler):
    """The messages of a logger."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.mark.parametrize("level", ["info", "warning"])
def test_coverage_is_logged_at_the_start(tmp_path: Path, level: str) -> None:
    made = trainer(tmp_path, log_level=level)
    records = Records()
    logger = logging.getLogger("transformers.lorapre")
    logger.addHandler(records)
    try:
        made.train()
    finally:
        logger.removeHandler(records)
    if level == "warning":  # the default of replicas
        assert records.messages == []
    else:
        (message,) = records.messages
        assert message.startswith("LoRAPreAdamW\nparameter")
        assert "14 low-rank weights hold" in message


class Classifier(nn.Module):
    """A loss with a layer of its own, as SoftmaxLoss of sentence-transformers is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.classifier = model, nn.Linear(64, 3)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        logits = self.classifier(self.model(inputs["input_ids"]).logits.mean(1))
        return nn.functional.cross_entropy(logits, inputs["labels"][:, 0] % 3)


class LossTrainer(Trainer):
    """Keeps its loss outside the model, as the Trainer of sentence-transformers does."""

    loss: Any

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return self.loss(inputs)


@pytest.mark.parametrize("several", [False, True], ids=["one", "dict"])
def test_parameters_of_a_loss_are_named_and_can_be_trained(tmp_path: Path, several: bool) -> None:
    made = trainer(tmp_path, trainer_class=LossTrainer)
    loss = Classifier(made.model)
    made.loss = {"data": loss} if several else loss
    with pytest.warns(UserWarning, match=r"not be trained: classifier\.weight, classifier\.bias\. Give"):
        made.create_optimizer()
    strict = trainer(tmp_path, options={"strict": True}, model=made.model, trainer_class=LossTrainer)
    strict.loss = made.loss
    with pytest.raises(ValueError, match=r"not be trained: classifier\.weight"):
        strict.create_optimizer()

    optimizer = LoRAPreAdamW(param_groups(loss, rank=4), lr=1e-2)
    other = LossTrainer(made.model, made.args, train_dataset=data(), optimizers=(optimizer, None))
    other.loss = loss
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    other.train()
    assert not any(torch.equal(p, before[name]) for name, p in loss.named_parameters())


def test_a_loss_without_parameters_of_its_own_is_no_trouble(tmp_path: Path) -> None:
    made = trainer(tmp_path, trainer_class=LossTrainer)
    made.loss = Classifier(made.model)
    made.loss.classifier.requires_grad_(False)
    made.create_optimizer()
    made.loss = lambda inputs: 0.0
    made.optimizer = None
    made.create_optimizer()


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed: no LoRA adapters to train")
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def test_lora_adapters_as_the_weights_are_reported(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=adapted())
    with pytest.warns(UserWarning, match=r"no trainable parameter gets low-rank momenta.*LoRA adapter"):
        made.create_optimizer()
    with pytest.raises(ValueError, match=r"factors would not be smaller than the matrix for .*lora_A"):
        trainer(tmp_path, options={"strict": True}, model=adapted()).create_optimizer()


def test_adapters_beside_trainable_matrices_are_no_trouble(tmp_path: Path) -> None:
    model = adapted()
    model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.weight").requires_grad_()
    made = trainer(tmp_path, model=model)
    made.train()
    assert math.isfinite(losses(made)[-1])
