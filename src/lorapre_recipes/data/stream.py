"""From `--data` to what the trainer takes: read, hold out, tokenize, keep the tokens on disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets  # type: ignore[import-untyped]
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorapre_recipes.config import PretrainConfig, UserError
from lorapre_recipes.data.corpus import Corpus, hash_documents, read_corpus, take_characters
from lorapre_recipes.data.examples import spaced
from lorapre_recipes.data.tokens import (
    Sequence,
    cached_sequences,
    cached_tokenizer,
    features,
    for_transformers,
    load_tokenizer,
    sequences,
)

TOKENIZER_CHARACTERS = 50_000_000  # of a large corpus: how much the tokenizer is trained on


class TokenData(NamedTuple):
    """What the trainer needs: sequences of `sequence_length` tokens under the key `input_ids`."""

    tokenizer: PreTrainedTokenizerFast
    train: datasets.Dataset | TokenStream
    validation: datasets.Dataset
    facts: dict[str, Any]  # what must be the same when a run goes on


class TokenStream(torch.utils.data.IterableDataset[dict[str, Sequence]]):
    """Tokenizes a stream of documents as it is read, without end; each epoch is shuffled anew.

    To the trainer all this is one epoch, for it cannot know where an epoch of a stream ends.
    """

    def __init__(self, corpus: Corpus, encode: Callable[[Iterable[str]], Iterator[Sequence]]):
        self.corpus, self.encode = corpus, encode

    def __iter__(self) -> Iterator[dict[str, Sequence]]:
        assert self.corpus.set_epoch is not None
        for epoch in itertools.count():
            self.corpus.set_epoch(epoch)
            sequence = None
            for sequence in self.encode(self.corpus.train):
                yield {"input_ids": sequence}
            if sequence is None:
                raise UserError("--data: the stream holds too little text for one sequence")


def load_data(config: PretrainConfig, run: Path | None = None) -> TokenData:
    """Read, split and tokenize. Raises UserError.

    Tokens of another run with the same data are found in the cache. A stream is tokenized as it is
    read, and not kept. The folder `run` of a run that goes on has its tokenizer.
    """
    corpus, length = read_corpus(config), config.sequence_length
    own = config.tokenizer if run is None else str(run)
    if own is not None:  # AutoTokenizer would take the run's config.json for a model's
        kind = AutoTokenizer if run is None else PreTrainedTokenizerFast
        tokenizer = load_tokenizer(f"--tokenizer {own}", own, kind, model_max_length=length)
    else:
        sample = take_characters(corpus.sample, TOKENIZER_CHARACTERS)
        trained = cached_tokenizer(sample, corpus.fingerprint, config.vocab_size)
        tokenizer = for_transformers(trained, length)
    encode = partial(
        sequences,
        tokenizer=tokenizer,
        length=length,
        packed=config.packed,
        vocab_size=config.vocab_size,
    )
    needs = f"one step takes {config.sequences_per_step} sequences of {length} tokens"
    share = f"one document in {config.held_out_every} is held out"
    too_little = UserError(f"--data {config.data}: too little text; {needs}, and {share}")
    train: datasets.Dataset | TokenStream
    if corpus.set_epoch is not None:
        train = TokenStream(corpus, encode)
        # Reading on until every held-out document of a stream is found would take for ever.
        held_out = list(itertools.islice(encode(corpus.validation), config.eval_sequences))
        validation = datasets.Dataset.from_dict({"input_ids": held_out}, features=features(length))
        validation = validation.with_format("torch")
    else:
        words = hash_documents([tokenizer.backend_tokenizer.to_str(), str(tokenizer.eos_token_id)])
        form = f"{length} {config.packed} {config.vocab_size} {words}"
        sums = corpus.fingerprint, hash_documents(corpus.validation)
        train, validation = (
            cached_sequences(f"{fingerprint} {form}", length, partial(encode, part), too_little)
            for part, fingerprint in zip((corpus.train, corpus.validation), sums, strict=True)
        )
        if len(train) < config.sequences_per_step:
            raise too_little
        # An epoch has whole steps, all of one size.
        train = train.select(range(len(train) - len(train) % config.sequences_per_step))
    if len(validation) == 0:
        raise too_little
    # Evenly spaced, so that every held-out document has its say.
    count = config.evaluated(len(validation))
    validation = validation.select(spaced(range(len(validation)), count))
    facts = {
        "sha256": corpus.fingerprint,
        "train_sequences": len(train) if isinstance(train, datasets.Dataset) else None,
        "validation_sequences": len(validation),
    }
    return TokenData(tokenizer, train, validation, facts)
