"""launch/: the exact commands, what is refused, and when a job requeues; SLURM and torchrun are stubs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atlas_megatron.parallel.world import RESUMES

ROOT = Path(__file__).parents[2]
LOCAL, SLURM, JOB, NODE = (ROOT / "launch" / name for name in ("local.sh", "slurm.sh", "job.sbatch", "node.sh"))
CONFIG = "configs/quickstart.toml"
TWO = [CONFIG, "--nodes", "2", "--gpus-per-node", "0", "train.micro_batch=2"]
# What atlas-train is in these tests: the report of a dry run as far as slurm.sh reads it. The first real one is below.
ATLAS_TRAIN = """
case " $* " in
  *" train.lr=bad "*) echo "atlas-train: train.lr='bad' is no number" >&2; exit 2;;
  *" memory="*) verdict="does not fit: pipeline rank 0 needs about 90 GiB" ;;
  *) verdict="fits: about 1 GiB" ;;
esac
printf '[run]\\ndirectory = "runs/quickstart"\\nseed = 1\\n\\n[train]\\n%s\\nwhat would change that:\\n' "$verdict"
"""
STUBS = {
    "torchrun": 'echo "torchrun $*; threads $OMP_NUM_THREADS; $(trap)"',
    "atlas-train": ATLAS_TRAIN,
    "sbatch": 'echo "sbatch $*" >>"$STUB_LOG"; echo 7',
    "sinfo": 'case " $* " in *" --partition gpu "*|*" --format %R "*) ;; *) exit 0;; esac; '
    'case " $* " in *" --partition nope "*) ;; *) echo gpu;; esac',
    "srun": 'echo "srun $*" >>"$STUB_LOG"; eval "$ON_SRUN"',
    "scontrol": 'case "$2" in hostnames) echo a1;; node) echo "NodeName=a1 NodeAddr=10.0.0.1 X";; '
    'job) echo "JobId=7 JobState=$STATE X";; *) echo "scontrol $*" >>"$STUB_LOG";; esac',
}


class Stubs:
    """A folder of stub commands, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "bin", folder / "called"
        self.folder.mkdir()
        self.log.touch()
        for name, body in STUBS.items():
            path = self.folder / name
            path.write_text(f"#!/usr/bin/env bash\n{body}\n")
            path.chmod(0o755)

    def run(self, script: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder}:{os.environ['PATH']}"
        given = {
            "PATH": path,
            "STUB_LOG": str(self.log),
            "ATLAS_BIN": str(self.folder),
            "ON_SRUN": ":",
            "STATE": "RUNNING",
        }
        environment = {"HOME": "/", "CUDA_VISIBLE_DEVICES": "", "SLURM_CPUS_ON_NODE": "8", **given, **environment}
        return subprocess.run(
            ["bash", str(script), *words], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )

    def called(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)


def test_the_scripts_parse_and_explain_themselves(stubs: Stubs) -> None:
    for file in filter(Path.is_file, (ROOT / "launch").iterdir()):
        subprocess.run(["bash", "-n", str(file)], check=True)
    for script in (LOCAL, SLURM):
        said = stubs.run(script, "--help")
        assert said.returncode == 0 and "examples:" in said.stdout and os.access(script, os.X_OK)


def test_every_launcher_says_its_versions_as_the_commands_do(stubs: Stubs) -> None:
    (stubs.folder / "atlas-train").write_text('#!/usr/bin/env bash\necho "atlas-train $*"\n')
    launchers = [file for file in (ROOT / "launch").glob("*.sh") if "usage()" in file.read_text()]
    assert {LOCAL, SLURM} < set(launchers)
    for script in launchers:
        said = stubs.run(script, CONFIG, "--version")
        assert (said.returncode, said.stdout, said.stderr) == (0, "atlas-train --version\n", "")
        absent = stubs.run(script, "--version", ATLAS_BIN="/nowhere")
        assert absent.returncode == 2 and absent.stderr.startswith(f"{script.name}: atlas-train is not in /nowhere")


