"""What needles are buried in: sentences of a folder of text, one sentence repeated, or sentences made on the fly."""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random

import numpy as np

from atlas_megatron.data.text_files import MARK, is_utf8
from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.haystack import PIECE, Filler, Stretch, encode

SUFFIXES = (".txt", ".md", ".rst", ".py")
BLOCK = 65_536  # bytes of a file that are cut into sentences and encoded at once
OVERHANG = 1024  # bytes after a block in which the white space that ends it is looked for
KEPT = 16_777_216  # tokens of encoded blocks kept for their next turn (64 MiB)
LONGEST = 400  # characters of a sentence; text without full stops is cut at a space
MADE_AT_ONCE = 256  # sentences

# Up to a full stop with the quotes and brackets that close after it, or to the end of the text.
SENTENCE = re.compile(r"""\S.*?(?:[.!?]+["'”’)\]]*(?=\s|$)|$)""")
WHITE = re.compile(rb"\s")


class TextFolder:
    """The sentences of all text files (SUFFIXES) under a folder, in the order of their paths, over and over.

    Hidden files and folders are left out, and files that are not UTF-8, which `left_out` names. Sentences are those of
    English punctuation; white space is one space. Each is encoded with a space before it.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        """Raises ValueError for a folder without text."""
        self.folder, self.tokenizer = Path(folder), tokenizer
        if not self.folder.is_dir():
            raise ValueError(f"filler folder {str(folder)!r} does not exist; give a folder of text files")
        found = sorted(file for file in self.folder.rglob("*") if self._counts(file))
        # All of them now: a file that is met after hours would cost them.
        files = [file for file in found if is_utf8(file)]
        self.left_out = sorted(set(found) - set(files))
        sizes = [file.stat().st_size for file in files]
        self._places = [
            (file, start) for file, size in zip(files, sizes, strict=True) for start in range(0, size, BLOCK)
        ]
        # Of the files' names and sizes: equal means that the same seed gives the same filler.
        self.fingerprint = hashlib.sha256(
            "".join(f"{file.relative_to(folder)}\t{size}\n" for file, size in zip(files, sizes, strict=True)).encode()
        ).hexdigest()
        self._blocks: OrderedDict[int, Stretch | None] = OrderedDict()
        self._kept = 0
        if not any(self._block(number) for number in range(len(self._places))):
            names = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
            raise ValueError(
                f"filler folder {str(folder)!r} holds no UTF-8 text in files named {names}; put some there"
            )

    def _counts(self, file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(self.folder).parts)
        return file.suffix in SUFFIXES and not hidden and file.is_file()

    def filler(self, seed: Sequence[int], least: int = 1, bare: bool = False) -> Filler:
        """Filler that starts at a place drawn by the seed.

        least: tokens of a sentence; shorter ones are left out. bare: no space before the first sentence. Raises
        ValueError where all sentences are shorter.
        """
        if not any(longer(self._block(number), least) for number in range(len(self._places))):
            raise ValueError(
                f"filler folder {str(self.folder)!r} holds no sentence of {least} tokens and more; put longer ones in"
            )
        return partial(self._bare if bare else self._stretches, tuple(seed), least)

    def _bare(self, seed: tuple[int, ...], least: int) -> Iterator[Stretch]:
        stretches = self._stretches(seed, least)
        first = next(stretches)
        end = int(first.ends[0])
        text = self.tokenizer.decode(first.tokens[:end].tolist()).removeprefix(" ")
        alone = encode(self.tokenizer, text)
        yield Stretch(np.concatenate([alone, first.tokens[end:]]), first.ends + (len(alone) - end))
        yield from stretches

    def _stretches(self, seed: tuple[int, ...], least: int) -> Iterator[Stretch]:
        generator = np.random.default_rng(seed)
        number = int(generator.integers(len(self._places)))
        first = longer(self._block(number), least)
        if first:
            skipped = int(generator.integers(len(first.ends)))
            start = int(first.ends[skipped - 1]) if skipped else 0
            yield Stretch(first.tokens[start:], first.ends[skipped:] - start)
        while True:
            number = (number + 1) % len(self._places)
            block = longer(self._block(number), least)
            if block:
                yield block

    def _block(self, number: int) -> Stretch | None:
        """The sentences of one block; None for one of white space."""
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        block = stretch(self.tokenizer, (f" {sentence}" for sentence in sentences(_text(*self._places[number]))))
        self._blocks[number] = block
        self._kept += len(block.tokens) if block else 0
        while self._kept > KEPT:
            _, dropped = self._blocks.popitem(last=False)
            self._kept -= len(dropped.tokens) if dropped else 0
        return block


def _text(file: Path, start: int) -> str:
    """A block of a file: it begins and ends at the first white space from its place on."""
    with file.open("rb") as source:
        source.seek(start)
        raw = source.read(BLOCK + OVERHANG)
    begin, end = (_border(raw, 0) if start else 0), _border(raw, BLOCK)
    text = raw[begin:end].decode()
    return text if start else text.removeprefix(MARK)


def _border(raw: bytes, place: int) -> int:
    """The first white space at `place` or soon after; where there is none, the start of a character."""
    white = WHITE.search(raw, place, place + OVERHANG)
    if white:
        return white.start()
    while place < len(raw) and raw[place] & 0xC0 == 0x80:  # continues a UTF-8 character
        place += 1
    return place


def sentences(text: str) -> Iterator[str]:
    """The text's sentences, white space made single spaces, overlong ones cut at a space."""
    for sentence in SENTENCE.findall(" ".join(text.split())):
        if len(sentence) <= LONGEST:
            yield sentence
        else:
            yield from textwrap.wrap(sentence, LONGEST, break_on_hyphens=False)


def stretch(tokenizer: Tokenizer, texts: Iterable[str]) -> Stretch | None:
    """Texts encoded one by one, each a sentence; None if they hold no token."""
    encoded = [encode(tokenizer, text) for text in texts]
    ends = np.cumsum([len(tokens) for tokens in encoded], dtype=np.int64)
    if len(ends) == 0 or ends[-1] == 0:
        return None
    return Stretch(np.concatenate(encoded), ends)


def longer(block: Stretch | None, least: int) -> Stretch | None:
    """Its sentences of at least so many tokens; None if there is none."""
    if block is None or least <= 1:
        return block
    sizes = np.diff(block.ends, prepend=0)
    kept = sizes >= least
    if kept.all():
        return block
    ends = np.cumsum(sizes[kept])
    return Stretch(block.tokens[np.repeat(kept, sizes)], ends) if len(ends) else None


def repeated(tokenizer: Tokenizer, sentence: str, first: str | None = None) -> Filler:
    """One sentence over and over; `first`: how it is written the first time."""
    tokens = encode(tokenizer, sentence)
    opening = tokens if first is None else encode(tokenizer, first)
    count = max(1, PIECE // len(tokens))
    block = Stretch(np.tile(tokens, count), np.arange(1, count + 1, dtype=np.int64) * len(tokens))

    def stretches() -> Iterator[Stretch]:
        yield Stretch(opening, np.array([len(opening)], dtype=np.int64))
        while True:
            yield block

    return stretches


def made(tokenizer: Tokenizer, sentence: Callable[[Random], str], seed: Sequence[int]) -> Filler:
    """Sentences that a function makes from random numbers, one after another."""

    def stretches() -> Iterator[Stretch]:
        random = Random(repr(tuple(seed)))
        while True:
            block = stretch(tokenizer, [sentence(random) for _ in range(MADE_AT_ONCE)])
            assert block is not None, "a made sentence is not empty"
            yield block

    return stretches
