"""Each member of the family by its name: one key picks it, it trains, it resumes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from atlas_megatron.config import load, model_differences, to_toml
from atlas_megatron.config.checks import validate
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.train import main
from tests.support import tiny_run

CONFIGS = Path(__file__).parents[2] / "configs"


def test_one_key_picks_a_member_and_keys_beside_it_win(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[memory]\npreset = "titans"\nchunk = 32\nns_steps = 2\n')
    memory = load(path).memory
    assert (memory.window, memory.step_in_momentum, memory.chunk, memory.ns_steps) == (1, True, 32, 2)
    # On the command line the preset wins over the file, another word over the preset.
    memory = load(path, ["memory.degree=3", "memory.preset=atlas++"]).memory
    assert (memory.network, memory.ns_steps, memory.step_in_momentum, memory.degree) == ("gated_mlp", 5, False, 3)
    assert memory.chunk == 32


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_config_and_reads_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'[memory]\npreset = "{name}"\n')
    config = load(path)
    validate(config, 1)
    (tmp_path / "resolved.toml").write_text(to_toml(config))
    assert load(tmp_path / "resolved.toml") == config
    path.write_text("[memory]\n" + "\n".join(f"{k} = {_toml(v)}" for k, v in PRESETS[name].items()))
    assert model_differences(config, load(path)) == []


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("atlas-*.toml")), ids=lambda file: file.stem)
def test_a_shipped_atlas_is_the_preset(file: Path) -> None:
    memory = load(file).memory
    assert memory.preset == "atlas" and {key: getattr(memory, key) for key in PRESETS["atlas"]} == PRESETS["atlas"]


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def test_an_unknown_preset_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[memory]\npreset = "omegnet"\n')
    with pytest.raises(ValueError, match="memory.preset='omegnet' is unknown; did you mean 'omeganet'"):
        load(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("presets")
    tiny_run.write(folder, "M-")
    return folder


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_and_resumes(name: str, root: Path) -> None:
    config = str(root / "tiny.toml")
    words = [f"memory.preset={name}", "checkpoint.every=4", "train.validate_every=0"]
    assert main([config, f"run.directory={root}/{name}", "train.steps=8", *words]) == 0
    whole = tiny_run.losses(root / name)
    assert len(whole) == 8 and all(map(math.isfinite, whole)) and whole[-1] < whole[0]
    # The same steps again from the checkpoint in the middle.
    for newer in (root / name / "checkpoints").glob("step_*8"):
        for file in newer.iterdir():
            file.unlink()
        newer.rmdir()
    assert main([config, f"run.directory={root}/{name}", "train.steps=8", *words]) == 0
    assert tiny_run.losses(root / name) == whole
