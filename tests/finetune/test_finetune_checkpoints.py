"""Fine-tuning's checkpoints: a damaged one is named and the one before it taken; nothing in them is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_megatron.files import integrity
from atlas_megatron.finetune import checkpoints

IDENTITY = {"steps": 6, "lr": 1e-4}
RAN: list[str] = []


class Payload:
    def __reduce__(self) -> Any:
        return RAN.append, ("ran",)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Checkpoints of steps 2, 4 and 10, with DeepSpeed's files in a folder of their own."""
    for step in (2, 4, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / f"global_step{step}").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(range(100)))
        torch.save({"step": step, "moments": torch.zeros(4)}, folder / f"global_step{step}" / "optim.pt")
        checkpoints.mark(folder, IDENTITY)
    return tmp_path


def test_the_newest_is_that_of_the_highest_step(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoints.newest(work, IDENTITY) == work / "checkpoint-10"
    assert capsys.readouterr().err == ""
    assert checkpoints.newest(work / "none", IDENTITY) is None


MARKERS = ("", "{", "[]", "{}", "3", "null", '{"files": {}, "crc32": null, "identity": {}}', "[" * 100_000)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "inner", *MARKERS], ids=range(4 + len(MARKERS)))
def test_a_damaged_one_is_named_and_the_one_before_it_taken(
    work: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = work / "checkpoint-10"
    file = folder / ("global_step10/optim.pt" if damage == "inner" else "model.safetensors")
    raw = bytearray(file.read_bytes())
    if damage in ("flipped", "inner"):
        raw[50] ^= 1
        file.write_bytes(raw)
    elif damage == "cut":
        file.write_bytes(raw[:50])
    elif damage == "gone":
        file.unlink()
    else:
        (folder / checkpoints.MARKER).write_text(damage)
    assert checkpoints.newest(work, IDENTITY) == work / "checkpoint-4"
    said = capsys.readouterr().err
    assert said.startswith(f"finetune: skipped the damaged checkpoint {folder}: ") and said.count("\n") == 1
    # Behind it the run goes on, and the damaged one is no checkpoint any more.
    assert checkpoints.newest(work, IDENTITY) == work / "checkpoint-4"
    assert capsys.readouterr().err == ""


def test_where_all_are_damaged_nothing_begins_anew(work: Path) -> None:
    for folder in checkpoints.all_in(work):
        (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is left undamaged .*checkpoint-2: .* is missing"):
        checkpoints.newest(work, IDENTITY)


def test_other_settings_are_refused_in_old_markers_too(work: Path) -> None:
    with pytest.raises(ValueError, match=r"lr is 0\.001, was 0\.0001"):
        checkpoints.newest(work, IDENTITY | {"lr": 1e-3})
    # As they were written before there were checksums.
    (work / "checkpoint-10" / checkpoints.MARKER).write_text(json.dumps(IDENTITY))
    assert checkpoints.newest(work, IDENTITY) == work / "checkpoint-10"
    with pytest.raises(ValueError, match=r"lr is 0\.001, was 0\.0001"):
        checkpoints.newest(work, IDENTITY | {"lr": 1e-3})


def test_a_payload_in_deepspeeds_files_is_refused(work: Path) -> None:
    file = work / "checkpoint-10" / "global_step10" / "optim.pt"
    torch.save({"step": Payload()}, file)
    checkpoints.mark(file.parents[1], IDENTITY)
    with pytest.raises(ValueError, match=rf"{file} would run builtins\.getattr"):
        checkpoints.newest(work, IDENTITY)
    file.write_bytes(b"no zip")
    checkpoints.mark(file.parents[1], IDENTITY)
    with pytest.raises(ValueError, match=rf"{file} is no file of DeepSpeed's"):
        checkpoints.newest(work, IDENTITY)
    assert not RAN


def test_what_a_user_keeps_beside_them_stays(work: Path) -> None:
    names = ["checkpoint-2.good", "checkpoint-10-copy", "checkpoint-best", "notes"]
    for name in names:
        (work / name).mkdir()
        (work / name / checkpoints.MARKER).write_text("{}")
    (work / "checkpoint-1").symlink_to(work / "notes")
    assert checkpoints.newest(work, IDENTITY) == work / "checkpoint-10"
    checkpoints.drop_old(work, 2)
    assert {path.name for path in work.iterdir()} == {*names, "checkpoint-1", "checkpoint-4", "checkpoint-10"}
    checkpoints.make_room(work / "checkpoint-4")
    assert not (work / "checkpoint-4").exists()
    assert integrity.read_marker(work / "checkpoint-10", checkpoints.MARKER)["identity"] == IDENTITY
