"""Tokenizers: a local Hugging Face folder read, or a byte-level BPE trained here.

Imports neither torch nor Megatron, so that preparation's worker processes start fast.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from atlas_megatron.data.declared_tokens import CONFIG, END_OF_TEXT, added_tokens, end_of_document, read_object
from atlas_megatron.data.older_tokenizers import converted

BYTE_ALPHABET = 256
LARGEST_VOCABULARY = 1 << 22  # tokens; the trainer reserves memory for all of them before it reads


@dataclass(frozen=True)
class Tokenizer:
    """What training and preparation need of a tokenizer, whichever library reads it."""

    folder: str
    encode: Callable[[str], list[int]]  # adds no special tokens
    decode: Callable[[Sequence[int]], str]  # keeps special tokens
    vocab_size: int  # largest token id + 1
    eod: int  # end-of-document token
    describe: Callable[[], str] = str  # all that its ids depend on, in words that are equal for equal tokenizers

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """What Megatron's index cache keys on: nothing of an index depends on anything else."""
        return OrderedDict(vocab_size=self.vocab_size, eod=self.eod)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides which ids a text becomes, and of the end token: equal wherever its files lie."""
        return hashlib.sha256(f"{self.eod}\n{self.describe()}".encode()).hexdigest()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a local Hugging Face tokenizer folder.

    What its tokenizer.json remembers of other uses does not act: truncation, padding, dropout. A folder without
    tokenizer.json is converted by transformers. Raises ValueError when the folder is missing, unreadable, or names no
    end-of-document token.
    """
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"tokenizer folder {str(folder)!r} is a file; give the folder that holds it: {path.parent}")
    if not path.is_dir():
        raise ValueError(
            f"tokenizer folder {str(folder)!r} does not exist; give a folder that holds tokenizer.json, "
            "or train one with tools/prepare_data.py --train-tokenizer"
        )
    backend = _backend(path)
    # A tokenizer.json remembers how somebody used it: sentence models cut at 512 tokens and pad.
    backend.no_truncation()
    backend.no_padding()
    for chance in ("dropout", "alpha", "nbest_size"):
        if getattr(backend.model, chance, None) is not None:
            setattr(backend.model, chance, None)
    # Text that happens to spell a special token is text, not the end of a document.
    backend.encode_special_tokens = True
    vocabulary = backend.get_vocab(with_added_tokens=True)

    def encode(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    def decode(ids: Sequence[int]) -> str:
        return backend.decode(list(ids), skip_special_tokens=False)

    def describe() -> str:
        said = json.loads(backend.to_str())
        # What comes before and after a text in other uses, and how a text is written, leave the ids as they are.
        kept = {name: said[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        return json.dumps(kept, sort_keys=True)

    end = end_of_document(path, vocabulary)
    return Tokenizer(str(path), encode, decode, max(vocabulary.values()) + 1, end, describe)


def write_converted(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer whose own folder has no tokenizer.json in the form that needs no conversion."""
    source = Path(tokenizer.folder)
    backend = _backend(source)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    said = {name: value for name, value in read_object(source / CONFIG).items() if name != "added_tokens_decoder"}
    said |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": backend.id_to_token(tokenizer.eod)}
    (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def has_tokenizer_json(folder: Path) -> bool:
    """Whether a folder holds the form that the tokenizers package reads."""
    return (folder / "tokenizer.json").is_file()


def _backend(path: Path) -> Backend:
    backend = _read_backend(path) if has_tokenizer_json(path) else converted(path)
    _add_declared(backend, path)
    return backend


def _read_backend(path: Path) -> Backend:
    file = path / "tokenizer.json"
    try:
        return Backend.from_str(file.read_text(encoding="utf-8-sig"))
    except OSError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for every malformed file
        raise ValueError(f"{file} is not a tokenizer ({error}); restore the file or train a new tokenizer") from error


def _add_declared(backend: Backend, path: Path) -> None:
    """Tokens that older folders keep beside the vocabulary. Raises ValueError where they would get other ids."""
    for number, token in sorted(added_tokens(path).items()):
        content = token["content"]
        if content and backend.token_to_id(content) is None:
            add = backend.add_special_tokens if token.get("special") else backend.add_tokens
            add([AddedToken(**token)])
            if backend.token_to_id(content) != number:
                raise ValueError(
                    f"tokenizer {path} lists {content!r} as token {number}, which would follow "
                    f"{backend.get_vocab_size() - 1} tokens; restore its files"
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
    if vocab_size > LARGEST_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab_size} is too large to train; give at most {LARGEST_VOCABULARY}")
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
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
