"""Validation loss against position in the context, on the same tokens at every position."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor
from torch.utils.data import Dataset

from atlas_megatron.config import Config
from atlas_megatron.data.batches import blend
from atlas_megatron.data.tokenizer import load_tokenizer

STRIDES = 8  # windows that see one token: at so many places along the context


class SlidingWindows(Dataset):
    """Windows of one text, each a stride after the last; their loss masks keep the tokens that all strides show.

    Loss by position over ordinary sequences compares different tokens at each position, and their difference hides
    what context is worth. Here every token of the mask stands once in each eighth of the context, so a mean over any
    `stride` positions is a mean over the same tokens.
    """

    def __init__(self, config: Config, windows: int, multiple: int = 1) -> None:
        """At most `windows` of them over the first validation set, as many multiples of `multiple` as its text gives.

        Samples are as Megatron's GPTDataset has them.
        """
        self.length = config.model.seq_length
        self.stride = max(1, self.length // STRIDES)
        self.eod = load_tokenizer(config.data.tokenizer).eod if config.data.packed else None
        _, prefix = blend(config.data.validation)[0]
        data = IndexedDataset(prefix)
        wanted = self.length + (windows - 1) * self.stride + 1
        parts: list[np.ndarray] = []
        for document in data:
            if sum(map(len, parts)) >= wanted:
                break
            parts.append(document)
        self.text = torch.from_numpy(np.concatenate(parts).astype(np.int64)[:wanted])
        available = max(0, (len(self.text) - 1 - self.length) // self.stride + 1)
        self.windows = available - available % multiple

    def _positions(self, tokens: Tensor) -> Tensor:
        place = torch.arange(self.length)
        if self.eod is None:
            return place
        # As Megatron counts: a document begins after the token that ends the one before.
        begins = torch.cat([torch.zeros(1, dtype=torch.bool), tokens[:-1] == self.eod])
        return place - torch.where(begins, place, 0).cummax(0).values

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        start = number * self.stride
        tokens = self.text[start : start + self.length + 1]
        place = start + torch.arange(self.length)
        seen_by_all = (place >= self.length - self.stride) & (place < self.windows * self.stride)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": seen_by_all.float(),
            "position_ids": self._positions(tokens[:-1]),
        }
