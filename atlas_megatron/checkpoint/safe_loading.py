"""Checkpoints, read without running what stands in them: a run's directory may come from a stranger.

torch unpickles `.metadata` and the objects of a checkpoint without limits. Here a pickle may name plain data and the
few classes that describe tensors, and anything else is refused. Megatron's format stays as it is.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.safe_globals import SafeUnpickler
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

METADATA = ".metadata"
# What a description of tensors is made of, by module and name. Types of numbers (torch.float32) come besides.
DESCRIBING = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
}
# What a damaged pickle, or one that does not describe what we ask for, raises where it is read.
UNREADABLE = (
    *(AssertionError, AttributeError, EOFError, ImportError, IndexError, KeyError, OverflowError, RecursionError),
    *(RuntimeError, TypeError, ValueError, MemoryError, pickle.UnpicklingError),
    *(CheckpointException, CheckpointingException),
)


class PlainUnpickler(pickle.Unpickler):
    """Reads the names in DESCRIBING and nothing else. Raises UnpicklingError for another."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in DESCRIBING or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}, which no checkpoint of ours holds")


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint says of its tensors. Raises ValueError where `.metadata` is damaged, or would run code."""
    with _explained(folder):
        return FileSystemReader(str(folder)).read_metadata()


def load_common(folder: Path) -> dict[str, Any]:
    """The plain values of a checkpoint (step, schedule, layout). Raises as `load_sharded` does."""
    with _explained(folder):
        return dist_checkpointing.load_common_state_dict(str(folder))


def load_sharded(
    state: dict[str, Any], folder: Path, strict: StrictHandling = StrictHandling.ASSUME_OK_UNEXPECTED
) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint; every process calls it.

    Raises ValueError, naming the checkpoint, where it lacks something, is damaged, or would run code.
    """
    with _explained(folder):
        loaded = dist_checkpointing.load(state, str(folder), strict=strict)
        _check_extra_states(loaded)
        return loaded


def load_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Fill whole tensors by their names, in one process. Raises as `load_sharded` does."""
    with _explained(folder):
        torch.distributed.checkpoint.load(tensors, storage_reader=FileSystemReader(str(folder)), no_dist=True)


@contextmanager
def running_nothing() -> Iterator[None]:
    """Within: torch's readers of checkpoints take plain data alone."""
    with (
        patch.object(FileSystemReader, "read_metadata", _plain_metadata),
        patch.object(DefaultLoadPlanner, "load_bytes", _load_bytes),
        # Through it a pickled tensor brings a second pickle.
        patch.object(torch.storage, "_load_from_bytes", _storage_from_bytes),
    ):
        yield


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Within: as `running_nothing`, and what cannot be read is one ValueError that names the checkpoint."""
    try:
        with running_nothing():
            # Here, for torch would go on without one that cannot be read.
            FileSystemReader(str(folder)).read_metadata()
            yield
    except UNREADABLE as error:
        cause = _innermost(error)
        # Neither memory nor a disk that fails says anything of the checkpoint.
        if isinstance(cause, OSError | MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(cause):
            raise cause from error
        said = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise ValueError(
            f"checkpoint {folder} cannot be read: {said}; take another one, or restore its files"
        ) from error


def _innermost(error: BaseException) -> BaseException:
    """The first of the processes' errors, where torch has collected them."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error


def _plain_metadata(self: FileSystemReader, *args: Any, **given: Any) -> Metadata:
    """Stands for FileSystemReader.read_metadata; what it says of the files beside it is checked as well."""
    path = Path(self._get_metadata_path(given.get("rank")))
    raw = path.read_bytes()
    try:
        metadata = PlainUnpickler(io.BytesIO(raw)).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds a {type(metadata).__name__}")
        _check_places(metadata, path.parent)
    except UNREADABLE as error:
        raise ValueError(f"{path} is no description of a checkpoint: {error}") from error
    metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _check_places(metadata: Metadata, folder: Path) -> None:
    """Raise ValueError where a part lies outside of the folder's files, or a tensor is larger than what is stored."""
    sizes: dict[str, int] = {}
    stored: dict[str, int] = {}
    for index, info in (metadata.storage_data or {}).items():
        name = info.relative_path
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index.fqn} is said to lie at {name!r}, not beside it")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} is stored in the form {info.transform_descriptors}, which is not read")
        if name not in sizes:
            sizes[name] = (folder / name).stat().st_size
        if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes[name]:
            raise ValueError(
                f"{index.fqn} is said to be bytes {info.offset:,} to {info.offset + info.length:,} of {name}, which "
                f"has {sizes[name]:,}"
            )
        stored[index.fqn] = stored.get(index.fqn, 0) + info.length
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            claimed = prod(entry.size) * entry.properties.dtype.itemsize
            if claimed > stored.get(name, 0):
                raise ValueError(f"{name} is said to be {claimed:,} bytes, and {stored.get(name, 0):,} are stored")


def _load_bytes(self: DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
    """Stands for DefaultLoadPlanner.load_bytes, which Megatron's planner inherits: the same, of plain data."""
    name = read_item.dest_index.fqn
    try:
        loaded = torch.load(value, weights_only=True)
    except UNREADABLE as error:
        # torch's message goes on with how to switch this off.
        said = str(error).partition("WeightsUnpickler error: ")[2].splitlines() or str(error).splitlines() or [""]
        raise ValueError(f"its object {name} is damaged, or would run code: {said[0]}") from error
    if self.flatten_state_dict:
        torch.distributed.checkpoint.default_planner.set_element(
            self.original_state_dict, self.mappings[name], loaded
        )
    else:
        self.state_dict[name] = loaded


def _storage_from_bytes(raw: bytes) -> Any:
    return torch.load(io.BytesIO(raw), weights_only=True)


def _check_extra_states(state: Any) -> None:
    """Transformer Engine unpickles the FP8 state of a linear from a tensor of bytes: raise UnpicklingError where that
    would run code."""
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, Mapping):
            _check_extra_states(value)
        elif str(name).endswith("_extra_state") and isinstance(value, torch.Tensor) and value.numel():
            # Where Transformer Engine is not installed, nothing will unpickle it.
            with suppress(ImportError):
                SafeUnpickler(io.BytesIO(value.detach().cpu().numpy().tobytes())).load()
