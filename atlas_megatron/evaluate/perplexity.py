"""What context is worth: the loss of the same tokens after more and more of the text before them, and along a reading.

Each of several places of a text is a target of TARGET tokens. After `context` tokens read through the state, the
target's tokens are predicted; so every length of context is judged on the same tokens. Along the longest reading the
loss of the tokens that are read is kept besides, by position: there, unlike above, each position has tokens of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from atlas_megatron.config import Config
from atlas_megatron.data.batches import blend, inspect
from atlas_megatron.data.corpus import documents, fingerprint
from atlas_megatron.data.pieces import pieces
from atlas_megatron.data.records import holds_records
from atlas_megatron.data.text_files import opened_text
from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.reading import SEGMENT, PeakMemory, check_room, segments, watched
from atlas_megatron.inference.reader import Reader
from atlas_megatron.reports.results import Cell

TARGET = 128  # tokens
BINS_PER_OCTAVE = 2  # of positions


@dataclass(frozen=True)
class Text:
    """A text in tokens: an int array that may lie on the disk. name: where it is from; fingerprint: of its files."""

    name: str
    tokens: np.ndarray
    fingerprint: str = ""


def of_validation(config: Config, tokenizer: Tokenizer) -> Text:
    """The first of a run's validation sets, which must name one."""
    return indexed(blend(config.data.validation)[0][1], tokenizer)


def indexed(prefix: str, tokenizer: Tokenizer) -> Text:
    """All documents of a Megatron .bin/.idx pair, one after the other, as they lie on the disk.

    Raises ValueError where it is not whole, or has tokens that the tokenizer does not know.
    """
    inspect(prefix, tokenizer.vocab_size)
    dtype = IndexedDataset(prefix).index.dtype
    files = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
    return Text(prefix, np.memmap(files[0], dtype=dtype, mode="r"), fingerprint(files, ""))


def from_file(path: Path, tokenizer: Tokenizer, most: int) -> Text:
    """The first `most` tokens of a text file, or of the documents under "text" in JSON or Parquet, each with its end.

    All may be compressed. Raises ValueError where it is not UTF-8, or not of that form.
    """
    found: list[int] = []
    for part in _documents(path, tokenizer) if holds_records(path) else _plain(path, tokenizer):
        found += part
        if len(found) >= most:
            break
    return Text(str(path), np.array(found[:most], np.int32), fingerprint([path], ""))


def _plain(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    try:
        with opened_text(path) as file:
            for piece in pieces(file, tokenizer.encode):
                yield tokenizer.encode(piece)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); convert it or give another") from error


def _documents(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    for document in documents(path, "text"):
        with document.opened() as source:
            for piece in pieces(source, tokenizer.encode):
                yield tokenizer.encode(piece)
        yield [tokenizer.eod]


def places(text: Text, longest: int, count: int) -> list[int]:
    """Where `count` targets begin, spread over the text, each with the longest context and one token before it.

    Raises ValueError where the text is too short for one.
    """
    first, last = longest + 1, len(text.tokens) - TARGET
    if last < first:
        raise ValueError(
            f"{text.name} holds {len(text.tokens):,} tokens; a context of {longest:,} needs {first + TARGET:,}: "
            "give a longer text or shorter lengths"
        )
    return np.linspace(first, last, count).astype(np.int64).tolist()


def after_context(reader: Reader, text: Text, starts: Sequence[int], context: int, segment: int = SEGMENT) -> Cell:
    """The loss of the targets at `starts`, read side by side after `context` tokens each (0: after one token alone).

    mean_loss: of each target, nats per token; tokens, bytes: of all targets.
    """
    check_room(reader, context, len(starts))
    before = [_read(text, start - 1 - context, context) for start in starts]
    reader.forget()
    peak = PeakMemory(reader.device)
    for tokens in watched(f"context of {context:,}", segments(before, segment), context, len(starts), peak):
        reader.read(torch.from_numpy(tokens).to(reader.device, torch.int64), keep=1)
    rows = np.stack([text.tokens[start - 1 : start + TARGET] for start in starts]).astype(np.int64)
    own = losses_of(reader, torch.from_numpy(rows)).mean(1)
    end = reader.tokenizer.eod
    said = (reader.tokenizer.decode([token for token in row if token != end]) for row in rows[:, 1:].tolist())
    return {
        "context": context,
        "targets": len(starts),
        "mean_loss": [round(loss, 6) for loss in own.tolist()],
        "tokens": TARGET * len(starts),
        "bytes": sum(len(target.encode(errors="replace")) for target in said),
    }


def along(reader: Reader, text: Text, starts: Sequence[int], length: int, segment: int = SEGMENT) -> Cell:
    """The mean loss of the tokens that are read, in bins of positions that grow by a constant factor.

    The texts are those before the targets at `starts`, read from position 0 of the state on.
    """
    check_room(reader, length, len(starts))
    reader.forget()
    before = [_read(text, start - 1 - length, length + 1) for start in starts]
    ends = bins(length)
    sums, done = torch.zeros(len(ends), dtype=torch.float64), 0
    last: Tensor | None = None
    peak = PeakMemory(reader.device)
    for piece in watched(f"along {length:,}", segments(before, segment), length + 1, len(starts), peak):
        tokens = torch.from_numpy(piece).to(torch.int64)
        tokens, last = (tokens if last is None else torch.cat([last, tokens], 1)), tokens[:, -1:]
        if tokens.shape[1] < 2:
            continue
        losses = losses_of(reader, tokens).mean(0).double().cpu()
        position = torch.arange(done + 1, done + 1 + len(losses))
        sums.index_add_(0, torch.bucketize(position, torch.tensor(ends)), losses)
        done += len(losses)
    widths = np.diff([0, *ends])
    return {"ends": ends, "loss": [round(s / w, 6) for s, w in zip(sums.tolist(), widths.tolist(), strict=True)]}


def bins(length: int) -> list[int]:
    """Last positions of the bins over 1 to length."""
    octaves = math.log2(length)
    ends = {round(2 ** (n / BINS_PER_OCTAVE)) for n in range(math.ceil(octaves * BINS_PER_OCTAVE))}
    return sorted({end for end in ends if end < length} | {length})


def summary(cells: Sequence[Cell]) -> dict[str, float | None]:
    """Of the cells of one context: nats per token with the standard error over targets, bits per byte, perplexity."""
    losses = np.concatenate([cell["mean_loss"] for cell in cells])
    tokens, size = sum(cell["tokens"] for cell in cells), sum(cell["bytes"] for cell in cells)
    mean = float(losses.mean())
    return {
        "loss": mean,
        "error": float(losses.std(ddof=1) / len(losses) ** 0.5) if len(losses) > 1 else None,
        "bits_per_byte": mean * tokens / size / math.log(2),
        "perplexity": math.exp(mean),
    }


def _read(text: Text, start: int, length: int) -> Iterator[np.ndarray]:
    """Tokens [start, start + length) of the text, a segment at a time."""
    for place in range(start, start + length, SEGMENT):
        yield np.asarray(text.tokens[place : min(place + SEGMENT, start + length)], np.int32)


def losses_of(reader: Reader, tokens: Tensor) -> Tensor:
    """Read all tokens [B, T + 1] but the last; the loss of each of the last T, in nats [B, T]."""
    tokens = tokens.to(reader.device)
    logits = reader.read(tokens[:, :-1])[..., : reader.tokenizer.vocab_size].float()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
