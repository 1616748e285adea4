"""Recall of random tokens that no text has together: MQAR, and MAD's tasks that need no training of their own.

Sequences of token ids as synthetic.py draws them; a score is the share of asked tokens that the likeliest
token meets. The ids are the first ones of the model's vocabulary: no text, so this asks for what a model does in its
context alone. MAD's other tasks ask for what training has taught (experiments/mad.py). A name such as mqar is
our generator's, mqar@zoology and mad_noisy_recall@mad are those benchmarks' own, though counted alike: the mean of the
sequences' shares, where MAD has that of the classes'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, stdev

import torch

from atlas_megatron.evaluate import mad, zoology
from atlas_megatron.evaluate.reading import SEGMENT, check_room
from atlas_megatron.evaluate.synthetic import (
    NO_ANSWER,
    NOISE_SHARE,
    NOISE_VOCABULARY,
    RECALL_VOCABULARY,
    SOURCE,
    Batch,
    fuzzy_recall,
    in_context_recall,
    mqar,
)
from atlas_megatron.inference.reader import Reader
from atlas_megatron.reports.results import Cell

MOST_IDS = 8192  # zoology's vocabulary
PAIRS_SHARE = 16  # tokens of a sequence for each pair of MQAR: as zoology's 64 pairs in 1,024 tokens


@dataclass(frozen=True)
class Symbolic:
    """generate: (seed, count, tokens, ids) -> sequences; ids: the fewest token ids it takes.

    source: whose generator it is, which every result says. others: by what stands behind the @ of their names.
    """

    generate: Callable[[int, int, int, int], Batch]
    ids: int
    source: str = SOURCE
    others: Mapping[str, Symbolic] = field(default_factory=dict)


def _mqar(seed: int, count: int, tokens: int, ids: int) -> Batch:
    return mqar(seed, count, tokens, pairs_of(tokens), min(ids, MOST_IDS) // 2 * 2)


def _zoology_mqar(seed: int, count: int, tokens: int, ids: int) -> Batch:
    return zoology.mqar(seed, count, tokens, pairs_of(tokens), min(ids, MOST_IDS))


def _recall(seed: int, count: int, tokens: int, ids: int, noise: float = 0.0) -> Batch:
    return in_context_recall(seed, count, tokens, noise=noise)


def _fuzzy(seed: int, count: int, tokens: int, ids: int) -> Batch:
    return fuzzy_recall(seed, count, tokens)


def _mads(task: Callable[..., Batch], ids: int) -> dict[str, Symbolic]:
    """MAD's own of a task, as it is measured."""

    def generate(seed: int, count: int, tokens: int, ids: int) -> Batch:
        return task(seed, count, tokens, training=False)

    return {"mad": Symbolic(generate, ids, mad.SOURCE)}


_NOISY = mad.VOCABULARY + mad.NOISE_VOCABULARY
TASKS = {
    "mqar": Symbolic(_mqar, 32, others={"zoology": Symbolic(_zoology_mqar, 32, zoology.SOURCE)}),
    "mad_in_context_recall": Symbolic(
        _recall, RECALL_VOCABULARY, others=_mads(mad.in_context_recall, mad.VOCABULARY)
    ),
    "mad_fuzzy_recall": Symbolic(_fuzzy, RECALL_VOCABULARY, others=_mads(mad.fuzzy_recall, mad.VOCABULARY)),
    "mad_noisy_recall": Symbolic(
        partial(_recall, noise=NOISE_SHARE),
        RECALL_VOCABULARY + NOISE_VOCABULARY,
        others=_mads(partial(mad.in_context_recall, noise=mad.NOISE_SHARE), _NOISY),
    ),
}


def find(name: str) -> Symbolic:
    """The task of that name, of the generator behind its @. Raises ValueError for an unknown one."""
    base, at, generator = name.partition("@")
    task = TASKS.get(base)
    if task is None or (at and generator not in task.others):
        names = [name for base, task in TASKS.items() for name in (base, *(f"{base}@{other}" for other in task.others))]
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(names)}")
    return task.others[generator] if at else task


def pairs_of(tokens: int) -> int:
    """Of MQAR, in a sequence."""
    return max(1, tokens // PAIRS_SHARE)


def longest(name: str, ids: int) -> int:
    """The most tokens of a sequence for which a vocabulary has ids; our MQAR takes every key and filler once.

    ids: tokens of the tokenizer.
    Raises ValueError where it has too few for any.
    """
    needed = find(name).ids
    if ids < needed:
        raise ValueError(f"the tokenizer has {ids} tokens, and {name} takes {needed}; ask another model")
    if not name.startswith("mqar"):
        return sys.maxsize
    if name == "mqar@zoology":
        return (min(ids, MOST_IDS) - 1) // 2 * 2
    half = min(ids, MOST_IDS) // 2
    return max(tokens for tokens in range(2 * half) if tokens - pairs_of(tokens) <= half)


def measured(task: Symbolic, reader: Reader, tokens: int, indices: range, seed: int, segment: int = SEGMENT) -> Cell:
    """Sequences of so many tokens, side by side: right and asked tokens of each.

    Raises ValueError where a state that grows would not fit into memory.
    """
    ids = reader.tokenizer.vocab_size
    check_room(reader, tokens, len(indices))
    batch = task.generate(seed * 2**20 + indices[0] * 2**10 + tokens, len(indices), tokens, ids)
    reader.forget()
    read = (reader.read(part.to(reader.device)) for part in batch.tokens.split(segment, dim=1))
    told = torch.cat([logits[..., :ids].argmax(-1).cpu() for logits in read], 1)
    asked = batch.labels != NO_ANSWER
    right = (told == batch.labels) & asked
    shares = right.sum(1) / asked.sum(1).clamp(min=1)
    return {
        "length": tokens,
        "accuracy": [round(share, 6) for share in shares[asked.any(1)].tolist()],
        "asked": int(asked.sum()),
    }


def accuracy(cells: Iterable[Cell], length: int) -> tuple[float, float]:
    """Of the cells of one length: the mean of the sequences' shares, and its standard error."""
    shares = [share for cell in cells if cell["length"] == length for share in cell["accuracy"]]
    return fmean(shares), stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0


def chance(task: str, tokens: int) -> float:
    """What naming any value that the context holds would score."""
    return 1 / pairs_of(tokens) if task.startswith("mqar") else 2 / RECALL_VOCABULARY
