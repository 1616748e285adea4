"""Generated tasks: multi-query associative recall and the six of MAD. Pure functions of a seed.

MQAR after zoology (Arora et al. 2023, arXiv 2312.04927); the others after MAD (Poli et al. 2024, arXiv 2403.17844).
These generators are ours; zoology.py and mad.py draw as those repositories do.
Labels stand where the answer is due: the model's output at position t is compared with labels[t].

Dims: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

SOURCE = "ours"
NO_ANSWER = -100  # cross_entropy's ignore_index
RECALL_VOCABULARY = 16  # MAD's: half keys, half values
NOISE_VOCABULARY = 16
NOISE_SHARE = 0.2
LONGEST_MOTIF = 3  # tokens of a key or a value of fuzzy recall
FUZZY_PAIRS = 8  # of one sequence
MEMORISED = 128  # facts
DICTIONARY_SEED = 0


@dataclass(frozen=True)
class Batch:
    """tokens, labels [B, T] int64; labels are NO_ANSWER where nothing is asked."""

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """A generator (seed, B) -> Batch with its sizes.

    decoded: the last output alone is to give every label. by_class: accuracy is the mean over what is due of the share
    that is met, as MAD has it; else the share of all.
    """

    generate: Callable[[int, int], Batch]
    vocabulary: int
    tokens: int
    decoded: bool = False
    by_class: bool = False


def mqar(seed: int, count: int, tokens: int, pairs: int, vocabulary: int = 8192, power: float = 0.01) -> Batch:
    """k v k v ..., then each key once more among fillers; its value is due there.

    The place of a query after the pairs, j = 0, 1, ..., has probability proportional to (j + 1)^(power - 1), drawn
    without replacement: most gaps are short. Keys and fillers (keys that this sequence does not use) come from the
    lower half of the vocabulary, values from the upper half. Raises ValueError if the queries find no place.
    """
    places = tokens - 2 * pairs
    half = vocabulary // 2
    if places < pairs or pairs + places > half:
        raise ValueError(
            f"{pairs} pairs leave {places} places for {pairs} queries in {tokens} tokens of vocabulary {vocabulary}; "
            f"give at least {3 * pairs} tokens and a vocabulary of at least {2 * (pairs + places)}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = distinct(half, pairs + places, count, generator)
    keys, fillers = drawn[:, :pairs], drawn[:, pairs:]
    values = half + distinct(half, pairs, count, generator)
    law = (torch.arange(places) + 1.0) ** (power - 1)
    asked = 2 * pairs + torch.multinomial(law.expand(count, places), pairs, generator=generator)
    written = torch.stack([keys, values], -1).flatten(1)
    sequence = torch.cat([written, fillers], 1).scatter(1, asked, keys)
    labels = torch.full_like(sequence, NO_ANSWER).scatter(1, asked, values)
    return Batch(sequence, labels)


def distinct(size: int, chosen: int, count: int, generator: torch.Generator) -> Tensor:
    """[count, chosen] numbers below `size`, no two alike in a row."""
    return torch.rand(count, size, generator=generator).topk(chosen, dim=1).indices


def in_context_recall(seed: int, count: int, tokens: int, noise: float = 0.0) -> Batch:
    """Pairs k v under a map of the sequence's own, drawn with repetition; due where a key comes again.

    noise: the share of places that hold a token of a third alphabet instead of a pair.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = RECALL_VOCABULARY // 2
    of_key = keys + torch.randint(keys, (count, keys), generator=generator)
    asked = torch.randint(keys, (count, tokens), generator=generator)
    noisy = torch.rand(count, tokens, generator=generator) < noise
    third = RECALL_VOCABULARY + torch.randint(NOISE_VOCABULARY, (count, tokens), generator=generator)
    sequences, labels = torch.empty(count, tokens).long(), torch.full((count, tokens), NO_ANSWER)
    for row in range(count):
        place, seen = 0, set()
        for slot in range(tokens):
            if place >= tokens - 1 or noisy[row, slot]:
                # A pair does not fit on one place: noise, or where there is none, a key without its value.
                sequences[row, place] = third[row, slot] if noise else asked[row, slot]
                place += 1
            else:
                key = int(asked[row, slot])
                value = of_key[row, key]
                sequences[row, place], sequences[row, place + 1] = key, value
                if key in seen:
                    labels[row, place] = value
                seen.add(key)
                place += 2
            if place >= tokens:
                break
    return Batch(sequences, labels)


