"""What tests of experiments share."""

from __future__ import annotations

from collections.abc import Callable

import pytest


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
    from experiments.shared import record

    return lambda: monkeypatch.setattr(record, "ProcessPoolExecutor", NoJobs)