@pytest.mark.parametrize(
    ("gpus", "words", "count"),
    [("", [], 1), ("0,1,2", [], 3), ("", ["--processes", "2"], 2), ("-1", ["--processes", "2"], 2), ("0,-1,2", [], 1)],
)
def test_local_says_its_command_and_becomes_it(stubs: Stubs, gpus: str, words: list[str], count: int) -> None:
    said = stubs.run(LOCAL, CONFIG, *words, "run.directory=runs/a b", CUDA_VISIBLE_DEVICES=gpus).stdout.splitlines()
    command = f"torchrun --standalone --nproc-per-node {count} -m atlas_megatron.train {CONFIG} run.directory=runs/a"
    assert said[0] == f"{stubs.folder}/{command}\\ b"
    assert said[1].startswith(f"{command} b; threads {8 // count if 8 // count <= 8 else 8}")
    dry = stubs.run(LOCAL, CONFIG, *words, "run.directory=runs/a b", "--dry-run", CUDA_VISIBLE_DEVICES=gpus)
    assert dry.stdout.splitlines() == said[:1]


def test_local_takes_torchrun_without_its_trace_where_python_lies_beside_it(stubs: Stubs) -> None:
    python = stubs.folder / "python"
    python.write_text('#!/usr/bin/env bash\necho "python $*"\nexit 2\n')
    python.chmod(0o755)
    said = stubs.run(LOCAL, CONFIG)
    command = f"python -m atlas_megatron.cli.torchrun --standalone --nproc-per-node 1 -m atlas_megatron.train {CONFIG}"
    assert said.stdout.splitlines() == [f"{stubs.folder}/{command}", command]
    assert said.returncode == 2


@pytest.mark.parametrize(
    ("limit", "before", "seconds"),
    [("5", "300", 300), ("00:05:00", "300", 300), ("5:00", "301", 300), ("1:00:00", "3600", 3600),
     ("0-1", "3600", 3600), ("1-01:01", "90060", 90060), ("2-0:0:9", "172809", 172809)],
)  # fmt: skip
def test_a_time_limit_that_leaves_no_time_to_train_is_refused(
    stubs: Stubs, limit: str, before: str, seconds: int
) -> None:
    words = [*TWO, "--dry-run", "--time", limit]
    refused = stubs.run(SLURM, *words, "--save-before", before)
    assert refused.returncode == 2 and stubs.called() == []
    assert f"--time {limit} is no longer than --save-before {before} (seconds); give more time" in refused.stderr
    assert stubs.run(SLURM, *words, "--save-before", str(seconds - 1)).returncode == 0


def test_a_job_that_cannot_train_does_not_wait_in_the_queue(stubs: Stubs) -> None:
    report = "[run]\\ndirectory = \"runs/a\"\\nfits: about 1 GiB\\ncannot train yet: data/a.idx does not exist\\n"
    (stubs.folder / "atlas-train").write_text(f"#!/usr/bin/env bash\nprintf '{report}'\n")
    said = stubs.run(SLURM, *TWO)
    assert said.returncode == 2 and said.stderr == "slurm.sh: data/a.idx does not exist\n" and stubs.called() == []
    dry = stubs.run(SLURM, *TWO, "--dry-run")
    assert dry.returncode == 0 and dry.stderr == "slurm.sh: cannot train yet: data/a.idx does not exist\n"


def test_of_a_sweep_every_run_has_what_it_trains_on(stubs: Stubs) -> None:
    """And the run without the sweep need not: the values may be what it lacks."""
    missing = "cannot train yet: {} does not exist"
    report = f"""case " $* " in
      *" data.train=here "*) ;;
      *" data.train=gone "*) echo '{missing.format("gone.idx")}' ;;
      *) echo '{missing.format("data.train")}' ;;
    esac
    printf '[run]\\ndirectory = "runs/a"\\nfits: about 1 GiB\\n'"""
    (stubs.folder / "atlas-train").write_text(f"#!/usr/bin/env bash\n{report}\n")
    said = stubs.run(SLURM, *TWO, "--logs", str(stubs.folder), "--array", "data.train=here,gone")
    assert (said.returncode, said.stderr, stubs.called()) == (2, "slurm.sh: gone.idx does not exist\n", [])
    said = stubs.run(SLURM, *TWO, "--logs", str(stubs.folder), "--array", "data.train=here")
    assert said.returncode == 0 and len(stubs.called()) == 1, said.stderr


