"""RULER's variable tracking: chains of assignments hidden in noise; all variables of one value are asked for.

After NVIDIA/RULER, scripts/data/synthetic/variable_tracking.py; the prompt's words are those of its constants.py. As
there, a solved example of about EXAMPLE_TOKENS stands first, noise lies between any two assignments of a chain, and the
prompt ends with a space. Two of its editions are here, by the day from which they hold: since NEWEST every sentence of
noise and every assignment is a line of its own; before, they were parted by spaces. Ours: no two variables or values of
an example are equal; the length is exact and holds the prompt, so the last sentence of noise is cut; where the solved
example has room for five sentences alone they stay whole (before NEWEST they were cut at their full stops there).
"""

from __future__ import annotations

import string
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.filler import TextFolder, repeated
from atlas_megatron.evaluate.haystack import Example, Haystack, Needle, Question, encode, room_for_context
from atlas_megatron.evaluate.ruler.niah import NOISE

OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are {assigned}"
    " the value {value}, they are: "
)
EXAMPLE_TOKENS = 500
SOLVED = 1  # in the seed of the solved example
LETTERS, EXAMPLE_LETTERS = 5, 3  # of a variable
NEWEST, EARLIER = "2025-05-13", "2024-12-04"


@dataclass(frozen=True)
class Wording:
    """How an edition writes.

    after_noise, after_assignment: what ends them. before: what stands before each but the first. assigned: a word of
    the question. after_example: what parts it from the task. The example has as many sentences of noise as fit into
    EXAMPLE_TOKENS less `spared`: a multiple of `step`, LEAST_NOISES at least.
    """

    after_noise: str
    after_assignment: str
    before: str
    assigned: str
    after_example: str
    spared: int
    step: int


LEAST_NOISES = 5
WORDINGS = {
    NEWEST: Wording("\n", "\n", "", "assigned", "\n\n", spared=0, step=1),
    # Misspelt there; spared are the tokens to generate.
    EARLIER: Wording("\n", "", " ", "assgined", "\n\n\n\n", spared=30, step=5),
}


@dataclass(frozen=True)
class Tracking:
    """chains: how many there are; the first is asked for. hops: assignments of a chain after its first."""

    chains: int
    hops: int
    max_new_tokens: int
    edition: str = NEWEST

    @property
    def wording(self) -> Wording:
        return WORDINGS[self.edition]


@dataclass(frozen=True)
class Chain:
    variables: tuple[str, ...]
    value: str

    @property
    def assignments(self) -> list[str]:
        """In the order in which they stand in the text. RULER ends all but the first with a space."""
        later = [f"VAR {new} = VAR {known} " for known, new in pairwise(self.variables)]
        return [f"VAR {self.variables[0]} = {self.value}", *later]

    def question(self, wording: Wording) -> Question:
        text = QUESTION.format(value=self.value, count=len(self.variables), assigned=wording.assigned)
        return Question(text, self.variables)


@dataclass(frozen=True)
class Place:
    """noises: how many sentences of noise stand before an assignment; chain, number: which assignment it is."""

    noises: int
    chain: int
    number: int


