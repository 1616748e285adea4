"""RULER's tasks: official parameters, needles where they are said to be, answers found again in the text."""

import re
from collections import Counter

import numpy as np
import pytest

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.evaluate.haystack import Example
from atlas_megatron.evaluate.ruler.frequent_words import zeta
from atlas_megatron.evaluate.ruler.parameters import NIAH, NIAH_EACH, TRACKING
from atlas_megatron.evaluate.ruler.shuffle import Shuffle
from atlas_megatron.evaluate.ruler.tracking import Tracking, drawn_places, tracking
from atlas_megatron.evaluate.tasks import find, make
from atlas_megatron.evaluate.words import SHORT_WORDS, WORDS, word

SENTENCE = 250  # tokens; the longest has two uuids
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")


def text(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(np.concatenate(list(example.context())))


@pytest.mark.parametrize("name", NIAH)
@pytest.mark.parametrize("length", [1200, 4096, 10_001])
def test_needles_are_found_again(name: str, length: int, tokenizer: Tokenizer, folder: TextFolder) -> None:
    task = NIAH[name]
    example = make(name, tokenizer, length, index=3, seed=5, folder=folder)
    (question,) = example.questions
    found = text(example, tokenizer)
    hidden: dict[str, list[str]] = {}
    for kind, key, value in NEEDLE.findall(found):
        assert kind == task.value
        hidden.setdefault(key, []).append(value)
    asked = re.search(r" for (.+) mentioned in the provided text\?", question.text).group(1)
    keys = re.split(r", and |, ", asked)
    assert len(keys) == task.queries
    assert sorted(question.answers) == sorted(value for key in keys for value in hidden[key])
    assert all(found.count(answer) == 1 for answer in question.answers)
    if task.haystack != "needle":
        assert len(hidden) == task.keys and all(len(values) == task.values for values in hidden.values())
    else:
        assert len(hidden) > 5
    # The needles asked for lie where they are said to, up to a sentence.
    places = sorted(len(tokenizer.encode(found[: found.index(answer)])) for answer in question.answers)
    assert np.allclose(np.array(places) / example.length, example.depths, atol=SENTENCE / example.length)
    assert example.length == sum(len(piece) for piece in example.context())
    assert example.length + len(tokenizer.encode(question.text)) == length


@pytest.mark.parametrize("name", NIAH_EACH)
def test_needles_are_asked_for_apart(name: str, tokenizer: Tokenizer, folder: TextFolder) -> None:
    example = make(name, tokenizer, 6000, index=1, seed=5, folder=folder)
    found = text(example, tokenizer)
    assert len(example.questions) == len(example.depths) == 16
    hidden = {key: value for _, key, value in NEEDLE.findall(found)}
    for question, depth in zip(example.questions, example.depths, strict=True):
        key = re.search(r"What is the special magic number for (\S+) mentioned", question.text).group(1)
        assert question.answers == (hidden.pop(key),)
        place = len(tokenizer.encode(found[: found.index(f"for {key} is")]))
        assert place / example.length == pytest.approx(depth, abs=SENTENCE / example.length)
    assert not hidden
    assert np.allclose(np.diff(example.depths), 1 / 16, atol=0.01)


@pytest.mark.parametrize("length", [1500, 4096, 20_000])
def test_a_chain_is_followed_to_its_variables(length: int, tokenizer: Tokenizer) -> None:
    example = make("vt", tokenizer, length, index=1, seed=2)
    (question,) = example.questions
    found = text(example, tokenizer)
    # The solved example has variables of three letters.
    assignments = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", found)
    value = re.search(r"assigned the value (\d+) in", question.text).group(1)
    reached = [value]
    for variable, source in assignments:
        assert source in reached, "a variable is assigned before its source is"
        reached.append(variable)
    assert tuple(reached[1:]) == question.answers
    assert len(question.answers) == TRACKING["vt"].hops + 1
    places = [len(tokenizer.encode(found[: found.index(f"VAR {answer}")])) for answer in question.answers]
    assert np.allclose(np.array(places) / example.length, example.depths, atol=SENTENCE / example.length)
    assert example.length + len(tokenizer.encode(question.text)) == length


def test_the_solved_example_is_solved(tokenizer: Tokenizer) -> None:
    found = text(make("vt", tokenizer, 1500), tokenizer)
    chain = re.findall(r"VAR ([A-Z]{3}) = ", found)
    assert len(chain) == 5 and f"they are:  {' '.join(chain)}\n\nMemorize" in found


NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
EDITIONS = {"vt": "2025-05-13", "vt@2024-12-04": "2024-12-04"}


def lines_of(name: str, tokenizer: Tokenizer, index: int) -> tuple[list[str], str]:
    """Of the context that is asked about, what stands between noise, in turn, and the whole."""
    example = make(name, tokenizer, 3000, index, seed=2)
    whole = text(example, tokenizer) + example.questions[0].text
    context = whole[whole.rindex("hidden in the following text.\n\n") + len("hidden in the following text.\n\n") :]
    return context.partition("\nQuestion")[0].split(NOISE), whole


@pytest.mark.parametrize("name", EDITIONS)
def test_noise_lies_between_assignments_as_the_edition_writes(name: str, tokenizer: Tokenizer) -> None:
    earlier = name != "vt"
    first, inner, nothing = ("{} ", "\n {} ", "\n ") if earlier else ("{}\n", "\n{}\n", "\n")
    assignment = re.compile(r"VAR [A-Z]{5} = (VAR [A-Z]{5} |\d{5})")
    starts = set()
    for index in range(40):
        (head, *rest, _), whole = lines_of(name, tokenizer, index)
        found = [match[0] for part in (head, *rest) for match in [assignment.search(part)] if match]
        assert len(found) == 5
        match = assignment.search(head)
        assert head == (first.format(match[0]) if match else "")
        starts.add(bool(match))
        for part in rest:
            match = assignment.search(part)
            assert part == (inner.format(match[0]) if match else nothing)
        assert whole.endswith("they are: ")
        assert ("assgined" in whole) == earlier and ("\n\n\n\nMemorize" in whole) == earlier
    # Some begin with an assignment, most with noise.
    assert starts == {True, False}
    assert find(name).source == f"RULER {EDITIONS[name]}"


def test_editions_hide_the_same_chain(tokenizer: Tokenizer) -> None:
    one, other = (make(name, tokenizer, 3000, 3) for name in EDITIONS)
    assert one.questions[0].answers == other.questions[0].answers
    one, other = (make(name, tokenizer, 3000, 3) for name in ("cwe", "cwe@2024-12-04"))
    assert "in the list are: 1. " in text(one, tokenizer) and "in the list are:1. " in text(other, tokenizer)
    assert one.questions == other.questions
    with pytest.raises(ValueError, match=r"choose one of niah_single_1 \(niah_single_1 is RULER 2025-05-13, with"):
        find("niah_single_1@2024-12-04")


def test_the_solved_example_takes_its_share(tokenizer: Tokenizer) -> None:
    """As much noise as 500 tokens hold."""
    whole = text(make("vt", tokenizer, 3000), tokenizer)
    example = whole[: whole.index("they are: ") + len("they are: ")]
    one_more = example.replace(NOISE, f"{NOISE}\n{NOISE}", 1)
    assert len(tokenizer.encode(example)) <= 500 + 5 < len(tokenizer.encode(one_more)) + 10 or example.count(NOISE) == 5


@pytest.mark.parametrize("noises", [5, 6, 50])
@pytest.mark.parametrize("chains", [1, 2, 4])
def test_places_of_a_chain_have_noise_or_another_chain_between(noises: int, chains: int) -> None:
    task = Tracking(chains=chains, hops=4, max_new_tokens=30)
    for seed in range(50):
        places = drawn_places(task, noises, np.random.default_rng(seed))
        assert {(place.chain, place.number) for place in places} == {(c, n) for c in range(chains) for n in range(5)}
        assert len(places) == 5 * chains
        assert [place.noises for place in places] == sorted(place.noises for place in places)
        assert places[-1].noises < noises
        for chain in range(chains):
            own = [order for order, place in enumerate(places) if place.chain == chain]
            assert [places[order].number for order in own] == list(range(5))
            for order, later in zip(own, own[1:], strict=False):
                assert later > order + 1 or places[later].noises > places[order].noises


def test_lists_and_essays_begin_without_a_space(tokenizer: Tokenizer, folder: TextFolder) -> None:
    assert "often.\n1. " in text(make("cwe", tokenizer, 2000), tokenizer).partition("Question")[2]
    seen = set()
    for index in range(60):
        found = text(make("niah_single_2", tokenizer, 1200, index, folder=folder), tokenizer)
        essay = found.partition("afterwards.\n")[2]
        # RULER joins what stands before a needle, nothing here, and the needle by a space.
        assert essay[0] != " " or essay.startswith(" One of the special magic")
        assert "  " not in essay and re.search(r": \d{7}\. \w", essay)
        seen.add(essay[0] == " ")
    assert seen == {True, False}


def test_more_chains_are_told_apart(tokenizer: Tokenizer) -> None:
    example = tracking(Tracking(chains=3, hops=2, max_new_tokens=30), "three", tokenizer, 3000, (1,), None)
    known: dict[str, str] = {}
    for variable, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text(example, tokenizer)):
        known[variable] = known.get(source, source)
    (question,) = example.questions
    value = re.search(r"value (\d+) in", question.text).group(1)
    assert len(set(known.values())) == 3
    assert {variable for variable, its in known.items() if its == value} == set(question.answers)


