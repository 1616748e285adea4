"""Every task by its name: exact lengths, the same for the same seed, constant memory at 10 million tokens, measures."""

import itertools
import tracemalloc

import numpy as np
import pytest

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.evaluate.haystack import PIECE, Example, Question
from atlas_megatron.evaluate.metrics import string_match_all, string_match_part
from atlas_megatron.evaluate.tasks import TASKS, find, make, score

LONG = 10_000_000


@pytest.mark.parametrize("name", TASKS)
def test_length_is_exact(name: str, tokenizer: Tokenizer, folder: TextFolder) -> None:
    for length in (2000, 3001):
        example = make(name, tokenizer, length, index=1, seed=2, folder=folder)
        pieces = list(example.context())
        longest = max(len(tokenizer.encode(question.text)) for question in example.questions)
        assert sum(len(piece) for piece in pieces) == example.length == length - longest
        assert all(piece.dtype == np.int32 and 0 < len(piece) <= PIECE for piece in pieces)
        assert all(0 <= depth <= 1 for depth in example.depths)
        assert example.name == f"{name}/1" and example.max_new_tokens > 0
        assert all(question.answers for question in example.questions)


@pytest.mark.parametrize("name", TASKS)
def test_seeds_and_indices_tell_examples_apart(name: str, tokenizer: Tokenizer, folder: TextFolder) -> None:
    def tokens(example: Example) -> bytes:
        return np.concatenate(list(example.context())).tobytes()

    one, same, *others = (
        make(name, tokenizer, 2000, index, seed, folder) for index, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert tokens(one) == tokens(one) == tokens(same)
    assert (one.questions, one.depths) == (same.questions, same.depths)
    assert len({tokens(example) for example in (one, *others)}) == 3


def test_tokens_do_not_depend_on_what_was_made_before(texts, tokenizer: Tokenizer) -> None:
    """A folder that has its blocks at hand, and one that has not, give the same."""
    used = TextFolder(texts, tokenizer)
    list(make("niah_single_2", tokenizer, 100_000, folder=used).context())
    one, other = (
        np.concatenate(list(make("niah_single_3", tokenizer, 5000, 4, folder=folder).context()))
        for folder in (used, TextFolder(texts, tokenizer))
    )
    assert np.array_equal(one, other)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multivalue", "vt", "babilong_qa3"])
def test_10_million_tokens(name: str, tokenizer: Tokenizer, folder: TextFolder) -> None:
    """Read to the end, in memory that does not grow."""
    list(make(name, tokenizer, 200_000, folder=folder).context())  # all of the folder is encoded
    tracemalloc.start()
    example = make(name, tokenizer, LONG, folder=folder)
    total = 0
    for piece in example.context():
        total += len(piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == example.length > LONG - 200
    assert peak < 4_000_000, f"{peak:,} bytes"


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3", "fwe"])
def test_what_is_made_on_the_fly_starts_at_once(name: str, tokenizer: Tokenizer, folder: TextFolder) -> None:
    tracemalloc.start()
    example = make(name, tokenizer, LONG, folder=folder)
    assert [len(piece) for piece in itertools.islice(example.context(), 1)] == [PIECE]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000, f"{peak:,} bytes"


def test_unknown_tasks_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="there is no task 'niah_single1'; did you mean 'niah_single_1'?"):
        make("niah_single1", tokenizer, 1000)
    with pytest.raises(ValueError, match="no task 'xyz'; the tasks are niah_single_1, "):
        score("xyz", "", Question("", ("",)))
    with pytest.raises(ValueError, match="index -1 and seed 0"):
        make("vt", tokenizer, 1000, index=-1)


@pytest.mark.parametrize("name", TASKS)
def test_text_is_asked_for_where_it_is_needed(name: str, tokenizer: Tokenizer) -> None:
    if TASKS[name].needs_text:
        with pytest.raises(ValueError, match=f"{name}/0 hides its .* in text, and no folder was given"):
            make(name, tokenizer, 2000)
    else:
        assert make(name, tokenizer, 2000).length > 1800


def test_rulers_measures() -> None:
    assert string_match_all("It is 123 and abc.", ("123", "ABC", "9")) == pytest.approx(2 / 3)
    assert string_match_all("", ("1",)) == 0
    assert string_match_part("It is 123", ("9", "123")) == 1
    assert string_match_part("It is 12", ("9", "123")) == 0
    question = Question("", ("1234567", "7654321"))
    assert score("niah_multivalue", " 1234567, 1111111", question) == {"string_match_all": 0.5, "string_match_part": 1}
    assert all(find(name).official in find(name).metrics for name in TASKS)
