"""The order in which training samples are read: it does not depend on how many of them a run asks for.

A run that is made longer so goes on with what comes next, as if it had been that long from the start. The first pass
over a set is in Megatron's own order, and a blend takes its samples as Megatron's blending does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch.utils.data import Dataset


class TrainingOrder(Dataset):
    """Samples of one pass over each set of a blend, then of the next, each pass shuffled anew; without an end.

    `len` is the number that was asked for; any index from 0 on can be read.
    """

    def __init__(self, sets: Sequence[GPTDataset], weights: Sequence[float], seed: int, samples: int) -> None:
        """sets: each holds one pass. weights: how often each is drawn, in any unit."""
        self._sets = list(sets)
        self._weights = np.asarray(weights, dtype=np.float64) / sum(weights)
        self._seed, self._samples = seed, samples
        # Which set each sample is of, and which of that set's; grows where more is read than was asked for.
        self._of = np.zeros(0, dtype=np.int16)
        self._place = np.zeros(0, dtype=np.int64)
        self._shuffled = lru_cache(maxsize=2 * len(self._sets))(self._shuffle)

    def __len__(self) -> int:
        return self._samples

    @property
    def passes(self) -> list[int]:
        """How many samples one pass over each set holds."""
        return [len(one) for one in self._sets]

    @property
    def weights(self) -> list[float]:
        """The share of the samples that each set gives."""
        return self._weights.tolist()

    def __getitem__(self, index: int) -> dict[str, Any]:
        of, place = self._blended(index)
        number, within = divmod(place, len(self._sets[of]))
        return self._sets[of][int(self._shuffled(of, number)[within]) if number else within]

    def __getstate__(self) -> dict[str, Any]:
        # For loader processes that are spawned: a cache does not travel.
        return {name: value for name, value in vars(self).items() if name != "_shuffled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._shuffled = lru_cache(maxsize=2 * len(self._sets))(self._shuffle)

    def _blended(self, index: int) -> tuple[int, int]:
        """The set of a sample, and its place in that set's endless order."""
        if len(self._sets) == 1:
            return 0, index
        if index >= len(self._of):
            # Each choice follows from those before it alone: a longer list begins with the shorter one.
            size = max(self._samples, index + 1, 2 * len(self._of))
            self._of, self._place = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
            helpers.build_blending_indices(self._of, self._place, self._weights, len(self._sets), size, False)
        return int(self._of[index]), int(self._place[index])

    def _shuffle(self, of: int, number: int) -> np.ndarray:
        """The order of a set's samples in its pass `number`."""
        size = len(self._sets[of])
        order = np.arange(size, dtype=np.uint32 if size < 2**32 else np.int64)
        np.random.default_rng((self._seed, of, number)).shuffle(order)
        return order
