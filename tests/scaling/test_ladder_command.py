"""tools/ladder.py: what the repository holds is what it writes; nothing of the user's is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from atlas_megatron.commands import ladder as command
from atlas_megatron.config import load
from atlas_megatron.scaling import ladder

SCALE = Path(__file__).parents[2] / "configs" / "scale"


def test_the_committed_ladder_is_the_generators(tmp_path: Path) -> None:
    assert command.main(["write", str(tmp_path)]) == 0
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in SCALE.iterdir()}
    # A TOML says all that the generator decides.
    for name in ("0.15M", "7B"):
        assert load(tmp_path / f"{name.lower()}.toml") == ladder.rung(name)


def test_some_rungs_for_other_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["20M", "40m", "--tokens-per-parameter", "40", "--memory", "16GiB", "--gpus-per-node", "4"]
    assert command.main(["write", str(tmp_path), *words]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20m.toml", "40m.toml", "gpu.list"]
    config = load(tmp_path / "20m.toml")
    assert config.train.steps * config.train.global_batch * 4096 == pytest.approx(40 * 20e6, rel=0.01)
    assert config.parallel.devices_per_node == 4

    (tmp_path / "40m.toml").write_text("mine")
    assert command.main(["write", str(tmp_path), "20M", "40M"]) == 2
    assert "is there and not what would be written; name another folder" in capsys.readouterr().err
    assert (tmp_path / "40m.toml").read_text() == "mine" and load(tmp_path / "20m.toml") == config
    assert command.main(["write", str(tmp_path), "40M", "--replace"]) == 0
    assert load(tmp_path / "40m.toml") == ladder.rung("40M")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "350M"], "'350M' is no rung; the nearest is 340M"),
        (["show", "7B", "--memory", "4GiB"], "rung 7B does not fit 64 devices of 4 GiB"),
        (["show", "20M", "--memory", "4"], "'memory=4' is no size"),
        (["show", "20M", "--tokens-per-parameter", "-1"], "-1 tokens a parameter must be above 0"),
        (["show", "20M", "--gpus-per-node", "0"], "--gpus-per-node 0 is no number of GPUs"),
    ],
)
def test_bad_words_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("ladder: ") and said in error and error.count("\n") == 1


def test_show_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["show", "1.3B"]) == 0
    assert "1,296,551,040" in capsys.readouterr().out
