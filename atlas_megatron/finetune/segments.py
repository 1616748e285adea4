"""A sequence read in segments whose memory is carried over the cuts, and how far its gradients go back.

Dims: B batch, T tokens, S tokens of a segment.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

IGNORED = -100  # of a target that the loss leaves out, as transformers has it


@dataclass(frozen=True)
class Window:
    """Neighbouring segments, as a range of tokens; gradients do not leave it. learns: whether it holds a target."""

    start: int
    stop: int
    learns: bool


class SegmentReader(nn.Module):
    """A model of language with its loss on a window, one forward however many segments the window has.

    checkpointing: of a segment only its memory at the start is kept, and the backward reads it again. reach: tokens
    after which a memory's gradients end inside of a segment, counted from its start; 0: nowhere.
    """

    accepts_loss_kwargs = True  # Trainer: the loss is divided by the targets of the whole batch, here

    def __init__(self, language_model: nn.Module, segment: int, *, checkpointing: bool, reach: int = 0) -> None:
        super().__init__()
        self.language_model = language_model
        self.segment, self.checkpointing = segment, checkpointing
        layers: Any = language_model.modules()
        for layer in layers:
            if hasattr(layer, "gradient_reach"):
                # In every segment, however short its batch's rows leave it.
                layer.trained, layer.gradient_reach = 0, reach

    @property
    def config(self) -> Any:
        return self.language_model.config

    def forward(self, tokens: Tensor, targets: Tensor, memory: Any, count: Tensor) -> tuple[Tensor, Any]:
        """The sum of the losses at targets [B, T] of tokens [B, T], divided by `count`, and the memory after.

        targets: as `shifted` gives them. memory: of what was read before, None for nothing; it is left as it is.
        """
        losses = []
        for read, wanted in zip(tokens.split(self.segment, 1), targets.split(self.segment, 1), strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                # To the end of the model: ZeRO-3 lets go of a module's parameters where its forward ends.
                with set_checkpoint_early_stop(False):
                    # No state of random numbers: the model has no dropout.
                    loss, memory = checkpoint(
                        self._read, read, wanted, memory, count, use_reentrant=False, preserve_rng_state=False
                    )
            else:
                loss, memory = self._read(read, wanted, memory, count)
            losses.append(loss)
        return torch.stack(losses).sum(), memory

    def _read(self, tokens: Tensor, targets: Tensor, memory: Any, count: Tensor) -> tuple[Tensor, Any]:
        out = self.language_model(
            input_ids=tokens,
            # Given as shifted already: within a segment the model would not see what its last token predicts.
            labels=targets,
            shift_labels=targets.contiguous(),
            num_items_in_batch=count,
            # The model takes the next states into the cache that it is given; the backward needs those of now.
            past_key_values=copy.copy(memory),
            use_cache=True,
        )
        return out.loss, out.past_key_values


def shifted(labels: Tensor) -> Tensor:
    """What each token [B, T] is to predict: the label of the next one, of the last one nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def segments_with_targets(targets: Tensor, segment: int) -> Tensor:
    """Whether each segment of targets [B, T] holds one, [T / S, rounded up] bool."""
    found = (targets != IGNORED).any(0)
    padded = F.pad(found, (0, -len(found) % segment))
    return padded.unflatten(0, (-1, segment)).any(1)


def windows(wanted: list[bool], segment: int, detach_every: int) -> list[Window]:
    """The windows of a sequence, up to its last target: `detach_every` segments each, or, for 0, all in one.

    wanted: whether each segment holds a target.
    """
    count = len(wanted) - wanted[::-1].index(True)
    size = detach_every or count
    firsts = range(0, count, size)
    return [
        Window(first * segment, min(first + size, count) * segment, any(wanted[first : first + size]))
        for first in firsts
    ]


def widened(tokens: Tensor, targets: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Both [B, T], padded on the right to `length` with tokens that nobody learns from or is asked about."""
    missing = max(0, length - tokens.shape[1])
    return F.pad(tokens, (0, missing)), F.pad(targets, (0, missing), value=IGNORED)
