"""The quickstart's own decisions, without its training: whose data it makes, what it cannot show, who trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from atlas_megatron.commands import quickstart
from atlas_megatron.config import load
from atlas_megatron.data.corpus import Summary


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was called, in order; training ends at once."""
    names: list[str] = []
    monkeypatch.setattr(quickstart, "prepare", lambda config: names.append("prepare") or 0)
    monkeypatch.setattr(quickstart, "train_side_by_side", lambda words, count: names.append("train") or 3)
    return names


@pytest.mark.parametrize(
    ("words", "wanted"),
    [([], ["prepare", "train"]), (["data.train=mine/train", "data.validation=mine/validation"], ["train"])],
)
def test_data_of_ones_own_are_left_alone(called: list[str], words: list[str], wanted: list[str]) -> None:
    assert quickstart.main(words) == 3
    assert called == wanted


def test_its_data_are_made_anew_but_not_by_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{number}.py" for number in range(40)]
    for file in files:
        file.write_text(f"def number_{file.stem}(): return {file.stem}\n" * 9)
    monkeypatch.setattr(quickstart, "standard_library", lambda _: files)
    monkeypatch.setattr(quickstart, "HELD_OUT", 0.3)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    out = tmp_path / "data"
    words = [f"data.train={out}/train", "model.vocab_size=270"]
    assert quickstart.prepare(load(quickstart.CONFIG, words)) == 0
    files[0].write_text("another = 1\n")  # as where Python was updated
    assert quickstart.prepare(load(quickstart.CONFIG, words)) == 0
    before = Summary.read(out)
    assert quickstart.prepare(load(quickstart.CONFIG, [*words, "model.vocab_size=260"])) == 2
    assert Summary.read(out) == before is not None


def test_without_validation_there_is_nothing_to_show(called: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart.main(["train.validate_every=0"]) == 2
    assert called == [] and capsys.readouterr().err.startswith("quickstart: train.validate_every=0 leaves nothing")


@pytest.mark.parametrize(
    ("words", "devices", "wanted"),
    [
        ([], 1, (1, 4)),
        ([], 2, (2, 2)),
        ([], 3, (2, 2)),
        ([], 64, (4, 1)),
        (["train.global_batch=6", "train.micro_batch=1"], 4, (3, 1)),
        (["parallel.tensor=2"], 2, (2, 4)),
        (["parallel.tensor=2"], 1, (2, 4)),
        (["parallel.tensor=2"], 4, (4, 2)),
    ],
)
def test_replicas_share_the_global_batch(words: list[str], devices: int, wanted: tuple[int, int]) -> None:
    assert quickstart.layout(load(quickstart.CONFIG, ["train.global_batch=4", *words]), devices) == wanted


@pytest.mark.parametrize("count", [1, 2])
def test_the_status_is_that_of_the_processes(count: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [str(quickstart.CONFIG), "data.train=nowhere/train", "train.global_batch=4", "train.micro_batch=2"]
    words.append(f"run.directory={tmp_path}")
    assert quickstart.train_side_by_side(words, count) == 2
    assert "nowhere/train" in capfd.readouterr().err
