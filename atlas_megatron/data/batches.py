"""Training data: Megatron indexed datasets, checked before use, read as resumable batches."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from atlas_megatron.config import Config
from atlas_megatron.data import index_cache
from atlas_megatron.data.corpus import Summary
from atlas_megatron.data.indexed_files import INDEX_HEADER, INDEX_MAGIC
from atlas_megatron.data.order import TrainingOrder
from atlas_megatron.data.prefixes import blend
from atlas_megatron.data.tokenizer import Tokenizer, load_tokenizer
from atlas_megatron.parallel.device import device

type SampleSet = GPTDataset | BlendedDataset | TrainingOrder
type Batch = dict[str, Tensor]
VALIDATION_SEED = 1234
FIELDS = ("tokens", "labels", "loss_mask", "position_ids")

# Token ids are checked against the vocabulary in full up to this much of a .bin, in evenly spaced
# windows beyond it: a terabyte is not read before the first step.
SCANNED_BYTES = 64 << 20
SCAN_WINDOWS = 64


@dataclass(frozen=True)
class Source:
    """One checked .bin/.idx pair of a blend."""

    prefix: str
    tokens: int
    weight: float


def build_datasets(
    config: Config, train_samples: int, validation_samples: int
) -> tuple[TrainingOrder, SampleSet | None]:
    """Build the train and validation sets through Megatron-Core; call it on every rank.

    Sequences hold `model.seq_length` tokens and one more for the last label. The sets repeat their
    sources as often as the samples asked for need; the training set's order is the same for any number of them.
    No validation set or samples: None in its place.
    Every rank builds both, so that all ranks of a tensor or pipeline group see one batch.
    Raises ValueError for data that cannot be trained on, on every rank alike and before any
    collective call.
    """
    if not config.data.train:
        raise ValueError("data.train is empty; give the prefix of a .bin/.idx pair, as tools/prepare_data.py writes it")
    return _build(config, sources(config, config.data.train), train_samples, validation_samples)


def _build(
    config: Config, train: tuple[Source, ...], train_samples: int, validation_samples: int
) -> tuple[TrainingOrder, SampleSet | None]:
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_tokenizer(config, tokenizer)
    validation = sources(config, config.data.validation) if validation_samples else ()
    if not config.data.allow_change:
        for source in train + validation:
            check_tokenizer_of(source.prefix, tokenizer)

    cache = _index_cache(config, train + validation)

    def built(split: int, drawn: tuple[Source, ...], samples: int | None, seed: int) -> Any:
        prefixes = [source.prefix for source in drawn]
        blended = (prefixes, [source.weight for source in drawn] if samples else None)
        options = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=config.model.seq_length,
            blend_per_split=[blended if place == split else None for place in range(3)],
            path_to_cache=str(cache),
            tokenizer=tokenizer,
            reset_position_ids=config.data.packed,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        counts = [samples if place == split else None for place in range(3)]
        return BlendedMegatronDatasetBuilder(GPTDataset, counts, lambda: True, options).build()[split]

    with index_cache.kept_whole(cache):
        # One pass over each: how they repeat and blend does not hang on the number of samples.
        passes = [built(0, (source,), None, config.run.seed) for source in train]
        order = TrainingOrder(passes, [source.weight for source in train], config.run.seed, train_samples)
        # Validation of one seed, whatever the run's: losses of several seeds are of the same windows.
        return order, built(1, validation, validation_samples, VALIDATION_SEED) if validation else None


def check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Raise ValueError where the model's embedding has fewer rows than the tokenizer has tokens."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens but model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size={tokenizer.vocab_size} or more"
        )


def check_tokenizer_of(prefix: str, tokenizer: Tokenizer) -> None:
    """Raise ValueError where the data.json beside a set names another tokenizer than the run's."""
    summary = Summary.read(Path(prefix).parent)
    if summary is None or Path(prefix).name not in summary.splits:
        return
    made_with, told = _fingerprint_of(summary, Path(prefix).parent), tokenizer.fingerprint
    # Of a tokenizer that is gone its size is left.
    if made_with == told or (not made_with and summary.vocab_size == tokenizer.vocab_size):
        return
    raise ValueError(
        f"{prefix} was made with another tokenizer ({summary.tokenizer}, {summary.vocab_size} tokens) than "
        f"data.tokenizer={tokenizer.folder} ({tokenizer.vocab_size} tokens); set data.tokenizer to that one, prepare "
        "the data with this one, or set data.allow_change=true to train all the same"
    )


def _fingerprint_of(summary: Summary, folder: Path) -> str:
    """Of the tokenizer that a folder of data was made with; empty where neither it nor its files are known."""
    if summary.tokenizer_fingerprint:
        return summary.tokenizer_fingerprint
    # One that was trained on the data lies beside them, wherever they are by now.
    own = folder / "tokenizer"
    named = own if own.is_dir() and Path(summary.tokenizer).name == "tokenizer" else Path(summary.tokenizer)
    return load_tokenizer(named).fingerprint if named.is_dir() else ""