def fuzzy_recall(seed: int, count: int, tokens: int) -> Batch:
    """As `in_context_recall`, with keys and values of one to three tokens; due are all tokens of a value."""
    generator = torch.Generator().manual_seed(seed)
    sequences, labels = torch.empty(count, tokens).long(), torch.full((count, tokens), NO_ANSWER)
    for row in range(count):
        keys = [list(motif) for motif in _motifs(0, FUZZY_PAIRS, generator, unique=True)]
        values = [list(motif) for motif in _motifs(RECALL_VOCABULARY // 2, FUZZY_PAIRS, generator, unique=False)]
        sequence: list[int] = []
        due: list[int] = []
        seen = set()
        while len(sequence) < tokens:
            pair = int(torch.randint(FUZZY_PAIRS, (), generator=generator))
            key, value = keys[pair], values[pair]
            answers = value if pair in seen else [NO_ANSWER] * len(value)
            sequence += key + value
            # One step ahead: the value's first token is due at the key's last one.
            due += [NO_ANSWER] * (len(key) - 1) + answers + [NO_ANSWER]
            seen.add(pair)
        sequences[row], labels[row] = torch.tensor(sequence[:tokens]), torch.tensor(due[:tokens])
    return Batch(sequences, labels)


def _motifs(first: int, count: int, generator: torch.Generator, *, unique: bool) -> list[tuple[int, ...]]:
    """`count` motifs of one to three tokens of the alphabet of RECALL_VOCABULARY / 2 that begins at `first`."""
    found: list[tuple[int, ...]] = []
    while len(found) < count:
        length = int(torch.randint(1, LONGEST_MOTIF + 1, (), generator=generator))
        motif = tuple((first + torch.randint(RECALL_VOCABULARY // 2, (length,), generator=generator)).tolist())
        if not (unique and motif in found):
            found.append(motif)
    return found


def selective_copying(seed: int, count: int, tokens: int, copied: int) -> Batch:
    """Tokens scattered among blanks, then as many copy marks: at the i-th mark the i-th token is due.

    Content is below RECALL_VOCABULARY, the blank is RECALL_VOCABULARY, the mark one more.
    """
    generator = torch.Generator().manual_seed(seed)
    context = tokens - copied
    content = torch.randint(RECALL_VOCABULARY, (count, copied), generator=generator)
    places = distinct(context, copied, count, generator).sort(dim=1).values
    scattered = torch.full((count, context), RECALL_VOCABULARY).scatter(1, places, content)
    sequence = torch.cat([scattered, torch.full((count, copied), RECALL_VOCABULARY + 1)], 1)
    labels = torch.cat([torch.full((count, context), NO_ANSWER), content], 1)
    return Batch(sequence, labels)


def compression(seed: int, count: int, tokens: int) -> Batch:
    """Random tokens and a mark at the end; all of them are due, from the output at the mark alone."""
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(RECALL_VOCABULARY, (count, tokens - 1), generator=generator)
    mark = torch.full((count, 1), RECALL_VOCABULARY)
    return Batch(torch.cat([content, mark], 1), torch.cat([content, torch.full_like(mark, NO_ANSWER)], 1))


def facts() -> Tensor:
    """The value of each key of `memorisation`, [MEMORISED]: the same in every sequence."""
    generator = torch.Generator().manual_seed(DICTIONARY_SEED)
    return MEMORISED + torch.randint(MEMORISED, (MEMORISED,), generator=generator)


def memorisation(seed: int, count: int, tokens: int) -> Batch:
    """Keys, each with a blank after it, where its value is due; the map is fixed and never shown."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(MEMORISED, (count, tokens // 2), generator=generator)
    blank = torch.full_like(keys, 2 * MEMORISED)
    nothing = torch.full_like(keys, NO_ANSWER)
    return Batch(torch.stack([keys, blank], -1).flatten(1), torch.stack([nothing, facts()[keys]], -1).flatten(1))


def mad_tasks(tokens: int, short: int, copied: int) -> dict[str, Task]:
    """The six tasks of MAD; compression and memorisation take the `short` length."""
    noisy = RECALL_VOCABULARY + NOISE_VOCABULARY
    return {
        "in-context recall": Task(partial(in_context_recall, tokens=tokens), RECALL_VOCABULARY, tokens),
        "fuzzy recall": Task(partial(fuzzy_recall, tokens=tokens), RECALL_VOCABULARY, tokens),
        "noisy recall": Task(partial(in_context_recall, tokens=tokens, noise=NOISE_SHARE), noisy, tokens),
        "selective copying": Task(
            partial(selective_copying, tokens=tokens, copied=copied), RECALL_VOCABULARY + 2, tokens
        ),
        "compression": Task(partial(compression, tokens=short), RECALL_VOCABULARY + 1, short, decoded=True),
        "memorisation": Task(partial(memorisation, tokens=short), 2 * MEMORISED + 1, short),
    }
