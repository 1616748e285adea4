"""The quickstart's own decisions, without its training: whose data it makes, and what it cannot show."""

from __future__ import annotations

import pytest

import quickstart


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called, in order; training ends at once."""
    names: list[str] = []
    monkeypatch.setattr(quickstart, "prepare", lambda config: names.append("prepare") or 0)
    monkeypatch.setattr(quickstart.train, "main", lambda words: names.append("train") or 3)
    return names


@pytest.mark.parametrize(
    ("words", "wanted"),
    [([], ["prepare", "train"]), (["data.train=mine/train", "data.validation=mine/validation"], ["train"])],
)
def test_data_of_ones_own_are_left_alone(called: list[str], words: list[str], wanted: list[str]) -> None:
    assert quickstart.main(words) == 3
    assert called == wanted


def test_without_validation_there_is_nothing_to_show(called: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["train.validate_every=0"]) == 2
    assert called == [] and capsys.readouterr().err.startswith("quickstart: train.validate_every=0 leaves nothing")
