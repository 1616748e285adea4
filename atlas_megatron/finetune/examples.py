"""What is learned from: text in pieces of one length, and prompts with answers, of which only the answers are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from atlas_megatron.corpus import Summary, documents, expand
from atlas_megatron.finetune.segments import IGNORED
from atlas_megatron.finetune.settings import FIELD, Settings
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.tokenizer import Tokenizer, load_tokenizer

ANSWER = "target"  # the field that makes a line of .jsonl a prompt with its answer


class Sequences(Dataset[tuple[np.ndarray, int]]):
    """Token ids, and how many of each sequence's first tokens are not learned: 1, which nothing precedes, or more."""

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        raise NotImplementedError

    @property
    def longest(self) -> int:
        raise NotImplementedError


class Pieces(Sequences):
    """A stream of tokens cut into pieces of `length`, all of them learned."""

    def __init__(self, stream: np.ndarray, length: int) -> None:
        self.stream, self.length = stream, length

    def __len__(self) -> int:
        return len(self.stream) // self.length

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        return self.stream[number * self.length : (number + 1) * self.length], 1

    @property
    def tokens(self) -> int:
        return len(self) * self.length

    @property
    def longest(self) -> int:
        return self.length


class Answers(Sequences):
    """Prompts with answers; what comes before the answer is read, not learned."""

    def __init__(self, examples: list[tuple[np.ndarray, int]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        return self.examples[number]

    @property
    def tokens(self) -> int:
        return sum(len(read) for read, _ in self.examples)

    @property
    def longest(self) -> int:
        return max(len(read) for read, _ in self.examples)


@dataclass(frozen=True)
class Examples:
    """All that a run learns from, or is validated on."""

    dataset: Dataset[tuple[np.ndarray, int]]
    sequences: int
    tokens: int
    longest: int  # tokens


class Loader:
    """Reads files and prefixes with the tokenizer in the model's folder."""

    def __init__(self, settings: Settings, config: AtlasConfig) -> None:
        """Raises ValueError for a tokenizer that has more tokens than the model."""
        self.settings, self.vocab_size = settings, config.vocab_size
        self.length = settings.length or config.seq_length
        self.tokenizer: Tokenizer | None = None
        if (settings.model / "tokenizer.json").is_file() or (settings.model / "tokenizer_config.json").is_file():
            self.tokenizer = load_tokenizer(settings.model)
            if self.tokenizer.vocab_size > config.vocab_size:
                raise ValueError(
                    f"the tokenizer in {settings.model} has {self.tokenizer.vocab_size} tokens, more than the model's "
                    f"{config.vocab_size}; put there the one that the model was trained with"
                )

    def load(self, words: Sequence[str]) -> Examples:
        """The data that `words` name: prefixes of .bin/.idx, .jsonl of text or of answers, plain text, Parquet.

        Raises ValueError for data that are missing, malformed, empty, or of another tokenizer.
        """
        parts: list[Sequences] = []
        texts: list[Path] = []
        for word in words:
            prefix = word.removesuffix(".bin").removesuffix(".idx")
            if Path(f"{prefix}.idx").is_file() or Path(f"{prefix}.bin").is_file():
                parts.append(Pieces(self._indexed(prefix), self.length))
                continue
            for file in expand([word]):
                if file.suffix == ".jsonl" and _has_answers(file):
                    parts.append(Answers(list(self._answers(file))))
                else:
                    texts.append(file)
        if texts:
            parts.append(Pieces(self._text(texts), self.length))
        parts = [part for part in parts if len(part)]
        if not parts:
            raise ValueError(
                f"{', '.join(words)}: no sequence of {self.length} tokens in it; give more text, or a smaller --length"
            )
        return Examples(
            ConcatDataset(parts),
            sum(len(part) for part in parts),
            sum(part.tokens for part in parts),
            max(part.longest for part in parts),
        )

    def _needed_tokenizer(self, what: object) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{what} is text, and {self.settings.model} holds no tokenizer; put the model's tokenizer.json there, "
                "or give .bin/.idx data"
            )
        return self.tokenizer

    def _indexed(self, prefix: str) -> np.ndarray:
        """The tokens of a .bin, where they lie."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        from atlas_megatron.data import inspect

        inspect(prefix, self.vocab_size)
        summary = Summary.read(Path(prefix).parent)
        if summary and self.tokenizer and summary.vocab_size != self.tokenizer.vocab_size:
            raise ValueError(
                f"{prefix} was prepared with a tokenizer of {summary.vocab_size} tokens, and that of the model has "
                f"{self.tokenizer.vocab_size}; prepare it with --tokenizer {self.settings.model}"
            )
        return np.memmap(f"{prefix}.bin", dtype=IndexedDataset(prefix).index.dtype, mode="r")

    def _text(self, files: Sequence[Path]) -> np.ndarray:
        """Every document of every file, one after the other, each with its end."""
        tokenizer = self._needed_tokenizer(files[0])
        found = [
            np.asarray([*tokenizer.encode(document.text), tokenizer.eod], dtype=np.int32)
            for file in files
            for document in documents(file, self.settings.key)
        ]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int32)

    def _answers(self, file: Path) -> Iterator[tuple[np.ndarray, int]]:
        tokenizer, most = self._needed_tokenizer(file), self.settings.length
        for place, record in _records(file):
            prompt = tokenizer.encode(_prompt(record, self.settings.prompt, place))
            answer = [*tokenizer.encode(_field(record, ANSWER, place)), tokenizer.eod]
            total = len(prompt) + len(answer)
            if most and total > most:
                raise ValueError(
                    f"{place}: prompt and answer have {total:,} tokens, more than --length {most:,}; nothing is cut "
                    "off: raise --length, or leave the line out"
                )
            yield np.asarray([*prompt, *answer], dtype=np.int32), max(1, len(prompt))


def collate(sequences: list[tuple[np.ndarray, int]]) -> dict[str, Tensor]:
    """input_ids and labels [B, T] int64, padded on the right, which no token before sees.

    labels: IGNORED for what is not learned.
    """
    longest = max(len(read) for read, _ in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    for row, (read, unlearned) in enumerate(sequences):
        own = torch.from_numpy(np.asarray(read, dtype=np.int64))
        tokens[row, : len(own)] = own
        labels[row, unlearned : len(own)] = own[unlearned:]
    return {"input_ids": tokens, "labels": labels}


def _has_answers(file: Path) -> bool:
    for _, record in _records(file):
        return ANSWER in record
    return False


def _records(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """The objects of a .jsonl, each with where it stands."""
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            place = f"{file}, line {number}"
            try:
                record = json.loads(raw.decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{place}: not JSON ({error}); mend or remove the line") from error
            if not isinstance(record, dict):
                raise ValueError(f"{place}: expected an object, found {type(record).__name__}; mend or remove it")
            yield place, record


def _field(record: dict[str, object], name: str, place: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        found = f"{type(value).__name__}, not text" if name in record else "nothing"
        raise ValueError(f"{place}: {name!r} holds {found}; mend the line, or choose its fields with --prompt")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise ValueError(f"{place}: {name!r} is not valid Unicode ({error.reason}); mend or remove the line") from error
    return value


def _prompt(record: dict[str, object], template: str, place: str) -> str:
    """The template with each {field} that it names in its place."""
    return FIELD.sub(lambda found: _field(record, found[1], place), template)
