"""A run's directory from a stranger, or one that a disk has damaged: refused or passed over, and nothing in it runs."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from atlas_megatron.checkpoint import checkpoint, safe_loading, step_folders
from atlas_megatron.files import integrity
from atlas_megatron.hf import export
from atlas_megatron.resilience import run_lock
from atlas_megatron.train import main
from tests.support import tiny_run

RAN: list[str] = []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a config and of its run, with checkpoints of steps 2 and 4."""
    root = tmp_path_factory.mktemp("trained")
    words = ["train.steps=4", "checkpoint.every=2", "train.validate_every=0"]
    assert main([str(tiny_run.write(root, "M-")), *words]) == 0
    return root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def resumed(trained: Path, run: Path) -> int:
    words = ["train.steps=5", "checkpoint.every=2", "train.validate_every=0", f"run.directory={run}"]
    return main([str(trained / "tiny.toml"), *words])


class Payload(dict[str, Any]):
    def __reduce__(self) -> Any:
        return RAN.append, ("ran",)


def rewritten(folder: Path, name: str, raw: bytes) -> None:
    """Another file of a checkpoint, with a marker that vouches for it."""
    (folder / name).write_bytes(raw)
    marker = json.loads((folder / integrity.MARKER).read_text())
    marker["files"][name], marker["crc32"][name] = len(raw), f"{zlib.crc32(raw):08x}"
    (folder / integrity.MARKER).write_text(json.dumps(marker))


def test_a_payload_in_the_description_is_refused_by_every_reader(
    trained: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoint.folder_of(run) / "step_00000004"
    rewritten(newest, safe_loading.METADATA, pickle.dumps(Payload()))
    for read in (checkpoint.load_model, export.dry_run):
        with tiny_run.a_world_that_is_left(), pytest.raises(ValueError, match="would run builtins") as refused:
            read(run)
        assert str(newest / safe_loading.METADATA) in str(refused.value)
    assert resumed(trained, run) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"atlas-train: checkpoint {newest}") and said.count("\n") == 1
    assert not RAN


