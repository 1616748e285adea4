"""A decay that branches off another run's checkpoint: it goes on from there to the bit, or is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.train import main
from atlas_megatron.training import metrics
from tests.support import tiny_run

STABLE = ["train.schedule=constant", "checkpoint.every=2", "train.validate_every=0", "data.workers=0"]
DECAY = ["train.schedule=wsd", "train.decay_steps=3", "train.steps=7", "checkpoint.every=5", "train.validate_every=0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside its data, a stable run of six steps that keeps every second one."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_run.write(folder)
    assert main([str(config), *STABLE, f"run.directory={folder}/stable"]) == 0
    return folder


def decay(root: Path, name: str, *words: str) -> int:
    given = [f"run.directory={root}/{name}", f"train.decay_from={root}/stable:4", *words]
    return main([str(root / "tiny.toml"), *DECAY, *given])


def test_it_goes_on_where_the_stable_run_stood(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decay(root, "decay") == 0
    said = capsys.readouterr().out
    assert f"the decay branches off {checkpoint.folder_of(root / 'stable')}/step_00000004" in said
    assert "they hold from step 5 on, where the learning rate goes from 3.00e-03 to 2.03e-03" in said
    stable, found = metrics.read(root / "stable"), metrics.read(root / "decay")
    assert [record["step"] for record in found] == [5, 6, 7]
    # The same weights, the same data; then the rate has fallen.
    assert found[0]["loss"] == stable[4]["loss"] and found[0]["grad_norm"] == stable[4]["grad_norm"]
    assert found[1]["loss"] != stable[5]["loss"]
    assert [record["lr"] for record in found] == pytest.approx([2.0333333e-3, 1.0666667e-3, 1e-4])
    assert found[-1]["tokens"] == 7 * 4 * 32
    # Stopped, it resumes from its own checkpoint, with nothing left of the stable run.
    shutil.copytree(root / "decay", root / "again")
    shutil.rmtree(checkpoint.folder_of(root / "again") / "step_00000007")
    (root / "stable").rename(root / "moved")
    try:
        assert decay(root, "again") == 0
    finally:
        (root / "moved").rename(root / "stable")
    assert [record["loss"] for record in metrics.read(root / "again")] == [record["loss"] for record in found]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}/stable:3", "train.steps=6"], "keeps no whole checkpoint of step 3; kept are 2, 4, 6: take one of these"),
        (["{}/nowhere:4"], "nowhere is no folder; name the directory of a run that has trained"),
        (["{}/stable:4", "train.lr=2e-3"], "0.003 at that step, and would jump to train.lr=0.002; set train.lr=0.003"),
        (["{}/stable:4", "run.seed=1"], "was trained with run.seed=1234, which is 1 now"),
        (["{}/stable:4", "memory.window=8"], "is of another model: memory.window: 8, the checkpoint has 4"),
        (["{}/stable:4", "run.directory={}/stable"], "is the run's own directory"),
        (["{}/stable:4", "train.optimizer=muon"], "holds another optimizer's states: train.optimizer: 'muon', the"),
    ],
)
def test_what_cannot_be_branched_off_is_refused(
    root: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    point, *others = (word.format(root) for word in words)
    if "own directory" in said:
        # Without a checkpoint of its own: with one, it would resume.
        point, others = f"{root}/empty:4", [f"run.directory={root}/empty"]
        (root / "empty").mkdir()
    for more in ([], ["--dry-run"]):
        status = decay(root, "refused", f"train.decay_from={point}", *others, *more)
        out, err = capsys.readouterr()
        assert said in (out if more else err) and "Traceback" not in err
        assert status == (0 if more else 2)
    assert not (root / "refused").exists()


def test_another_optimizer_is_refused_by_the_dry_run_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A resume says what keeps it from starting before anything is built."""
    words = [str(root / "tiny.toml"), *STABLE, f"run.directory={root}/stable", "train.steps=8", "train.optimizer=muon"]
    refused = "holds another optimizer's states: train.optimizer: 'muon', the checkpoint has 'adamw'"
    assert main([*words, "--dry-run"]) == 0
    assert f"cannot train yet: the checkpoint of {root}/stable {refused}" in capsys.readouterr().out
    assert main(words) == 2
    assert refused in capsys.readouterr().err


def test_a_damaged_step_is_refused_and_a_run_does_not_change_where_it_came_from(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "stable", tmp_path / "stable")
    for name in ("tiny.toml", "tokenizer", "train.bin", "train.idx", "validation.bin", "validation.idx"):
        (tmp_path / name).symlink_to(root / name)
    file = next(checkpoint.folder_of(tmp_path / "stable").glob("step_00000004/*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert decay(tmp_path, "decay") == 2
    assert "step_00000004 is damaged" in capsys.readouterr().err
    point = f"train.decay_from={tmp_path}/stable:2"
    assert decay(tmp_path, "decay", point, "train.steps=5", "checkpoint.every=3") == 0
    capsys.readouterr()
    assert decay(tmp_path, "decay", f"train.decay_from={tmp_path}/stable:6", "train.steps=9") == 2
    said = capsys.readouterr().err
    assert f"was trained with train.decay_from='{tmp_path}/stable:2', which is '{tmp_path}/stable:6' now" in said


@pytest.mark.parallel
def test_another_layout_decays_alike(root: Path) -> None:
    """The stable run was one process's; without Newton-Schulz, which would blow up what a layout rounds."""
    config = root / "tiny.toml"
    plain = ["memory.preset=omeganet", "model.pattern=M-*-"]
    assert main([str(config), *STABLE, *plain, f"run.directory={root}/plain"]) == 0
    words = [*DECAY, *plain, f"train.decay_from={root}/plain:4"]
    assert main([str(config), *words, f"run.directory={root}/one"]) == 0
    layouts = {"tensor": ["parallel.tensor=2"], "pipeline": ["parallel.pipeline=2", "model.pattern=M-|*-"], "data": []}
    tiny_run.train_in(2, config, [[*words, *own, f"run.directory={root}/{name}"] for name, own in layouts.items()])
    for name in layouts:
        assert tiny_run.losses(root / name) == pytest.approx(tiny_run.losses(root / "one"), rel=1e-4), name
