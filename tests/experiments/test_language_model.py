"""The language-model experiment: equal sizes, cells that are kept, a picture and a paragraph."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "megatron"))

import language_model
import tiny_run
from atlas_megatron.config import load
from atlas_megatron.model import num_params


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(language_model, "BASE", tiny_run.write(tmp_path, "M-*-M-"))
    monkeypatch.setattr(language_model, "RUNS", tmp_path / "runs")
    return tmp_path


class NoJobs:
    """Stands in for the processes when all cells are there."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> NoJobs:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, *_: object) -> None:
        raise AssertionError("a cell that is there was asked for again")


def test_every_variant_has_the_first_ones_parameters() -> None:
    wanted = num_params(load(language_model.BASE))
    for variant in language_model.VARIANTS:
        config = load(language_model.BASE, language_model.words_of(variant, 100))
        assert num_params(config) == pytest.approx(wanted, rel=1e-3), variant


def test_a_gpu_sized_base_repeats_the_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        language_model, "BASE", language_model.record.ROOT / "configs/experiments/language_model_gpu.toml"
    )
    words = language_model.words_of("MAG", 100)
    assert "model.pattern=" + "A-" * 12 in words
    test_every_variant_has_the_first_ones_parameters()


def test_quick_leaves_results_and_does_nothing_twice(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--quick", "--out", str(tiny / "out")]
    assert language_model.main(words) == 0
    cells = json.loads((tiny / "out" / "language_model.json").read_text())["cells"]
    assert len(cells) == len(language_model.QUICK)
    assert cells["atlas, seed 1"]["parameters"] == num_params(load(language_model.BASE))
    assert (tiny / "out" / "language_model.png").read_bytes().startswith(b"\x89PNG")
    assert "bits per byte" in (tiny / "out" / "language_model.md").read_text()
    monkeypatch.setattr(language_model.record, "ProcessPoolExecutor", NoJobs)
    assert language_model.main(words) == 0
