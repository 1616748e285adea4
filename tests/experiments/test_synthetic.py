"""Every generated answer can be found where the task says, and is asked for nowhere else."""

from __future__ import annotations

import pytest
import torch

from atlas_megatron.evaluate import synthetic
from atlas_megatron.evaluate.synthetic import NO_ANSWER, RECALL_VOCABULARY, Batch, Task

HALF = RECALL_VOCABULARY // 2
TASKS = synthetic.mad_tasks(tokens=48, short=24, copied=6) | {
    "mqar": Task(lambda seed, count: synthetic.mqar(seed, count, 48, 8, 256), 256, 48)
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_batch_is_a_function_of_its_seed(task: Task) -> None:
    first, again, other = (task.generate(seed, 4) for seed in (7, 7, 8))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.tokens.shape == first.labels.shape == (4, task.tokens)
    assert first.tokens.dtype == first.labels.dtype == torch.int64
    for values in (first.tokens, first.labels[first.labels != NO_ANSWER]):
        assert 0 <= values.min() and values.max() < task.vocabulary
    assert (first.labels != NO_ANSWER).any()


def test_every_mqar_query_has_its_pair_before_it() -> None:
    pairs, half = 8, 128
    batch = synthetic.mqar(seed=0, count=64, tokens=48, pairs=pairs, vocabulary=2 * half)
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        written = dict(zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(written) == pairs and all(key < half <= value for key, value in written.items())
        asked = [place for place, label in enumerate(labels) if label != NO_ANSWER]
        assert min(asked) >= 2 * pairs
        assert sorted(tokens[place] for place in asked) == sorted(written)
        assert all(labels[place] == written[tokens[place]] for place in asked)
        fillers = [token for place, token in enumerate(tokens) if place >= 2 * pairs and place not in asked]
        assert not set(fillers) & (set(written) | set(written.values()))


def test_gaps_follow_the_power_law() -> None:
    power, places, count = 0.2, 14, 20_000
    batch = synthetic.mqar(seed=1, count=count, tokens=places + 2, pairs=1, vocabulary=64, power=power)
    found = torch.bincount((batch.labels != NO_ANSWER).int().argmax(1) - 2, minlength=places) / count
    law = (torch.arange(places) + 1.0) ** (power - 1)
    # Four standard deviations of each place's count.
    expected = law / law.sum()
    assert ((found - expected).abs() < 4 * (expected / count).sqrt()).all()


def test_mqar_says_when_its_queries_find_no_place() -> None:
    with pytest.raises(ValueError, match="8 pairs leave 4 places .* at least 24 tokens"):
        synthetic.mqar(seed=0, count=1, tokens=20, pairs=8)
    with pytest.raises(ValueError, match="vocabulary of at least 80"):
        synthetic.mqar(seed=0, count=1, tokens=48, pairs=8, vocabulary=64)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_recall_asks_where_a_key_comes_again(noise: float) -> None:
    batch = synthetic.in_context_recall(seed=2, count=64, tokens=40, noise=noise)
    noisy = 0
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        known: dict[int, int] = {}
        place = 0
        while place < len(tokens) - 1:
            key = tokens[place]
            if key >= RECALL_VOCABULARY:
                assert labels[place] == NO_ANSWER
                noisy += 1
                place += 1
                continue
            value = tokens[place + 1]
            assert key < HALF <= value < RECALL_VOCABULARY
            assert known.get(key, value) == value
            assert labels[place] == (value if key in known else NO_ANSWER)
            assert labels[place + 1] == NO_ANSWER
            known[key] = value
            place += 2
        assert labels[-1] == NO_ANSWER
    if noise == 0:
        assert noisy == 0
    else:
        slots = 64 * 40 / (2 - noise)  # a slot is one token with the share `noise`, else two
        assert noisy / slots == pytest.approx(noise, abs=0.04)


def test_fuzzy_recall_asks_for_values_seen_before() -> None:
    batch = synthetic.fuzzy_recall(seed=3, count=32, tokens=64)
    lengths = set()
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        place = 0
        while place < len(tokens):
            begin = place
            while place < len(tokens) and tokens[place] < HALF:
                place += 1
            middle = place
            while place < len(tokens) and tokens[place] >= HALF:
                place += 1
            if place == len(tokens):
                break  # the last pair may be cut
            key, value = tuple(tokens[begin:middle]), tuple(tokens[middle:place])
            asked = [NO_ANSWER] * (len(key) - 1) + (
                [*value] if key in known else [NO_ANSWER] * len(value)
            )
            assert labels[begin:place] == [*asked, NO_ANSWER]
            assert known.get(key, value) == value
            known[key] = value
            lengths |= {len(key), len(value)}
    assert lengths == set(range(1, synthetic.LONGEST_MOTIF + 1))


def test_copying_asks_for_the_content_in_order() -> None:
    batch = synthetic.selective_copying(seed=4, count=16, tokens=40, copied=6)
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        content = [token for token in tokens[:34] if token < RECALL_VOCABULARY]
        assert set(tokens[:34]) <= {*range(RECALL_VOCABULARY + 1)}
        assert tokens[34:] == [RECALL_VOCABULARY + 1] * 6
        assert labels == [NO_ANSWER] * 34 + content


def test_compression_asks_for_everything_before_its_mark() -> None:
    batch = synthetic.compression(seed=5, count=4, tokens=24)
    assert torch.equal(batch.labels[:, :-1], batch.tokens[:, :-1])
    assert (batch.tokens[:, -1] == RECALL_VOCABULARY).all() and (batch.labels[:, -1] == NO_ANSWER).all()


def test_memorised_facts_are_the_same_everywhere_and_never_shown() -> None:
    one, other = (synthetic.memorisation(seed, 16, 24) for seed in (0, 1))
    facts = synthetic.facts()
    for batch in (one, other):
        assert torch.equal(batch.labels[:, 1::2], facts[batch.tokens[:, ::2]])
        assert (batch.labels[:, ::2] == NO_ANSWER).all()
        assert (batch.tokens[:, ::2] < synthetic.MEMORISED).all()
        assert (batch.tokens[:, 1::2] == 2 * synthetic.MEMORISED).all()


def test_noise_stays_out_of_the_plain_recall_vocabulary() -> None:
    plain: Batch = TASKS["in-context recall"].generate(0, 32)
    assert plain.tokens.max() < RECALL_VOCABULARY