def test_a_missing_sbatch_is_said_before_anything_is_checked(stubs: Stubs) -> None:
    (stubs.folder / "sbatch").unlink()
    (stubs.folder / "atlas-train").write_text("#!/usr/bin/env bash\ntouch \"$STUB_LOG.ran\"\nexit 1\n")
    # A PATH of its own: /usr/bin has an sbatch where SLURM is installed.
    for name in ("basename", "bash", "cat", "dirname", "realpath", "sed", "touch"):
        (stubs.folder / name).symlink_to(shutil.which(name) or name)
    said = stubs.run(SLURM, *TWO, PATH=str(stubs.folder))
    assert said.returncode == 2 and "sbatch is not on PATH" in said.stderr
    assert not stubs.log.with_name("called.ran").exists()


def test_a_configs_path_may_hold_an_equals_sign(stubs: Stubs, tmp_path: Path) -> None:
    config = tmp_path / "run-train.lr=1e-3" / "config.toml"
    config.parent.mkdir()
    config.write_text((ROOT / CONFIG).read_text())
    for words in ((LOCAL, str(config)), (SLURM, str(config), "--nodes", "1", "--dry-run")):
        said = stubs.run(words[0], *words[1:], "train.lr=1e-4")
        assert said.returncode == 0 and f"{config} train.lr=1e-4" in said.stdout, said.stderr


