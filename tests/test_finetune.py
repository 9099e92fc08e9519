"""`lorapre finetune`: each method, resuming, what the loss counts, packing, release, a user's mistakes."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorapre_recipes import presets
from lorapre_recipes.config import FinetuneConfig, Method, UserError
from lorapre_recipes.data.arithmetic import VOCABULARY, make_problem
from lorapre_recipes.data.examples import IGNORED, Example, encode, load_examples, read_examples
from lorapre_recipes.data.tokens import for_transformers, train_tokenizer
from lorapre_recipes.presets import FINETUNE as PRESETS
from lorapre_recipes.presets import arithmetic, metamath100k
from lorapre_recipes.train.finetune import (
    ALPHA,
    collator,
    finetune,
    load_model,
    load_tokenizer,
    with_optimizer,
)
from lorapre_recipes.train.loss import LEAST, ChunkedLoss
from lorapre_recipes.train.runs import last_checkpoint, load_run, model_folder
from lorapre_recipes.train.session import training_arguments
from lorapre_recipes.train.summary import read_metrics
from tiny_runs import Interrupt, losses

METHODS = get_args(Method)
# Made up, in the form of GSM8K's lines: several steps, calculator annotations, a comma in a number.
GSM8K = [
    {
        "question": "A mill grinds 40 sacks a day for 30 days and sells 75 of them. How many are left?",
        "answer": "It grinds 40*30 = <<40*30=1200>>1,200 sacks.\n"
        "There are 1200-75 = <<1200-75=1125>>1,125 left.\n#### 1,125",
    },
    {
        "question": "Ida reads 12 pages on each of 5 days.\n\nHow many pages is that?",
        "answer": "She reads 12*5 = $<<12*5=60>>60 pages.\n#### 60",
    },
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    problems = [make_problem(random.Random(seed)) for seed in range(50)]
    texts = [Example(*problem).prompt + " " + problem.answer for problem in problems]
    tokenizer = for_transformers(train_tokenizer(texts, VOCABULARY, digits=True))
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=400,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Problems whose lengths differ."""
    file = tmp_path / "problems.jsonl"
    drawn = random.Random(7)
    file.write_text("".join(json.dumps(make_problem(drawn)._asdict()) + "\n" for _ in range(40)))
    return file


Tiny = Callable[..., FinetuneConfig]


