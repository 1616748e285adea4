"""The layouts experiment: runs that torchrun starts, their curves in one picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import layout_curves
from tests.support import pages, tiny_run


@pytest.mark.parallel
def test_quick_compares_two_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_curves, "BASE", tiny_run.write(tmp_path, "M-*-M-"))
    monkeypatch.setattr(layout_curves, "RUNS", tmp_path / "runs")
    assert layout_curves.main(["--quick", "--out", str(tmp_path / "out")]) == 0
    cells = json.loads((tmp_path / "out" / "layout_curves.json").read_text())["cells"]
    assert len(cells) == len(layout_curves.QUICK) * len(layout_curves.PRESETS)
    for preset in layout_curves.PRESETS:
        one, two = (cells[f"{name}, {preset}"]["loss"] for name in layout_curves.QUICK)
        assert len(one) == layout_curves.QUICK_STEPS
        assert two[0] == pytest.approx(one[0], rel=1e-5)
    pages.hold((tmp_path / "out" / "layout_curves.md").read_text())
    assert (tmp_path / "out" / "layout_curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_corpus_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run.write(tmp_path, "M-*-M-")
    (tmp_path / "train.bin").unlink()
    monkeypatch.setattr(layout_curves, "BASE", config)
    assert layout_curves.main(["--quick", "--out", str(tmp_path / "out")]) == 2
    assert "run make quickstart first" in capsys.readouterr().err
