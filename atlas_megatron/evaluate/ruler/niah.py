"""RULER's needles in a haystack: special magic numbers (words, uuids) for keys, hidden and asked for.

After NVIDIA/RULER, scripts/data/synthetic/niah.py, whose texts are the same since 2024-04-25; the prompt's words are
those of its constants.py. Ours: the words are made up (words.py); no two keys or values of an example are equal;
essays are any text, from a random place on (there Paul Graham's, from the first on); a depth is a share of the tokens
(there of the sentences), and needles outside of essays may stand side by side; the length is exact and holds the
prompt, so the last sentence is cut.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.filler import TextFolder, made, repeated
from atlas_megatron.evaluate.haystack import (
    Example,
    Filler,
    Haystack,
    Needle,
    Question,
    at_start,
    encode,
    room_for_context,
)
from atlas_megatron.evaluate.words import pair

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
OPENING = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
QUESTION = (
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text are"
)
ONE_OPENING = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
ONE_QUESTION = (
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text is"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * step / 39) / 100 for step in range(40)]  # where needles in essays may lie


@dataclass(frozen=True)
class Niah:
    """haystack: repeat (NOISE), essay (text of a folder) or needle (other keys' needles).

    key, value: words, numbers or uuids. keys, values, queries: how many keys there are, values a key has, and keys
    that are asked for together. apart (ours): every key is asked for in a question of its own, the needles are spread
    evenly, and `Example.depths` are those of the questions in turn.
    """

    haystack: str
    key: str
    value: str
    keys: int
    values: int
    queries: int
    max_new_tokens: int
    apart: bool = False


def number(random: Random) -> str:
    """Seven digits."""
    return str(random.randrange(10**6, 10**7))


def random_uuid(random: Random) -> str:
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


KINDS: dict[str, Callable[[Random], str]] = {"words": pair, "numbers": number, "uuids": random_uuid}


def niah(
    task: Niah, name: str, tokenizer: Tokenizer, length: int, seed: tuple[int, ...], folder: TextFolder | None
) -> Example:
    """One example. Raises ValueError for a length without room and for a missing folder of essays."""
    random = Random(repr((*seed, "needles")))
    keys = _distinct(KINDS[task.key], random, task.keys)
    values = _distinct(KINDS[task.value], random, task.keys * task.values)
    by_key = {key: values[place * task.values : (place + 1) * task.values] for place, key in enumerate(keys)}
    hidden = [(key, value) for key in keys for value in by_key[key]]
    random.shuffle(hidden)
    asked = random.sample(keys, task.queries)
    if task.apart:
        questions = tuple(_question(task, [key], (value,)) for key, value in hidden)
    else:
        questions = (_question(task, asked, tuple(value for key in asked for value in by_key[key])),)

    one = len(asked) * task.values == 1
    kind = task.value.removesuffix("s") if one else task.value
    opening = encode(tokenizer, (ONE_OPENING if one else OPENING).format(kind=kind))
    before, after = (" ", "") if task.haystack == "essay" else ("", "\n")
    needles = [
        encode(tokenizer, before + NEEDLE.format(kind=task.value, key=key, value=value) + after)
        for key, value in hidden
    ]
    needed = len(opening) + sum(len(needle) for needle in needles)
    room = room_for_context(name, tokenizer, length, questions, needed)
    depths = _depths(task, random, len(needles))
    # Essays begin without a space. RULER puts one before a needle that stands first.
    filler = _filler(task, name, tokenizer, seed, folder, {*keys, *values}, not at_start(depths[0], room - needed))
    haystack = Haystack(opening, tuple(map(Needle, needles, depths)), filler, room)
    places = tuple(depth for depth, (key, _) in zip(haystack.depths, hidden, strict=True) if key in asked)
    return Example(name, haystack.length, haystack.pieces, questions, task.max_new_tokens, places)


def _question(task: Niah, keys: list[str], answers: tuple[str, ...]) -> Question:
    one = len(answers) == 1
    kind = task.value.removesuffix("s") if one else task.value
    query = f"{', '.join(keys[:-1])}, and {keys[-1]}" if len(keys) > 1 else keys[0]
    return Question((ONE_QUESTION if one else QUESTION).format(kind=kind, query=query), answers)


def _distinct(draw: Callable[[Random], str], random: Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(random)] = None
    return list(found)


def _depths(task: Niah, random: Random, count: int) -> list[float]:
    if task.apart:
        return [(number + 0.5) / count for number in range(count)]
    if task.haystack == "essay":
        return sorted(random.sample(DEPTHS, count))
    return sorted(random.random() for _ in range(count))


def _filler(
    task: Niah,
    name: str,
    tokenizer: Tokenizer,
    seed: tuple[int, ...],
    folder: TextFolder | None,
    taken: set[str],
    bare: bool,
) -> Filler:
    if task.haystack == "repeat":
        return repeated(tokenizer, f"{NOISE}\n")
    if task.haystack == "essay":
        if folder is None:
            raise ValueError(f"{name} hides its needles in text, and no folder was given; give a folder of text files")
        return folder.filler(seed, bare=bare)

    def distractor(random: Random) -> str:
        while True:
            key, value = KINDS[task.key](random), KINDS[task.value](random)
            if key not in taken and value not in taken:
                return NEEDLE.format(kind=task.value, key=key, value=value) + "\n"

    return made(tokenizer, distractor, seed)
