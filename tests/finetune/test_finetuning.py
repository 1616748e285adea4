"""The command line, on one process: what comes out, going on, the dry run, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from atlas_megatron.commands import finetune
from atlas_megatron.finetune import estimate
from atlas_megatron.finetune.examples import collate
from atlas_megatron.finetune.plan import REPORT, Plan, plan
from atlas_megatron.finetune.settings import Settings
from atlas_megatron.resilience.run_lock import RunLock
from tests.support import exported_models as exported

ROOT = Path(__file__).parents[2]
ZERO2 = str(ROOT / "configs/deepspeed/zero2.json")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exported model in bfloat16, a text, and answers."""
    folder = tmp_path_factory.mktemp("finetune")
    exported.exported(folder, dtype=torch.bfloat16)
    exported.text(folder)
    exported.answers(folder)
    return folder


def words(root: Path, out: Path, **given: Any) -> list[str]:
    options = {"length": 48, "segment": 16, "batch": 2, "steps": 4, "lr": 3e-3, "save_every": 2} | given
    line = [str(root / "model"), "--data", str(root / "text.txt"), "--out", str(out)]
    return line + [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / REPORT).read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def tuned(root: Path) -> Path:
    """A run of four steps with a checkpoint after two, whole."""
    assert finetune.main(words(root, root / "tuned")) == 0
    return root / "tuned"


