"""launch/ladder.sh: every rung is checked before the first starts; what is started is slurm.sh's or local.sh's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.test_scripts import ROOT, Stubs

LADDER = ROOT / "launch" / "ladder.sh"
GPU = "configs/scale/gpu.list"


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A list of two rungs beside their configs, as a user would write one: comments, and no newline at its end."""
    for name in ("small", "large"):
        (tmp_path / f"{name}.toml").write_text("[run]\n")
    path = tmp_path / "short.list"
    path.write_text("# two\nsmall.toml 1\n\nlarge.toml 4  # slow")
    return path


def test_each_rung_is_submitted_on_its_nodes(stubs: Stubs, tmp_path: Path) -> None:
    words = [GPU, "--partition", "gpu", "--time=24:00:00", "--logs", str(tmp_path / "logs"), "memory.preset=omeganet"]
    said = stubs.run(LADDER, *words, "--rungs", "20m,7b", "--runs", "runs/omeganet/")
    assert said.returncode == 0, said.stderr
    first, second = stubs.called()
    for called, name, nodes in ((first, "20m", 1), (second, "7b", 8)):
        assert f"--job-name {name} --nodes {nodes} " in called and "--time 24:00:00 --partition gpu" in called
        end = f"-- configs/scale/{name}.toml memory.preset=omeganet run.directory=runs/omeganet/{name}"
        assert called.endswith(end)


def test_a_dry_run_starts_nothing(stubs: Stubs) -> None:
    said = stubs.run(LADDER, GPU, "--dry-run")
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("sbatch --parsable") == 9 and stubs.called() == []
    local = stubs.run(LADDER, "configs/scale/cpu.list", "--dry-run", "--local")
    assert [line.split()[-1] for line in local.stdout.splitlines()] == [
        f"configs/scale/{name}.toml" for name in ("0.15m", "0.3m", "0.6m", "1.2m")
    ]


def test_a_list_of_another_systems_editor_is_read(stubs: Stubs, short: Path) -> None:
    short.write_bytes(b"\xef\xbb\xbf" + short.read_bytes().replace(b"# two\n", b"").replace(b"\n", b"\r\n"))
    said = stubs.run(LADDER, str(short), "--dry-run")
    assert said.returncode == 0 and said.stdout.count("sbatch --parsable") == 2, said.stderr


def test_locally_what_a_later_rung_lacks_is_said_before_the_first_trains(stubs: Stubs, short: Path) -> None:
    short.write_text("small.toml 1\nlarge.toml 1")
    lacks = "#!/usr/bin/env bash\necho fits\n[[ $1 != *large.toml ]] || echo 'cannot train yet: a.idx does not exist'\n"
    (stubs.folder / "atlas-train").write_text(lacks)
    said = stubs.run(LADDER, str(short), "--local")
    assert said.returncode == 2 and said.stderr.endswith("ladder.sh: large: a.idx does not exist\n")
    assert "torchrun" not in said.stdout
    assert stubs.run(LADDER, str(short), "--local", "--dry-run").returncode == 0


def test_locally_one_after_the_other_until_one_fails(stubs: Stubs, short: Path) -> None:
    refused = stubs.run(LADDER, str(short), "--local")
    assert refused.returncode == 2 and "large wants 4 nodes, and --local is this machine" in refused.stderr
    assert refused.stdout == ""
    short.write_text("small.toml 1\nlarge.toml 1")
    said = stubs.run(LADDER, str(short), "--local", "--processes", "2", "train.steps=5")
    assert said.returncode == 0, said.stderr
    trained = [line for line in said.stdout.splitlines() if line.startswith("torchrun ")]
    assert [f"-m atlas_megatron.train {short.parent}/{name}.toml train.steps=5" in line for name, line in zip(
        ("small", "large"), trained, strict=True)] == [True, True]  # fmt: skip
    (stubs.folder / "torchrun").write_text("#!/bin/sh\nexit 1\n")
    failed = stubs.run(LADDER, str(short), "--local")
    assert failed.returncode == 2 and "small.toml was not started or did not end well" in failed.stderr
    assert "large.toml" not in failed.stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "no list was given"),
        (["nowhere.list"], "list 'nowhere.list' cannot be read"),
        ([GPU, "--rungs", "20m,35m"], "rung '35m' is not in configs/scale/gpu.list; it has: 20m 40m 85m"),
        ([GPU, "--nodes", "2"], "--nodes came with a list"),
        ([GPU, "--array", "train.lr=1e-3,3e-3"], "--array is of one job"),
        ([GPU, "run.directory=runs/x"], "would be the directory of every rung; write --runs DIR"),
        ([GPU, "--partition", "gpu", "--gpus", "8"], "20m: option '--gpus' is unknown"),
        ([GPU, "--partition", "nope"], "--partition nope does not exist"),
        ([GPU, "train.lr=bad"], "20m: 1 nodes of 8: atlas-train: train.lr='bad' is no number"),
        ([GPU, "--memory-per-gpu", "8GiB"], "20m: --memory-per-gpu 8GiB is too little for 1 nodes of 8"),
        ([GPU, "--local", "--processes", "0"], "20m: local.sh: --processes 0 is no whole number"),
    ],
)
def test_nothing_starts_where_something_is_wrong(stubs: Stubs, words: list[str], reason: str) -> None:
    said = stubs.run(LADDER, *words)
    assert said.returncode == 2
    assert reason in said.stderr
    assert stubs.called() == [] and "torchrun" not in said.stdout


@pytest.mark.parametrize("line", ["large.toml", "large.toml four", "large.toml 2 3", "large.toml 0"])
def test_a_list_that_is_none_is_refused(stubs: Stubs, short: Path, line: str) -> None:
    short.write_text(f"small.toml 1\n{line}\n")
    said = stubs.run(LADDER, str(short))
    assert said.returncode == 2 and "is no rung; write a config and its nodes" in said.stderr and stubs.called() == []
    short.write_text("small.toml 1\nsmall.toml 2\n")
    assert "rung 'small' is in " in stubs.run(LADDER, str(short)).stderr
    short.write_text("# nothing\n")
    assert "has no rung; write lines" in stubs.run(LADDER, str(short)).stderr
    short.write_text("gone.toml 1\n")
    assert "gone.toml' cannot be read" in stubs.run(LADDER, str(short)).stderr


def test_it_explains_itself(stubs: Stubs) -> None:
    said = stubs.run(LADDER, "--help")
    assert said.returncode == 0 and "examples:" in said.stdout
