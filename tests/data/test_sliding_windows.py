"""Loss along the context is compared on the same tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from atlas_megatron.config import load
from atlas_megatron.data.sliding_windows import STRIDES, SlidingWindows
from tests.support import tiny_run


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> SlidingWindows:
    root: Path = tmp_path_factory.mktemp("positions")
    return SlidingWindows(load(tiny_run.write(root)), 20)


def test_every_kept_token_stands_once_in_each_stride(windows: SlidingWindows) -> None:
    places: dict[int, list[int]] = {}
    for number in range(len(windows)):
        sample = windows[number]
        for position in sample["loss_mask"].nonzero().flatten().tolist():
            places.setdefault(number * windows.stride + position, []).append(position // windows.stride)
    assert len(windows) == 20 and len(places) == (20 - STRIDES + 1) * windows.stride
    assert all(sorted(seen) == list(range(STRIDES)) for seen in places.values())


def test_labels_follow_tokens(windows: SlidingWindows) -> None:
    first, second = windows[3], windows[4]
    assert torch.equal(first["tokens"][1:], first["labels"][:-1])
    assert torch.equal(first["tokens"][windows.stride :], second["tokens"][: -windows.stride])


def test_a_short_text_gives_the_windows_it_has(tmp_path: Path) -> None:
    config = load(tiny_run.write(tmp_path))
    asked = SlidingWindows(config, 10**6)
    text = len(asked.text)
    assert 0 < len(asked) == (text - 1 - config.model.seq_length) // asked.stride + 1
    assert Counter(np.diff([asked[n]["tokens"].numel() for n in range(3)]).tolist()) == {0: 2}
    longer = replace(config, model=replace(config.model, seq_length=text + 5))
    assert len(SlidingWindows(longer, 4)) == 0
