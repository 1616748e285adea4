"""The experiments are scripts beside each other: their folder is where they find their neighbours."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "configs" / "experiments"
sys.path.insert(0, str(EXPERIMENTS))


class NoJobs:
    """Stands in for the processes when all cells are there."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> NoJobs:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, *_: object) -> None:
        raise AssertionError("a cell that is there was asked for again")


@pytest.fixture
def no_more_jobs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and a cell that is asked for from then on fails the test."""
    import record

    return lambda: monkeypatch.setattr(record, "ProcessPoolExecutor", NoJobs)
