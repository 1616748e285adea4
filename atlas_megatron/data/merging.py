"""Shards of a preparation joined: what comes out is byte for byte what one process would have written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron.core.datasets.indexed_dataset import DType

from atlas_megatron.data.corpus import SPLITS, Summary
from atlas_megatron.data.indexed_files import Part
from atlas_megatron.data.prepare import TOKENIZER, Options, finish, input_files, look
from atlas_megatron.data.shards import Shard, shards
from atlas_megatron.data.split_writer import Advance, check_filled
from atlas_megatron.files.scratch import built_beside


def merge(
    inputs: Sequence[str], out: Path, options: Options, advance: Advance, count: int, overwrite: bool = False
) -> tuple[Summary, bool]:
    """Join `count` shards that `prepare` wrote of the same inputs with the same options; as `prepare` returns.

    The shards stay where they are. Raises ValueError naming those that are not there, or are of something else.
    """
    files = input_files(inputs)
    every = shards(count)
    given, mark, earlier = look(files, out, options, overwrite)
    if earlier is not None:
        return earlier, False
    found = [_summary(files, shard, out, options) for shard in every]
    names = SPLITS if options.validation else SPLITS[:1]
    documents = {name: sum(one.splits[name].documents for one in found) for name in names}
    check_filled(documents, options.validation)
    parts = {name: [Part(shard.folder(out) / name) for shard in every] for name in names}
    with built_beside(out) as built:
        dtype = DType.optimal_dtype(found[0].vocab_size)
        splits, left_out = finish(parts, built, dtype, options.dedup, advance)
        kept = options.tokenizer
        # Converted, it lies with each shard.
        own = every[0].folder(out) / TOKENIZER
        if own.is_dir():
            shutil.copytree(own, built / TOKENIZER)
            kept = os.fspath(out / TOKENIZER)
        skipped = sum(one.skipped for one in found)
        summary = Summary(
            mark, kept, found[0].vocab_size, splits, found[0].tokenizer_fingerprint, skipped, left_out
        )
        summary.write(built)
    return summary, True


def _summary(files: Sequence[Path], shard: Shard, out: Path, options: Options) -> Summary:
    """What a shard says of itself. Raises ValueError."""
    folder = shard.folder(out)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there; prepare it with --shard {shard.number}/{shard.count}")
    # One that was made of other inputs, or with other settings, is refused here.
    _, _, whole = look(files, folder, options, overwrite=False, shard=shard)
    if whole is None:
        raise ValueError(f"{folder} is no shard; remove it, and prepare it with --shard {shard.number}/{shard.count}")
    return whole
