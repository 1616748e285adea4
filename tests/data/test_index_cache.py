"""Megatron's sample indices: what a killed or damaged one left is built again, and nothing in it is unpickled."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest

from atlas_megatron.config import Config, load
from atlas_megatron.data import index_cache
from atlas_megatron.data.batches import INDEX_HEADER, INDEX_MAGIC, build_datasets, inspect
from tests.support import tiny_run

RAN: list[str] = []


class KilledError(Exception):
    pass


class Payload:
    def __reduce__(self) -> Any:
        return RAN.append, ("ran",)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(tiny_run.write(tmp_path, "M-"))


def first_sample(config: Config) -> list[int]:
    train, _ = build_datasets(config, 8, 0)
    return train[0]["tokens"].tolist()


def indices(config: Config) -> list[Path]:
    return sorted(Path(config.run.directory, "index").glob("*/*.npy"))


@pytest.mark.parametrize("share", [0.0, 0.6])
@pytest.mark.parametrize("part", ["document_index", "sample_index", "shuffle_index"])
def test_an_index_that_was_being_written_is_built_again(
    config: Config, monkeypatch: pytest.MonkeyPatch, part: str, share: float
) -> None:
    save = numpy.save

    def torn(path: str, array: numpy.ndarray, **options: Any) -> None:
        if part not in str(path):
            save(path, array, **options)
            return
        whole = io.BytesIO()
        save(whole, array, **options)
        Path(path).write_bytes(whole.getvalue()[: int(len(whole.getvalue()) * share)])
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(numpy, "save", torn)
        first_sample(config)
    built = first_sample(config)
    assert len(indices(config)) == 3
    times = [file.stat().st_mtime_ns for file in indices(config)]
    # A whole one is kept, and not built at every start.
    assert first_sample(config) == built
    assert [file.stat().st_mtime_ns for file in indices(config)] == times


@pytest.mark.parametrize("damage", ["flipped", "zeros", "marker", "payload"])
def test_a_damaged_index_is_built_again(config: Config, damage: str) -> None:
    built = first_sample(config)
    file = indices(config)[-1]
    raw = bytearray(file.read_bytes())
    if damage == "flipped":
        raw[-1] ^= 1
    elif damage == "zeros":
        raw[:] = bytes(len(raw))
    elif damage == "marker":
        (file.parent / index_cache.MARKER).write_text('{"files"')
    else:
        raw[:] = pickle.dumps(Payload())
    file.write_bytes(raw)
    if damage == "payload":
        index_cache.integrity.mark(file.parent, {}, {}, index_cache.MARKER)
    assert first_sample(config) == built
    assert not RAN


@pytest.mark.parametrize(("sequences", "borders"), [(1 << 60, 1), (1, 1 << 60), (1 << 63, 1 << 63)])
def test_an_index_that_claims_more_than_it_holds_is_refused_with_sizes(
    config: Config, sequences: int, borders: int
) -> None:
    prefix = config.data.train[0]
    Path(f"{prefix}.idx").write_bytes(INDEX_HEADER.pack(INDEX_MAGIC, 1, 4, sequences, borders) + bytes(64))
    with pytest.raises(ValueError, match=rf"has 98 bytes and says that it lists {sequences:,} sequences"):
        inspect(prefix, config.model.vocab_size)


def test_ids_below_zero_and_sequences_that_begin_elsewhere_are_refused(config: Config) -> None:
    prefix = config.data.train[0]
    Path(f"{prefix}.bin").write_bytes(struct.pack("<4i", 1, 2, -3, 4))
    lengths, borders = struct.pack("<i", 4), struct.pack("<2q", 0, 1)
    for start, said in ((0, "holds token -3, and ids begin at 0"), (1 << 40, "truncated or not a Megatron index")):
        header = INDEX_HEADER.pack(INDEX_MAGIC, 1, 4, 1, 2)
        Path(f"{prefix}.idx").write_bytes(header + lengths + struct.pack("<q", start) + borders)
        with pytest.raises(ValueError, match=said):
            inspect(prefix, config.model.vocab_size)
