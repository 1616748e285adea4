"""A trained model that reads a text of any length piece by piece, wherever it was saved.

What it keeps of the text has a constant size, but for full attention (`F`) and the exponential kernels.
Dims: B batch, T tokens.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

from atlas_megatron.tokenizer import Tokenizer, load_tokenizer

BLOCK = 1 << 16  # characters of a file at a time
# Where a byte-level tokenizer always cuts: before a space between two words.
BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
LONGEST_UNCUT = 16 * BLOCK


class Reader(Protocol):
    """One text for each row of a batch, which all advance together."""

    tokenizer: Tokenizer
    device: torch.device

    def read(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] of the next T tokens [B, T] int64 of each text."""

    def forget(self) -> None:
        """Begin new texts."""

    def mark(self) -> object:
        """Where the texts stand now, for `back`. It costs nothing: what a layer keeps is replaced, never changed."""

    def back(self, mark: Any) -> None:
        """Go on, once more or again and again, from where `mark` was taken."""


class MegatronReader:
    """The newest whole checkpoint of a run, in one process."""

    def __init__(self, run_directory: Path) -> None:
        """Raises ValueError where the run has no whole checkpoint."""
        from atlas_megatron.checkpoint import load_model
        from atlas_megatron.parallel.cpu import device

        self._model, config = load_model(run_directory)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.device = device()
        self.forget()

    def forget(self) -> None:
        from atlas_megatron.streaming import StreamContext

        self._context = StreamContext()

    def mark(self) -> object:
        return dict(self._context.states)

    def back(self, mark: Any) -> None:
        self.forget()
        self._context.states |= mark

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        from atlas_megatron import streaming

        return streaming.read(self._model, tokens, self._context)


class HuggingFaceReader:
    """An exported model in its folder."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where transformers is missing or cannot load the folder."""
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise ValueError(
                f"{folder} is a Hugging Face model, and reading it needs the transformers package; install it with: "
                "pip install -e '.[hf]' -c constraints.txt"
            ) from error
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is not a whole Hugging Face model ({str(error).splitlines()[0]})") from error
        self._model = model.to(self.device).eval()
        self.tokenizer = load_tokenizer(folder)
        self.forget()

    def forget(self) -> None:
        self._memory: Any = None

    def mark(self) -> object:
        return copy.copy(self._memory)

    def back(self, mark: Any) -> None:
        # A copy again: reading advances the cache that it is given.
        self._memory = copy.copy(mark)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        out = self._model(input_ids=tokens, past_key_values=self._memory, use_cache=True)
        self._memory = out.past_key_values
        return out.logits


def open_reader(path: str | Path) -> Reader:
    """The model in `path`: a run's directory or a folder that was exported for Hugging Face.

    Raises ValueError where it is neither.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is no folder; give the directory of a run or an exported model")
    if (folder / "config.json").is_file():
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "atlas":
            raise ValueError(f"{path} holds a model of type {kind!r}; give an exported atlas model or a run")
        return HuggingFaceReader(folder)
    return MegatronReader(folder)


def pieces(file: TextIO) -> Iterator[str]:
    """The text of a file in pieces that a byte-level tokenizer encodes as it would the whole, one after the other."""
    rest = ""
    while block := file.read(BLOCK):
        rest += block
        cuts = [match.start() for match in BETWEEN_WORDS.finditer(rest, max(0, len(rest) - BLOCK))]
        if cuts or len(rest) > LONGEST_UNCUT:
            cut = cuts[-1] if cuts else len(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


class Spoken:
    """Tokens to text as they come: what is given out never ends inside a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._said: list[int] = []  # the last token given out: some tokenizers drop the space before a first word
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._pending.append(token)
        text = self._decode(self._said + self._pending)[len(self._decode(self._said)) :]
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < 4:
            return ""
        self._said, self._pending = self._pending[-1:], []
        return text