def test_a_payload_among_the_objects_is_refused(
    trained: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "random_state", Payload)
        assert resumed(trained, run) == 0
    RAN.clear()
    words = [str(trained / "tiny.toml"), f"run.directory={run}", "train.steps=6", "train.validate_every=0"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "step_00000005 cannot be read" in said and "random" in said and said.count("\n") == 1
    assert not RAN


def test_a_tensor_of_more_than_what_is_stored_is_refused_before_memory_is_asked_for(run: Path) -> None:
    newest = checkpoint.folder_of(run) / "step_00000004"
    metadata = safe_loading.read_metadata(newest)
    entries = metadata.state_dict_metadata.items()
    name, entry = next((name, entry) for name, entry in entries if isinstance(entry, TensorStorageMetadata))
    entry.size = type(entry.size)([1 << 30, 1 << 30])
    rewritten(newest, safe_loading.METADATA, pickle.dumps(metadata))
    with pytest.raises(ValueError, match=rf"{name} is said to be 4,611,\S+ bytes, and \d+[\d,]* are stored"):
        safe_loading.read_metadata(newest)


def test_a_part_outside_of_the_checkpoint_is_not_read(run: Path) -> None:
    newest = checkpoint.folder_of(run) / "step_00000004"
    metadata = safe_loading.read_metadata(newest)
    for info in metadata.storage_data.values():
        info.relative_path = "../step_00000002/__0_0.distcp"
    rewritten(newest, safe_loading.METADATA, pickle.dumps(metadata))
    with pytest.raises(ValueError, match="not beside it"):
        safe_loading.read_metadata(newest)


MARKERS = (
    "[]", "3", "null", "{", "", '"files"', "{}", '{"files": []}', '{"files": {}}', '{"files": {}, "crc32": null}',
    '{"files": {"config.toml": "1"}}', '{"files": {"config.toml": null}}', '{"files": {"../../secret": 1}}',
    '{"files": {"/etc/passwd": 1}}', '{"files": {"config.toml": 1}, "crc32": {"config.toml": 7}}', "[" * 100_000,
)  # fmt: skip


@pytest.mark.parametrize("text", MARKERS, ids=range(len(MARKERS)))
def test_a_marker_of_another_form_is_a_damaged_checkpoint(run: Path, text: str) -> None:
    folder = checkpoint.folder_of(run)
    (folder / "step_00000004" / integrity.MARKER).write_text(text)
    newest, wrong = checkpoint.newest(run)
    assert newest == folder / "step_00000002"
    assert len(wrong) == 1 and "skipped the damaged checkpoint" in wrong[0] and len(wrong[0]) < 1000


def test_a_run_goes_on_behind_a_marker_of_another_form(
    trained: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint.folder_of(run) / "step_00000004" / integrity.MARKER).write_text("[]")
    assert resumed(trained, run) == 0
    said = capsys.readouterr().out
    assert "skipped the damaged checkpoint" in said and "step_00000002" in said


def test_what_a_user_keeps_beside_the_checkpoints_is_neither_read_nor_removed(trained: Path, run: Path) -> None:
    folder = checkpoint.folder_of(run)
    names = ["step_00000002.good", "step_00000004_copy", "step_best", "step_00000009", "step_00000003 (copy)", "notes"]
    for name in names:
        shutil.copytree(folder / "step_00000002", folder / name)
    (folder / "step_00000001").symlink_to(folder / "step_best")
    assert checkpoint.newest(run)[0] == folder / "step_00000004"
    words = ["checkpoint.every=1", "checkpoint.keep=1", "train.validate_every=0", f"run.directory={run}"]
    assert main([str(trained / "tiny.toml"), *words, "train.steps=9"]) == 0
    kept = {path.name for path in folder.iterdir()}
    # What stood in the way of step 9 was renamed.
    assert kept == (set(names) | {"step_00000009.kept-1", "step_00000001"})
    assert json.loads((folder / "step_00000009.kept-1" / integrity.MARKER).read_text())["step"] == 2
    assert checkpoint.newest(run)[0] == folder / "step_00000009"


def test_steps_of_more_digits_are_newer(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        (tmp_path / step_folders.name_of(step)).mkdir()
    assert [step_folders.step_of(path) for path in step_folders.checkpoints(tmp_path)] == [100_000_000, 99_999_999]


def test_a_reader_takes_the_newer_checkpoint_when_its_own_is_removed(run: Path) -> None:
    folder = checkpoint.folder_of(run)
    os.rename(folder / "step_00000004", folder / "hidden")
    tried = []

    def read(saved: Path) -> str:
        tried.append(saved.name)
        if len(tried) == 1:
            # What a run does that saves, and drops its oldest one.
            os.rename(folder / "hidden", folder / "step_00000004")
            step_folders.remove(saved)
        return (saved / checkpoint.CONFIG).read_text(encoding="utf-8")

    assert checkpoint.read_newest(run, read)
    assert tried == ["step_00000002", "step_00000004"]


def test_a_checkpoint_that_goes_while_it_is_checked_is_not_called_damaged(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = integrity.wrong_size

    def removing(folder: Path) -> str:
        if folder.name == "step_00000004":
            step_folders.remove(folder)
        return checked(folder)

    monkeypatch.setattr(integrity, "wrong_size", removing)
    assert checkpoint.newest(run) == (checkpoint.folder_of(run) / "step_00000002", [])


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_run_is_locked_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def link(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    lock = run_lock.RunLock(tmp_path, print)
    with pytest.raises(ValueError, match="is in use by process"):
        run_lock.RunLock(tmp_path, print)
    lock.check()
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[]", '{"pid": 1}', "[" * 100_000, json.dumps(dict.fromkeys(
    ("host", "pid", "started", "kernel", "ticks", "token"), "../../etc"))])  # fmt: skip
def test_a_lock_that_says_nothing_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.0)
    (tmp_path / run_lock.NAME).write_text(text)
    lock = run_lock.RunLock(tmp_path, print)
    assert (tmp_path / run_lock.NAME).read_text() != text
    lock.release()
    assert not (tmp_path / run_lock.NAME).exists()


def test_a_file_system_that_does_not_sync_folders_holds_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    (tmp_path / "weights").write_bytes(b"1234")
    monkeypatch.setattr(os, "fsync", fsync)
    integrity.mark(tmp_path, {"step": 1}, {})
    assert not integrity.wrong_size(tmp_path) and not integrity.wrong_content(tmp_path)
