"""What is learned from: text in pieces of one length, and prompts with answers and chats, of which only answers are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from atlas_megatron.data.corpus import Summary, documents, expand
from atlas_megatron.data.declared_tokens import CONFIG
from atlas_megatron.data.older_tokenizers import SENTENCEPIECE
from atlas_megatron.data.pieces import pieces
from atlas_megatron.data.prefixes import is_indexed, prefix_of
from atlas_megatron.data.records import Skipped, go_past, holds_records, records
from atlas_megatron.data.tokenizer import Tokenizer, load_tokenizer
from atlas_megatron.finetune.prompts import ANSWER, MESSAGES, Prompts
from atlas_megatron.finetune.segments import IGNORED
from atlas_megatron.finetune.settings import Settings
from atlas_megatron.hf.configuration_atlas import AtlasConfig

TOKENIZERS = ("tokenizer.json", CONFIG, "vocab.json", *SENTENCEPIECE)  # one of these makes a folder a tokenizer's

# Token ids, and how many of the first are not learned: 1, which nothing precedes, or more. Or which ones are learned.
type Example = tuple[np.ndarray, int | np.ndarray]


class Sequences(Dataset[Example]):
    """Examples, counted before they are read."""

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

    def __getitem__(self, number: int) -> Example:
        return self.stream[number * self.length : (number + 1) * self.length], 1

    @property
    def tokens(self) -> int:
        return len(self) * self.length

    @property
    def longest(self) -> int:
        return self.length


class Answers(Sequences):
    """Prompts with answers, and chats; what comes before an answer is read, not learned."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Example:
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

    dataset: Dataset[Example]
    sequences: int
    tokens: int
    longest: int  # tokens


class Loader:
    """Reads files and prefixes with the tokenizer in the model's folder."""

    def __init__(self, settings: Settings, config: AtlasConfig) -> None:
        """Raises ValueError for a tokenizer that has more tokens than the model."""
        self.settings, self.vocab_size = settings, config.vocab_size
        self.length = settings.length or config.seq_length
        self.skipped = Skipped() if settings.skip_bad else None
        self.tokenizer: Tokenizer | None = None
        if any((settings.model / name).is_file() for name in TOKENIZERS):
            self.tokenizer = load_tokenizer(settings.model)
            if self.tokenizer.vocab_size > config.vocab_size:
                raise ValueError(
                    f"the tokenizer in {settings.model} has {self.tokenizer.vocab_size} tokens, more than the model's "
                    f"{config.vocab_size}; put there the one that the model was trained with"
                )

    def load(self, words: Sequence[str]) -> Examples:
        """The data that `words` name: prefixes of .bin/.idx, JSON or Parquet of text, answers or chats, plain text.

        Raises ValueError for data that are missing, malformed, empty, or of another tokenizer.
        """
        parts: list[Sequences] = []
        texts: list[Path] = []
        for word in words:
            prefix = prefix_of(word)
            if is_indexed(prefix) and (prefix != word or not Path(word).is_file()):
                parts.append(Pieces(self._indexed(prefix), self.length))
                continue
            for file in expand([word]):
                kind = _kind(file)
                if kind is None:
                    texts.append(file)
                else:
                    parts.append(Answers(list(self._learned_in_part(file, kind))))
        if texts:
            parts.append(Pieces(self._text(texts), self.length))
        parts = [part for part in parts if len(part)]
        if not parts:
            if self.skipped and self.skipped.count:
                raise ValueError(
                    f"{', '.join(words)}: nothing is left to learn from after {self.skipped.count:,} bad records, the "
                    f"first of them: {self.skipped.named[0]}"
                )
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

        from atlas_megatron.data.batches import inspect

        inspect(prefix, self.vocab_size)
        summary = Summary.read(Path(prefix).parent)
        ours = self.tokenizer
        if summary and ours and _differs(summary, ours):
            theirs = "of the same size, but another one"
            if summary.vocab_size != ours.vocab_size:
                theirs = f"of {summary.vocab_size} tokens, and that of the model has {ours.vocab_size}"
            raise ValueError(
                f"{prefix} was prepared with a tokenizer {theirs}; prepare it with --tokenizer {self.settings.model}"
            )
        return np.memmap(f"{prefix}.bin", dtype=IndexedDataset(prefix).index.dtype, mode="r")

    def _text(self, files: Sequence[Path]) -> np.ndarray:
        """Every document of every file, one after the other, each with its end."""
        tokenizer = self._needed_tokenizer(files[0])
        found: list[np.ndarray] = []
        for file in files:
            for document in documents(file, self.settings.key, self.skipped):
                with document.opened() as source:
                    parts = pieces(source, tokenizer.encode)
                    found += [np.asarray(tokenizer.encode(part), np.int32) for part in parts]
                found.append(np.array([tokenizer.eod], np.int32))
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int32)

    def _learned_in_part(self, file: Path, kind: str) -> Iterator[Example]:
        prompts = Prompts(self.settings.model, self.settings.prompt, self._needed_tokenizer(file))
        most = self.settings.length
        for record in records(file, skipped=self.skipped):
            try:
                found: Example = prompts.chat(record) if kind == MESSAGES else prompts.answer(record)
                if most and len(found[0]) > most:
                    what = "the chat has" if kind == MESSAGES else "prompt and answer have"
                    raise ValueError(
                        f"{record.place}: {what} {len(found[0]):,} tokens, more than --length {most:,}; nothing is "
                        "cut off: raise --length, or leave the line out"
                    )
            except ValueError as error:
                go_past(error, self.skipped)
                continue
            yield found


def collate(sequences: list[Example]) -> dict[str, Tensor]:
    """input_ids and labels [B, T] int64, padded on the right, which no token before sees.

    labels: IGNORED for what is not learned.
    """
    longest = max(len(read) for read, _ in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    for row, (read, learned) in enumerate(sequences):
        own = torch.from_numpy(np.asarray(read, dtype=np.int64))
        tokens[row, : len(own)] = own
        counts = np.arange(len(own)) >= learned if isinstance(learned, int) else learned
        labels[row, : len(own)] = torch.where(torch.from_numpy(counts), own, IGNORED)
    return {"input_ids": tokens, "labels": labels}


def _kind(file: Path) -> str | None:
    """What a file's first record that can be read is of: a prompt with its answer, or a chat; None for text."""
    if not holds_records(file):
        return None
    first = next(records(file, skipped=Skipped()), None)
    return next((name for name in (ANSWER, MESSAGES) if first and name in first.values), None)


def _differs(summary: Summary, tokenizer: Tokenizer) -> bool:
    if summary.tokenizer_fingerprint:
        return summary.tokenizer_fingerprint != tokenizer.fingerprint
    return summary.vocab_size != tokenizer.vocab_size
