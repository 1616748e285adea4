"""A language of 160 words in which facts are told among filler, and asked for: needles, and bAbI's first task.

    the code of anna is amber .     what a needle says; told again of the same name, the later one holds
    anna went to the garden .       where a person is, as in bAbI's qa1
    the old rivers hum softly .     filler: four to eight words that mean nothing
    code of anna ? amber .          questions; the answer is one word
    where is anna ? garden .

Training sequences mix them and are asked all along; in evaluation facts lie in a context of any length, and every one
of them is asked for at its end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from atlas_megatron.evaluate.haystack import Example, Haystack, Needle, Question, Stretch
from atlas_megatron.evaluate.synthetic import NO_ANSWER, Batch

END = "<|endoftext|>"
NAMES = (
    "anna bela carl dora emil fred gina hugo iris jack kira liam mona nils olga paul quin rosa sean tina ugo vera "
    "walt xena yuri zora alma boris clara david elsa felix"
).split()
CODES = (
    "amber azure beige black blue bronze brown coral cream crimson cyan gold green grey indigo ivory jade khaki lemon "
    "lilac lime maroon mauve mint navy ochre olive orange peach pink plum purple"
).split()
PLACES = (
    "attic balcony bathroom bedroom cellar garage garden hallway kitchen library office park porch school shop stable"
).split()
FILLER = (
    "old river slow hums softly warm stone under quiet cloud turns again long grass bends near wide field calm wind "
    "moves over small bird sings late sun falls behind tall tree stands still deep lake holds cold light early rain "
    "comes after dry road leads past low wall grows round soft moss with every far hill rests in pale dust while thin "
    "smoke"
).split()
GRAMMAR = "the code of is . went to ? where".split()
WORDS = list(dict.fromkeys([END, *GRAMMAR, *NAMES, *CODES, *PLACES, *FILLER]))
VOCABULARY = 256  # rows of the embedding
NUMBERS = {word: number for number, word in enumerate(WORDS)}
SHORTEST, LONGEST = 4, 8  # words of a filler sentence
FACTS = 8  # of one context of the evaluation, half of each kind, each of a name of its own


def ids(text: str) -> list[int]:
    return [NUMBERS[word] for word in text.split()]


@dataclass(frozen=True)
class Kind:
    """A kind of fact: what it says of a name, how it is asked for, and the possible answers."""

    says: str
    asks: str
    answers: list[str]

    def told(self, name: str, answer: str) -> str:
        return self.says.format(name=name, answer=answer)

    def asked(self, name: str) -> str:
        return self.asks.format(name=name)


KINDS = (
    Kind("the code of {name} is {answer} .", "code of {name} ?", CODES),
    Kind("{name} went to the {answer} .", "where is {name} ?", PLACES),
)
# Encoded once: training draws millions of sentences.
TOLD = [{(n, a): ids(kind.told(n, a)) for n in NAMES for a in kind.answers} for kind in KINDS]
ASKED = [{n: ids(kind.asked(n)) for n in NAMES} for kind in KINDS]
FILLER_IDS, STOP, THE = np.array(ids(" ".join(FILLER))), NUMBERS["."], NUMBERS["the"]


@dataclass(frozen=True)
class Mix:
    """How training sequences are drawn.

    tokens: of a sequence. filler: bounds of the share of filler sentences, drawn once a sequence. names: the most that
    a sequence speaks of. questions: their share of what is not filler.
    """

    tokens: int
    filler: tuple[float, float]
    names: int
    questions: float = 0.6


def batch(seed: int, count: int, mix: Mix) -> Batch:
    """`count` training sequences; labels at the question marks alone."""
    generator = np.random.default_rng(seed)
    rows = [_sequence(generator, mix) for _ in range(count)]
    tokens, labels = (torch.tensor([row[part][: mix.tokens] for row in rows]) for part in (0, 1))
    return Batch(tokens, labels)


def _sequence(generator: np.random.Generator, mix: Mix) -> tuple[list[int], list[int]]:
    tokens: list[int] = []
    labels: list[int] = []
    share = generator.uniform(*mix.filler)
    names = generator.permutation(NAMES)[: generator.integers(1, mix.names + 1)]
    known: list[dict[str, str]] = [{}, {}]
    while len(tokens) < mix.tokens:
        kind, answer = int(generator.integers(2)), None
        if generator.random() < share:
            sentence = filler_sentence(generator)
        elif known[kind] and generator.random() < mix.questions:
            name = list(known[kind])[generator.integers(len(known[kind]))]
            answer = NUMBERS[known[kind][name]]
            sentence = [*ASKED[kind][name], answer, STOP]
        else:
            name = str(generator.choice(names))
            known[kind][name] = str(generator.choice(KINDS[kind].answers))
            sentence = TOLD[kind][name, known[kind][name]]
        tokens += sentence
        labels += [NO_ANSWER] * len(sentence)
        if answer is not None:
            labels[-3] = answer  # due at the question mark
    return tokens, labels


def filler_sentence(generator: np.random.Generator) -> list[int]:
    words = FILLER_IDS[generator.integers(len(FILLER_IDS), size=generator.integers(SHORTEST, LONGEST + 1))]
    return [THE, *words.tolist(), STOP]


def example(length: int, index: int) -> Example:
    """The index-th context of `length` tokens, and a question for each of its facts."""
    generator = np.random.default_rng((length, index))
    names, facts = generator.permutation(NAMES)[:FACTS], []
    for place, name in enumerate(names):
        kind = KINDS[place % 2]
        facts.append((kind, str(name), str(generator.choice(kind.answers))))
    depths = np.sort(generator.random(FACTS)).tolist()
    order = generator.permutation(FACTS)
    facts = [facts[place] for place in order]
    needles = tuple(
        Needle(np.array(ids(kind.told(name, answer)), np.int32), depth)
        for (kind, name, answer), depth in zip(facts, depths, strict=True)
    )
    stack = Haystack(np.empty(0, np.int32), needles, lambda: _stretches((length, index)), length)
    questions = tuple(Question(kind.asked(name), (answer,)) for kind, name, answer in facts)
    return Example(f"recall/{length}/{index}", length, stack.pieces, questions, 1, stack.depths)


def _stretches(seed: tuple[int, int]) -> Iterator[Stretch]:
    """Filler sentences without end, 4,096 at a time."""
    generator = np.random.default_rng((*seed, 1))
    while True:
        lengths = generator.integers(SHORTEST, LONGEST + 1, size=4096) + 2
        ends = np.cumsum(lengths)
        tokens = FILLER_IDS[generator.integers(len(FILLER_IDS), size=ends[-1])].astype(np.int32)
        tokens[ends - 1] = STOP
        tokens[ends - lengths] = THE
        yield Stretch(tokens, ends)


def write_tokenizer(folder: Path) -> None:
    """The language's tokenizer, a token a word, where `load_tokenizer` and transformers read it."""
    backend = Backend(models.WordLevel(NUMBERS, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
