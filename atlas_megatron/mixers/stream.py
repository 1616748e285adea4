"""What layers carry over the cuts of a sequence that is read piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


class StreamContext:
    """One state for each layer that has one, by layer number; passed to the model as `inference_context`.

    forward(a, context), then forward(b, context), gives what forward(a + b) gives, at any cut. A fresh context
    begins a sequence. Nothing is detached: without no_grad, gradients flow back over the cuts. Under context
    parallelism a and b are this rank's shards of them, and the states stay in that layout.
    """

    def __init__(self) -> None:
        self.states: dict[int, Any] = {}

    def is_static_batching(self) -> bool:
        """Core asks, to prepare its own caches; ours need none of it."""
        return False

    def is_dynamic_batching(self) -> bool:
        """As above: a stream is a whole batch that advances together."""
        return False


def mapped(state: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The states of a stream (nested dicts, tuples and dataclasses) with `fn` applied to every tensor in them."""
    if isinstance(state, Tensor):
        return fn(state)
    if isinstance(state, dict):
        return {name: mapped(part, fn) for name, part in state.items()}
    if isinstance(state, tuple):
        return tuple(mapped(part, fn) for part in state)
    if is_dataclass(state) and not isinstance(state, type):
        return type(state)(**{f.name: mapped(getattr(state, f.name), fn) for f in fields(state)})
    return state
