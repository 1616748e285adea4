"""BABILong: the facts of a bAbI story hidden, in their order, among sentences of other text.

After Kuratov et al. 2024, arXiv 2402.10790, and booydar/babilong: facts lie at random borders between sentences of ten
tokens and more, and a story whose facts leave no room is not asked in that length, but the next one is. Ours: the
length is exact, in the model's tokens, and holds the whole prompt (there it is GPT-2's, of the context, 300 less for
the prompt); a border is as likely as the sentence before it is long (there all alike); filler of any kind will do
(there a book of PG-19, from a random place on), and it goes on in the next file; bAbI's files are those of its test
(there, for the 100 rows a task that are published, those of its training).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.babilong_files import Row
from atlas_megatron.evaluate.babilong_prompts import EDITIONS, NEWEST, Edition
from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.evaluate.haystack import (
    Example,
    Haystack,
    Needle,
    Question,
    at_start,
    encode,
    packed,
    room_for_context,
)
from atlas_megatron.evaluate.stories import PLACES, Story, tell

MAX_NEW_TOKENS = 20
TRIES = 100  # stories told for one that fits the length
BLOCK = 65_536  # characters of a row's text that are encoded at once
LEAST_TOKENS = 10  # of a sentence of filler: shorter ones are left out

# The answers that there are to each task's questions, BABILong's TASK_LABELS.
LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), PLACES),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
}


@dataclass(frozen=True)
class Babilong:
    """task: qa1 ... qa5.

    prompted: with BABILong's instruction and examples, for a model that was not trained on the task, as an edition of
    babilong_prompts.py has them. Otherwise (ours) the question stands on the line after the context, and the answer is
    to stand on the next one.
    """

    task: str
    prompted: bool = False
    edition: str = NEWEST

    @property
    def source(self) -> str:
        """Whose texts stand around the context."""
        return self._edition.source if self.prompted else "BABILong without its prompt (ours)"

    @property
    def opening(self) -> str:
        if not self.prompted:
            return ""
        prompt = self._edition.prompts[self.task]
        before = self._edition.template.partition("{context}")[0]
        return before.format(instruction=prompt.instruction, examples=prompt.examples, post_prompt=prompt.post_prompt)

    def question(self, text: str, answer: str) -> Question:
        if not self.prompted:
            return Question(f"\n{text}\n", (answer,))
        return Question(self._edition.template.partition("{context}")[2].format(question=text), (answer,))

    @property
    def _edition(self) -> Edition:
        return EDITIONS[self.edition]


def babilong(
    task: Babilong, name: str, tokenizer: Tokenizer, length: int, seed: tuple[int, ...], folder: TextFolder | None
) -> Example:
    """A story told for the seed, hidden in `length` tokens; 0 hides it in nothing (BABILong's 0k).

    Raises ValueError for a missing folder and a length without room for any of TRIES stories.
    """
    random = Random(repr(seed))
    shortest: Story | None = None
    for _ in range(TRIES):
        story = tell(task.task, random)
        if fits(task, story, tokenizer, length):
            return hide(task, name, story, tokenizer, length, seed, folder)
        if shortest is None or len(story.facts) < len(shortest.facts):
            shortest = story
    assert shortest is not None
    return hide(task, name, shortest, tokenizer, length, seed, folder)


def fits(task: Babilong, story: Story, tokenizer: Tokenizer, length: int) -> bool:
    """Whether so many tokens have room for the story; 0 is for the story alone."""
    return length == 0 or _needed(task, tokenizer, story) <= length


def hide(
    task: Babilong,
    name: str,
    story: Story,
    tokenizer: Tokenizer,
    length: int,
    seed: tuple[int, ...],
    folder: TextFolder | None,
) -> Example:
    """This story, read from bAbI's files or told, hidden in `length` tokens, or in nothing for 0. Raises ValueError."""
    generator = np.random.default_rng((*seed, 1))
    opening, facts = _encoded(task, tokenizer, story)
    question = task.question(story.question, story.answer)
    needed = len(opening) + sum(len(fact) for fact in facts)
    if length and folder is None:
        raise ValueError(f"{name} hides its facts in text, and no folder was given; give a folder of text files")
    room = room_for_context(name, tokenizer, length, [question], needed) if length else needed
    depths = sorted(float(depth) for depth in generator.random(len(facts)))
    # A context begins without a space: with a fact where its place is before all filler, else with the filler.
    fact_first = at_start(depths[0], room - needed)
    bare = encode(tokenizer, story.facts[0])
    more = len(bare) - len(facts[0])
    if fact_first and (not length or more <= room - needed):
        facts[0], depths[0] = bare, 0.0
        room += 0 if length else more
    filler = folder.filler(seed, least=LEAST_TOKENS, bare=not fact_first) if folder else partial(iter, ())
    haystack = Haystack(opening, tuple(map(Needle, facts, depths)), filler, room)
    supporting = tuple(haystack.depths[place] for place in story.supporting)
    return Example(name, room, haystack.pieces, (question,), MAX_NEW_TOKENS, supporting)


def _encoded(task: Babilong, tokenizer: Tokenizer, story: Story) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tokens of the opening and of each fact."""
    opening = encode(tokenizer, task.opening) if task.prompted else np.empty(0, np.int32)
    return opening, [encode(tokenizer, f" {fact}") for fact in story.facts]


def _needed(task: Babilong, tokenizer: Tokenizer, story: Story) -> int:
    opening, facts = _encoded(task, tokenizer, story)
    asked = encode(tokenizer, task.question(story.question, story.answer).text)
    return len(opening) + len(asked) + sum(len(fact) for fact in facts)


def from_row(task: Babilong, name: str, row: Row, tokenizer: Tokenizer) -> Example:
    """A row of BABILong's own, as long as it is; its text is encoded in blocks that end at a space."""
    context = row.input.strip()

    def parts() -> Iterator[np.ndarray]:
        if task.prompted:
            yield encode(tokenizer, task.opening)
        for block in _blocks(context):
            yield encode(tokenizer, block)

    length = sum(len(part) for part in parts())
    question = task.question(row.question, row.target)
    return Example(name, length, lambda: packed(parts()), (question,), MAX_NEW_TOKENS, ())


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find(" ", start + BLOCK)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def exact(task: str, prediction: str, question: Question) -> float:
    """BABILong's compare_answers (metrics.py): the answer is the one label in the prediction's first sentence.

    Labels that the question holds do not count.
    """
    said, asked = _first_sentence(prediction), question.text.lower()
    labels = {label.lower() for label in LABELS[task]}
    found = {label for label in labels if label in said and label not in asked}
    return float(found == {question.answers[0].lower()})


def substring(prediction: str, question: Question) -> float:
    """BABILong's earlier measure (babilong_utils.py): the prediction's first sentence contains the answer."""
    return float(question.answers[0].lower() in _first_sentence(prediction))


def _first_sentence(prediction: str) -> str:
    """In lower case, and no further than where a model begins to make up a context or an example."""
    said = prediction.lower().split(".")[0]
    for mark in ("<context>", "<example>"):
        said = said.split(mark)[0]
    return said
