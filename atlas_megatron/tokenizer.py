"""Tokenizers: a local Hugging Face folder read, or a byte-level BPE trained here.

Imports neither torch nor Megatron, so that preparation's worker processes start fast.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# Names that tokenizers in the wild give their end-of-document token, tried in this order when
# tokenizer_config.json names none.
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
BYTE_ALPHABET = 256


@dataclass(frozen=True)
class Tokenizer:
    """What training and preparation need of a tokenizer, whichever library reads it."""

    folder: str
    encode: Callable[[str], list[int]]  # adds no special tokens
    decode: Callable[[Sequence[int]], str]  # keeps special tokens
    vocab_size: int  # largest token id + 1
    eod: int  # end-of-document token

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """What Megatron's index cache keys on: nothing of an index depends on anything else."""
        return OrderedDict(vocab_size=self.vocab_size, eod=self.eod)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a local Hugging Face tokenizer folder.

    Raises ValueError when the folder is missing, unreadable, or names no end-of-document token.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            f"tokenizer folder {str(folder)!r} does not exist; give a folder that holds tokenizer.json, "
            "or train one with tools/prepare_data.py --train-tokenizer"
        )
    if (path / "tokenizer.json").is_file():
        return _load_fast(path)
    return _load_transformers(path)


def _load_fast(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # `tokenizers` raises bare Exception for every malformed file
        raise ValueError(f"{file} is not a tokenizer ({error}); restore the file or train a new tokenizer") from error
    # Text that happens to spell a special token is text, not the end of a document.
    backend.encode_special_tokens = True
    vocabulary = backend.get_vocab(with_added_tokens=True)

    def encode(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    def decode(ids: Sequence[int]) -> str:
        return backend.decode(list(ids), skip_special_tokens=False)

    return Tokenizer(str(path), encode, decode, max(vocabulary.values()) + 1, _end_of_document(path, vocabulary))


def _load_transformers(path: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"{path} holds no tokenizer.json, and reading it otherwise needs the transformers package; "
            "install it with: pip install -e '.[hf]' -c constraints.txt"
        ) from error
    try:
        backend = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a tokenizer folder ({reason}); give one with tokenizer.json") from error
    if backend.eos_token_id is None:
        raise ValueError(_no_end(path))

    def encode(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(ids: Sequence[int]) -> str:
        return backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return Tokenizer(str(path), encode, decode, max(backend.get_vocab().values()) + 1, backend.eos_token_id)


def _end_of_document(path: Path, vocabulary: dict[str, int]) -> int:
    """The id of the end-of-document token: tokenizer_config.json's eos_token, else a known name."""
    names: tuple[str, ...] = KNOWN_ENDS
    config = path / "tokenizer_config.json"
    if config.is_file():
        try:
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{config} is not a JSON object ({error}); restore the file") from error
        if named is not None:
            names = (named["content"] if isinstance(named, dict) else named,)
    for name in names:
        if name in vocabulary:
            return vocabulary[name]
    raise ValueError(_no_end(path))


def _no_end(path: Path) -> str:
    return (
        f"tokenizer {path} names no end-of-document token that its vocabulary holds; "
        'add "eos_token" to its tokenizer_config.json'
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE and write it where `load_tokenizer` and transformers' AutoTokenizer read it.

    Raises ValueError when the texts cannot fill the vocabulary.
    """
    least = BYTE_ALPHABET + 1
    if vocab_size < least:
        raise ValueError(
            f"a byte-level vocabulary of {vocab_size} is too small; give at least {least}, all bytes and {END_OF_TEXT}"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    if backend.get_vocab_size() < vocab_size:
        raise ValueError(
            f"a vocabulary of {vocab_size} is too big for this text, which yields {backend.get_vocab_size()} tokens; "
            "ask for no more than that or give more text"
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def encode_batches(
    batches: Iterable[Sequence[str]], folder: str, workers: int
) -> Iterator[tuple[Sequence[str], list[np.ndarray]]]:
    """Each batch of texts with its int32 token ids, in order, encoded by `workers` processes.

    At most three batches a worker are on their way: memory stays bounded however large the corpus is.
    """
    if workers == 1:
        tokenizer = load_tokenizer(folder)
        for texts in batches:
            yield texts, _encode(tokenizer, texts)
        return
    # Spawned, not forked: tokenizers and torch have threads by now, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (folder,)) as pool:
        under_way: deque[tuple[Sequence[str], Future[list[np.ndarray]]]] = deque()
        try:
            for texts in batches:
                under_way.append((texts, pool.submit(_encode_in_worker, texts)))
                if len(under_way) == 3 * workers:
                    sent, encoded = under_way.popleft()
                    yield sent, encoded.result()
            for sent, encoded in under_way:
                yield sent, encoded.result()
        except BrokenProcessPool as error:
            raise ValueError(f"one of {workers} worker processes died; try fewer, or more memory") from error
        finally:
            pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer  # one a worker process, read once


def _start_worker(folder: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(folder)


def _encode_in_worker(texts: Sequence[str]) -> list[np.ndarray]:
    return _encode(_worker_tokenizer, texts)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.asarray(tokenizer.encode(text), dtype=np.int32) for text in texts]
