"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest

from atlas_kernels import chunked


@pytest.fixture(params=["held", "recomputed", "recomputed by chunk"])
def backward(request, monkeypatch):
    """The ways of the backward: the whole graph held, every segment recomputed, and each of its chunks once more."""
    if request.param != "held":
        monkeypatch.setattr(chunked, "HELD_BYTES", 0)
    if request.param == "recomputed by chunk":
        monkeypatch.setattr(chunked, "SEGMENT_BYTES", 0)
