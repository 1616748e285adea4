"""The scale-up experiment: equal sizes in all kinds, cells that are kept, a curve with its bars in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from atlas_megatron.scaling import ladder
from experiments import scaling as experiment
from tests.support import pages, tiny_run


def test_all_kinds_of_a_rung_are_as_large_and_see_the_same_tokens() -> None:
    for rung in experiment.RUNGS:
        configs = [experiment.config_of(kind, rung, quick=False) for kind in experiment.KINDS]
        for config in configs:
            assert ladder.counted(config, experiment.SETTING) == pytest.approx(ladder.size_of(rung), rel=0.02)
            assert config.model.hidden_size == configs[0].model.hidden_size
            assert (config.train, config.data) == (configs[0].train, configs[0].data)
        atlas, omeganet, attention = configs
        assert atlas.memory.ns_steps == 5 and atlas.memory.ns_period == atlas.memory.chunk
        assert omeganet.memory.ns_steps == 0 and set(attention.model.pattern) == {"F", "-"}


@pytest.mark.slow
def test_quick_leaves_results_and_does_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run.write(tmp_path)
    small = replace(experiment.SETTING, vocab_size=tiny_run.VOCABULARY, seq_length=64, data=str(tmp_path))
    monkeypatch.setattr(experiment, "SETTING", small)
    monkeypatch.setattr(experiment, "RUNS", tmp_path / "runs")
    words = ["--quick", "--out", str(tmp_path / "out")]
    assert experiment.main(words) == 0, capsys.readouterr().err
    content = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert list(content["cells"]) == [f"{kind}, {r}" for r in experiment.QUICK_RUNGS for kind in experiment.QUICK_KINDS]
    computes = [content["cells"][f"omeganet, {rung}"]["compute"] for rung in experiment.QUICK_RUNGS]
    assert computes == sorted(computes) and len(set(computes)) == 3
    assert (tmp_path / "out" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "scaling.md").read_text()
    pages.hold(text)
    # Three steps need not fall with compute; that three points are too few is said where they do.
    assert text.count("are too few for E") + text.count("no fit: the loss does not fall") >= 2
    monkeypatch.setattr(experiment, "trained", None)
    assert experiment.main(words) == 0

    monkeypatch.setattr(experiment, "SETTING", replace(small, data=str(tmp_path / "nowhere")))
    assert experiment.main(words) == 2
    assert "run make quickstart once" in capsys.readouterr().err
