"""What is written beside its target: whole or not there, never over what is the user's, and nothing of a killed one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from atlas_megatron.checkpoint import best
from atlas_megatron.files import scratch
from atlas_megatron.reports import results

ROOT = Path(__file__).parents[2]
KILLED = (
    "import os, signal; from pathlib import Path; from atlas_megatron.files import scratch\n"
    "with scratch.{how}(Path({target!r})) as built:\n"
    "    (built / 'part' if built.is_dir() else built).write_text('half')\n"
    "    os.kill(os.getpid(), signal.SIGKILL)"
)


def killed(how: str, target: Path) -> None:
    """A process that dies while it writes."""
    program = KILLED.format(how=how, target=str(target))
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_whole_or_what_it_was(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    scratch.write_whole(target, "first")
    with pytest.raises(KeyboardInterrupt), scratch.file_beside(target) as written:
        written.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "first" and names(tmp_path) == ["a.json"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("how", ["file_beside", "new_folder"])
def test_what_a_killed_process_left_goes_and_nothing_of_the_users(tmp_path: Path, how: str) -> None:
    target = tmp_path / "out"
    theirs = ["out.tmp", "out.unfinished", ".out.tmp", ".out.mine", ".out.0123456789abcdef"]
    for name in theirs:
        (tmp_path / name).write_text("mine")
    killed(how, target)
    assert len(names(tmp_path)) == len(theirs) + 1
    with getattr(scratch, how)(target) as built:
        assert len(names(tmp_path)) == len(theirs) + 1  # what was left has gone, this one has come
        if how == "file_beside":
            # One that is being written is not taken for one that was left.
            scratch.remove_left(target)
            assert built.exists()
    assert names(tmp_path) == sorted([*theirs, "out"])
    assert all((tmp_path / name).read_text() == "mine" for name in theirs)


def test_a_new_folder_replaces_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ValueError, match="was made by somebody else meanwhile"), scratch.new_folder(target):
        target.mkdir()
        (target / "theirs").touch()
    with pytest.raises(ValueError, match="out exists"), scratch.new_folder(target):
        pass
    assert names(tmp_path) == ["out"] and names(target) == ["theirs"]
    nowhere = tmp_path / "link"
    nowhere.symlink_to("gone")
    with pytest.raises(ValueError, match="link exists"), scratch.new_folder(nowhere):
        pass


@pytest.mark.parametrize("name", ["folder", "device"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    if name == "folder":
        target.mkdir()
    else:
        os.mkfifo(target)
    with pytest.raises(ValueError, match="is no file that can be replaced"):
        scratch.write_whole(target, "text")
    assert names(tmp_path) == [name]


def test_without_locks_nothing_is_taken_for_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_locked", lambda file: False)
    with scratch.file_beside(tmp_path / "a") as written:
        scratch.remove_left(tmp_path / "a")
        written.write_text("text")
    assert (tmp_path / "a").read_text() == "text" and names(tmp_path) == ["a"]


def test_results_and_the_best_leave_a_users_file_beside_them(tmp_path: Path) -> None:
    for name in ("r.json.tmp", "r.tmp", "best.json.tmp"):
        (tmp_path / name).write_text("mine")
    results.Results(tmp_path / "r.json", {}, {}).cell("one", lambda: {"value": 1})
    best.note(tmp_path, 3, 1.5)
    assert {(tmp_path / name).read_text() for name in ("r.json.tmp", "r.tmp", "best.json.tmp")} == {"mine"}
    assert (tmp_path / "r.json").is_file() and (tmp_path / "best.json").is_file()


@pytest.mark.parametrize("stored", ["", "[]", "{}", '{"settings": 3}', '{"settings": {}, "cells": 3}', "[" * 99999])
def test_results_of_another_form_are_left_and_named(tmp_path: Path, stored: str) -> None:
    (tmp_path / "r.json").write_text(stored)
    with pytest.raises(ValueError, match=r"r\.json holds no results; move it away, or choose another --out"):
        results.Results(tmp_path / "r.json", {}, {})
    assert (tmp_path / "r.json").read_text() == stored


def test_where_nothing_can_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("gone")
    for name in ("file", "file/a/b", "link", "link/a"):
        assert scratch.refusal(tmp_path / name) == f"{tmp_path / name.split('/')[0]} is no folder"
    monkeypatch.chdir(tmp_path)
    for free in (tmp_path, tmp_path / "a/b", Path("a/b"), Path()):
        assert scratch.refusal(free) == ""
    monkeypatch.setattr("os.access", lambda *_: False)
    assert scratch.refusal(tmp_path / "a") == f"nothing can be written to {tmp_path}"


def test_there_is_no_second_way() -> None:
    """A name that a user could have given is nowhere written to."""
    for file in (ROOT / "atlas_megatron").rglob("*.py"):
        assert not re.search(r"""\.(tmp|temp|part)["'}]""", file.read_text(encoding="utf-8")), file
