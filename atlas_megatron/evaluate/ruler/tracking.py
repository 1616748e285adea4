"""RULER's variable tracking: chains of assignments hidden in noise; all variables of one value are asked for.

After NVIDIA/RULER, scripts/data/synthetic/variable_tracking.py; the prompt's words are those of its constants.py. As
there, a solved example stands first. Ours: that example has EXAMPLE_NOISES sentences of noise whatever the tokenizer,
the prompt ends without a space, no two variables or values of an example are equal, and the length is exact.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from atlas_megatron.evaluate.filler import TextFolder, repeated
from atlas_megatron.evaluate.haystack import Example, Haystack, Needle, Question, encode, room_for_context
from atlas_megatron.evaluate.ruler.niah import NOISE
from atlas_megatron.tokenizer import Tokenizer

OPENING = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned"
    " the value {value}, they are:"
)
EXAMPLE_NOISES = 5
LETTERS, EXAMPLE_LETTERS = 5, 3  # of a variable


@dataclass(frozen=True)
class Tracking:
    """chains: how many there are; the first is asked for. hops: assignments of a chain after its first."""

    chains: int
    hops: int
    max_new_tokens: int


@dataclass(frozen=True)
class Chain:
    variables: tuple[str, ...]
    value: str

    @property
    def assignments(self) -> list[str]:
        """In the order in which they stand in the text."""
        sources = (self.value, *(f"VAR {variable}" for variable in self.variables))
        return [f" VAR {variable} = {source}" for variable, source in zip(self.variables, sources, strict=False)]

    @property
    def question(self) -> Question:
        return Question(QUESTION.format(value=self.value, count=len(self.variables)), self.variables)


def tracking(
    task: Tracking, name: str, tokenizer: Tokenizer, length: int, seed: tuple[int, ...], folder: TextFolder | None
) -> Example:
    """One example; `folder` goes unused, for the noise is one sentence. Raises ValueError for a length without room."""
    generator = np.random.default_rng(seed)
    opening = encode(tokenizer, _example(task, generator) + OPENING)
    chains = _chains(task, LETTERS, generator)
    depths = [np.sort(generator.random(task.hops + 1)) for _ in chains]
    placed = sorted(
        (float(depth), number, text)
        for number, chain in enumerate(chains)
        for depth, text in zip(depths[number], chain.assignments, strict=True)
    )
    needles = tuple(Needle(encode(tokenizer, text), depth) for depth, _, text in placed)
    question = chains[0].question
    needed = len(opening) + sum(len(needle.tokens) for needle in needles)
    room = room_for_context(name, tokenizer, length, [question], needed)
    haystack = Haystack(opening, needles, repeated(tokenizer, f" {NOISE}\n"), room)
    asked = tuple(depth for depth, (_, number, _) in zip(haystack.depths, placed, strict=True) if number == 0)
    return Example(name, room, haystack.pieces, (question,), task.max_new_tokens, asked)


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


def _example(task: Tracking, generator: np.random.Generator) -> str:
    """A short solved one, with shorter variables."""
    chains = _chains(task, EXAMPLE_LETTERS, generator)
    lines: Sequence[str] = [f" {NOISE}\n"] * EXAMPLE_NOISES
    for chain in chains:
        places = np.sort(generator.integers(0, len(lines) + 1, task.hops + 1))
        grown: list[str] = []
        for place, line in enumerate([*lines, ""]):
            grown += [text for text, at in zip(chain.assignments, places, strict=True) if at == place]
            grown.append(line)
        lines = grown
    question = chains[0].question
    return f"{OPENING}{''.join(lines)}{question.text} {' '.join(question.answers)}\n\n"
