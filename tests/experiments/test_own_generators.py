"""Zoology's and MAD's own sequences: every answer where the benchmark puts it, and what sets them apart from ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from atlas_megatron.evaluate import mad, zoology
from atlas_megatron.evaluate.synthetic import NO_ANSWER, Batch
from experiments import mad as mad_script
from experiments import mqar as mqar_script
from experiments.shared import record, training

KEYS = mad.VOCABULARY // 2
MEASURED = mad.tasks(tokens=64, short=24, copied=6, training=False)
LEARNED = mad.tasks(tokens=64, short=24, copied=6, training=True)


def rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    return list(zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True))


@pytest.mark.parametrize("passes", [1, 3])
def test_zoologys_queries_stand_at_every_second_place(passes: int) -> None:
    pairs, tokens, vocabulary = 4, 48, 64
    batch = zoology.mqar(0, 200, tokens, pairs, vocabulary, passes=passes)
    context, fillers = 2 * pairs * passes, set()
    for sequence, labels in rows(batch):
        told = sequence[: 2 * pairs]
        assert sequence[:context] == told * passes
        written = dict(zip(told[::2], told[1::2], strict=True))
        assert len(written) == pairs
        assert all(1 <= key < vocabulary // 2 <= value < vocabulary for key, value in written.items())
        asked = [place for place, label in enumerate(labels) if label != NO_ANSWER]
        assert sorted(sequence[place] for place in asked) == sorted(written)
        assert all(labels[place] == written[sequence[place]] for place in asked)
        assert all(place >= context and place % 2 == 0 for place in asked)
        fillers |= {token for place, token in enumerate(sequence) if place >= context and place not in asked}
    # Any token, keys, values and 0.
    assert fillers == set(range(vocabulary))


def test_zoologys_gaps_follow_the_power_law() -> None:
    places, count, power = 12, 20_000, 0.01
    batch = zoology.mqar(1, count, 2 + 2 * places, 1, 64, power)
    found = torch.bincount(((batch.labels != NO_ANSWER).int().argmax(1) - 2) // 2, minlength=places) / count
    law = (torch.arange(places) + 1.0) ** (power - 1)
    expected = law / law.sum()
    assert ((found - expected).abs() < 4 * (expected / count).sqrt()).all()


@pytest.mark.parametrize(
    ("tokens", "pairs", "vocabulary", "passes"),
    [(15, 2, 64, 1), (14, 4, 64, 1), (64, 4, 64, 1), (20, 2, 64, 5), (16, 0, 64, 1)],
)
def test_zoologys_sizes_are_checked(tokens: int, pairs: int, vocabulary: int, passes: int) -> None:
    with pytest.raises(ValueError, match=f"{pairs} pairs, told {passes} times, .* in {tokens} tokens of vocabulary 64"):
        zoology.mqar(0, 1, tokens, pairs, vocabulary, passes=passes)


@pytest.mark.parametrize("name", MEASURED)
def test_mads_batches_are_functions_of_their_seed(name: str) -> None:
    for task in (MEASURED[name], LEARNED[name]):
        first, again, other = (task.generate(seed, 4) for seed in (7, 7, 8))
        assert torch.equal(first.tokens, again.tokens) and torch.equal(first.labels, again.labels)
        assert not torch.equal(first.tokens, other.tokens)
        assert first.tokens.shape == first.labels.shape == (4, task.tokens)
        assert first.tokens.dtype == first.labels.dtype == torch.int64
        for values in (first.tokens, first.labels[first.labels != NO_ANSWER]):
            assert 0 <= values.min() and values.max() < task.vocabulary
        assert task.by_class


@pytest.mark.parametrize("name", ["in-context recall", "noisy recall", "fuzzy recall"])
def test_mads_recall_is_learned_from_every_next_token(name: str) -> None:
    batch = LEARNED[name].generate(3, 8)
    assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])
    measured = MEASURED[name].generate(3, 8)
    due = measured.labels[:, :-1] != NO_ANSWER
    assert torch.equal(measured.labels[:, :-1][due], measured.tokens[:, 1:][due])
    assert (measured.labels != NO_ANSWER).float().mean() < 0.6


@pytest.mark.parametrize("name", ["in-context recall", "noisy recall"])
def test_mads_noise_stands_in_place_of_pairs(name: str) -> None:
    noisy = total = 0
    for sequence, labels in rows(MEASURED[name].generate(4, 200)):
        pairs = list(zip(sequence[::2], sequence[1::2], strict=True))
        known: dict[int, int] = {}
        for number, (key, value) in enumerate(pairs):
            assert labels[2 * number + 1] == NO_ANSWER
            if key >= mad.VOCABULARY:
                assert value >= mad.VOCABULARY and labels[2 * number] == NO_ANSWER
                noisy += 1
                continue
            assert key < KEYS <= value < mad.VOCABULARY and known.get(key, value) == value
            assert labels[2 * number] == (value if key in known else NO_ANSWER)
            last, known[key] = key in known, value
        assert known and last, "the last pair has been there before"
        total += len(pairs) - 1
    assert noisy / total == pytest.approx(mad.NOISE_SHARE if name == "noisy recall" else 0, abs=0.02)


def test_mads_keys_are_fuzzy_in_training_and_longest_where_measured() -> None:
    def sizes(batch: Batch) -> tuple[set[int], set[int]]:
        keys, values = set(), set()
        for sequence, _ in rows(batch):
            kinds = "".join("p" if t == mad.PAD else "k" if t < mad.FUZZY_KEYS else "v" for t in sequence).lstrip("p")
            assert "p" not in kinds
            keys |= {len(run) for run in kinds.split("v") if run}
            # The last value is cut.
            values |= {len(run) for run in kinds.split("k")[:-1] if run}
        return keys, values

    assert sizes(MEASURED["fuzzy recall"].generate(5, 50)) == ({3}, {1, 2, 3})
    assert sizes(LEARNED["fuzzy recall"].generate(5, 50)) == ({1, 2, 3}, {1, 2, 3})


def test_mads_fuzzy_values_are_due_where_their_key_comes_again() -> None:
    asked = 0
    for sequence, labels in rows(MEASURED["fuzzy recall"].generate(6, 50)):
        whole = [*sequence, labels[-1]]
        assert labels[-1] != NO_ANSWER
        place = next(place for place, token in enumerate(whole) if token != mad.PAD)
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        while place < len(whole):
            key, place = tuple(whole[place : place + 3]), place + 3
            assert len(set(key)) == 3
            end = next((at for at in range(place, len(whole)) if whole[at] < mad.FUZZY_KEYS), len(whole))
            value = tuple(whole[place:end])
            assert known.get(key, value) == value and len(set(value)) == len(value)
            # The last pair is due, and MAD does not see to it that it was told before.
            expected = [*value] if key in known or end == len(whole) else [NO_ANSWER] * len(value)
            assert labels[place - 1 : end - 1] == expected
            assert labels[place - 3 : place - 1] == [NO_ANSWER] * 2
            asked += key in known
            known[key], place = value, end
    assert asked >= 50


def test_mads_copies_follow_one_mark() -> None:
    before = set()
    for sequence, labels in rows(MEASURED["selective copying"].generate(7, 50)):
        mark = sequence.index(mad.COPY)
        assert mark == 64 - 6 - 1 and sequence[mark + 1 :] == [mad.BLANK] * 6
        content = [token for token in sequence[:mark] if token != mad.BLANK]
        assert labels == [NO_ANSWER] * (mark + 1) + content and len(content) == 6
        assert sequence[mark - 1] != mad.BLANK
        before.add(sequence[:mark].index(content[0]))
    assert len(before) > 5
    with pytest.raises(ValueError, match="6 tokens to copy in 13: give at least 14"):
        mad.selective_copying(0, 1, 13, 6)


def test_mads_compression_asks_for_its_mark_too() -> None:
    batch = MEASURED["compression"].generate(8, 16)
    assert torch.equal(batch.labels, batch.tokens) and (batch.tokens[:, -1] == mad.VOCABULARY - 1).all()
    assert batch.tokens[:, :-1].max() < mad.VOCABULARY - 1


def test_mads_memorised_values_are_different_ones() -> None:
    facts = mad.facts()
    assert len(set(facts.tolist())) == len(facts) == 127 and facts.min() >= 127 and facts.max() <= 254
    batch = MEASURED["memorisation"].generate(9, 16)
    assert torch.equal(batch.labels[:, 1::2], facts[batch.tokens[:, ::2]])
    assert (batch.tokens[:, 1::2] == 255).all() and (batch.labels[:, ::2] == NO_ANSWER).all()


@pytest.mark.parametrize("draw", [mad.in_context_recall, mad.fuzzy_recall])
def test_mads_sizes_are_checked(draw: Callable[..., Batch]) -> None:
    with pytest.raises(ValueError, match="recall in 3 tokens"):
        draw(0, 1, 3, training=False)


def test_accuracy_by_class_is_torchmetrics() -> None:
    """Of its documentation: the mean of 1/2, 1 and 1; and a class that is named and never due."""
    assert training.by_class(torch.tensor([2, 1, 0, 1]), torch.tensor([2, 1, 0, 0])) == pytest.approx(5 / 6)
    assert training.by_class(torch.tensor([3, 1]), torch.tensor([1, 1])) == pytest.approx(0.25)


def test_a_generator_is_chosen_and_named(tmp_path) -> None:
    given = ["--quick", "--out", str(tmp_path), "--generator", "zoology", "--passes", "2"]
    asked = record.options("mqar", "", given, generators=["zoology"], passes=True)
    grid = mqar_script.drawn_by(mqar_script.QUICK, asked.generator, asked.passes)
    assert asdict(grid)["generator"] == "zoology" and grid.lengths[4] == 2 * mqar_script.QUICK.lengths[4]
    for seed in range(len(grid.lengths)):
        batch = mqar_script.mixed(seed, 4, grid)
        assert torch.equal(batch.tokens, mqar_script.mixed(seed, 4, grid).tokens)
    stored = record.Record("mqar", asked, {"generator": asked.generator})
    assert stored.path.name == "mqar_zoology_2_passes.json"
    assert stored.content["command"] == "python -m experiments.mqar --quick --generator zoology --passes 2"
    plain = record.Record("mqar", record.options("mqar", "", ["--out", str(tmp_path)]), {})
    assert plain.path.name == "mqar.json" and plain.content["command"] == "python -m experiments.mqar"


@pytest.mark.parametrize("words", [["--passes", "2"], ["--generator", "zoology", "--passes", "0"]])
def test_passes_are_zoologys(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        record.options("mqar", "", words, generators=["zoology"], passes=True)
    assert ended.value.code == 2 and "or more with --generator zoology" in capsys.readouterr().err


def test_zoologys_own_are_trained_and_measured() -> None:
    """A cell of the experiment, of a memory, whose chunks a sequence has to fill."""
    grid = mqar_script.drawn_by(mqar_script.QUICK, "zoology", 2)
    cell = mqar_script.measure(grid, "atlas", 8, 0, mqar_script.replace(grid.schedule, steps=1, lr=0.01))
    assert set(cell["measured"]) == {"1", "2", "4"} and cell["diverged_at_step"] is None


def test_mads_own_are_trained_and_measured_in_their_way() -> None:
    """A cell of the experiment, by its own function."""
    grid = mad_script.replace(mad_script.QUICK, generator="mad")
    schedule = mad_script.replace(grid.schedule, steps=2)
    for name in ("compression", "fuzzy recall"):
        cell = mad_script.measure(grid, "delta", name, 0, schedule)
        assert 0 <= cell["measured"][name]["accuracy"] <= 1 and cell["diverged_at_step"] is None
