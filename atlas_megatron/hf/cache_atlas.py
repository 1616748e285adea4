"""The cache of `generate`, which is the memory: what every layer carries over a cut, and how it is kept in a file.

Its size does not depend on the length read, but for full attention and the exponential kernels.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .configuration_atlas import AtlasConfig, differences
from .place_atlas import Position
from .registry_atlas import MIXERS

FORMAT = "atlas-memory"
# What tells the weights of a model from others of its shape: `AtlasPreTrainedModel.weights_print`.
PrintOf = Callable[[], str]


class AtlasCache:
    """Of every layer its state, batch first; and how many tokens it has read.

    position: tokens of the text, 64 bits: of all rows, or [B] where padding on the left made them differ.
    """

    # What `generate` asks of a cache.
    is_compileable = False
    is_croppable = False

    def __init__(self, config: AtlasConfig) -> None:
        self.config = config
        self.states: list[Any] = [None] * len(config.pattern)
        self.position: Position = 0
        self.columns = 0
        self.begun = True  # every row has text, and no column that follows is padding
        self.model: PrintOf | None = None  # the print of the weights that read; None: nothing was read yet

    @property
    def rows(self) -> int | None:
        """Of the batch; None: nothing was read yet."""
        return next((t.shape[0] for state in self.states for t in tensors_of(state)), None)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch read since the cache was made, or loaded: what `generate` need not read again."""
        return self.columns

    def reset(self) -> None:
        """Forget all that was read."""
        self.states, self.position, self.columns, self.begun = [None] * len(self.states), 0, 0, True

    def advance(self, states: list[Any], position: Position, columns: int, begun: bool = True) -> None:
        """Take over what the layers leave after so many more columns."""
        self.begun = begun
        self.states, self.position = states, position
        self.columns += columns

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self._map(lambda t: t.index_select(0, rows.to(t.device)))

    # The names by which `generate` asks for it.
    reorder_cache = batch_select_indices = select

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, next to each other."""
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def crop(self, *_: Any) -> None:
        raise ValueError("a memory cannot be cropped: what it has learned from later tokens is in its weights")

    def __deepcopy__(self, memo: dict[int, Any]) -> AtlasCache:
        """A memory of its own, so that one prompt can be continued twice; within the graph, where there is one."""
        kept = copy.copy(self)
        kept._map(torch.Tensor.clone)
        return kept

    def detach(self) -> AtlasCache:
        """The same memory without the graph that made it: gradients of what reads on from it end here."""
        kept = copy.copy(self)
        kept._map(torch.Tensor.detach)
        return kept

    def to(self, device: torch.device | str) -> AtlasCache:
        """Move it, in place."""
        self._map(lambda t: t.to(device))
        return self

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.states = [mapped(state, fn) for state in self.states]
        self.position = mapped(self.position, fn)

    def save_memory(self, path: str | Path) -> None:
        """Write it all to one safetensors file, with a description of the model that it belongs to."""
        tensors: dict[str, Tensor] = {}
        layers = [_described(state, f"layers.{number}", tensors) for number, state in enumerate(self.states)]
        memory = {"layers": layers, "position": _described(self.position, "position", tensors)}
        described = {"format": FORMAT, "memory": json.dumps(memory), "model": json.dumps(self.config.sections())}
        described |= {"sha256": _digest(tensors)} | ({"weights": self.model()} if self.model is not None else {})
        save_file(tensors, str(path), described)

    @classmethod
    def load_memory(
        cls,
        path: str | Path,
        config: AtlasConfig,
        device: torch.device | str = "cpu",
        weights: str | None = None,
    ) -> AtlasCache:
        """What `save_memory` wrote. Raises ValueError where the file is none, damaged, or of another model.

        weights: the print of the model's; None: any of this configuration. `generate` then takes its input_ids as the
        continuation of what the memory has read.
        """
        cache = cls(config)
        try:
            with safe_open(str(path), "pt", device=str(device)) as file:
                said = file.metadata() or {}
                if said.get("format") != FORMAT:
                    raise ValueError(f"{path} holds no memory; give a file that save_memory wrote")
                _check_model(path, said, config, weights)
                memory = json.loads(said["memory"])
                if len(memory["layers"]) != len(config.pattern):
                    raise ValueError(f"{path} has {len(memory['layers'])} layers, the model {len(config.pattern)}")
                # Files from before digests were written have none.
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
                if "sha256" in said and said["sha256"] != _digest(tensors):
                    raise ValueError(f"{path} is damaged: its tensors are not those that were written; give a copy")
                cache.states = [_restored(state, file.get_tensor) for state in memory["layers"]]
                cache.position = _restored(memory["position"], file.get_tensor)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}; give a file that save_memory wrote") from error
        except (LookupError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); give a file that save_memory wrote") from error
        return cache


def _check_model(path: str | Path, said: dict[str, str], config: AtlasConfig, weights: str | None) -> None:
    """Raise ValueError where what a file says of its model is another one."""
    found = differences(config.sections(), json.loads(said["model"]))
    if found:
        raise ValueError(f"{path} is the memory of another model: {'; '.join(found)}; load it into its own")
    if weights is not None and said.get("weights", weights) != weights:
        raise ValueError(
            f"{path} is the memory of another model: of this shape, with other weights; load it into its own, or read "
            "the text again"
        )


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors with their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of a state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_of(part)
    elif is_dataclass(value):
        for f in fields(value):
            yield from tensors_of(getattr(value, f.name))


def mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A state with `fn` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple):
        return tuple(mapped(part, fn) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: mapped(getattr(value, f.name), fn) for f in fields(value)})
    return value


def _described(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A state in JSON, its tensors by name; these go to `tensors`."""
    if isinstance(value, Tensor):
        # A copy: a file cannot hold two names for one storage.
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, tuple):
        return [_described(part, f"{name}.{place}", tensors) for place, part in enumerate(value)]
    if is_dataclass(value):
        parts = {f.name: _described(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in fields(value)}
        return {"state": type(value).__name__, "fields": parts}
    return value


def _restored(described: Any, tensor: Callable[[str], Tensor]) -> Any:
    if isinstance(described, list):
        return tuple(_restored(part, tensor) for part in described)
    if not isinstance(described, dict):
        return described
    if "tensor" in described:
        return tensor(described["tensor"])
    # Nothing else that a file may name.
    states = {kind.__name__: kind for mixer in MIXERS.values() for kind in mixer.states}
    return states[described["state"]](**{n: _restored(part, tensor) for n, part in described["fields"].items()})