@pytest.mark.parametrize(("length", "common", "uncommon"), [(2000, 6, 1), (4095, 6, 1), (12_000, 30, 3)])
def test_common_words_are_the_most_common(length: int, common: int, uncommon: int, tokenizer: Tokenizer) -> None:
    example = make("cwe", tokenizer, length, index=4, seed=1)
    (question,) = example.questions
    found = text(example, tokenizer)
    entries = re.findall(r"(\d+)\. ([a-z]{7})\b", found.rpartition("appear most often.\n")[2])
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    assert {word: count for word, count in counts.items() if count == common} == dict.fromkeys(question.answers, common)
    rest = Counter(count for word, count in counts.items() if word not in question.answers)
    assert set(rest) <= set(range(1, uncommon + 1))
    assert uncommon == 1 or rest[1] + rest[2] < uncommon + 2
    # Spread over the whole list.
    first = [number for number, (_, word) in enumerate(entries) if word in question.answers]
    assert 0.4 < np.mean(first) / len(entries) < 0.6
    assert example.length + len(tokenizer.encode(question.text)) == length


def test_the_solved_list_is_solved(tokenizer: Tokenizer) -> None:
    found = text(make("cwe", tokenizer, 2000), tokenizer)
    example, _, rest = found.partition("\nQuestion:")
    entries = Counter(re.findall(r"\d+\. ([a-z]{7})\b", example))
    answers = re.findall(r"\d+\. ([a-z]{7})\b", rest.partition("\n")[0])
    assert {word for word, count in entries.items() if count == 3} == set(answers) and len(answers) == 10
    assert len(entries) == 20


