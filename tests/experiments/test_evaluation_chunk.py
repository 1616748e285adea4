"""The experiment on chunks: both stages of every member, cells that are kept, a run that fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from atlas_megatron.config import at_chunk, load, load_saved
from atlas_megatron.config.checks import validate
from experiments import evaluation_chunk
from experiments.evaluation_chunk import CHUNK, FULL, MEMBERS, SECOND, words_of
from tests.support import pages, tiny_run


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    quick = replace(evaluation_chunk.QUICK, base=tiny_run.write(tmp_path, "M-"), runs=tmp_path / "runs")
    monkeypatch.setattr(evaluation_chunk, "QUICK", quick)
    monkeypatch.setattr(evaluation_chunk, "prepare_bytes", lambda: None)
    return tmp_path


@pytest.mark.parametrize("member", MEMBERS)
def test_both_stages_are_valid_and_the_second_is_the_first_at_another_chunk(member: str) -> None:
    first = load(FULL.base, words_of(member, 1, FULL, CHUNK))
    for chunk in SECOND:
        second = load(FULL.base, words_of(member, 1, FULL, chunk))
        validate(second, world_size=1)
        trained = at_chunk(first.memory, chunk)
        assert replace(second.memory, eta_start=trained.eta_start) == replace(trained, eta_start=trained.eta_start)
    assert max(FULL.chunks) == FULL.tokens and CHUNK in FULL.chunks and SECOND[0] == CHUNK


@pytest.mark.slow
def test_quick_leaves_a_page_and_does_nothing_twice(tiny: Path, no_more_jobs: Callable[[], None]) -> None:
    words = ["--quick", "--out", str(tiny / "out")]
    assert evaluation_chunk.main(words) == 0
    cells = json.loads((tiny / "out/evaluation_chunk.json").read_text())["cells"]
    assert len(cells) == len(MEMBERS) * 3
    for cell in cells.values():
        assert list(cell["bits_per_byte"]) == ["1", "8", "32", "64"]
    page = (tiny / "out/evaluation_chunk.md").read_text()
    pages.hold(page)
    assert "| Titans | then at 8 |" in page and "What was seen" in page
    assert (tiny / "out/evaluation_chunk.png").read_bytes().startswith(b"\x89PNG")
    no_more_jobs()
    assert evaluation_chunk.main(words) == 0


def test_a_second_stage_begins_with_the_first_and_a_failure_is_a_cell(tiny: Path) -> None:
    grid = replace(evaluation_chunk.QUICK, chunks=(8, 32))
    assert "is no folder" in evaluation_chunk.second("Titans", 1, 8, grid)["wrong"]
    found = evaluation_chunk.first("Titans", 1, grid)["bits_per_byte"]
    again = evaluation_chunk.second("Titans", 1, 8, replace(grid, second_rate=1e-12))["bits_per_byte"]
    assert again == pytest.approx(found, abs=1e-4)
    config = load_saved(tiny / "runs/titans_1_then_8/config.toml")
    assert config.memory.chunk == 8 and config.train.start_from.endswith("runs/titans_1")
