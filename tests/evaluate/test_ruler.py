"""RULER's tasks: official parameters, needles where they are said to be, answers found again in the text."""

import re

import numpy as np
import pytest

from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.evaluate.haystack import Example
from atlas_megatron.evaluate.ruler.parameters import NIAH
from atlas_megatron.evaluate.tasks import make
from atlas_megatron.tokenizer import Tokenizer

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
    assert len(example.depths) == task.keys * task.values
    assert example.length == sum(len(piece) for piece in example.context())
    assert example.length + len(tokenizer.encode(question.text)) == length