@pytest.fixture
def tiny(base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """The preset `tiny` for the command line, and as a function: seconds for a whole run."""

    def preset(method: Method = "lorapre-adamw", **changes: Any) -> FinetuneConfig:
        config = arithmetic(method)
        fields: dict[str, Any] = {
            "preset": "tiny",
            "model": str(base),
            "data": str(data),
            "rank": config.rank and 4,
            "sequence_length": 400,
            "held_out_every": 5,
            "lr": 0.01,
            "steps": 6,
            "batch_size": 4,
            "log_points": 6,
            "evaluations": 2,
            "checkpoints": 3,
            "precision": "fp32",
        }
        return config.replace(**(fields | changes))

    monkeypatch.setitem(PRESETS, "tiny", preset)
    return preset


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return {**AutoModelForCausalLM.from_pretrained(folder).state_dict()}


# Runs


RESUMED = ("lorapre-adamw", "galore", "dora", "lora+")  # the others keep nothing that these do not


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_resumes_and_leaves_a_model(
    method: Method, tiny: Tiny, base: Path, lorapre: Any, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, stdout, _ = lorapre("finetune", "--preset", "tiny", "--method", method, "--out", whole)
    assert code == 0
    assert FinetuneConfig.load(whole / "config.json") == tiny(method)
    assert f"\n{method}" in stdout  # the title of the table
    assert (whole / "curves.png").is_file()
    if method in RESUMED:
        with pytest.raises(KeyboardInterrupt):
            finetune(tiny(method), cut, callbacks=[Interrupt(step=5)])
        code, _, _ = lorapre("finetune", "--resume", cut)
        assert code == 0
        assert losses(cut) == losses(whole)
    validation = [row["validation_loss"] for row in losses(whole) if "validation_loss" in row]
    assert validation[-1] < 5.9 < torch.tensor(384.0).log()  # where an untrained model is

    assert Path(model_folder(str(whole))).parent == whole
    trained, before = weights(model_folder(str(whole))), weights(base)
    if method in RESUMED:
        resumed = weights(model_folder(str(cut)))
        assert all(torch.equal(trained[name], resumed[name]) for name in before)
    changed = {name for name in before if not torch.equal(trained[name], before[name])}
    assert any("q_proj" in name for name in changed)
    adapters = method in ("lora", "rslora", "dora", "lora+")
    assert ("lm_head.weight" in changed) == (not adapters)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(str(whole)))
    assert tokenizer.decode(tokenizer("9 plums")["input_ids"]) == "9 plums"

    summary = json.loads((whole / "summary.json").read_text())
    assert summary["tokens"] == losses(whole)[-1]["tokens"]
    assert (summary["adapter_bytes"] > 0) == adapters
    full = sum(2 * weight.numel() * 4 + 4 for weight in before.values())
    assert summary["adamw_state_bytes"] == full
    if adapters:
        checkpoint = last_checkpoint(whole)
        assert checkpoint is not None
        assert not (checkpoint / "model.safetensors").exists()
        file = load_file(checkpoint / "adapter_model.safetensors")
        assert sum(x.nbytes for x in file.values()) == summary["adapter_bytes"]
        assert 2 * summary["adapter_bytes"] < summary["state_bytes"] < 2.1 * summary["adapter_bytes"]


OPTIONS: dict[str, dict[str, Any]] = {
    "release": {"release": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "packing": {"packing": True},
    "bf16": {"dtype": "bf16", "stochastic_rounding": True},
    "accumulation": {"batch_size": 2, "accumulation": 2},
}


@pytest.fixture(scope="module")
def plain() -> list[dict[str, Any]]:
    """The losses without an option, once they are known."""
    return []


@pytest.mark.parametrize("name", OPTIONS)
def test_options_change_no_loss_and_resume(
    name: str, tiny: Tiny, tmp_path: Path, plain: list[dict[str, Any]]
) -> None:
    if not plain:
        finetune(tiny(), tmp_path / "plain")
        plain += losses(tmp_path / "plain")
    config = tiny(**OPTIONS[name])
    finetune(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finetune(config, tmp_path / "cut", callbacks=[Interrupt(step=3)])
    finetune(load_run(tmp_path / "cut", FinetuneConfig), tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")

    # Adam makes a step of full size of the rounding errors of gradients that are almost zero.
    tolerance = {"bf16": 2e-2, "packing": 1e-3}.get(name, 1e-5)
    for row, expected in zip(losses(tmp_path / "whole"), plain, strict=True):
        for key in {"loss", "validation_loss"} & expected.keys():
            assert row[key] == pytest.approx(expected[key], rel=tolerance)
        assert row["tokens"] == expected["tokens"]
        assert ("grad_norm" in row) == ("grad_norm" in expected) * (name != "release")


@pytest.mark.parametrize("tied", [False, True])
def test_a_card_of_24_gigabytes(tied: bool, lorapre: Any, base: Path, data: Path, tmp_path: Path) -> None:
    """The preset on a small Llama: factors for every matrix, and it says what it chose."""
    folder = tmp_path / "model"
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    shape = LlamaConfig.from_pretrained(base, tie_word_embeddings=tied)
    LlamaForCausalLM(shape).save_pretrained(folder)
    options = ("--steps", 4, "--evaluations", 2, "--lr", 0.01, "--held-out-every", 5)
    options += ("--sequence-length", 400, "--out", tmp_path / "run")
    code, _, err = lorapre("finetune", "--preset", "24gb", "--model", folder, "--data", data, *options)
    assert code == 0
    assert (
        "lorapre: lorapre-adamw, rank 8, split, low-rank ends, gradients released, bf16 weights, stochastic "
        "rounding, activations computed again, loss in chunks, 4 sequences of up to 400 tokens; fits: "
        "0.0 of 24 GiB\n"
    ) in err
    coverage = (tmp_path / "run" / "coverage.txt").read_text()
    routes = {line.split()[0]: line.split()[2] for line in coverage.splitlines() if line.count("x") == 1}
    assert routes["model.embed_tokens"] == "8"
    assert routes.get("lm_head") == (None if tied else "8")
    rows = losses(tmp_path / "run")
    assert rows[-1]["validation_loss"] < rows[0].get("loss", rows[1].get("loss"))
    assert {x.dtype for x in weights(last_checkpoint(tmp_path / "run")).values()} == {torch.bfloat16}


def test_a_run_that_does_not_fit_is_refused_with_the_plan(
    lorapre: Any, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(presets.BUDGETS, "24gb", "1MiB")
    monkeypatch.setattr("lorapre_recipes.plan.tables.gpu_bytes", lambda: None)
    out = tmp_path / "run"
    options = ("--preset", "24gb", "--data", data, "--out", out, "--no-gradient-checkpointing")
    options += ("--sequence-length", 400)
    code, _, err = lorapre("finetune", "--model", base, *options)
    assert code == 2
    assert "--preset 24gb: no room; lower --batch-size or --rank\n" in err
    assert "Memory of one GPU" in err
    assert "GiB too much for" in err
    assert "--gradient-checkpointing saves" in err
    assert not out.exists()


def test_release_has_no_time_in_the_optimizer(tiny: Tiny, tmp_path: Path, capsys: Any) -> None:
    summary = finetune(tiny(release=True, steps=2), tmp_path / "run")
    assert summary.optimizer_share is None
    printed = capsys.readouterr().out
    assert "gradients released" in printed
    assert "optimizer.step" not in printed


def test_rules_and_freeze_and_rank_0(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    plain = finetune(tiny(steps=2), tmp_path / "plain")
    ruled = finetune(tiny(steps=2, rules=("embed_tokens|lm_head=4",)), tmp_path / "ruled")
    frozen = finetune(tiny(steps=2, freeze=("embed_tokens", "lm_head")), tmp_path / "frozen")
    vocabulary, hidden = weights(base)["lm_head.weight"].shape
    dense, low_rank = 2 * vocabulary * hidden, (4 + 1) * (vocabulary + hidden)  # split, of one table
    saved = 2 * 4 * (dense - low_rank)  # two tables, float32
    assert ruled.state_bytes == plain.state_bytes - saved
    assert frozen.state_bytes == plain.state_bytes - 2 * 4 * (2 * vocabulary * hidden + 1)
    assert frozen.trained_parameters == frozen.parameters - 2 * vocabulary * hidden
    after, before = weights(model_folder(str(tmp_path / "frozen"))), weights(base)
    same = {name for name in before if torch.equal(after[name], before[name])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}
    none = finetune(tiny(steps=2, rank=0), tmp_path / "none")
    factors = sum(4 * sum(weight.shape) for name, weight in before.items() if "_proj" in name)
    assert none.state_bytes == plain.state_bytes - 4 * factors


def test_lora_plus_moves_B_faster(tiny: Tiny, tmp_path: Path) -> None:
    moved = {}
    for method in ("lora", "lora+"):
        finetune(tiny(method, lr=1e-4, steps=1, checkpoints=1, warmup=0.0), tmp_path / method)
        file = load_file(tmp_path / method / "checkpoint-1" / "adapter_model.safetensors")
        moved[method] = next(x.abs().max() for name, x in file.items() if "lora_B" in name)
    assert moved["lora+"] / moved["lora"] == pytest.approx(16, rel=1e-3)


def test_a_run_of_pretrain_goes_on(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    run = tmp_path / "pretrained"
    first = finetune(tiny("adamw", steps=4), run)
    second = finetune(tiny("lora", model=str(run), steps=1), tmp_path / "second")
    assert json.loads((tmp_path / "second" / "data.json").read_text())["model"] == str(run / "checkpoint-4")
    assert second.validation_loss < first.validation_loss + 0.1


# What the loss counts


@pytest.mark.parametrize("row", GSM8K, ids=["commas", "paragraphs"])
def test_labels_are_the_answer_and_the_end(row: dict[str, str], base: Path) -> None:
    tokenizer = load_tokenizer("", str(base))
    example = Example(**row)
    encoded = encode(example, tokenizer)
    tokens, labels = encoded["input_ids"], encoded["labels"]
    counted = [label for label in labels if label != IGNORED]
    prompt = tokenizer(example.prompt)["input_ids"]
    answer = tokenizer(example.completion)["input_ids"]
    assert tokens == [*prompt, *answer, tokenizer.eos_token_id]  # what generation sees is what was trained
    assert labels == [IGNORED] * len(prompt) + [*answer, tokenizer.eos_token_id]
    assert tokenizer.decode(counted) == f" {row['answer']}<|endoftext|>"
    assert tokenizer.decode(prompt) == f"Question: {row['question']}\nAnswer:"


def test_a_token_across_the_border_is_the_answers() -> None:
    # The usual template ends in a colon, behind which no tokenizer of words has a token that goes on.
    class Merging:
        eos_token_id = 0

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            return {"input_ids": [5, 6, 7], "offset_mapping": [(0, 20), (20, 23), (23, 24)]}

    example = Example("12345", "6")  # the prompt has 23 characters
    assert len(example.prompt) == 23
    encoded = encode(example, Merging())  # type: ignore[arg-type]
    assert encoded["labels"] == [IGNORED, IGNORED, 7, 0]
    assert encode(Example("1234", "6"), Merging())["labels"] == [IGNORED, 6, 7, 0]  # type: ignore[arg-type]


def rows_of(data: Path, base: Path) -> list[dict[str, list[int]]]:
    tokenizer = load_tokenizer("", str(base))
    return [encode(example, tokenizer) for example in read_examples(str(data))]


def by_hand(model: Any, rows: list[dict[str, list[int]]]) -> torch.Tensor:
    """Losses of all labels, one example at a time."""
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        found.append(cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="none"))
    return torch.cat(found)


@pytest.mark.parametrize("packing", [False, True])
def test_batches_lose_what_examples_alone_do(packing: bool, base: Path, data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).train()
    rows = rows_of(data, base)[:5]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    batch = collator(load_tokenizer("", str(base)), packing=packing)(rows)
    labels = sum(label != IGNORED for row in rows for label in row["labels"])
    assert (batch["labels"] != IGNORED).sum() == labels
    assert batch["input_ids"].shape[0] == (1 if packing else 5)
    expected = by_hand(model, rows).sum() / labels
    torch.testing.assert_close(model(**batch).loss, expected)

    rows[0]["input_ids"][:10] = [1] * 10  # the others must not see it
    logits = model(**collator(load_tokenizer("", str(base)), packing=packing)(rows)).logits
    before = model(**batch).logits
    first = len(rows[0]["input_ids"])
    others = (slice(None), slice(first, None)) if packing else (slice(1, None),)
    torch.testing.assert_close(logits[others], before[others])
    assert not torch.allclose(logits[0, :first], before[0, :first])


def small(name: str, tied: bool = False) -> Any:
    """A model of a class of transformers with a vocabulary that takes several chunks."""
    made: Any = getattr(transformers, name)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=2, head_dim=16)
    return made(made.config_class(vocab_size=500, tie_word_embeddings=tied, **sizes)).eval()


def loss_and_gradients(
    model: Any, *, chunked: bool, **options: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(500, (3, 40), generator=drawn)}
    batch["labels"] = torch.where(torch.rand(3, 40, generator=drawn) < 0.4, IGNORED, batch["input_ids"])
    model.zero_grad()
    in_chunks = ChunkedLoss(getattr(model, "_orig_mod", model), wanted=chunked)
    loss = in_chunks(lambda: model(**batch, **options).loss)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("count", [None, 50, torch.tensor(50.0)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile hides it else
def test_the_chunked_loss_is_the_loss(compiled: bool, tied: bool, count: Any) -> None:
    model = small("LlamaForCausalLM", tied)
    expected, gradients = loss_and_gradients(model, chunked=False, num_items_in_batch=count)
    if compiled:
        model = torch.compile(model, backend="eager")
    loss, found = loss_and_gradients(model, chunked=True, num_items_in_batch=count)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for x, y in zip(found, gradients, strict=True):
        assert (x - y).norm() <= 1e-6 * y.norm()


@pytest.mark.parametrize("name", ["GPTNeoXForCausalLM", "GemmaForCausalLM", "PhiForCausalLM"])
def test_the_chunked_loss_of_other_models(name: str) -> None:
    model = small(name)
    assert ChunkedLoss(model).applies
    expected, _ = loss_and_gradients(model, chunked=False)
    loss, _ = loss_and_gradients(model, chunked=True)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_the_chunked_loss_in_bfloat16() -> None:
    """The loss in float32; gradients to the rounding of bfloat16, once for each chunk."""
    model = small("LlamaForCausalLM")
    for weights_too in (False, True):
        model = model.to(torch.bfloat16) if weights_too else model
        with torch.autocast("cpu", torch.bfloat16):
            expected, gradients = loss_and_gradients(model, chunked=False)
            loss, found = loss_and_gradients(model, chunked=True)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for x, y in zip(found, gradients, strict=True):
            assert (x - y).norm() <= 0.02 * y.norm()


def test_a_model_that_changes_its_logits_keeps_its_loss(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    """Gemma 2 caps them: the run goes on with the model's own loss."""
    model = small("Gemma2ForCausalLM")
    assert loss_and_gradients(model, chunked=True)[0] == loss_and_gradients(model, chunked=False)[0]
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 500)  # the head is itself again
    made = transformers.Gemma2Config.from_dict(model.config.to_dict() | {"vocab_size": 500})
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "gemma")
    transformers.Gemma2ForCausalLM(made).save_pretrained(tmp_path / "gemma")
    for chunked in (True, False):
        config = tiny(model=str(tmp_path / "gemma"), steps=2, checkpoints=1, chunked_loss=chunked)
        finetune(config, tmp_path / f"{chunked}")
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


@pytest.mark.parametrize("method", ["lorapre-adamw", "lora"])
def test_a_run_has_the_same_losses_without_chunks(
    method: Method, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(
        "lorapre_recipes.train.loss.checkpoint",
        lambda *a, **k: taken.append(len(a[1])) or torch.utils.checkpoint.checkpoint(*a, **k),
    )
    for chunked in (False, True):
        finetune(tiny(method, steps=3, chunked_loss=chunked), tmp_path / f"{chunked}")
        assert bool(taken) == chunked
    assert max(taken) == LEAST < 4 * 60  # positions of a batch
    for plain, row in zip(losses(tmp_path / "False"), losses(tmp_path / "True"), strict=True):
        assert row == pytest.approx(plain, rel=1e-5)


def test_validation_loss_is_the_mean_over_tokens(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    # Three whole batches whose numbers of labels differ; a rate too small to change anything.
    config = tiny(steps=1, lr=1e-12, batch_size=2, held_out_every=6, evaluations=1)
    summary = finetune(config, tmp_path / "run")
    examples = load_examples(config, load_tokenizer("", str(base)))
    rows = list(examples.validation)
    assert len(rows) == 6
    counts = [sum(label != IGNORED for row in rows[i : i + 2] for label in row["labels"]) for i in (0, 2, 4)]
    assert len(set(counts)) > 1
    found = by_hand(AutoModelForCausalLM.from_pretrained(base), rows)
    assert found.count_nonzero() == sum(counts)
    assert summary.validation_loss == pytest.approx(found.sum().item() / sum(counts), rel=1e-5)
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert (first["step"], first["validation_loss"]) == (0, summary.loss_before)


# Data


def test_fields_of_both_data_sets(tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    rows = [
        {"query": " q1 ", "response": "r1", "type": "GSM_Rephrased"},
        {"question": "q2", "answer": "a\u2028b"},
    ]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert list(read_examples(str(file))) == [("q1", "r1"), ("q2", "a\u2028b")]


def test_columns_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_list(GSM8K)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [example.answer for example in read_examples("openai/gsm8k:main")] == [r["answer"] for r in GSM8K]
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"text": "x"}])
    )
    with pytest.raises(
        UserError, match=r"^--data owner/name: row 1: needs the fields 'query' and 'response'"
    ):
        list(read_examples("owner/name"))


def test_samples_and_long_examples(tiny: Tiny, base: Path, data: Path, capsys: Any) -> None:
    tokenizer = load_tokenizer("", str(base))
    few = load_examples(tiny(samples=20), tokenizer)
    assert few.facts["train_examples"] == len(few.train) == 16
    assert len(few.validation) == 4
    assert capsys.readouterr().err == ""
    lengths = sorted(len(row["input_ids"]) for row in rows_of(data, base))
    short = load_examples(tiny(sequence_length=lengths[-4]), tokenizer)
    left_out = sum(length > lengths[-4] for length in lengths)
    assert capsys.readouterr().err == (
        f"lorapre: {left_out} of 40 examples have more than {lengths[-4]} tokens (--sequence-length) and are "
        "left out\n"
    )
    assert max(len(row) for row in short.train["input_ids"]) <= lengths[-4]


def test_the_protocol_of_metamath100k() -> None:
    config = metamath100k()
    assert (config.method, config.rank, config.model) == ("lorapre-adamw", 8, "meta-llama/Llama-3.1-8B")
    assert (config.data, config.only, config.fewer_than) == ("meta-math/MetaMathQA", "GSM", 512)
    assert (config.template, config.sequence_length, config.seed) == ("instruction", 1024, 0)
    assert (config.batch_size * config.accumulation, config.steps) == (32, 3125)
    assert config.samples is not None
    trained = config.samples - config.samples // config.held_out_every
    assert trained == config.steps * config.sequences_per_step == 100_000  # one epoch
    assert (config.lr, config.weight_decay, config.final_lr, config.warmup) == (2e-5, 0, 0, 0.03)
    assert training_arguments(config, Path("run")).warmup_steps == 94
    assert (config.precision, config.dtype) == ("bf16", "bf16")
    assert ALPHA * (metamath100k("lora").rank or 0) == 16
    assert {metamath100k(method).method for method in METHODS} == {*METHODS}


def test_a_model_and_data_of_yours_without_a_preset(
    base: Path, data: Path, tmp_path: Path, lorapre: Any
) -> None:
    options = ("--rank", "4", "--sequence-length", "400", "--steps", "2", "--batch-size", "4")
    out = tmp_path / "run"
    code, _, errors = lorapre(
        "finetune", "--model", str(base), "--data", str(data), "--out", str(out), *options
    )
    assert code == 0, errors
    facts = json.loads((out / "data.json").read_text())
    assert (facts["train_examples"], facts["validation_examples"]) == (36, 2)  # all 40, in whole steps


def test_the_adapters_are_on_the_seven_projections(base: Path, tiny: Tiny) -> None:
    model, _ = with_optimizer(load_model("", str(base), torch.float32), tiny("lora"))
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert adapted == {*projections}


def test_which_examples_are_taken(tiny: Tiny, base: Path, tmp_path: Path, capsys: Any) -> None:
    kinds = ("GSM_Rephrased", "MATH_AnsAug", "GSM_SV", "GSM_AnsAug")
    rows = [{"query": f"{n}?", "response": str(n), "type": kinds[n % 4]} for n in range(40)]
    rows[2]["response"] *= 50
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer("", str(base))
    config = tiny(data=str(tmp_path / "mixed.jsonl"), only="GSM", samples=15, template="instruction")
    length = len(encode(Example("39?", "39"), tokenizer, "instruction")["input_ids"])
    data = load_examples(config.replace(fewer_than=length + 10), tokenizer)
    texts = [tokenizer.decode(row["input_ids"]) for row in (*data.train, *data.validation)]
    numbers = sorted(
        int(text.rpartition("### Response:\n ")[2].removesuffix("<|endoftext|>")) for text in texts
    )
    assert numbers == [n for n in range(22) if n % 4 != 1 and n != 2][: len(numbers)]
    assert len(numbers) == 12 + 3  # of 15, one in five is held out; whole steps of 4
    assert texts[0].startswith("Below is an instruction that describes a task.")
    assert capsys.readouterr().err == (
        f"lorapre: 1 of 16 examples have more than {length + 9} tokens (--fewer-than) and are left out\n"
    )


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "best"], "--method"),
        (["--preset", "huge"], "--preset: there is no 'huge'; choose from own, metamath100k"),
        (["--rank", "0", "--variant", "paper"], "--rank: must be at least 1 for variant paper, not 0"),
        (["--method", "lora", "--rank", "0"], "--rank: must be at least 1 for lora, not 0"),
        (["--rank", "16"], "--rank: rank: factors would not be smaller than the matrix for model.layers.0"),
        (["--method", "adamw", "--rank", "4"], "--rank: adamw has no such option"),
        (["--method", "dora", "--variant", "paper"], "--variant: dora has no such option"),
        (["--method", "lora", "--release"], "--release: lora has no such option"),
        (["--release", "--accumulation", "2"], "--release: gradients cannot be accumulated"),
        (["--method", "lora", "--freeze", "embed"], "--freeze: lora freezes the whole model"),
        (["--method", "adamw", "--rules", "x=4"], "--rules: adamw has no such option"),
        (["--rules", "lm_head"], "--rules 'lm_head': write PATTERN=RANK"),
        (["--rules", "lm_head=0"], "--rules 'lm_head=0': write PATTERN=RANK"),
        (["--rules", "(=4"], "--rules '(': not a regular expression"),
        (["--rules", "nowhere=4"], "--rules: rules: no parameter is left for 'nowhere'"),
        (["--freeze", "["], "--freeze '[': not a regular expression"),
        (["--freeze", "nowhere"], "--freeze 'nowhere': found in the name of no parameter"),
        (["--freeze", "."], "--freeze: leaves nothing to train"),
        (["--freeze", "proj"], "no trainable parameter gets low-rank momenta"),
        (["--sequence-length", "401"], "--sequence-length 401: the model reads at most 400 tokens"),
        (["--sequence-length", "20"], "too few examples, 0 to train on where one step takes 4"),
        (["--only", "GSM"], "0 to train on where one step takes 4 (with 'GSM' in their field type, --only)"),
        (["--samples", "1"], "--samples: must be at least 2"),
        (["--data", "missing.jsonl"], "--data missing.jsonl: no such file"),
        (["--data", "owner/missing"], "--data owner/missing: no such file here, nor a dataset found"),
        (["--data", "text.txt"], "must be a file of JSON lines"),
        (
            ["--data", "fields.jsonl"],
            "fields.jsonl: line 2: needs the fields 'query' and 'response' or 'quest",
        ),
        (["--data", "empty.jsonl"], "empty.jsonl: line 1: the field 'answer' is empty"),
        (["--data", "broken.jsonl"], "broken.jsonl: line 3 is not JSON"),
        (["--data", "latin.jsonl"], "latin.jsonl: line 1 is not JSON ('utf-8' codec"),
        (["--model", "no/model"], "--model no/model: no such folder, and not on the hub"),
        (["--model", "nope"], "--model nope: no such folder, and not on the hub"),
        (["--model", "./nowhere"], "--model ./nowhere: there is no such folder"),
        (["--model", "no-matrix"], "--rank: no trainable parameter gets low-rank momenta"),
        (["--model", "no-matrix", "--method", "lora"], "--method lora"),
        (["--model", "unfinished"], "unfinished: no checkpoint in this run folder"),
        (["--out", "full"], "--out full: this folder is not empty"),
        (["--resume", "full"], "--resume full: not a run folder"),
        (["--resume", "full", "--packing"], "--resume: a run goes on as it began; leave out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tiny: Tiny,
    base: Path,
    lorapre: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    line = json.dumps(GSM8K[0]) + "\n"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "data.json").write_text("{}")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "fields.jsonl").write_text(line + '{"query": "q", "answer": "a"}\n')
    (tmp_path / "empty.jsonl").write_text('{"question": "q", "answer": " "}\n')
    (tmp_path / "broken.jsonl").write_text(line * 2 + "{\n")
    (tmp_path / "latin.jsonl").write_bytes(b'"\xe9"')
    if "no-matrix" in arguments:
        model = LlamaForCausalLM.from_pretrained(base)
        model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(), 0
        model.save_pretrained("no-matrix")
        AutoTokenizer.from_pretrained(base).save_pretrained("no-matrix")
    preset = [] if arguments[0] == "--preset" or "--resume" in arguments else ["--preset", "tiny"]
    code, stdout, stderr = lorapre("finetune", *preset, *arguments)
    assert code == 2
    assert stdout == ""
    assert message in stderr
    assert stderr.removesuffix("\n").count("\n") == ("left out" in stderr and "400" not in arguments)
    assert not (tmp_path / "runs").exists()  # nothing left behind


def test_a_preset_names_its_missing_model(
    lorapre: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    code, _, stderr = lorapre("finetune", "--preset", "arithmetic")
    assert code == 2
    assert stderr.startswith("lorapre: --model runs/llama-arithmetic: no such folder, and not on the hub")
    assert "it is the model of preset arithmetic" in stderr


def test_the_hub_is_asked_once_and_its_cache_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, timeout: asked.append(name))
    assert model_folder("owner/there") == "owner/there"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    assert model_folder("owner/cached") == "owner/cached"
    assert asked == ["owner/there"]


def test_data_are_read_before_the_model(tiny: Tiny, lorapre: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("too early"))
    code, _, stderr = lorapre("finetune", "--preset", "tiny", "--data", "missing.jsonl")
    assert code == 2
    assert "--data missing.jsonl: no such file" in stderr


def test_galore_without_its_package(tiny: Tiny, lorapre: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    code, _, stderr = lorapre("finetune", "--preset", "tiny", "--method", "galore")
    assert code == 2
    assert "pytorch_optimizer, which is not installed" in stderr


def test_changed_data_or_model_cannot_go_on(tiny: Tiny, lorapre: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny(), tmp_path / "run", callbacks=[Interrupt(step=3)])
    data.write_text(data.read_text().replace("has", "had", 1))
    code, _, stderr = lorapre("finetune", "--resume", tmp_path / "run")
    assert code == 2
    assert "the data have changed" in stderr


def test_help_is_quick_and_complete(lorapre: Any, capsys: Any) -> None:
    code, stdout, _ = lorapre("finetune", "--help")
    assert code == 0
    for option in ("--method", "--model", "--release", "--packing", "--rules", "--freeze", "--resume"):
        assert option in stdout
