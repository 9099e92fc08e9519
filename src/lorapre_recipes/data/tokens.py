"""From documents to sequences of tokens: the tokenizer, packing or padding, and their cache."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import datasets  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from datasets.exceptions import DatasetGenerationError  # type: ignore[import-untyped]
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorapre_recipes.config import NOT_LOADED, UserError, user_errors
from lorapre_recipes.files import cache_folder, write_whole

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = -100  # in place of a token; it is what losses of torch and transformers ignore

Sequence = npt.NDArray[np.int32]


def load_tokenizer(
    option: str, name: str, kind: Any = AutoTokenizer, **options: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer from a folder or the Hugging Face Hub. Raises UserError where it cannot serve."""
    with user_errors(f"{option}: no tokenizer here, nor on the Hugging Face Hub", *NOT_LOADED):
        tokenizer = kind.from_pretrained(name, **options)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise UserError(f"{option}: needs a tokenizer with a tokenizer.json and an end token")
    tokenizer.backend_tokenizer.no_truncation()  # what its file may ask for is `sequences`' to do
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int, digits: bool = False) -> Tokenizer:
    """Train byte-level BPE: every text can be encoded and decoded without loss.

    With `digits`, every digit is a token of its own: all numbers are read alike.
    """
    tokenizer = Tokenizer(models.BPE())
    words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits:
        words = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def for_transformers(tokenizer: Tokenizer, length: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers saves and loads it, for a model that reads `length` tokens."""
    limit = {} if length is None else {"model_max_length": length}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT, **limit
    )


def writable_cache() -> AbstractContextManager[None]:
    """Raises UserError where the block cannot write the cache."""
    message = f"the cache {cache_folder()} cannot be written"
    return user_errors(f"{message}; set LORAPRE_CACHE to a folder that can", OSError)


def cached_tokenizer(documents: Iterable[str], fingerprint: str, vocab_size: int) -> Tokenizer:
    """The byte-level BPE tokenizer of these documents, trained at first use.

    The key in the cache is `fingerprint`, their `hash_documents`, and the size of the vocabulary.
    """
    file = cache_folder() / "tokenizers" / f"bpe-{vocab_size}-{fingerprint[:32]}.json"
    if file.is_file():
        return Tokenizer.from_file(str(file))
    tokenizer = train_tokenizer(documents, vocab_size)
    with writable_cache():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, tokenizer.to_str())
    return tokenizer


def cached_sequences(
    key: str, length: int, make: Callable[[], Iterator[Sequence]], empty: UserError
) -> datasets.Dataset:
    """Rows `input_ids` of `make()`, memory-mapped from a file that the first call writes.

    The key names all that decides the sequences. If `make()` is cut off, nothing is left of the
    file; if it makes no sequence, `empty` is raised.
    """

    def rows() -> Iterator[dict[str, Sequence]]:
        sequence = None
        for sequence in make():
            yield {"input_ids": sequence}
        if sequence is None:
            raise empty

    try:
        with writable_cache():
            return datasets.Dataset.from_generator(
                rows,
                features=features(length),
                cache_dir=str(cache_folder() / "tokens"),
                fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
            ).with_format("torch")
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def features(length: int) -> datasets.Features:
    """The one column of a data set: `length` tokens, which come out as an int64 tensor."""
    return datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=length)})


def sequences(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    *,
    packed: bool,
    vocab_size: int,
) -> Iterator[Sequence]:
    """Documents as sequences of `length` tokens, each document closed by the tokenizer's end token.

    If `packed`, the documents are cut one after the other, and the rest at the end is dropped; else
    each is truncated, and padded with PADDING. Raises UserError for a token above `vocab_size`.
    """
    rest = np.empty(0, np.int32)
    end = [tokenizer.eos_token_id]
    encode = tokenizer.backend_tokenizer.encode_batch  # it uses every core
    documents = iter(documents)
    while batch := list(itertools.islice(documents, 64)):
        encoded = [encoding.ids for encoding in encode(batch, add_special_tokens=False)]
        if packed:
            tokens = np.concatenate([rest, *(np.asarray(ids + end, np.int32) for ids in encoded)])
            full = len(tokens) // length * length
            rows, rest = tokens[:full].reshape(-1, length), tokens[full:]
        else:
            rows = np.full((len(batch), length), PADDING, np.int32)
            for row, ids in zip(rows, encoded, strict=True):
                ids = ids[: length - 1] + end
                row[: len(ids)] = ids
        if rows.size and (largest := rows.max()) >= vocab_size:
            makes = f"it makes token {largest}"
            raise UserError(f"--tokenizer: {makes}, and the model's vocabulary is {vocab_size}")
        yield from rows
