"""Exported folders load without trust where the package is installed; each says in its README.md what it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.hf.export import export
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from tests.support import exported_models, tiny_run

ROOT = Path(__file__).parents[2]
LOAD = """
import sys
{first}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(name.split(".")[0] in ("megatron", "transformers_modules") for name in sys.modules)
assert type(AutoModel.from_pretrained(sys.argv[1])).__module__ == "atlas_megatron.hf.modeling_atlas"
assert type(AutoConfig.from_pretrained(sys.argv[1])).__module__ == "atlas_megatron.hf.configuration_atlas"
with torch.no_grad():
    torch.save(model(torch.arange(30)[None]).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_models.exported(tmp_path_factory.mktemp("exported"), "M-*-G-")


def loaded(folder: Path, first: str, out: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(ROOT / "kernels"), str(ROOT)))
    named = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", LOAD.format(first=first), str(folder), str(out)]
    return subprocess.run(
        words, env={**os.environ, **named}, input="", capture_output=True, text=True, timeout=120, check=False
    )


def test_an_exported_folder_loads_without_trust_after_one_import(folder: Path, tmp_path: Path) -> None:
    done = loaded(folder, "import atlas_megatron.hf.auto", tmp_path / "logits")
    assert done.returncode == 0, done.stderr
    model = AtlasForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), model(torch.arange(30)[None]).logits)


def test_without_the_import_transformers_asks_for_trust(folder: Path, tmp_path: Path) -> None:
    done = loaded(folder, "", tmp_path / "logits")
    assert done.returncode != 0 and "trust_remote_code=True" in done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    done = tiny_run.train(tiny_run.write(root), "train.validate_silenced=true")
    assert done.returncode == 0, done.stderr
    return root / "run"


def test_the_card_says_what_was_trained_on_and_what_came_out(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "small")
    text = (folder / "README.md").read_text(encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    said = f"# small\n\nA language model of {sum(t.numel() for t in weights.values()):,} parameters"
    assert said in text and text.startswith("---\nlibrary_name: transformers")
    assert "| `*` | sliding-window attention | 1 |" in text and "| `-` | MLP | 2 |" in text
    # The last two names of the path alone: the rest is of the machine that trained.
    assert f"- data: {run.parent.name}/train\n" in text and str(run.parent.parent) not in text
    assert "- 6 steps of 4 sequences, 768 tokens" in text and "SHA-256 over windows of" in text
    record = tiny_run.read(run)[-1]
    assert record["step"] == 6 and f"| validation loss, nats a token | {record['validation_loss']:.4f} |" in text
    assert "memories silenced" in text and "Its state has one size" in text
    for way in ("trust_remote_code=True", "import atlas_megatron.hf.auto", "atlas-generate"):
        assert way in text


def test_a_card_is_of_its_own_checkpoint(run: Path, tmp_path: Path) -> None:
    """An earlier one has the validation of its step; one away from its run has none."""
    early = checkpoint.folder_of(run) / "step_00000003"
    record = next(r for r in tiny_run.read(run) if r["step"] == 3)
    text = (export(early, tmp_path / "early") / "README.md").read_text(encoding="utf-8")
    assert f"{record['validation_loss']:.4f}" in text and "At step 3:" in text and "- 3 steps of 4" in text
    away = early.rename(tmp_path / "away")
    try:
        text = (export(away, tmp_path / "model") / "README.md").read_text(encoding="utf-8")
    finally:
        away.rename(early)
    assert "No validation was recorded" in text and "steps of 4" not in text


def test_a_growing_state_is_said(tmp_path: Path) -> None:
    text = (exported_models.exported(tmp_path, "F-") / "README.md").read_text(encoding="utf-8")
    assert "Its state grows with the text" in text and "- data: not noted" in text