def validation_sequences(config: Config) -> list[list[int]]:
    """The token ids of each sequence that a validation of the run reads, with its last label; call it on every rank.

    Raises ValueError for data that cannot be read.
    """
    count = config.train.validate_sequences if config.data.validation else 0
    if count == 0:
        return []
    _, validation = _build(config, (), 0, count)
    assert validation is not None  # `count` samples were asked for
    samples = (validation[number] for number in range(count))
    return [[int(sample["tokens"][0]), *sample["labels"].tolist()] for sample in samples]


def validation_labels(config: Config) -> list[list[int]]:
    """The token ids that each validation of the run predicts, a list a sequence; call it on every rank."""
    return [sequence[1:] for sequence in validation_sequences(config)]


def text_of(labels: list[list[int]], tokenizer: Tokenizer) -> bytes:
    """The text behind sequences of token ids, end-of-document tokens left out."""
    texts = (tokenizer.decode([token for token in row if token != tokenizer.eod]) for row in labels)
    return "".join(texts).encode(errors="replace")


def bytes_per_token(config: Config) -> float | None:
    """Bytes of text behind a token of the validation sequences; None without validation. Call it on every rank.

    Bits per byte = nats per token / ln 2 / bytes per token: of the very sequences that the loss is of.
    """
    labels = validation_labels(config)
    if not labels:
        return None
    return len(text_of(labels, load_tokenizer(config.data.tokenizer))) / sum(map(len, labels))


def trained_bytes_per_token(config: Config) -> float | None:
    """Bytes of text behind a token of the training data, as their data.json say; None where one does not."""
    counted = []
    for weight, prefix in blend(config.data.train):
        summary = Summary.read(Path(prefix).parent)
        split = summary.splits.get(Path(prefix).name) if summary else None
        if split is None or not split.tokens:
            return None
        counted.append((split.tokens if weight is None else weight, split.bytes / split.tokens))
    whole = sum(weight for weight, _ in counted)
    return sum(weight * each for weight, each in counted) / whole if whole else None


