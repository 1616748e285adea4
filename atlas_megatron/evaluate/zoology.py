"""Multi-query associative recall as zoology draws it: HazyResearch/zoology, zoology/data/multiquery_ar.py.

Beside `synthetic.mqar` (ours): queries stand at every second place, fillers are any tokens of the whole vocabulary, its
keys and values too, token 0 is no key, and the pairs may be told several times.
"""

from __future__ import annotations

import torch

from atlas_megatron.evaluate.synthetic import NO_ANSWER, Batch, distinct

SOURCE = "zoology"
FIRST_KEY = 1  # 0 stands there for a place that is filled later


def mqar(
    seed: int, count: int, tokens: int, pairs: int, vocabulary: int = 8192, power: float = 0.01, passes: int = 1
) -> Batch:
    """k v k v ... `passes` times over, then each key once more, where its value is due; random tokens in between.

    Keys are below half of the vocabulary, values in the rest. The j-th place of a query, every second token after the
    pairs, j = 1, 2, ..., has probability proportional to j^(power - 1), drawn without replacement. Raises ValueError
    for sizes that do not fit.
    """
    context = 2 * pairs * passes
    half = vocabulary // 2
    least = context + 2 * pairs
    if tokens % 2 or min(pairs, passes) < 1 or not least <= tokens < vocabulary:
        raise ValueError(
            f"{pairs} pairs, told {passes} times, and their queries in {tokens} tokens of vocabulary {vocabulary}: "
            f"give an even number of at least {least} tokens and a larger vocabulary than that"
        )
    generator = torch.Generator().manual_seed(seed)
    keys = FIRST_KEY + distinct(half - FIRST_KEY, pairs, count, generator)
    values = half + distinct(vocabulary - half, pairs, count, generator)
    places = (tokens - context) // 2
    law = (torch.arange(places) + 1.0) ** (power - 1)
    asked = context + 2 * torch.multinomial(law.expand(count, places), pairs, generator=generator)
    written = torch.stack([keys, values], -1).flatten(1).repeat(1, passes)
    fillers = torch.randint(vocabulary, (count, tokens - context), generator=generator)
    sequence = torch.cat([written, fillers], 1).scatter(1, asked, keys)
    labels = torch.full_like(sequence, NO_ANSWER).scatter(1, asked, values)
    return Batch(sequence, labels)
