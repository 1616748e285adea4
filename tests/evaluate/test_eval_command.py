"""atlas-eval on a run and on its export: results, pictures, going on, and one line where something is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.cli.options import lengths_of
from atlas_megatron.config import load
from atlas_megatron.evaluate import command
from atlas_megatron.evaluate.command import main
from atlas_megatron.hf.export import export
from atlas_megatron.model.build import build_model
from atlas_megatron.parallel import world
from tests.support import tiny_run

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of weights, that has not trained."""
    root = tmp_path_factory.mktemp("run")
    config = load(tiny_run.write(root, "M-"), ["memory.preset=omeganet"])
    with tiny_run.a_world_that_is_left():
        world.join(config)
        checkpoint.save_weights(build_model(config), replace(config))
    return root / "run"


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    (folder / "book.txt").write_text("The window of the text says what the memory learns. " * 80, encoding="utf-8")
    return folder


def evaluate(*words: object) -> int:
    with tiny_run.a_world_that_is_left():
        return main([str(word) for word in words])


@pytest.mark.slow
def test_a_run_is_measured_and_what_is_done_is_not_done_again(
    run: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["babilong_qa1", "niah_single_1", "perplexity", "mad_fuzzy_recall", run, "--lengths", "1500,1600"]
    asked += ["--filler", books, "--text", books / "book.txt", "--samples", 3, "--batch", 2, "--out", tmp_path]
    assert evaluate(*asked) == 0
    first = capsys.readouterr().out
    for task, cells, metric in (
        ("babilong_qa1", 4, "exact"), ("niah_single_1", 4, "string_match"),
        ("perplexity", 7, "bits per byte"), ("mad_fuzzy_recall", 4, "accuracy"),
    ):  # fmt: skip
        content = json.loads((tmp_path / f"{task}.json").read_text())
        assert len(content["cells"]) == cells and {"commit", "versions", "machine"} <= set(content)
        assert content["command"].startswith("atlas-eval babilong_qa1 niah_single_1")
        assert content["settings"]["checkpoint"] == "step_00000000"
        assert (tmp_path / f"{task}.png").read_bytes().startswith(PNG)
        assert metric in first
    stored = (tmp_path / "niah_single_1.json").read_text()
    # More of the same goes on; what is there stays.
    again = ("niah_single_1", run, "--lengths", "1500,1600", "--out", tmp_path)
    assert evaluate(*again, "--samples", 4, "--batch", 2) == 0
    assert "niah_single_1: 1,500 tokens, examples 3 to 4 of 4 (" in capsys.readouterr().out
    cells = json.loads((tmp_path / "niah_single_1.json").read_text())["cells"]
    assert json.loads(stored)["cells"].items() <= cells.items() and len(cells) == 6
    # Another seed is another measurement.
    assert evaluate(*again, "--seed", 1) == 2
    assert "was made with other constants (seed)" in capsys.readouterr().err


def test_what_is_measured_is_what_was_read(
    run: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged checkpoint is named, and results go under the one before it; other weights are another measurement."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = load(run / "checkpoints/step_00000000/config.toml")
    newer = copy / "checkpoints/step_00000001"
    shutil.copytree(copy / "checkpoints/step_00000000", newer)
    marker = newer / "complete.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"step": 1}))
    file = next(newer.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    asked = ("mqar", "perplexity", copy, "--lengths", "64,4K", "--samples", 1, "--text", books / "book.txt")
    asked = (*asked, "--out", tmp_path / "out")
    assert evaluate("mqar", *asked[2:]) == 0
    said = capsys.readouterr().err
    assert "skipped the damaged checkpoint" in said and "ids for 145 tokens: longer ones are left out" in said
    content = json.loads((tmp_path / "out/mqar.json").read_text())
    assert content["settings"]["checkpoint"] == "step_00000000" and len(content["cells"]) == 1

    with tiny_run.a_world_that_is_left():
        config = replace(config, run=replace(config.run, directory=str(copy), seed=4))
        world.join(config)
        checkpoint.save_weights(build_model(config), config)
    assert evaluate("mqar", *asked[2:]) == 2
    assert "was made with other constants (weights)" in capsys.readouterr().err


def test_results_name_the_benchmark_and_its_edition(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("mqar", "mqar@zoology", "mad_fuzzy_recall@mad", run, "--lengths", 64, "--samples", 1, "--out", tmp_path)
    assert evaluate(*asked) == 0
    said = capsys.readouterr().out
    for name, source in (("mqar", "ours"), ("mqar@zoology", "zoology"), ("mad_fuzzy_recall@mad", "mad")):
        assert json.loads((tmp_path / f"{name}.json").read_text())["settings"]["source"] == source
        assert f"{name} ({source})" in said
    for name, message in (
        ("vt@2023-01-01", "choose one of vt, vt@2024-12-04 (vt is RULER 2025-05-13)"),
        ("mqar@mad", "choose one of mqar, mqar@zoology, mad_in_context_recall, "),
        ("perplexity@mad", "perplexity has one edition"),
    ):
        assert evaluate(name, run, "--out", tmp_path) == 2
        said = capsys.readouterr().err
        assert f"there is no task {name!r}" in said and message in said and said.count("\n") == 1


def test_an_export_says_what_its_run_says(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "model")
    found = []
    for model in (run, tmp_path / "model"):
        asked = ("niah_single_1", model, "--lengths", "1500", "--samples", 2, "--out", tmp_path / "out" / model.name)
        assert evaluate(*asked) == 0
        cells = json.loads((tmp_path / "out" / model.name / "niah_single_1.json").read_text())["cells"]
        found.append([example["questions"] for cell in cells.values() for example in cell["examples"]])
    assert found[0] == found[1] and len(found[0]) == 2


def test_official_stories_are_told(run: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qa1_single-supporting-fact_test.txt").write_text(
        "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"
    )
    asked = ("babilong_qa1", run, "--lengths", "800", "--samples", 1, "--filler", books, "--out", tmp_path / "out")
    assert evaluate(*asked, "--stories", tmp_path) == 0
    (cell,) = json.loads((tmp_path / "out" / "babilong_qa1.json").read_text())["cells"].values()
    assert cell["examples"][0]["questions"][0]["answers"] == ["bathroom"]
    capsys.readouterr()
    assert evaluate("niah_single_1", run, "--out", tmp_path / "other", "--stories", tmp_path) == 2
    assert evaluate("babilong_qa2", run, "--out", tmp_path / "other", "--stories", tmp_path, "--filler", books) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "niah_single_1 tells none of its stories" in first and "holds 0 files qa2_*_test.txt" in second


def test_rows_of_babilong_are_asked(run: Path, books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1/0k.json").write_text(json.dumps([{"input": "A.", "question": "Where? \n", "target": "b "}]))
    asked = ("babilong_qa1", run, "--filler", books, "--stories", tmp_path)
    assert evaluate(*asked, "--out", tmp_path / "alone", "--lengths", "0", "--samples", 1) == 0
    (cell,) = json.loads((tmp_path / "alone" / "babilong_qa1.json").read_text())["cells"].values()
    assert cell["examples"][0]["questions"][0]["answers"] == ["b"]
    rows = [
        {"input": "Mary moved to the bathroom. " * 9, "question": "Where is Mary?", "target": "bathroom"},
        {"input": "John went to the office.", "question": "Where is John?", "target": "office"},
    ]
    (tmp_path / "qa1/4k.json").write_text(json.dumps(rows))
    asked = ("babilong_qa1", run, "--filler", books, "--stories", tmp_path, "--out", tmp_path / "out")
    assert evaluate(*asked, "--lengths", "4K", "--samples", 2) == 0
    (cell,) = json.loads((tmp_path / "out" / "babilong_qa1.json").read_text())["cells"].values()
    told = {example["name"]: example["questions"][0]["answers"] for example in cell["examples"]}
    assert told == {"babilong_qa1/0": ["bathroom"], "babilong_qa1/1": ["office"]}
    capsys.readouterr()
    assert evaluate(*asked, "--lengths", "4K", "--samples", 3) == 2
    assert evaluate(*asked, "--lengths", "8K", "--samples", 1) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert (
        "holds 2 rows of 4096 tokens" in first and "no rows of 8,192 tokens" in second and second.endswith(": 0k, 4k")
    )


def test_lengths_are_read() -> None:
    assert lengths_of("4K,1000, 10M,1000") == (1000, 4096, 10 * 2**20)
    for wrong in ("", "4G", "1K,,2K", "-5", "1.5K"):
        with pytest.raises(ValueError, match="is no length; write for example 1000,4K,10M"):
            lengths_of(wrong)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["niah_singel_1", "RUN"], "there is no task 'niah_singel_1'; did you mean 'niah_single_1'?"),
        (["niah_single_1", "RUN", "--lengths", "4x"], "'4x' is no length"),
        (["niah_single_1", "RUN", "--batch", "0"], "--batch 0 must be at least 1"),
        (["niah_single_1", "RUN", "--lengths", "20"], "in 20 tokens: its facts and its question alone take"),
        (["niah_single_1", "nowhere"], "nowhere is no folder; give the directory of a run or an exported model"),
        (["perplexity", "RUN", "--lengths", "100K"], "holds 384 tokens; a context of 102,400 needs 102,529"),
        (["perplexity", "RUN", "--text", "nothing"], "nothing.idx does not exist"),
        (["babilong_qa1", "RUN", "--filler", "nowhere"], "filler folder 'nowhere' does not exist"),
        (["mqar", "RUN", "--lengths", "4K"], "a vocabulary of 272 has ids for 145 tokens; choose --lengths up to that"),
        (["mqar", "RUN", "--lengths", "0,64"], "0 tokens are of BABILong's tasks alone"),
    ],
)
def test_bad_input_is_one_line(
    run: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [str(run) if word == "RUN" else word for word in words]
    assert evaluate(*named, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith("atlas-eval: ")
    assert not (tmp_path / "out").exists()


def test_results_have_a_place_before_anything_is_measured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("measured what cannot be kept"))
    (tmp_path / "file").touch()
    assert evaluate("perplexity", run, "--out", tmp_path / "file" / "out") == 2
    said = capsys.readouterr().err
    assert f"but {tmp_path}/file is no folder; give another --out" in said and said.count("\n") == 1


def test_help_has_examples_and_every_task() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "atlas_megatron.evaluate.command", "--help"], capture_output=True, text=True, check=True
    )
    assert all(word in done.stdout for word in ("examples:", "babilong_qa5", "mqar", "perplexity", "vt"))