def test_what_comes_out_loads_like_what_went_in(root: Path, tuned: Path) -> None:
    found, came = bytes_of(tuned), bytes_of(root / "model")
    # The card tells of the weights that came in.
    assert found.keys() == came.keys() - {"README.md"} | {REPORT}
    changed = {name for name in came.keys() & found.keys() if found[name] != came[name]}
    assert changed == {"model.safetensors", "checksums.json"}
    model = AutoModelForCausalLM.from_pretrained(tuned, trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    before = AutoModelForCausalLM.from_pretrained(root / "model", trust_remote_code=True)
    read = AutoTokenizer.from_pretrained(tuned)((root / "text.txt").read_text(), return_tensors="pt").input_ids[:, :96]
    with torch.no_grad():
        assert model(read, labels=read).loss < before(read, labels=read).loss - 0.1
    said = losses(tuned)
    assert len(said) == 4 and said[-1] < said[0] - 0.1


def test_a_run_goes_on_to_the_same_end(root: Path, tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, again = root / "tuned.training", root / "again.training"
    shutil.copytree(work, again)
    shutil.rmtree(again / "checkpoint-4")
    # Killed while it saved: no marker.
    (again / "checkpoint-3").mkdir()
    (again / "checkpoint-3/model.safetensors").write_bytes(b"half")
    assert finetune.main(words(root, root / "again", lr=1e-3)) == 2
    assert "of a run with other settings: lr is 0.001, was 0.003; give those of it" in capsys.readouterr().err
    assert finetune.main(words(root, root / "again")) == 0
    assert f"going on from {again}/checkpoint-2" in capsys.readouterr().out
    for name, value in weights(root / "again").items():
        assert torch.equal(value, weights(tuned)[name]), name
    assert losses(root / "again") == losses(tuned)

    # Trained to the end, and only the folder is not there: no step more.
    shutil.copytree(work, root / "ended.training")
    assert finetune.main(words(root, root / "ended")) == 0
    assert weights(root / "ended").keys() == weights(tuned).keys()
    assert all(torch.equal(value, weights(tuned)[name]) for name, value in weights(root / "ended").items())


def test_a_budget_closes_write_gates(tmp_path: Path) -> None:
    """In the same steps; and that of a step does not hang on the size of its micro-batches."""
    exported.exported(tmp_path, "M-", write_gate=True, ns_step="sum")
    exported.text(tmp_path)
    closed, start = {}, weights(tmp_path / "model")["model.layers.0.mixer.gate_bias"][:, 1]
    for name, given in {
        "none": {},
        "budget": {"write_budget": 20},
        "in parts": {"write_budget": 20, "micro_batch": 2},
    }.items():
        assert finetune.main(words(tmp_path, tmp_path / name, **given)) == 0
        closed[name] = weights(tmp_path / name)["model.layers.0.mixer.gate_bias"][:, 1]  # of eta, after alpha
    assert (closed["budget"] < start - 1e-3).all() and (closed["budget"] < closed["none"]).all()
    torch.testing.assert_close(closed["in parts"], closed["budget"], rtol=1e-3, atol=1e-4)


def test_answers_are_learned_in_truncated_windows_and_validated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # In float32: rounded to bfloat16, what came out may be a percent from what was validated.
    root = tmp_path
    exported.exported(root, dtype=torch.float32)
    exported.text(root)
    exported.answers(root)
    out, data = root / "answered", root / "answers.jsonl"
    line = words(root, out, steps=2, length=400, segment=32, detach_every=1, batch=5, micro_batch=5, validate_every=2)
    line[line.index("--data") + 1] = str(data)
    assert finetune.main([*line, "--validation", str(data)]) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "validation loss" in line]
    # The same, the last two of the twelve included, by whole readings of what came out.
    planned = plan(Settings(root / "model", (str(data),), root / "none"), 1)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    lost, counted = 0.0, 0
    for number in range(planned.train.sequences):
        batch = collate([planned.train.dataset[number]])
        learned = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            lost += float(model(**batch, use_cache=False).loss) * learned
        counted += learned
    assert float(said.rpartition(" ")[2]) == pytest.approx(lost / counted, rel=1e-4)


def test_one_run_at_a_time_trains_for_a_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = RunLock(root / "shared.training", print)
    try:
        assert finetune.main(words(root, root / "shared")) == 2
        _assert_line(capsys.readouterr().err, "shared.training is in use by process .* choose another --out")
    finally:
        held.release()
    # What was refused before a step leaves no folder.
    assert not (root / "shared.training").exists() or not list((root / "shared.training").iterdir())


def test_nothing_is_left_that_looks_whole(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main(words(root, root / "nan", lr=1e30, clip=0)) == 2
    assert "the loss became nan at step 2" in capsys.readouterr().err
    assert not (root / "nan").exists()
    # Of a last step the loss says nothing: what it leaves is looked at.
    assert finetune.main(words(root, root / "last", lr=1e38, clip=0, steps=1)) == 2
    said = capsys.readouterr().err
    assert said.startswith("finetune: ") and ("is not finite after step 1" in said or "is too large" in said)
    assert not (root / "last").exists()


def test_the_dry_run_tells_and_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(root.iterdir())
    line = words(root, root / "dry", deepspeed=ZERO2, devices=2)
    assert finetune.main([*line, "--dry-run"]) == 0
    said = capsys.readouterr().out
    parameters = sum(value.numel() for value in weights(root / "model").values())
    assert f"{parameters:,}" in said and "4 of 2 sequences" in said and "ZeRO-2, chosen" in said
    assert sorted(root.iterdir()) == before


def test_options_come_from_a_file_and_the_line_wins(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.toml"
    file.write_text('steps = 9\nlength = 32\nschedule = "linear"\ncheckpointing = true\nbf16 = false\n')
    line = [str(root / "model"), "--data", str(root / "text.txt"), "--out", str(root / "of a file"), "--dry-run"]
    assert finetune.main([*line, "--config", str(file), "--steps", "7", "--batch", "2"]) == 0
    assert "7 of 2 sequences" in capsys.readouterr().out
    assert finetune.main([*line, "--config", str(ROOT / "configs/babilong.toml"), "--batch", "2"]) == 2
    _assert_line(capsys.readouterr().err, "no sequence of 16384 tokens in it")
    file.write_text(f'data = ["{root}/text.txt", "{root}/text.txt"]\nout = "{root}/of a file"\nbf16 = false\n')
    assert finetune.main(["--config", str(file), str(root / "model"), "--length", "32", "--dry-run"]) == 0
    file.write_text("steps: 9")
    assert finetune.main([*line, "--config", str(file)]) == 2
    _assert_line(capsys.readouterr().err, "some.toml is not TOML")
    file.write_text("lenght = 9")
    with pytest.raises(SystemExit, match="2"):
        finetune.main([*line, "--config", str(file)])
    assert "unrecognized arguments: --lenght=9" in capsys.readouterr().err


@pytest.mark.parametrize(("batch", "micro_batch", "steps"), [(4, 1, 2), (4, 2, 2), (3, 3, 2), (7, 1, 1)])
def test_an_epoch_has_the_steps_that_trainer_takes(root: Path, batch: int, micro_batch: int, steps: int) -> None:
    data = (str(root / "answers.jsonl"),)
    given = Settings(root / "model", data, root / "none", batch=batch, micro_batch=micro_batch)
    planned = plan(given, 1)
    assert replace(planned, train=replace(planned.train, sequences=7)).steps == steps


def test_beyond_the_length_of_training_gradients_end_as_the_exported_models_do(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Trained on 32 tokens in chunks of 8: a quarter is one chunk.
    def planned(**given: Any) -> Plan:
        return plan(Settings(root / "model", (str(root / "text.txt"),), root / "none", batch=1, **given), 1)

    far = planned(length=512)
    assert (far.segment, far.detach_every, far.reach, far.window) == (32, 1, 8, 32)
    assert "up to 512 tokens, 32 in training: gradients do not pass further" in far.on_length
    assert planned(length=512, segment=4).detach_every == 2
    wide = planned(length=512, segment=128)
    assert (wide.detach_every, wide.reach) == (1, 8)
    within = planned()
    assert (within.detach_every, within.reach, within.on_length) == (0, 0, "")
    # What is given holds, with a warning where it is further than training went.
    assert (planned(length=512, detach_every=1).reach, planned(length=512, detach_every=1).on_length) == (0, "")
    for every, window in {0: 512, 4: 128}.items():
        said = planned(length=512, detach_every=every).on_length
        assert said.startswith(f"warning: gradients pass over up to {window} ")
    assert far.identity() != planned(length=512, detach_every=1).identity()

    line = words(root, root / "far", length=512, segment=32)
    assert finetune.main([*line, "--dry-run"]) == 0
    assert "do not pass further than the exported model's own" in " ".join(capsys.readouterr().out.split())


def test_stages_share_out_what_they_say(root: Path) -> None:
    data = (str(root / "text.txt"),)
    given = Settings(root / "model", data, root / "none", length=64, segment=16, batch=4, detach_every=0)
    planned = plan(given, 4)
    size = 4 * sum(value.numel() for value in weights(root / "model").values())
    held = [estimate.held(planned, stage) for stage in range(4)]
    assert [found.parameters for found in held] == [size, size, size, size / 4]
    assert [found.gradients for found in held] == [size, size, size / 4, size / 4]
    assert [found.optimizer for found in held] == [2 * size, 3 * size / 4, 3 * size / 4, 3 * size / 4]
    # Recomputed, only a segment is alive; over all cuts without that, everything.
    kept = plan(Settings(**{**vars(given), "checkpointing": False}), 4)
    assert estimate.held(kept, 0).activations == pytest.approx(4 * held[0].activations, rel=0.2)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "batch": ({"batch": 3, "micro_batch": 2}, "--batch 3 is no multiple of --micro-batch 2 .* --batch 4"),
    "more than there is": ({"batch": 2000}, "sequences, fewer than --batch 2000"),
    "negative": ({"segment": -1}, "--segment is -1; give 0 or more"),
    "learning rate": ({"lr": 0}, "--lr is 0.0; give a number greater than 0"),
    "not a number": ({"weight_decay": "nan"}, "--weight-decay is nan; give a finite number"),
    "too long": ({"epochs": "inf"}, "--epochs is inf; give a finite number"),
    "one token": ({"length": 1}, "--length is 1, and a sequence of one token predicts none; give 2 or more"),
    "seed": ({"seed": -1}, "--seed is -1; give 0 to 4294967295"),
    "warmup": ({"warmup": 4}, "--warmup 4 must be less than the 4 steps of the run"),
    "fewer devices than one": ({"devices": -1}, "--devices is -1; give 1 or more"),
    "schedule": ({"schedule": "step"}, "--schedule 'step' is unknown; one of cosine"),
    "bfloat16 alone": ({"bf16": None}, "--bf16 needs --deepspeed"),
    "no DeepSpeed configuration": ({"deepspeed": "none.json"}, "--deepspeed none.json cannot be read"),
    "a budget for no gates": ({"write_budget": 0.1}, "--write-budget is 0.1, and the model .* has no write gates"),
    "devices": ({"devices": 2}, "--devices is of --dry-run"),
}


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_in_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], given: dict[str, Any], said: str
) -> None:
    line = [word for word in words(root, root / "refused", **given) if word != "None"]
    assert finetune.main(line) == 2
    _assert_line(capsys.readouterr().err, said)
    assert not (root / "refused").exists() and not (root / "refused.training").exists()


def test_folders_that_are_no_models_are_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(said: str, **changed: str) -> None:
        line = words(tmp_path, tmp_path / "out")
        line[2] = str(root / "text.txt")
        assert finetune.main(line) == 2
        _assert_line(capsys.readouterr().err, said)

    model = tmp_path / "model"
    refused("is no Hugging Face folder .* give one that tools/convert_hf.py export wrote")
    model.mkdir()
    (model / "adapter_config.json").write_text("{}")
    refused("holds a LoRA adapter and no model; merge it first")
    (model / "config.json").write_text('{"model_type": "llama"}')
    refused("holds a model of type 'llama'; give an exported atlas model")
    shutil.copytree(root / "model", model, dirs_exist_ok=True)
    whole = json.loads((model / "config.json").read_text())
    for key, value, said in (("seq_length", 0, "seq_length is 0, which"), ("dtype", "int8", "dtype is torch.int8")):
        (model / "config.json").write_text(json.dumps(whole | {key: value}))
        refused(said)
    (model / "config.json").write_text(json.dumps(whole))
    (model / "model.safetensors").unlink()
    refused("holds neither model.safetensors")
    (model / "model.safetensors").write_bytes(b"half a file")
    refused("the weights in .* cannot be read")
    code = (model / "cache_atlas.py").read_text()
    (model / "cache_atlas.py").write_text(code.replace("def detach(", "def other("))
    refused("is older than fine-tuning")
    (model / "modeling_atlas.py").unlink()
    refused("does not hold the model's code")


def test_a_run_that_is_done_says_so_and_nothing_is_written_over(
    root: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(tuned)
    assert finetune.main(words(root, tuned)) == 0
    assert f"{tuned} is done: these settings trained it for 4 steps" in capsys.readouterr().out
    others: dict[str, dict[str, Any]] = {"lr is 0.1, was 0.003": {"lr": 0.1}, "steps is 3, was 4": {"steps": 3}}
    for said, given in {**others, "detach_every is 1, was .left to": {"detach_every": 1}}.items():
        assert finetune.main(words(root, tuned, **given)) == 2
        _assert_line(capsys.readouterr().err, f"exists, of a run with other settings: {said}.*; nothing is written")
    assert bytes_of(tuned) == before
    # No place for a folder.
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken.training").write_text("mine")
    for out in (Path(), tmp_path / "..", tmp_path / "file/inside", tmp_path / "taken"):
        assert finetune.main(words(root, out)) == 2
        _assert_line(capsys.readouterr().err, "is no folder of its own|as a folder, and it is none")
    # Neither a folder of something else, nor one whose weights are not those that were written.
    (tmp_path / "other").mkdir()
    assert finetune.main(words(root, tmp_path / "other")) == 2
    _assert_line(capsys.readouterr().err, "exists and holds no finetune.json of a run; nothing is written over")
    shutil.copytree(tuned, tmp_path / "flipped")
    spoilt = bytearray((tuned / "model.safetensors").read_bytes())
    spoilt[-1] ^= 1
    (tmp_path / "flipped/model.safetensors").write_bytes(spoilt)
    assert finetune.main(words(root, tmp_path / "flipped")) == 2
    _assert_line(capsys.readouterr().err, "is not what was written: its checksum is")
    assert finetune.main(words(root, root / "model/inside")) == 2
    _assert_line(capsys.readouterr().err, "lies in the model's own folder")


def test_a_missing_deepspeed_names_its_command(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else found(name, *a))
    assert finetune.main(words(root, root / "refused", deepspeed=ZERO2)) == 2
    _assert_line(
        capsys.readouterr().err, r"deepspeed is not installed.* pip install -e '\.\[deepspeed\]' -c constraints.txt"
    )


def _assert_line(error: str, said: str) -> None:
    import re

    assert error.count("\n") == 1 and error.startswith("finetune: ") and re.search(said, error), error