def test_slurm_submits_exactly_this(stubs: Stubs, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    words = [
        CONFIG,
        "--nodes",
        "16",
        "--gpus-per-node=8",
        "--time",
        "24:00:00",
        "--partition",
        "gpu",
        "--account",
        "me",
    ]
    words += ["--logs", str(logs), "--requeue-limit", "5", "--sbatch=--qos=high", "parallel.tensor=2"]
    said = stubs.run(SLURM, *words)
    assert said.returncode == 0, said.stderr
    expected = (
        f"sbatch --parsable --job-name quickstart --nodes 16 --ntasks-per-node 1 --chdir {ROOT} --signal B:USR1@300 "
        "--gpus-per-node 8 --exclusive --mem 0 --time 24:00:00 --partition gpu --account me --qos=high "
        f"--output {logs}/%x-%j.out {JOB} launch={ROOT}/launch processes=8 gpus=8 limit=5 logs={logs} "
        f"directory=runs/quickstart torchrun={stubs.folder}/torchrun container= sweep= -- {CONFIG} parallel.tensor=2"
    )
    assert expected in said.stdout.splitlines()
    assert stubs.called() == [expected]
    assert f"job 7; its logs: {logs}/quickstart-7*" in said.stdout
    assert logs.is_dir()


def test_a_dry_run_needs_no_slurm_and_submits_nothing(stubs: Stubs) -> None:
    (stubs.folder / "sbatch").unlink()
    (stubs.folder / "sinfo").unlink()
    said = stubs.run(SLURM, *TWO, "--partition", "nope", "--processes-per-node", "4", "--dry-run", PATH=_bare(stubs))
    assert said.returncode == 0, said.stderr
    assert (
        "sbatch --parsable" in said.stdout
        and "processes=4 gpus=0" in said.stdout
        and "gpus-per-node" not in said.stdout
    )
    refused = stubs.run(SLURM, *TWO, PATH=_bare(stubs))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and "sbatch is not on PATH" in refused.stderr


def _bare(stubs: Stubs) -> str:
    """A PATH on which no real SLURM is."""
    folder = stubs.folder.parent / "bare"
    folder.mkdir(exist_ok=True)
    for name in ("bash", "dirname", "basename", "grep", "sed", "tail", "cat", "mkdir"):
        if not (folder / name).exists():
            (folder / name).symlink_to(shutil.which(name) or name)
    return f"{stubs.folder}:{folder}"


def test_a_sweep_checks_every_value_and_gives_each_a_directory(stubs: Stubs) -> None:
    said = stubs.run(SLURM, *TWO, "--dry-run", "--array", "train.lr=1e-3,3e-3,6e-3", "run.directory=runs/x").stdout
    assert "--array 0-2 " in said and "%x-%A_%a.out" in said and "sweep=train.lr=1e-3\\,3e-3\\,6e-3" in said
    assert "directory=runs/quickstart" in said and "run.directory" not in said
    refused = stubs.run(SLURM, *TWO, "--dry-run", "--array", "train.lr=1e-3,bad")
    assert refused.returncode == 2 and "train.lr='bad' is no number" in refused.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "no config was given"),
        (["nowhere.toml", "--nodes", "1"], "config 'nowhere.toml' cannot be read"),
        ([CONFIG], "--nodes is missing"),
        ([CONFIG, "--nodes"], "--nodes came without a value"),
        ([CONFIG, "--nodes", "0"], "--nodes 0 is no whole number of at least 1"),
        ([CONFIG, "--nodes", "1", "--gpus", "8"], "option '--gpus' is unknown"),
        ([CONFIG, "--nodes", "1", "--time", "soon"], "--time soon is no time"),
        ([CONFIG, "--nodes", "1", "--array", "lr=3"], "--array lr=3 is no sweep"),
        ([CONFIG, "--nodes", "1", "--processes-per-node", "2"], "a GPU has one process"),
        ([CONFIG, "--nodes", "1", "--partition", "nope"], "--partition nope does not exist; choose one of gpu"),
        ([CONFIG, "--nodes", "1", "train.lr=bad"], "1 nodes of 8: atlas-train: train.lr='bad' is no number"),
        ([CONFIG, "--nodes", "1", "--memory-per-gpu", "80GiB"], "--memory-per-gpu 80GiB is too little"),
        ([CONFIG, "--nodes", "1", "--job-name", "a/b"], "--job-name 'a/b' becomes a folder's name"),
        ([CONFIG, "--nodes", "1", "--job-name", "a\nb"], "--job-name 'a b' becomes a folder's name"),
        ([CONFIG, "--nodes", "1", "--time", ""], "--time came without a value"),
        ([CONFIG, "--nodes", "1", "--partition="], "--partition came without a value"),
        ([CONFIG, "--nodes", "1", "--time", "9" * 20], "is no time; write minutes"),
        ([CONFIG, "--nodes", "1", "--array", "train.lr=1\n2"], "is no sweep; write section.key=A,B,C"),
        ([CONFIG, "--nodes", "1", "--array", "data.train=a/b,a_b"], "makes two runs of runs/quickstart-data.train=a_b"),
        ([CONFIG, "--nodes", "1", "--logs", "/dev/null"], "--logs /dev/null cannot be made; give a folder of yours"),
    ],
)
def test_slurm_refuses_before_it_submits(stubs: Stubs, words: list[str], reason: str) -> None:
    said = stubs.run(SLURM, *words)
    assert said.returncode == 2
    assert said.stderr.splitlines()[-1].startswith("slurm.sh: ") and reason in said.stderr.splitlines()[-1]
    assert stubs.called() == []


def test_the_real_dry_run_is_what_slurm_reads(stubs: Stubs) -> None:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    train = stubs.folder / "atlas-train"
    train.write_text(f'#!/bin/sh\nPYTHONPATH={paths} exec {sys.executable} -m atlas_megatron.train "$@"\n')
    said = stubs.run(SLURM, *TWO, "--dry-run", "run.directory=runs/mine", OMP_NUM_THREADS="1")
    assert "directory=runs/mine" in said.stdout and "fits: about" in said.stdout
    refused = stubs.run(SLURM, *TWO, "--processes-per-node", "3", "--dry-run", OMP_NUM_THREADS="1")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "train.global_batch=8 is not a multiple of" in refused.stderr and "nearest: 12" in refused.stderr


