"""Long-context tasks: contexts of rising length are read into the model's state, then asked; scores, time, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from atlas_megatron.evaluate.haystack import Example, Question, encode
from atlas_megatron.evaluate.reading import SEGMENT, answers, read_contexts
from atlas_megatron.reader import Reader
from atlas_megatron.results import Cell, Results

ASKED_AT_ONCE = 64  # questions of one context


@dataclass(frozen=True)
class Recall:
    """A task as this module runs it. make: (length, index) -> its example; score: (prediction, question) -> metrics,
    each from 0 to 1; official: the metric that stands for it."""

    name: str
    make: Callable[[int, int], Example]
    score: Callable[[str, Question], dict[str, float]]
    official: str


@dataclass(frozen=True)
class Grid:
    """What is read: examples of each length, in tokens of context and question; `batch` of them side by side."""

    lengths: tuple[int, ...]
    samples: int
    batch: int = 1
    segment: int = SEGMENT

    def __post_init__(self) -> None:
        for name, least in (("samples", self.samples), ("batch", self.batch), ("segment", self.segment)):
            if least < 1:
                raise ValueError(f"{name}={least} must be at least 1")
        if not self.lengths:
            raise ValueError("no length was given; name at least one, for example 1K")


def run(task: Recall, reader: Reader, grid: Grid, results: Results) -> None:
    """Measure what the results do not hold yet, a cell a batch: `LENGTH, examples FIRST to LAST`."""
    for length in sorted(grid.lengths):
        for first in range(0, grid.samples, grid.batch):
            indices = range(first, min(first + grid.batch, grid.samples))
            name = cell_name(length, indices)
            results.cell(name, lambda length=length, indices=indices: _measured(task, reader, grid, length, indices))


def cell_name(length: int, indices: range) -> str:
    return f"{length} tokens, examples {indices[0]} to {indices[-1]}"


def _measured(task: Recall, reader: Reader, grid: Grid, length: int, indices: range) -> Cell:
    examples = [task.make(length, index) for index in indices]
    # Questions differ in length, so contexts may: the longest is read with all, the tails one by one.
    contexts = sorted({example.length for example in examples})
    if len(contexts) > 1:
        parts = [_measured_alike(task, reader, grid, [e for e in examples if e.length == n]) for n in contexts]
    else:
        parts = [_measured_alike(task, reader, grid, examples)]
    cost = [part["cost"] for part in parts]
    seconds, tokens = sum(c["seconds"] for c in cost), sum(c["tokens"] for c in cost)
    return {
        "length": length,
        "examples": [example for part in parts for example in part["examples"]],
        "tokens": tokens,
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "peak_bytes": max(c["peak"] for c in cost),
    }


def _measured_alike(task: Recall, reader: Reader, grid: Grid, examples: Sequence[Example]) -> Cell:
    """Examples whose contexts have one length."""
    name = f"{examples[0].name}{'' if len(examples) == 1 else f' and {len(examples) - 1} more'}"
    contexts = [example.context() for example in examples]
    cost = read_contexts(reader, contexts, examples[0].length, name, grid.segment)
    mark = reader.mark()
    return {"cost": asdict(cost), "examples": [_asked(task, reader, mark, row, e) for row, e in enumerate(examples)]}


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


def points(results: Results, metric: str) -> list[Point]:
    """One for each length that is measured, shortest first."""
    found = []
    for length in sorted({cell["length"] for cell in results.cells.values()}):
        cells = [cell for cell in results.cells.values() if cell["length"] == length]
        scores = [asked[metric] for cell in cells for example in cell["examples"] for asked in example["questions"]]
        error = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
        seconds = sum(cell["tokens"] / cell["tokens_per_second"] for cell in cells)
        speed = sum(cell["tokens"] for cell in cells) / seconds
        found.append(
            Point(length, len(scores), fmean(scores), error, speed, max(cell["peak_bytes"] for cell in cells))
        )
    return found
