"""The chain of a memory shared by several programs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atlas_kernels import MemoryRule
from atlas_kernels.gpu.scan import split
from tests.support.device_problems import CHUNK, compare, compare_rounded, small

BASE = MemoryRule(window=5, chunk=CHUNK, ns_steps=0, norm="layer")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.fixture(autouse=True)
def room(monkeypatch):
    monkeypatch.setattr(split, "multiprocessors", lambda device: 132)


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "sum"])
@pytest.mark.parametrize("memory,norm", [("mlp", "layer"), ("gated_mlp", "none")])
def test_every_rule(memory, norm, momentum):
    compare(small(replace(BASE, memory=memory, norm=norm, momentum=momentum), 2 * CHUNK + 5))