def tracking(
    task: Tracking, name: str, tokenizer: Tokenizer, length: int, seed: tuple[int, ...], folder: TextFolder | None
) -> Example:
    """One example; `folder` goes unused, for the noise is one sentence. Raises ValueError for a length without room."""
    generator, wording = np.random.default_rng(seed), task.wording
    chains = _chains(task, LETTERS, generator)
    opening = encode(tokenizer, _solved(task, tokenizer, np.random.default_rng((*seed, SOLVED))) + OPENING)
    question = chains[0].question(wording)
    first_noise, noise = f"{NOISE}{wording.after_noise}", f"{wording.before}{NOISE}{wording.after_noise}"
    sizes = [len(encode(tokenizer, text)) for text in (first_noise, noise)]

    def encoded(place: Place, before: str = wording.before) -> np.ndarray:
        text = chains[place.chain].assignments[place.number]
        return encode(tokenizer, f"{before}{text}{wording.after_assignment}")

    fixed = len(opening) + sum(
        len(encoded(Place(0, chain, number))) for chain in range(task.chains) for number in range(task.hops + 1)
    )
    # Noise between any two assignments of a chain, and at the end.
    least = fixed + max(sizes) * (task.hops + 1)
    room = room_for_context(name, tokenizer, length, [question], least)
    places = drawn_places(task, (room - fixed) // max(sizes), generator)
    tokens = [encoded(place) for place in places]
    starts = places[0].noises == 0
    if starts:
        tokens[0] = encoded(places[0], before="")
    total = room - len(opening) - sum(map(len, tokens))
    ends = [0 if starts else sizes[0] - sizes[1], sizes[1]]
    depths = [(ends[0] + place.noises * ends[1]) / total if place.noises else 0.0 for place in places]
    filler = repeated(tokenizer, noise, first=noise if starts else first_noise)
    haystack = Haystack(opening, tuple(map(Needle, tokens, depths)), filler, room)
    asked = tuple(depth for depth, place in zip(haystack.depths, places, strict=True) if place.chain == 0)
    return Example(name, room, haystack.pieces, (question,), task.max_new_tokens, asked)


def drawn_places(task: Tracking, noises: int, generator: np.random.Generator) -> list[Place]:
    """Of all assignments, in the order of the text. The chains come one after the other into what is there, each
    assignment before a sentence or an assignment of its own."""
    taken: list[tuple[int, int, int]] = []  # place in the text, chain, number
    there = noises
    for chain in range(task.chains):
        chosen = np.sort(generator.choice(there, task.hops + 1, replace=False)).tolist()
        taken = [(place + bisect_right(chosen, place), other, number) for place, other, number in taken]
        taken += [(place + number, chain, number) for number, place in enumerate(chosen)]
        there += task.hops + 1
    return [Place(place - earlier, chain, number) for earlier, (place, chain, number) in enumerate(sorted(taken))]


def _chains(task: Tracking, letters: int, generator: np.random.Generator) -> list[Chain]:
    each = task.hops + 1
    variables = _distinct_variables(each * task.chains, letters, generator)
    values = generator.choice(np.arange(10_000, 100_000), task.chains, replace=False)
    return [
        Chain(tuple(variables[number * each : (number + 1) * each]), str(value)) for number, value in enumerate(values)
    ]


def _distinct_variables(count: int, letters: int, generator: np.random.Generator) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(generator.choice(list(string.ascii_uppercase), letters))] = None
    return list(found)


def _solved(task: Tracking, tokenizer: Tokenizer, generator: np.random.Generator) -> str:
    """A short solved example, with shorter variables."""
    text, answers = _short(task, _noises_of_example(task, tokenizer), generator)
    return f"{text} {' '.join(answers)}{task.wording.after_example}"


@lru_cache(maxsize=8)
def _noises_of_example(task: Tracking, tokenizer: Tokenizer) -> int:
    """How many sentences of noise the example has, one number for all examples of a tokenizer."""
    wording, noises = task.wording, LEAST_NOISES
    while True:
        text, answers = _short(task, noises + wording.step, np.random.default_rng(0))
        # The earlier edition counted the answers in.
        counted = f"{text} {' '.join(answers)}" if wording.spared else text
        if len(encode(tokenizer, counted)) + wording.spared > EXAMPLE_TOKENS:
            return noises
        noises += wording.step


def _short(task: Tracking, noises: int, generator: np.random.Generator) -> tuple[str, Sequence[str]]:
    """A task with so many sentences of noise up to where the answers follow, and these."""
    wording = task.wording
    chains = _chains(task, EXAMPLE_LETTERS, generator)
    lines, before = [], 0
    for place in drawn_places(task, noises, generator):
        lines += [f"{NOISE}{wording.after_noise}"] * (place.noises - before)
        lines.append(f"{chains[place.chain].assignments[place.number]}{wording.after_assignment}")
        before = place.noises
    lines += [f"{NOISE}{wording.after_noise}"] * (noises - before)
    context = wording.before.join(lines)
    # The question brings the newline after the last line.
    context = context if wording.before else context.removesuffix("\n")
    question = chains[0].question(wording)
    return f"{OPENING}{context}{question.text}", question.answers
