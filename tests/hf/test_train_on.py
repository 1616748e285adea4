"""What an import says of training on: the command runs, or names what it still needs."""

from __future__ import annotations

from pathlib import Path

from atlas_megatron.commands import convert_hf


def test_the_command_names_what_it_still_needs(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[data]\ntokenizer = "{tmp_path}/tokenizer"\n')
    said = convert_hf.train_on(tmp_path).splitlines()
    assert said[0] == f"train on with: atlas-train {config} 'data.train=[\"PREFIX\"]'"
    assert said[1] == f"PREFIX is of data that tools/prepare_data.py wrote with --tokenizer {tmp_path}/tokenizer"
    assert said[2].endswith("train.lr=0.001, train.warmup_steps=100, train.steps=1000")
    config.write_text('[data]\ntokenizer = "words"\ntrain = ["data/train"]\n[train]\nlr = 3e-4\n')
    whole = convert_hf.train_on(tmp_path).splitlines()
    assert whole[0] == f"train on with: atlas-train {config}" and "train.lr=0.0003" in whole[1]
