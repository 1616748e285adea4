"""docs/cluster_run.md: its commands, from the page, one after the other at a small size; text in, generated text out.

2M parameters by default. ATLAS_REHEARSAL=20m takes the ladder's 20M: 16 minutes on one core, with one thread.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atlas_megatron.checkpoint import step_folders
from atlas_megatron.data.corpus import Summary, standard_library
from atlas_megatron.training.metrics import read

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/cluster_run.md").read_text()
CONFIG = "mine-340m.toml"
STEPS = 8
COMMON = (
    "train.global_batch=8 train.micro_batch=1 train.warmup_steps=2 train.validate_every=5 "
    "train.validate_sequences=8 train.log_every=1 train.stats_every=5 train.precision=\"float32\" checkpoint.every=5"
)
# Overrides of the page's configuration, the tokenizer's vocabulary, parameters at the least and at the most.
SIZES = {
    "2m": (
        "model.pattern=\"M-M-M-M-\" model.hidden_size=192 model.ffn_hidden_size=512 model.vocab_size=512 "
        "model.seq_length=256 memory.heads=6 memory.head_dim=32",
        512, 1.5e6, 2.5e6,
    ),
    "20m": (
        "model.pattern=\"M-M-M-M-M-M-M-M-M-M-M-\" model.hidden_size=256 model.ffn_hidden_size=768 "
        "model.vocab_size=4096 model.seq_length=512 memory.heads=4",
        4096, 9e6, 21e6,
    ),
}  # fmt: skip


def commands() -> list[str]:
    """The page's commands, in order, but for those of SLURM."""
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    return [line for line in blocks.splitlines() if line and not line.startswith("launch/slurm.sh")]


def small(command: str, overrides: str, vocabulary: int) -> str:
    """A command of the page at the rehearsal's size."""
    for long, short in (
        ("--train-tokenizer 32000 --workers 8", f"--train-tokenizer {vocabulary} --validation 0.1 --dedup --workers 2"),
        ("--lengths 4K,32K", "--lengths 1K --samples 2"),
        ("'In the beginning'", "'In the beginning' --tokens 12"),
        ("train.steps=20", "train.steps=3"),
    ):
        command = command.replace(long, short)
    return f"{command} {overrides}" if re.match(r"(atlas-train|launch/local\.sh) ", command) else command


def write_config(folder: Path) -> None:
    """Step 3 of the page: the shipped configuration with the page's own lines in the place of its."""
    text = (ROOT / "configs/atlas-340m.toml").read_text()
    (own,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in own.splitlines():
        if "=" in line:
            text, found = re.subn(rf"^{line.split(' ')[0]} = .*$", line, text, flags=re.MULTILINE)
            assert found == 1, line
    (folder / CONFIG).write_text(text)


class Rehearsal:
    """A folder in which the page's relative paths lead to the checkout, and to data of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("tools", "configs", "launch"):
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").symlink_to(sys.prefix)
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), "OMP_NUM_THREADS": "1",
            "ATLAS_BIN": str(Path(sys.executable).parent), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip

    def start(self, command: str) -> subprocess.Popen[str]:
        out = (self.folder / "said.txt").open("w")
        with out:
            return subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, stdout=out,
                stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def do(self, command: str) -> str:
        status = self.start(command).wait(timeout=1800)
        assert status == 0, f"{command}: {status}\n{self.said()}"
        return self.said()


def write_corpus(folder: Path, size: int) -> None:
    """Python's own sources as two files of JSON lines, one of them twice."""
    folder.mkdir()
    files = standard_library(size)
    texts = [file.read_text() for file in files]
    for number, part in enumerate((texts[::2], [*texts[1::2], texts[0]])):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))


@pytest.mark.slow
def test_the_page_from_text_to_an_exported_model(tmp_path: Path) -> None:
    size, vocabulary, least, most = SIZES[os.environ.get("ATLAS_REHEARSAL", "2m")]
    here, run = Rehearsal(tmp_path), tmp_path / "runs/mine-340m"
    write_corpus(tmp_path / "corpus", 600_000)
    write_config(tmp_path)
    prepare, dry, plan, trial, plot, evaluate, export, generate = (
        small(command, f"{size} {COMMON}", vocabulary) for command in commands()
    )

    here.do(prepare)
    summary = Summary.read(tmp_path / "data/mine")
    assert summary is not None and summary.duplicates >= 1
    said = here.do(dry.replace("configs/atlas-340m.toml", CONFIG))
    parameters = re.search(r"parameters\W+([\d,]+)", said)
    assert parameters and least < int(parameters[1].replace(",", "")) < most
    assert "epochs of its" in said and "cannot train yet" not in said
    assert "devices of" in here.do(plan.replace(f" {size} {COMMON}", ""))
    here.do(trial)
    assert len(read(tmp_path / "runs/trial")) == 3

    # Stopped as a cluster stops it, and begun again by the same words.
    train = f"launch/local.sh {CONFIG} {size} {COMMON} train.steps={STEPS}"
    process = here.start(train)
    while process.poll() is None and not (run / "metrics.jsonl").is_file():
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 0, here.said()
    (saved,) = step_folders.checkpoints(run / "checkpoints")
    assert 0 < step_folders.step_of(saved) < STEPS
    assert f"resumed from {saved.relative_to(tmp_path)}" in here.do(train)
    losses = [record["loss"] for record in read(run) if "loss" in record]
    assert len(losses) == STEPS and losses[-1] < losses[0]

    here.do(plot)
    assert (run / "loss.png").is_file()
    here.do(evaluate)
    assert {file.stem for file in (run / "evaluation").glob("*.json")} >= {"perplexity", "niah_single_2"}
    here.do(export)
    assert (tmp_path / "exported/mine-340m/config.json").is_file()
    assert "In the beginning" in here.do(generate)
