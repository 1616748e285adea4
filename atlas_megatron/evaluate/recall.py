"""Long-context tasks: contexts of rising length are read into the model's state, then asked; scores, time, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from atlas_megatron.evaluate.haystack import Example, Question, encode
from atlas_megatron.evaluate.reading import SEGMENT, Cost, answers, read_contexts
from atlas_megatron.inference.reader import Reader
from atlas_megatron.reports.results import Cell

ASKED_AT_ONCE = 64  # questions of one context


@dataclass(frozen=True)
class Recall:
    """A task as this module runs it. make: (length, index) -> its example; score: (prediction, question) -> metrics by
    name, each from 0 to 1."""

    name: str
    make: Callable[[int, int], Example]
    score: Callable[[str, Question], dict[str, float]]


def measured(task: Recall, reader: Reader, length: int, indices: range, segment: int = SEGMENT) -> Cell:
    """The examples of a length, tokens of context and question, read side by side and asked."""
    examples = [task.make(length, index) for index in indices]
    # Questions differ in length, and what they leave to the contexts with them.
    contexts = sorted({example.length for example in examples})
    parts = [_measured_alike(task, reader, segment, [e for e in examples if e.length == n]) for n in contexts]
    costs = [cost for cost, _ in parts]
    tokens, seconds = sum(cost.tokens for cost in costs), sum(cost.seconds for cost in costs)
    return {
        "length": length,
        "examples": [cell for _, cells in parts for cell in cells],
        "tokens": tokens,
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "peak_bytes": max(cost.peak for cost in costs),
    }


def _measured_alike(
    task: Recall, reader: Reader, segment: int, examples: Sequence[Example]
) -> tuple[Cost, list[Cell]]:
    """Examples whose contexts have one length."""
    name = examples[0].name + (f" and {len(examples) - 1} more" if len(examples) > 1 else "")
    cost = read_contexts(reader, [e.context() for e in examples], examples[0].length, name, segment)
    mark = reader.mark()
    return cost, [_asked(task, reader, mark, row, example) for row, example in enumerate(examples)]


def _asked(task: Recall, reader: Reader, mark: Any, row: int, example: Example) -> Cell:
    """Every question of one context, each from the state after it."""
    asked: list[Cell] = [{} for _ in example.questions]
    for places, tokens in _alike(reader, example.questions):
        reader.back(mark, [row] * len(places))
        told = answers(reader, tokens, example.max_new_tokens).tolist()
        for place, ids in zip(places, told, strict=True):
            question = example.questions[place]
            prediction = reader.tokenizer.decode([token for token in ids if token != reader.tokenizer.eod])
            scores = task.score(prediction, question)
            asked[place] = {"answers": question.answers, "prediction": prediction, **scores}
    return {"name": example.name, "depths": [round(depth, 6) for depth in example.depths], "questions": asked}


def _alike(reader: Reader, questions: Sequence[Question]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Places of questions of one length in tokens, and these [n, tokens], at most ASKED_AT_ONCE together."""
    encoded = [encode(reader.tokenizer, question.text).astype("int64") for question in questions]
    for length in sorted({len(tokens) for tokens in encoded}):
        same = [place for place, tokens in enumerate(encoded) if len(tokens) == length]
        for start in range(0, len(same), ASKED_AT_ONCE):
            places = same[start : start + ASKED_AT_ONCE]
            yield places, torch.stack([torch.from_numpy(encoded[place]) for place in places])


@dataclass(frozen=True)
class Point:
    """A length's results: mean of a metric over its questions with its standard error (None of a single one)."""

    length: int
    questions: int
    mean: float
    error: float | None
    tokens_per_second: float
    peak_bytes: int


def points(measured: Iterable[Cell], metric: str) -> list[Point]:
    """One for each length of these cells, shortest first."""
    by_length: dict[int, list[Cell]] = {}
    for cell in measured:
        by_length.setdefault(cell["length"], []).append(cell)
    return [_point(length, by_length[length], metric) for length in sorted(by_length)]


def _point(length: int, cells: Sequence[Cell], metric: str) -> Point:
    scores = [asked[metric] for cell in cells for example in cell["examples"] for asked in example["questions"]]
    error = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    tokens = sum(cell["tokens"] for cell in cells)
    seconds = sum(cell["tokens"] / cell["tokens_per_second"] for cell in cells)
    peak = max(cell["peak_bytes"] for cell in cells)
    return Point(length, len(scores), fmean(scores), error, tokens / seconds, peak)
