"""Many texts at once through a reader: how likely given continuations are, and what it writes itself.

The texts of a batch have different lengths, and a reader's rows advance together. Every layer is causal, so a text that
is through reads on, any token, until the longest is through too: nothing that was asked of it changes. Texts are read
in segments through the state: their length has no bound, and memory does not grow with it.

Dims: B texts of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched, groupby

import torch
from torch import Tensor

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.inference.reader import Reader
from atlas_megatron.inference.streaming import sample

ANY = 0  # a token after which nothing is asked

# Of one continuation: the sum of its tokens' log-probabilities, in nats, and whether each was the likeliest.
Answer = tuple[float, bool]


@dataclass(frozen=True)
class Question:
    """How likely is each continuation after the context? None of them is empty, nor is the context."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Generation:
    """How a text is continued: by `most` tokens at most, up to the first `until` string; see `streaming.generate`."""

    most: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0


def batches(questions: Sequence[Question], rows: int) -> Iterator[tuple[int, ...]]:
    """The numbers of the questions to ask together: of as many continuations, and of like length, longest first."""

    def size(number: int) -> tuple[int, int]:
        question = questions[number]
        return len(question.continuations), len(question.context) + max(map(len, question.continuations))

    order = sorted(range(len(questions)), key=size, reverse=True)
    for _, numbers in groupby(order, lambda number: len(questions[number].continuations)):
        yield from batched(numbers, rows)


def ask(reader: Reader, questions: Sequence[Question], segment: int) -> list[list[Answer]]:
    """The answers of one batch, by question and continuation; all questions have as many continuations.

    What the contexts have in length is read once, and every continuation goes on from there. segment: tokens of each
    text that are read at once.
    """
    # The last token of every context is left: it is what the first token of a continuation is told by.
    shared = min(len(question.context) for question in questions) - 1
    reader.forget()
    for piece in _segments([question.context[:shared] for question in questions], segment):
        reader.read(piece.to(reader.device))
    rounds = len(questions[0].continuations)
    mark = reader.mark() if rounds > 1 else None
    answers: list[list[Answer]] = [[] for _ in questions]
    for place in range(rounds):
        if place:
            reader.back(mark)
        rests = [question.context[shared:] for question in questions]
        wanted = [question.continuations[place] for question in questions]
        for found, answer in zip(answers, _score(reader, rests, wanted, segment), strict=True):
            found.append(answer)
    return answers


def _score(
    reader: Reader, rests: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], segment: int
) -> list[Answer]:
    """Read on: of each text the rest of its context, then its continuation, whose answers these are."""
    totals, likeliest = [0.0] * len(rests), [True] * len(rests)
    start = 0
    texts = [[*rest, *tokens[:-1]] for rest, tokens in zip(rests, wanted, strict=True)]
    for piece in _segments(texts, segment):
        logits = reader.read(piece.to(reader.device))
        stop = start + piece.shape[1]
        for row, (rest, tokens) in enumerate(zip(rests, wanted, strict=True)):
            # The logits after the token at place p of this text tell the token tokens[p - before].
            before = len(rest) - 1
            first, last = max(start, before), min(stop, before + len(tokens))
            if first >= last:
                continue
            # Rows of the embedding beyond the tokenizer's vocabulary are never text.
            told = logits[row, first - start : last - start, : reader.tokenizer.vocab_size]
            told = told.to(torch.promote_types(told.dtype, torch.float32))
            target = torch.tensor(tokens[first - before : last - before], device=told.device)
            found = told.log_softmax(-1).gather(-1, target[:, None])
            totals[row] += found.sum(dtype=torch.float64).item()
            likeliest[row] &= bool((told.argmax(-1) == target).all())
        start = stop
    return list(zip(totals, likeliest, strict=True))


def alike(lengths: Sequence[int], rows: int, spread: int) -> Iterator[list[int]]:
    """The numbers of the texts to continue together: the longest, and others at most `spread` tokens shorter."""
    together: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number], reverse=True):
        if together and (len(together) == rows or lengths[together[0]] - lengths[number] > spread):
            yield together
            together = []
        together.append(number)
    if together:
        yield together


def write(
    reader: Reader, contexts: Sequence[Sequence[int]], how: Generation, seeds: Sequence[int], segment: int
) -> list[str]:
    """The continuation of each context [B], until a stop string, the end of the document or `how.most` tokens.

    Contexts are read in segments up to the end of the shortest; from there on a token at a time, which is the context's
    where it goes on and the text's own where it has ended. The same seed gives the same text in any batch.
    """
    shortest = min(map(len, contexts))
    reader.forget()
    for piece in _segments([context[:shortest] for context in contexts], segment):
        logits = _last(reader, piece)
    rows = [_Row(context[shortest:], how, seed, reader) for context, seed in zip(contexts, seeds, strict=True)]
    while True:
        step = [row.advance(logits[number : number + 1]) for number, row in enumerate(rows)]
        if all(row.ended for row in rows):
            return [row.text for row in rows]
        logits = _last(reader, torch.tensor(step)[:, None])


class _Row:
    """One text that is being continued."""

    def __init__(self, waiting: Sequence[int], how: Generation, seed: int, reader: Reader) -> None:
        """waiting: what of its context has yet to be read."""
        self._waiting, self._how = iter(waiting), how
        self._tokenizer: Tokenizer = reader.tokenizer
        self._generator = torch.Generator(reader.device).manual_seed(seed)
        self._written: list[int] = []
        self.text, self.ended = "", False

    def advance(self, logits: Tensor) -> int:
        """The token to read next; logits [1, vocabulary] are those of its place."""
        given = next(self._waiting, None)
        if given is not None:
            return given
        if self.ended:
            return ANY
        token = int(sample(logits, self._how.temperature, self._how.top_p, self._generator))
        if token == self._tokenizer.eod:
            self.ended = True
            return token
        self._written.append(token)
        text = self._tokenizer.decode(self._written)
        cuts = [text.find(stop) for stop in self._how.until if stop in text]
        self.text = text[: min(cuts, default=len(text))]
        self.ended = bool(cuts) or len(self._written) == self._how.most
        return token


def _last(reader: Reader, tokens: Tensor) -> Tensor:
    """Logits [B, vocabulary] after the last of the tokens [B, T]."""
    return reader.read(tokens.to(reader.device))[:, -1, : reader.tokenizer.vocab_size].float()


def _segments(texts: Sequence[Sequence[int]], segment: int) -> Iterator[Tensor]:
    """[B, up to `segment`] int64 of the texts after each other, until the longest is through."""
    for start in range(0, max(map(len, texts)), segment):
        parts = [text[start : start + segment] for text in texts]
        width = max(map(len, parts))
        yield torch.tensor([[*part, *[ANY] * (width - len(part))] for part in parts])
