"""A text is read, and continued token by token: one sequence, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

import torch
from torch import Tensor

from atlas_megatron.data.pieces import Spoken, pieces
from atlas_megatron.inference.reader import Reader
from atlas_megatron.inference.streaming import check_sampling, sample


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; see `streaming.generate`."""

    temperature: float
    top_p: float
    seed: int
    top_k: int = 0


class Speaker:
    """Reads text and continues it, one sequence."""

    def __init__(self, reader: Reader, sampling: Sampling, segment: int) -> None:
        """segment: tokens that are read at once. Raises ValueError for arguments out of range."""
        check_sampling(sampling.temperature, sampling.top_p, sampling.top_k)
        check_segment(segment)
        self.reader, self.sampling, self.segment = reader, sampling, segment
        self._generator = torch.Generator(reader.device).manual_seed(sampling.seed)
        self._logits: Tensor | None = None  # of the token after all that was read, [1, vocabulary]

    def read(self, file: TextIO) -> int:
        """Read a text to its end, in constant memory; the number of its tokens."""
        waiting: list[int] = []
        count = 0
        for piece in pieces(file, self.reader.tokenizer.encode):
            waiting += self.reader.tokenizer.encode(piece)
            while len(waiting) >= self.segment:
                self._take(waiting[: self.segment])
                waiting, count = waiting[self.segment :], count + self.segment
        if waiting:
            self._take(waiting)
        return count + len(waiting)

    def begin(self) -> None:
        """Read the end of a document, behind which a new one begins."""
        self._take([self.reader.tokenizer.eod])

    def speak(self, tokens: int) -> Iterator[tuple[int, str]]:
        """Up to `tokens` (id, text) of the continuation; ends with the end of the document."""
        spoken, sampling = Spoken(self.reader.tokenizer), self.sampling
        for left in reversed(range(tokens)):
            assert self._logits is not None
            drawn = sample(self._logits, sampling.temperature, sampling.top_p, self._generator, sampling.top_k)
            token = int(drawn)
            self._take([token])
            if token == self.reader.tokenizer.eod:
                # What was held back is no character any more.
                if rest := spoken.rest():
                    yield token, rest
                return
            yield token, spoken.add(token) + ("" if left else spoken.rest())

    def continuations(self, count: int) -> Iterator[int]:
        """The numbers of so many samples; at each, what was read so far is taken up again, with a seed of its own."""
        if count == 1:
            yield 0
            return
        mark, logits = self.reader.mark(), self._logits
        for number in range(count):
            self.reader.back(mark)
            self._logits = logits
            self._generator.manual_seed(self.sampling.seed + number)
            yield number

    def forget(self) -> None:
        self.reader.forget()
        self._logits = None

    def _take(self, tokens: list[int]) -> None:
        batch = torch.tensor([tokens], device=self.reader.device)
        # Rows of the embedding beyond the tokenizer's vocabulary are never text.
        self._logits = self.reader.read(batch, keep=1)[:, -1, : self.reader.tokenizer.vocab_size].float()


def check_segment(tokens: int) -> None:
    """Raise ValueError for a number of tokens to read at once that is none."""
    if tokens < 1:
        raise ValueError(f"--segment {tokens} must be at least 1 token")