def job(stubs: Stubs, *words: str, restarts: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    root = stubs.folder.parent
    given = {"launch": ROOT / "launch", "processes": 1, "gpus": 0, "limit": 1, "logs": root / "logs"}
    given |= {"directory": root / "run", "torchrun": "torchrun", "container": "", "sweep": ""}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "a", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    slurm["SLURM_RESTART_COUNT"] = str(restarts)
    parts = [word for word in words if not word.startswith("-")]
    header = [f"{name}={value}" for name, value in given.items()] + parts
    return stubs.run(JOB, *header, "--", CONFIG, **slurm, **environment)


def saved(root: Path, step: int, steps: int = 10) -> str:
    """A command that leaves a whole checkpoint of this step, as a start of a run of so many steps would."""
    folder = f"{root}/run/checkpoints/step_{step:08d}"
    whole = f"mkdir -p {folder}; touch {folder}/complete.json"
    return f"{whole}; printf '[train]\\nsteps = {steps}\\n' >{root}/run/config.toml"


def test_a_finished_run_ends_its_job(stubs: Stubs, tmp_path: Path) -> None:
    said = job(stubs, ON_SRUN=saved(tmp_path, 10))
    assert said.returncode == 0 and "job 7: done at step 10" in said.stdout
    (srun,) = stubs.called()
    assert "rendezvous=10.0.0.1:15007" in srun and "--kill-on-bad-exit=1" in srun and srun.endswith(f"-- {CONFIG}")


def test_a_run_that_stopped_early_is_requeued_while_it_gets_on(stubs: Stubs, tmp_path: Path) -> None:
    for restarts, (act, requeued) in enumerate(
        [(saved(tmp_path, 4), True), (f"{saved(tmp_path, 6)}; exit 1", True), ("exit 1", True), ("exit 1", False)]
    ):
        before = len(stubs.called())
        said = job(stubs, restarts=restarts, ON_SRUN=act)
        assert ("scontrol requeue 7" in stubs.called()[before:]) == requeued, said.stdout
    assert said.returncode == 1
    assert "stopped: 2 starts brought no checkpoint past step 6" in said.stdout
    # SLURM itself requeues after a lost node: that start gives up before it trains.
    before = len(stubs.called())
    assert job(stubs, restarts=4).returncode == 1 and len(stubs.called()) == before


def test_a_half_written_checkpoint_is_no_progress(stubs: Stubs, tmp_path: Path) -> None:
    parent = tmp_path / "run/checkpoints"
    half = f"mkdir -p {parent}/step_00000009.unfinished {parent}/step_00000008"
    said = job(
        stubs, ON_SRUN=f"{saved(tmp_path, 3)}; {half}; touch {parent}/step_00000009.unfinished/complete.json"
    )
    assert "requeued; it will go on from step 3" in said.stdout


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "TIMEOUT"])
def test_what_slurm_ends_is_not_requeued(stubs: Stubs, state: str) -> None:
    said = job(stubs, STATE=state)
    assert f"is {state} by SLURM's word: not requeued here" in said.stdout
    assert [line for line in stubs.called() if line.startswith("scontrol")] == []


@pytest.mark.parametrize(
    ("line", "requeued"),
    [
        ("atlas-train: data.train=nowhere", False),
        ("atlas-train: step 3: loss is nan, first seen in layer 1", False),
        (f"atlas-train: rank 1 of 2 lost the others within parallel.timeout_minutes=30; then {RESUMES}", True),
        (f"atlas-train: rank 1 of 2 hung: no step was finished; {RESUMES}", True),
        ("atlas-train: the checkpoint of step 6 was not saved; make room, then start the same command again", False),
        ("atlas-train: runs/a is in use by process 7 on n2", False),
        ("atlas-train: no checkpoint of runs/a is left undamaged", False),
        ("atlas-train: unforeseen: AcceleratorError: CUDA error: an uncorrectable ECC error; the traceback", True),
        ("CUDA error: an uncorrectable memory error was encountered", True),
    ],
)
def test_only_what_a_restart_mends_is_requeued(stubs: Stubs, tmp_path: Path, line: str, requeued: bool) -> None:
    logs = tmp_path / "logs/a-7/start-0/n1"
    logs.mkdir(parents=True)
    said = job(stubs, ON_SRUN=f"echo '{line}' >{logs}/stderr.log; exit 1")
    assert ("scontrol requeue 7" in stubs.called()) == requeued
    assert ("a restart would change nothing: " + line in said.stdout) == (not requeued)