def test_common_words_lie_short_where_the_long_list_has_no_room(tokenizer: Tokenizer) -> None:
    (needed,) = re.findall(r"alone take ([\d,]+);", refusal("cwe", tokenizer, 100))
    least = int(needed.replace(",", ""))
    assert make("cwe", tokenizer, least).length < least < 2000
    assert "alone take" in refusal("cwe", tokenizer, least - 1)


@pytest.mark.parametrize("length", [900, 4096, 50_001])
def test_frequent_words_are_the_most_frequent(length: int, tokenizer: Tokenizer) -> None:
    example = make("fwe", tokenizer, length, index=2, seed=9)
    (question,) = example.questions
    found = text(example, tokenizer).partition("coded words.")[2]
    counts = Counter(re.findall(r" ([a-z]{6})\b", found))
    assert tuple(word for word, _ in counts.most_common(3)) == question.answers
    ranked = [count for _, count in counts.most_common()]
    assert ranked[2] > ranked[3]
    # Shares fall off with the square of the rank, the dots' being the first; the counts are theirs exactly.
    ranks = np.arange(2, 2 + len(ranked))
    assert any(
        ranked == list((words * 6 / np.pi**2 / ranks**2).astype(int)) for words in range(length // 20, length)
    )
    assert found.count(" ...") > ranked[0]
    assert example.length + len(tokenizer.encode(question.text)) == length


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe"])
def test_least_length(name: str, tokenizer: Tokenizer) -> None:
    """The refusal says how many tokens are needed, and so many are enough."""
    (needed,) = re.findall(r"alone take ([\d,]+);", refusal(name, tokenizer, 10))
    least = int(needed.replace(",", ""))
    assert sum(len(piece) for piece in make(name, tokenizer, least).context()) == make(name, tokenizer, least).length
    assert "alone take" in refusal(name, tokenizer, least - 1)


def refusal(name: str, tokenizer: Tokenizer, length: int) -> str:
    with pytest.raises(ValueError) as caught:
        make(name, tokenizer, length)
    return str(caught.value)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 255, 256, 257, 5000])
def test_a_shuffle_is_a_permutation_of_no_order(count: int) -> None:
    shuffle = Shuffle(count, np.random.default_rng(count))
    order = np.concatenate([shuffle(np.arange(start, min(start + 7, count))) for start in range(0, count, 7)])
    assert sorted(order) == list(range(count))
    if count > 200:
        assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.15
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.15


def test_shuffles_differ_by_their_generator_and_reach_far() -> None:
    places = np.arange(10**12, 10**12 + 1000)
    one, other = (Shuffle(10**12 + 1000, np.random.default_rng(seed))(places) for seed in (0, 1))
    assert len(set(one)) == 1000 and one.max() < 10**12 + 1000
    assert len(set(one) & set(other)) < 5


def test_zeta() -> None:
    assert zeta(2.0) == pytest.approx(np.pi**2 / 6, rel=1e-12)
    assert zeta(4.0) == pytest.approx(np.pi**4 / 90, rel=1e-12)


def test_words_are_of_one_length_and_distinct() -> None:
    numbers = np.random.default_rng(0).integers(WORDS, size=2000)
    assert len({word(int(number)) for number in numbers}) == len(set(numbers))
    assert {len(word(int(number))) for number in (0, WORDS - 1, *numbers)} == {7}
    assert len({word(number, 2) for number in range(SHORT_WORDS)}) == SHORT_WORDS
