"""BABILong: answers found again by a bystander, facts whole and in order, the official measure, the official files."""

import hashlib
import json
import re
from dataclasses import replace
from random import Random

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.babilong import LABELS, Babilong, exact, from_row, hide, substring
from atlas_megatron.evaluate.babilong_files import Row, read_rows, read_stories
from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.evaluate.haystack import Example, Question
from atlas_megatron.evaluate.stories import PLOTS, tell
from atlas_megatron.evaluate.tasks import find, make, score
from tests.support import replay_facts as bystander

SUPPORTING = {"qa1": {1}, "qa2": {2}, "qa3": {3, 4}, "qa4": {1}, "qa5": {1}}


def text(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(np.concatenate(list(example.context())))


@pytest.mark.parametrize("task", LABELS)
def test_answers_follow_from_the_facts(task: str) -> None:
    random = Random(11)
    stories = [tell(task, random) for _ in range(200)]
    for story in stories:
        assert bystander.answer(list(story.facts), story.question) == story.answer
        assert story.answer in LABELS[task]
        assert len(story.supporting) in SUPPORTING[task]
        assert 0 <= min(story.supporting) <= max(story.supporting) < len(story.facts)
    counts = [len(story.facts) for story in stories]
    if task == "qa4":
        assert set(counts) == {2}
    else:
        assert PLOTS[task].least <= min(counts) < max(counts) <= PLOTS[task].most
    assert {story.answer for story in stories} == set(LABELS[task])


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa4", "qa5"])
def test_the_answer_rests_on_the_supporting_facts(task: str) -> None:
    """Told alone they give the same answer."""
    random = Random(12)
    for _ in range(100):
        story = tell(task, random)
        alone = [story.facts[place] for place in story.supporting]
        if task == "qa4":
            (match,) = [bystander.RELATION.fullmatch(fact) for fact in alone]
            assert story.answer in (match["one"], match["other"])
        elif task == "qa2":
            moves = [fact for fact in alone if bystander.FACT.fullmatch(fact)["place"]]
            assert len(moves) == 1 and moves[0].endswith(f" the {story.answer}.")
            thing = story.question.split()[-1].rstrip("?")
            told = [fact for fact in story.facts if f" the {thing}" in fact]
            assert {*alone} == {moves[0], told[-1]}
        elif task == "qa1":
            assert bystander.answer(alone, story.question) == story.answer
        else:
            assert story.answer in alone[0]


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("length", [700, 5000])
@pytest.mark.parametrize("prompted", [False, True])
def test_facts_are_hidden_whole(
    task: str, length: int, prompted: bool, tokenizer: Tokenizer, folder: TextFolder
) -> None:
    name = f"babilong_{task}" + ("_prompted" if prompted else "")
    length += 1000 * prompted
    for index in range(3):
        example = make(name, tokenizer, length, index, seed=3, folder=folder)
        (question,) = example.questions
        context = text(example, tokenizer)
        hidden = context.rpartition("<context>\n")[2] if prompted else context
        asked = question.text.strip().removeprefix("</context>\n\nQuestion: ")
        facts = bystander.facts_in(hidden)
        assert (bystander.answer(facts, asked),) == question.answers
        assert example.length + len(tokenizer.encode(question.text)) == length
        assert prompted == context.startswith(("I will give you context", "I give you context"))
        # Where the supporting facts are said to lie, there is a fact, up to a sentence.
        places, end = [], len(context) - len(hidden)
        for fact in facts:
            start = context.index(fact, end)
            end = start + len(fact)
            places.append(len(tokenizer.encode(context[:start])))
        for depth in example.depths:
            assert np.abs(np.array(places) - depth * example.length).min() < 100


def test_the_text_around_is_the_folders(tokenizer: Tokenizer, folder: TextFolder) -> None:
    example = make("babilong_qa1", tokenizer, 3000, folder=folder)
    context = text(example, tokenizer)
    assert context == context.lstrip()
    context = f" {context}"
    for fact in bystander.facts_in(context):
        context = context.replace(f" {fact}", "", 1)
    written = " ".join(" ".join(file.read_text().split()) for file in sorted(folder.folder.iterdir()))
    assert context.strip() in f"{written} {written}"


def test_length_0_is_the_story_alone(tokenizer: Tokenizer) -> None:
    example = make("babilong_qa2", tokenizer, 0, index=5)
    context = text(example, tokenizer)
    assert " ".join(bystander.facts_in(context)) == context.strip()
    assert example.length == sum(len(piece) for piece in example.context())


def test_a_story_fits_its_length(tokenizer: Tokenizer, folder: TextFolder) -> None:
    """qa3's longest stories do not fit 400 tokens: others are told there."""
    lengths = [make("babilong_qa3", tokenizer, 400, index, folder=folder).length for index in range(10)]
    assert all(340 < length < 400 for length in lengths)
    with pytest.raises(ValueError, match="facts and its question alone take"):
        make("babilong_qa3", tokenizer, 40, folder=folder)
    with pytest.raises(ValueError, match="no folder was given"):
        make("babilong_qa3", tokenizer, 400)


@pytest.mark.parametrize(
    ("task", "question", "target", "prediction", "right"),
    [
        ("qa1", "Where is Mary?", "kitchen", "The most recent location of Mary is kitchen.", True),
        ("qa1", "Where is Mary?", "kitchen", "KITCHEN", True),
        ("qa1", "Where is Mary?", "kitchen", "kitchen or garden", False),
        ("qa1", "Where is Mary?", "kitchen", "garden. kitchen", False),
        ("qa1", "Where is Mary?", "kitchen", "kitchen. Then the garden", True),
        ("qa1", "Where is Mary?", "kitchen", "kitchen <example> garden", True),
        ("qa1", "Where is Mary?", "kitchen", "somewhere", False),
        ("qa1", "Where is Mary?", "kitchen", "", False),
        ("qa3", "Where was the milk before the office?", "kitchen", "Before the office it was in the kitchen.", True),
        ("qa4", "What is north of the office?", "kitchen", "the kitchen is north of the office", True),
        ("qa5", "What did Bill give to Fred?", "milk", "Bill gave Fred the milk", True),
        ("qa5", "What did Bill give to Fred?", "milk", "Bill gave Jeff the milk", False),
        ("qa5", "Who gave the milk?", "Bill", "bill", True),
    ],
)
def test_the_official_measure(task: str, question: str, target: str, prediction: str, right: bool) -> None:
    asked = Babilong(task).question(question, target)
    assert exact(task, prediction, asked) == right
    assert exact(task, prediction, Babilong(task, prompted=True).question(question, target)) == right
    assert score(f"babilong_{task}", prediction, asked)["exact"] == right


def test_the_measure_by_substring() -> None:
    question = Question("Where is Mary?", ("kitchen",))
    assert substring("garden or kitchen", question) == 1
    assert substring("garden. kitchen", question) == 0
    assert score("babilong_qa1", "garden or Kitchen", question) == {"exact": 0, "substring": 1}


BABI = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Mary got the milk there.
6 Where is the milk?\tbathroom\t5 1
1 Sandra moved to the garden.
2 Where is Sandra? \tgarden\t1
"""


def test_babi_files_are_read(tmp_path, tokenizer: Tokenizer, folder: TextFolder) -> None:
    file = tmp_path / "qa1_single-supporting-fact_test.txt"
    file.write_text(BABI)
    first, second, third = read_stories(file)
    assert first.facts == ("Mary moved to the bathroom.", "John went to the hallway.")
    assert (first.question, first.answer, first.supporting) == ("Where is Mary?", "bathroom", (0,))
    assert second.facts[2:] == ("Daniel went back to the hallway.", "Mary got the milk there.")
    assert (second.question, second.supporting) == ("Where is the milk?", (0, 3))
    assert third.facts == ("Sandra moved to the garden.",)
    example = hide(Babilong("qa2"), "official", second, tokenizer, 600, (0,), folder)
    assert bystander.facts_in(text(example, tokenizer)) == list(second.facts)
    assert len(example.depths) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("2 John", "John"), "line 2: expected a number and a sentence"),
        (("4 Daniel", "3 Daniel"), "line 4: number 3 does not follow 3"),
        (("\tbathroom\t1", "\tbathroom"), "line 3: expected a question, its answer and the numbers"),
        (("\t5 1", "\t5 9"), "line 6: expected a question, its answer and the numbers"),
        ((BABI, "1 Mary moved to the bathroom.\n"), "asks no question"),
    ],
)
def test_broken_babi_files_are_refused(tmp_path, change: tuple[str, str], message: str) -> None:
    (tmp_path / "qa1.txt").write_text(BABI.replace(*change))
    with pytest.raises(ValueError, match=message):
        read_stories(tmp_path / "qa1.txt")


ROWS = [
    {"input": "Some text. Mary went to the kitchen. " * 40, "question": "Where is Mary?", "target": "kitchen"},
    {"input": "John is gone.", "question": "Where is John?", "target": "garden"},
]


@pytest.mark.parametrize("name", ["4k.json", "rows.jsonl", "rows.parquet"])
def test_rows_are_read(tmp_path, name: str) -> None:
    file = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    else:
        file.write_text(json.dumps(ROWS) if name == "4k.json" else "\n".join(map(json.dumps, ROWS)))
    assert list(read_rows(file)) == [Row(**row) for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", "[{]", "not JSON"),
        ("rows.json", '{"input": ""}', "holds no list but dict"),
        ("rows.json", '[{"input": "a", "question": "b"}]', "row 1: expected text under"),
        ("rows.json", "[]", "holds no row"),
        ("rows.jsonl", '{"input": "a", "question": "b", "target": "c"}\n\n{', "line 3: not JSON"),
        ("rows.jsonl", '{"input": "a", "question": "b", "target": 3}', "row 1: expected text under"),
        ("rows.parquet", "PAR1", "is not a Parquet file"),
    ],
)
def test_broken_rows_are_refused(tmp_path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(tmp_path / name))


def test_a_row_is_read_as_long_as_it_is(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas_megatron.evaluate.babilong.BLOCK", 100)
    row = Row(**ROWS[0])
    example = from_row(Babilong("qa1", prompted=True), "row", row, tokenizer)
    context = text(example, tokenizer)
    assert context == Babilong("qa1", prompted=True).opening + row.input.strip()
    assert example.length == sum(len(piece) for piece in example.context())
    assert example.questions[0].text == "\n</context>\n\nQuestion: Where is Mary?"


# Of what booydar/babilong's get_formatted_input gives for "CTX" and "Q?", the first 16 digits of its SHA-256: at
# commits c9c6ad2 (the same at 7a6efee of 2026), 876cf31 and d796183.
PROMPTS = {
    "2024-06-05": {
        "qa1": "f0099ca4b6819b9b", "qa2": "b297346b51210901", "qa3": "2144aeae6266d03f", "qa4": "18f8b9053ee2d7ec",
        "qa5": "e031edf7710e885a",
    },
    "2024-05-22": {
        "qa1": "f0099ca4b6819b9b", "qa2": "b297346b51210901", "qa3": "29758d93334993c0", "qa4": "18f8b9053ee2d7ec",
        "qa5": "e031edf7710e885a",
    },
    "2024-05-15": {
        "qa1": "02aef7a6339e23bd", "qa2": "6910f5ca576a8e97", "qa3": "9c89b4b4e197e783", "qa4": "0621f5abbf8e33e9",
        "qa5": "aaa87e8e41c101be",
    },
}  # fmt: skip


@pytest.mark.parametrize("edition", PROMPTS)
@pytest.mark.parametrize("task", LABELS)
def test_prompts_are_the_benchmarks_letter_for_letter(task: str, edition: str) -> None:
    asked = Babilong(task, prompted=True, edition=edition)
    whole = f"{asked.opening}CTX{asked.question('Q?', '').text}"
    assert hashlib.sha256(whole.encode()).hexdigest()[:16] == PROMPTS[edition][task]
    assert asked.source == f"BABILong {edition}"


def test_editions_are_chosen_by_name_and_ask_the_same_story(tokenizer: Tokenizer, folder: TextFolder) -> None:
    name = "babilong_qa3_prompted"
    newest, first, answer = (
        make(f"{name}{edition}", tokenizer, 2500, 4, folder=folder) for edition in ("", "@2024-05-15", "@answer")
    )
    for example in (first, answer):
        assert bystander.facts_in(text(example, tokenizer).rpartition("<context>\n")[2]) == bystander.facts_in(
            text(newest, tokenizer).rpartition("<context>\n")[2]
        )
    assert "$location_1&" in text(first, tokenizer) and "$location_1$" in text(newest, tokenizer)
    assert answer.questions[0].text == newest.questions[0].text + "\nAnswer:"
    assert find(f"{name}@answer").source.endswith("(ours)") and find("babilong_qa3").source.endswith("(ours)")
    with pytest.raises(ValueError, match="choose one of babilong_qa3_prompted, babilong_qa3_prompted@2024-05-22, "):
        make(f"{name}@2023-01-01", tokenizer, 2500, folder=folder)
    with pytest.raises(ValueError, match=r"no task 'babilong_qa3@2024-05-15'; choose one of babilong_qa3 \("):
        make("babilong_qa3@2024-05-15", tokenizer, 2500, folder=folder)


@pytest.mark.parametrize("length", [0, 700])
def test_no_space_stands_before_the_first_sentence(length: int, tokenizer: Tokenizer, folder: TextFolder) -> None:
    """Neither where a fact comes first, nor where the filler does."""
    first = [text(make("babilong_qa2", tokenizer, length, n, folder=folder), tokenizer) for n in range(30)]
    assert all(not context[0].isspace() and "  " not in context for context in first)
    assert all(context.startswith(bystander.facts_in(context)[0]) == (length == 0) for context in first)


def test_the_least_length_is_enough_whatever_the_tokenizer(tokenizer: Tokenizer, folder: TextFolder) -> None:
    """Also one to which a first word without a space is longer than one with it."""

    def encoded(text: str) -> list[int]:
        return [tokenizer.eod, *tokenizer.encode(text)] if text[0].isalpha() else tokenizer.encode(text)

    for coder in (tokenizer, replace(tokenizer, encode=encoded)):
        with pytest.raises(ValueError, match="alone take") as caught:
            make("babilong_qa4", coder, 10, folder=TextFolder(folder.folder, coder))
        least = int(re.findall(r"alone take ([\d,]+);", str(caught.value))[0])
        example = make("babilong_qa4", coder, least, folder=TextFolder(folder.folder, coder))
        assert sum(len(piece) for piece in example.context()) == example.length


def test_short_sentences_are_no_filler(tmp_path, tokenizer: Tokenizer) -> None:
    (tmp_path / "text.txt").write_text("No. " + "Yes. This one is long enough to be told between the facts. " * 50)
    context = text(make("babilong_qa1", tokenizer, 600, folder=TextFolder(tmp_path, tokenizer)), tokenizer)
    assert "Yes." not in context and "No." not in context and "long enough" in context
    (tmp_path / "text.txt").write_text("No. Yes. " * 50)
    with pytest.raises(ValueError, match="holds no sentence of 10 tokens and more"):
        make("babilong_qa1", tokenizer, 600, folder=TextFolder(tmp_path, tokenizer))