def inspect(prefix: str, vocab_size: int) -> int:
    """Check one .bin/.idx pair against itself and the vocabulary; return its tokens.

    Raises ValueError that names the file, what is wrong with it and what to do.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file in (index, data):
        if not file.is_file():
            raise ValueError(f"{file} does not exist; prepare the data (tools/prepare_data.py) or correct the prefix")
    dtype, lengths = _read_index(index)
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens == 0:
        raise ValueError(f"{data} holds no tokens; prepare it again from text that is not empty")
    if data.stat().st_size != tokens * dtype.itemsize:
        raise ValueError(
            f"{data} has {data.stat().st_size} bytes but its index says {tokens * dtype.itemsize}: "
            "it is truncated or belongs to another index; prepare it again"
        )
    smallest, largest = _range_of_tokens(np.memmap(data, dtype=dtype, mode="r"))
    if smallest < 0:
        raise ValueError(f"{data} holds token {smallest}, and ids begin at 0; prepare it again")
    if largest >= vocab_size:
        raise ValueError(
            f"{data} holds token {largest} but model.vocab_size is {vocab_size}; "
            f"set model.vocab_size={largest + 1} or more, or prepare the data with the model's tokenizer"
        )
    return tokens


def _read_index(index: Path) -> tuple[np.dtype, np.ndarray]:
    """The token dtype and the sequence lengths of an .idx file, every field of it checked."""
    again = "prepare the data again"
    broken = f"{index} is truncated or not a Megatron index; {again}"
    raw = index.read_bytes() if index.stat().st_size < INDEX_HEADER.size else np.memmap(index, dtype=np.uint8, mode="r")
    if len(raw) < INDEX_HEADER.size:
        raise ValueError(broken)
    magic, version, code, sequences, borders = INDEX_HEADER.unpack(bytes(raw[: INDEX_HEADER.size]))
    whole = INDEX_HEADER.size + 12 * sequences + 8 * borders
    if magic != INDEX_MAGIC or version != 1 or code not in {kind.value for kind in DType}:
        raise ValueError(broken)
    if len(raw) != whole:
        raise ValueError(
            f"{index} is truncated or not a Megatron index: it has {len(raw):,} bytes and says that it lists "
            f"{sequences:,} sequences and {borders:,} borders of documents, which take {whole:,}; {again}"
        )
    dtype = np.dtype(DType.dtype_from_code(code))
    lengths = np.frombuffer(raw, np.int32, sequences, INDEX_HEADER.size)
    offsets = np.frombuffer(raw, np.int64, sequences, INDEX_HEADER.size + 4 * sequences)
    documents = np.frombuffer(raw, np.int64, borders, INDEX_HEADER.size + 12 * sequences)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    consistent = (
        dtype.kind in "iu"
        and bool(np.all(lengths >= 0))
        and bool(np.all(offsets[:1] == 0))
        and np.array_equal(offsets[1:], ends[:-1])
        and bool(np.all(np.diff(documents) >= 0))
        and borders > 0
        and documents[0] == 0
        and documents[-1] == sequences
    )
    if not consistent:
        raise ValueError(broken)
    return dtype, lengths


def _range_of_tokens(tokens: np.ndarray) -> tuple[int, int]:
    """The smallest and the largest id of a .bin, or of evenly spaced windows of a large one."""
    scanned = SCANNED_BYTES // tokens.itemsize
    if len(tokens) <= scanned:
        return int(tokens.min()), int(tokens.max())
    window = scanned // SCAN_WINDOWS
    starts = np.linspace(0, len(tokens) - window, SCAN_WINDOWS).astype(np.int64)
    windows = [tokens[start : start + window] for start in starts]
    return min(int(part.min()) for part in windows), max(int(part.max()) for part in windows)


def sources(config: Config, words: tuple[str, ...]) -> tuple[Source, ...]:
    """The checked sets of a blend; a blend without weights is drawn in proportion to tokens."""
    checked = []
    for weight, prefix in blend(words):
        tokens = inspect(prefix, config.model.vocab_size)
        if tokens < config.model.seq_length + 1:
            raise ValueError(
                f"{prefix}.bin holds {tokens} tokens, fewer than one sequence of "
                f"model.seq_length={config.model.seq_length} and its last label; "
                f"give more text or set model.seq_length={tokens - 1} or less"
            )
        checked.append(Source(prefix, tokens, float(tokens) if weight is None else weight))
    return tuple(checked)


def _index_cache(config: Config, drawn: tuple[Source, ...]) -> Path:
    """The folder of Megatron's sample indices for exactly these files.

    Megatron keys its cache on paths; data prepared again under the same path would meet a stale index.
    """
    identity = hashlib.sha256()
    for source in drawn:
        for file in (f"{source.prefix}.idx", f"{source.prefix}.bin"):
            stat = os.stat(file)
            identity.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return Path(config.run.directory) / "index" / identity.hexdigest()[:16]


def micro_batches(config: Config, sequences: int) -> int:
    """How many micro-batches one replica runs of `sequences` sequences; `validate` has seen that it divides."""
    return sequences // (config.train.micro_batch * parallel_state.get_data_parallel_world_size())


class Batches(Iterator[Batch]):
    """This data-parallel rank's micro-batches of a set, in the set's order, from any sample on.

    The position is `consumed_samples`, counted over all ranks: rank r of R takes samples
    ``[n + r m, n + (r + 1) m)`` of each ``R m`` (m = train.micro_batch). So a resumed run, also
    one with another number of ranks, goes on at the very next sample. What is left at the end of
    the set and fills no micro-batch on every rank is not read. endless: a TrainingOrder is read on behind its length.
    Context-parallel ranks each take their shard of every sequence.
    Yields int64 ``tokens``, ``labels``, ``position_ids`` and float32 ``loss_mask``, each
    ``[micro_batch, tokens of a shard]``, and ``counted``, a micro-batch's sum of the whole loss mask, on this rank's
    device.
    """

    def __init__(self, dataset: SampleSet, config: Config, consumed_samples: int = 0, *, endless: bool = False) -> None:
        ranks, rank, self._shards, self._shard = 1, 0, 1, 0
        if parallel_state.model_parallel_is_initialized():
            ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
            self._shards = parallel_state.get_context_parallel_world_size()
            self._shard = parallel_state.get_context_parallel_rank()
        micro_batch = config.train.micro_batch
        self.consumed_samples = consumed_samples
        self._samples_per_batch = micro_batch * ranks
        left = range(consumed_samples, len(dataset) - self._samples_per_batch + 1, self._samples_per_batch)
        starts: Iterable[int] = itertools.count(consumed_samples, self._samples_per_batch) if endless else left
        own = ([start + rank * micro_batch + n for n in range(micro_batch)] for start in starts)
        self._device = device()
        self._left = len(left)
        self._batches = iter(
            DataLoader(
                dataset,
                batch_sampler=own,
                collate_fn=_collate,
                num_workers=config.data.workers,
                pin_memory=self._device.type == "cuda",
                # Its own: a loader draws a seed, and from torch's generator that draw would set a
                # resumed run apart from one that never stopped.
                generator=torch.Generator().manual_seed(config.run.seed),
            )
        )

    def __len__(self) -> int:
        """Micro-batches that are left of a set that ends."""
        return self._left

    def __next__(self) -> Batch:
        whole = next(self._batches)
        self._left -= 1
        self.consumed_samples += self._samples_per_batch
        batch = {name: tensor.chunk(self._shards, 1)[self._shard] for name, tensor in whole.items()}
        batch["counted"] = whole["loss_mask"].sum()
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}


def _collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    # A blend adds the number of the set a sample came from, which the model does not take.
    return default_collate([{name: sample[name] for name in FIELDS} for sample in samples])
