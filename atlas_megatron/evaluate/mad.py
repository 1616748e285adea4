"""MAD's six tasks as MAD draws them: athms/mad-lab, mad/data/instances.py, with the alphabets of configs/tasks/*.yml.

Beside `synthetic` (ours): recall is trained on every next token and ends with a pair that was there before; noise takes
the places of a key and a value, and of one pair never; a motif has no token twice, and keys of fuzzy recall are of any
length in training and of the longest where it is measured; what is to be copied follows one mark; compression asks for
its mark too; no two memorised keys have one value. In-context recall has a token more here than there: the last answer,
after which nothing is asked.

Dims: B sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from atlas_megatron.evaluate.synthetic import NO_ANSWER, Batch, Task

SOURCE = "mad"
VOCABULARY = 16  # of all tasks but memorisation, noise apart
NOISE_VOCABULARY = 16
NOISE_SHARE = 0.2
LONGEST_MOTIF = 3
FUZZY_KEYS = 7  # its vocabulary of 16 has a token to pad with: 7 are keys' and 8 values'
PAD = VOCABULARY - 1
BLANK, COPY = VOCABULARY - 2, VOCABULARY - 1
MEMORISED = 127  # its vocabulary of 256 has a token that asks: 127 are keys, 128 values
MAP_SEED = 12345


def in_context_recall(seed: int, count: int, tokens: int, training: bool, noise: float = 0.0) -> Batch:
    """Pairs under a map of the sequence's own; the last one has been there before. Due is every value of a key that
    comes again, in training every next token.

    noise: the share of pairs in whose place two tokens of a third alphabet stand. Raises ValueError for odd lengths.
    """
    if tokens % 2 or tokens < 4:
        raise ValueError(f"in-context recall in {tokens} tokens: its pairs take an even number of at least 4")
    generator = torch.Generator().manual_seed(seed)
    keys, slots = VOCABULARY // 2, tokens // 2 - 1
    of_key = keys + torch.randint(keys, (count, keys), generator=generator)
    chosen = torch.randint(keys, (count, slots), generator=generator)
    noisy = torch.rand(count, slots, generator=generator) < noise
    kept = torch.randint(slots, (count, 1), generator=generator)
    noisy.scatter_(1, kept, False)
    shown = torch.nn.functional.one_hot(chosen, keys) * ~noisy.unsqueeze(-1)
    before = shown.cumsum(1) - shown
    last = torch.multinomial(shown.any(1).float(), 1, generator=generator)
    values = of_key.gather(1, torch.cat([chosen, last], 1))
    pairs = torch.stack([torch.cat([chosen, last], 1), values], -1)
    third = VOCABULARY + torch.randint(NOISE_VOCABULARY, (count, slots, 2), generator=generator)
    pairs[:, :-1] = torch.where(noisy.unsqueeze(-1), third, pairs[:, :-1])
    again = before.gather(2, chosen.unsqueeze(-1)).squeeze(-1).bool() & ~noisy
    again = torch.cat([again, torch.ones(count, 1, dtype=torch.bool)], 1)
    due = torch.where(again, values, NO_ANSWER)
    sequence = pairs.flatten(1)
    labels = torch.stack([due, torch.full_like(due, NO_ANSWER)], -1).flatten(1)
    return _next_tokens(sequence) if training else Batch(sequence, labels)


def _next_tokens(sequence: Tensor) -> Batch:
    """Every next token is due."""
    return Batch(sequence, torch.cat([sequence[:, 1:], torch.full_like(sequence[:, :1], NO_ANSWER)], 1))


def fuzzy_recall(seed: int, count: int, tokens: int, training: bool) -> Batch:
    """As `in_context_recall`, with keys and values of one to three tokens, padded on the left.

    Raises ValueError where three of the longest pairs find no place.
    """
    if tokens < 6 * LONGEST_MOTIF:
        raise ValueError(f"fuzzy recall in {tokens} tokens: give at least {6 * LONGEST_MOTIF}")
    generator = np.random.default_rng(seed)
    sequences, due = zip(*(_fuzzy(generator, tokens, training) for _ in range(count)), strict=True)
    sequence = torch.tensor(sequences)
    return Batch(sequence[:, :-1], sequence[:, 1:] if training else torch.tensor(due)[:, 1:])


def _fuzzy(generator: np.random.Generator, tokens: int, training: bool) -> tuple[list[int], list[int]]:
    """One token more than asked for, and these tokens again where they are due."""

    def motif(first: int, size: int, longest: bool = False) -> tuple[int, ...]:
        length = LONGEST_MOTIF if longest else int(generator.integers(1, LONGEST_MOTIF + 1))
        return tuple((first + generator.permutation(size)[:length]).tolist())

    def key() -> tuple[int, ...]:
        return motif(0, FUZZY_KEYS, longest=not training)

    def value() -> tuple[int, ...]:
        return motif(FUZZY_KEYS, PAD - FUZZY_KEYS)

    known = {(asked := key()): value()}
    size = len(asked) + len(known[asked])
    told_from = int(generator.integers(tokens - 2 * size))
    sequence: list[int] = []
    due: list[int] = []
    seen: set[tuple[int, ...]] = set()

    def tell(which: tuple[int, ...]) -> None:
        written = known.setdefault(which, value())
        sequence.extend(which + written)
        due.extend([NO_ANSWER] * len(which) + ([*written] if which in seen else [NO_ANSWER] * len(written)))
        seen.add(which)

    while len(sequence) < tokens - size - 2 * LONGEST_MOTIF:
        tell(asked if len(sequence) >= told_from and asked not in seen else key())
    # MAD asks for the last pair even where no other has told it.
    seen.add(asked)
    tell(asked)
    padding = tokens + 1 - len(sequence)
    return [PAD] * padding + sequence, [NO_ANSWER] * padding + due


def selective_copying(seed: int, count: int, tokens: int, copied: int) -> Batch:
    """Tokens among blanks, a mark, and as many blanks as tokens, where these are due in turn. The last stands before
    the mark.

    Raises ValueError where the blanks find no place.
    """
    blanks = tokens - 2 * copied - 1
    if blanks < 1:
        raise ValueError(f"{copied} tokens to copy in {tokens}: give at least {2 * copied + 2} tokens")
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(BLANK, (count, copied), generator=generator)
    # Each blank stands before one of the tokens.
    before = torch.randint(copied, (count, blanks), generator=generator)
    ahead = torch.nn.functional.one_hot(before, copied).sum(1).cumsum(1)
    places = ahead + torch.arange(copied)
    scattered = torch.full((count, blanks + copied), BLANK).scatter(1, places, content)
    mark, asked = torch.full((count, 1), COPY), torch.full((count, copied), BLANK)
    nothing = torch.full((count, blanks + copied + 1), NO_ANSWER)
    return Batch(torch.cat([scattered, mark, asked], 1), torch.cat([nothing, content], 1))


def compression(seed: int, count: int, tokens: int) -> Batch:
    """Random tokens and a mark at the end; all of them are due, the mark too, from the output at the mark alone."""
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(VOCABULARY - 1, (count, tokens - 1), generator=generator)
    sequence = torch.cat([content, torch.full((count, 1), VOCABULARY - 1)], 1)
    return Batch(sequence, sequence.clone())


def facts() -> Tensor:
    """The value of each key of `memorisation`, [MEMORISED]: different ones, the same in every sequence."""
    generator = torch.Generator().manual_seed(MAP_SEED)
    return MEMORISED + torch.randperm(MEMORISED + 1, generator=generator)[:MEMORISED]


def memorisation(seed: int, count: int, tokens: int) -> Batch:
    """Keys, each with a token after it that asks for its value; the map is fixed and never shown."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(MEMORISED, (count, tokens // 2), generator=generator)
    asks = torch.full_like(keys, 2 * MEMORISED + 1)
    nothing = torch.full_like(keys, NO_ANSWER)
    return Batch(torch.stack([keys, asks], -1).flatten(1), torch.stack([nothing, facts()[keys]], -1).flatten(1))


def tasks(tokens: int, short: int, copied: int, training: bool) -> dict[str, Task]:
    """The six by the names of `synthetic.mad_tasks`; compression and memorisation take the `short` length.

    training: as they are learned, not as they are measured.
    """
    recall = partial(in_context_recall, tokens=tokens, training=training)
    copying = partial(selective_copying, tokens=tokens, copied=copied)
    made = {
        "in-context recall": Task(recall, VOCABULARY, tokens),
        "fuzzy recall": Task(partial(fuzzy_recall, tokens=tokens, training=training), VOCABULARY, tokens),
        "noisy recall": Task(partial(recall, noise=NOISE_SHARE), VOCABULARY + NOISE_VOCABULARY, tokens),
        "selective copying": Task(copying, VOCABULARY, tokens),
        "compression": Task(partial(compression, tokens=short), VOCABULARY, short, decoded=True),
        "memorisation": Task(partial(memorisation, tokens=short), 2 * MEMORISED + 2, short),
    }
    return {name: replace(task, by_class=True) for name, task in made.items()}
