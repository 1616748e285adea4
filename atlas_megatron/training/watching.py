"""What looks at the live model between two steps, and how the training stays as it is under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from megatron.core.transformer import MegatronModule

from atlas_megatron.config import Config
from atlas_megatron.parallel.random_state import kept
from atlas_megatron.training.metrics import Record


class Watcher(Protocol):
    """Reads the model as it is after a step; every process makes the same calls."""

    def is_due(self, step: int) -> bool:
        """Whether it looks after this step."""

    def after(self, step: int, config: Config, chunks: list[MegatronModule]) -> tuple[Record, list[str]]:
        """Its entries of the step's record, and lines for people.

        config: what the model trains with, which may differ from the given one where it goes on from a checkpoint.
        chunks: this process's stages.
        """


@contextmanager
def unchanged(chunks: list[MegatronModule]) -> Iterator[None]:
    """Within: the model is in evaluation mode and keeps no graph.

    Afterwards modes and random streams are what they were, so that the next step is the one that it would have been.
    """
    modes = [chunk.training for chunk in chunks]
    with kept(), torch.no_grad():
        try:
            for chunk in chunks:
                chunk.eval()
            yield
        finally:
            for chunk, mode in zip(chunks, modes, strict=True):
                chunk.train(mode)
