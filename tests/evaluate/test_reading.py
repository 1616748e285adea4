"""Contexts side by side through a state: cut into segments, measured, asked; rows that grow are refused in time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from atlas_megatron.evaluate import recall
from atlas_megatron.evaluate.haystack import Example, Question
from atlas_megatron.evaluate.reading import PeakMemory, answers, check_room, read_contexts, segments
from atlas_megatron.evaluate.recall import Recall, measured, points

END = 9


class Summing:
    """A reader that answers with the sum of all it has read, modulo 8, and END after an END. One number a row."""

    growth = 0.0

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(
            encode=lambda text: [int(digit) for digit in text],
            decode=lambda ids: "".join(map(str, ids)),
            vocab_size=10,
            eod=END,
        )
        self.device = torch.device("cpu")
        self.longest = 0
        self.forget()

    def forget(self) -> None:
        self.sums: torch.Tensor | None = None

    def mark(self) -> Any:
        return self.sums

    def back(self, mark: Any, rows: Sequence[int] | None = None) -> None:
        self.sums = mark if rows is None else mark[list(rows)]

    def read(self, tokens: torch.Tensor, keep: int | None = None) -> torch.Tensor:
        self.longest = max(self.longest, tokens.shape[1])
        before = torch.zeros(len(tokens), dtype=torch.int64) if self.sums is None else self.sums
        sums = before[:, None] + tokens.cumsum(1)
        self.sums = sums[:, -1]
        told = torch.nn.functional.one_hot(torch.where(tokens == END, END, sums % 8), 12).float()
        # A row of the embedding that is no token: the likeliest of all, and never to be told.
        told[..., 11] = 2.0
        return told[:, -keep:] if keep else told


def pieces(tokens: np.ndarray, size: int) -> Iterator[np.ndarray]:
    yield from (tokens[start : start + size] for start in range(0, len(tokens), size))


def test_segments_are_the_contexts_whatever_their_pieces() -> None:
    texts = np.random.default_rng(0).integers(0, 8, (3, 1000)).astype(np.int32)
    for size in (1, 7, 250, 999, 1000, 5000):
        cut = list(segments([pieces(text, 13 + 100 * row) for row, text in enumerate(texts)], size))
        assert np.array_equal(np.concatenate(cut, 1), texts)
        assert all(part.shape[1] == size for part in cut[:-1]) and cut[-1].shape[1] <= size


def test_reading_costs_what_it_says() -> None:
    reader, text = Summing(), np.ones(1000, np.int32)
    cost = read_contexts(reader, [pieces(text, 64), pieces(2 * text, 99)], 1000, "trial", segment=37)
    assert reader.longest == 37 and reader.sums is not None and reader.sums.tolist() == [1000, 2000]
    assert cost.tokens == 2000 and cost.seconds > 0 and cost.peak > 2**20
    with pytest.raises(AssertionError, match="holds 1,000 tokens, not 1,001"):
        read_contexts(reader, [pieces(text, 64)], 1001, "trial")


def test_a_peak_is_of_its_time() -> None:
    before = PeakMemory(torch.device("cpu"))
    held = np.ones(2**26, np.uint8)  # 64 MiB
    high = before.bytes()
    del held
    low = PeakMemory(torch.device("cpu")).bytes()
    assert high - low > 2**25


def test_answers_end_with_the_document() -> None:
    reader = Summing()
    told = answers(reader, torch.tensor([[1, 2], [3, END]]), 3)
    assert told.tolist() == [[3, 6, 4], [END, END, END]]
    reader.forget()
    assert answers(reader, torch.tensor([[END]]), 5).shape == (1, 1)


def test_a_state_that_would_not_fit_is_refused() -> None:
    reader = Summing()
    check_room(reader, 10**15, 8)
    reader.growth = 1024.0
    check_room(reader, 1000, 1)
    with pytest.raises(ValueError, match=r"would take [\d,]+\.\d GiB after 1,000,000,000,000 tokens of 2 texts"):
        check_room(reader, 10**12, 2)


def made(length: int, index: int) -> Example:
    """Contexts of `length` less the longest question; what is right is what Summing tells."""
    questions = [Question(text, ()) for text in ("12", "3", "44", "5" * (index % 2 + 2))]
    context = np.random.default_rng((length, index)).integers(0, 8, length - 3 + index % 2).astype(np.int32)
    total = int(context.sum())
    asked = tuple(Question(q.text, (str((total + sum(map(int, q.text))) % 8),)) for q in questions)
    return Example(f"trial/{index}", len(context), lambda: pieces(context, 50), asked, 1, (0.5,))


def test_every_question_is_asked_from_the_state_after_its_own_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "ASKED_AT_ONCE", 2)
    task = Recall("trial", made, lambda told, question: {"right": float(told == question.answers[0])})
    cell = measured(task, Summing(), 200, range(5), segment=64)
    asked = [question for example in cell["examples"] for question in example["questions"]]
    assert len(asked) == 20 and all(question["right"] == 1.0 for question in asked)
    # Contexts of two lengths, each group read in one go.
    assert cell["tokens"] == 3 * 197 + 2 * 198 and cell["length"] == 200
    assert {example["name"] for example in cell["examples"]} == {f"trial/{index}" for index in range(5)}


def test_points_are_means_over_the_questions_of_a_length() -> None:
    def cell(length: int, *scores: float) -> dict[str, Any]:
        questions = [{"m": score} for score in scores]
        return {
            "length": length, "examples": [{"questions": questions}], "tokens": 100, "tokens_per_second": 50.0,
            "peak_bytes": length,
        }  # fmt: skip

    short, long = points([cell(8, 1.0), cell(4, 1.0, 0.0), cell(4, 1.0, 1.0)], "m")
    assert (short.length, short.questions, short.mean, short.tokens_per_second) == (4, 4, 0.75, 50.0)
    assert short.error == pytest.approx(0.25) and long.error is None and long.peak_bytes == 8