def test_what_a_restart_mends_says_what_the_job_looks_for() -> None:
    assert f"{RESUMES}$" in JOB.read_text()
    for module in ("parallel/world.py", "resilience/watchdog.py"):
        assert "{RESUMES}" in (ROOT / "atlas_megatron" / module).read_text()


def test_a_signal_goes_on_to_the_step(stubs: Stubs, tmp_path: Path) -> None:
    # The stub is what srun is to its tasks; the batch script is its parent.
    act = (
        f'trap "{saved(tmp_path, 5)}; exit 0" USR1; kill -USR1 $PPID; for i in $(seq 100); do sleep 0.05; done; exit 9'
    )
    said = job(stubs, ON_SRUN=act)
    assert "the time limit is near: saving" in said.stdout
    assert "the time limit is near: requeued; it will go on from step 5" in said.stdout


def test_a_signal_that_comes_too_early_is_sent_again(stubs: Stubs, tmp_path: Path) -> None:
    late = f'sleep 1; trap "{saved(tmp_path, 5)}; exit 0" USR1; for i in $(seq 300); do sleep 0.05; done; exit 9'
    said = job(stubs, ON_SRUN=f"trap '' USR1; kill -USR1 $PPID; {late}")
    assert "the time limit is near: requeued; it will go on from step 5" in said.stdout


def test_an_element_of_a_sweep_is_a_run_of_its_own(stubs: Stubs, tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    said = job(stubs, "sweep=train.lr=1e-3,3e-3", **array)
    srun, requeue = stubs.called()
    assert srun.endswith(f"-- {CONFIG} train.lr=3e-3 run.directory={tmp_path}/run-train.lr=3e-3"), said.stderr
    assert requeue == "scontrol requeue 7_1"


def node(stubs: Stubs, *words: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], str]:
    logs = stubs.folder.parent / "logs"
    given = {"nodes": 2, "processes": 4, "gpus": 0, "rendezvous": "127.0.0.1:1", "id": "7-0", "logs": logs}
    given |= {"start": "start-0", "torchrun": stubs.folder / "torchrun", "container": ""}
    slurm = {"SLURM_NODEID": "0", "SLURMD_NODENAME": "n1"} | environment
    header = [f"{name}={value}" for name, value in given.items()]
    said = stubs.run(NODE, *header, *words, "--", CONFIG, **slurm)
    log = logs / "node-n1.log"
    return said, log.read_text() if log.is_file() else ""


def test_a_node_becomes_one_torchrun_that_ignores_what_is_meant_for_its_processes(stubs: Stubs, tmp_path: Path) -> None:
    said, log = node(stubs)
    command = (
        "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:1 --rdzv-id 7-0 "
        "--rdzv-conf is_host=1 --max-restarts 0 --signals-to-handle SIGINT,SIGHUP,SIGQUIT "
        f"--log-dir {tmp_path}/logs/start-0/n1 --tee 3 -m atlas_megatron.train {CONFIG}; threads 2; "
    )
    assert command in log, said.stderr
    assert "trap -- '' SIGTERM" in log and "trap -- '' SIGUSR1" in log


def test_in_an_image(stubs: Stubs) -> None:
    (stubs.folder / "apptainer").write_text('#!/bin/sh\necho "apptainer $*"\n')
    (stubs.folder / "apptainer").chmod(0o755)
    assert f"apptainer exec --nv --bind {ROOT}," in node(stubs, "container=apptainer:a.sif", "gpus=4")[1]
    job(stubs, "container=pyxis:nvcr.io/a:1")
    assert f"--container-image nvcr.io/a:1 --container-mounts {ROOT}:{ROOT}" in stubs.called()[0]


def test_a_port_in_use_is_one_line(stubs: Stubs) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said, log = node(stubs, f"rendezvous=127.0.0.1:{port}")
        assert (said.returncode, said.stderr.count("\n"), log) == (1, 1, "")
        assert f"port {port} of n1 is in use" in said.stderr
        # The other nodes come to this port.
        assert node(stubs, f"rendezvous=127.0.0.1:{port}", SLURM_NODEID="1")[0].returncode == 0
