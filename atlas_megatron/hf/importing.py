"""From a Hugging Face folder to a run that atlas-train goes on with: its weights as a checkpoint of step 0."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.checkpoint.shards import write_shards
from atlas_megatron.config import Config, ParallelConfig, load, model_differences, to_toml
from atlas_megatron.config.checks import validate
from atlas_megatron.files.scratch import new_folder
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.folders import config_of, listing
from atlas_megatron.hf.names import Name
from atlas_megatron.hf.tokenizer_files import copy_tokenizer
from atlas_megatron.hf.weights import Weights, check, described_in
from atlas_megatron.parallel import world

TOKENIZER = "tokenizer"  # the folder of a run that holds it


def import_folder(source: Path, run: Path, overrides: Sequence[str] = ()) -> Path:
    """Write `run`: a configuration, and a checkpoint of step 0 that holds the weights and nothing else of a run.

    overrides: ``section.key=value`` of everything that does not describe the model; its layout need not be that of
    this process. Raises ValueError where the folder is no ATLAS model, its tensors are not those of its configuration,
    its tokenizer is larger than its vocabulary, an override changes the model, or the run exists.
    """
    description, weights, parameters = _read(source)
    with new_folder(run) as folder:
        end = copy_tokenizer(source, folder / TOKENIZER, description.vocab_size)
        words = [f"run.directory={json.dumps(str(run))}"]
        words += [] if end is None else [f"data.tokenizer={json.dumps(str(run / TOKENIZER))}"]
        words += [f"train.gradient_reach={description.gradient_reach}"] if description.gradient_reach else []
        config = _configured(description, folder, [*words, *overrides])
        (folder / checkpoint.CONFIG).write_text(to_toml(config), encoding="utf-8")
        step = checkpoint.folder_of(folder) / f"step_{0:08d}"
        step.mkdir(parents=True)
        if end is not None:
            shutil.copytree(folder / TOKENIZER, step, dirs_exist_ok=True)
        # The checkpoint's sequences are those that its weights were trained on; the run's may be longer.
        trained = replace(config, model=replace(config.model, seq_length=description.seq_length))
        _write_checkpoint(weights, parameters, step, trained)
    return run


def dry_run(source: Path) -> str:
    """What an import would write, a line a parameter. Raises as `import_folder` does."""
    return listing(_read(source)[2])


def _read(source: Path) -> tuple[AtlasConfig, Weights, list[tuple[Name, tuple[int, ...]]]]:
    description = described_in(source)
    parameters = check(source, description)
    return description, Weights(source), parameters


def _configured(description: AtlasConfig, folder: Path, words: Sequence[str]) -> Config:
    """The run's configuration: the model's description under the overrides."""
    plain = config_of(description)
    file = folder / checkpoint.CONFIG
    file.write_text(to_toml(plain), encoding="utf-8")
    config = load(file, words)
    changed = model_differences(config, plain)
    if changed:
        raise ValueError(
            f"overrides change the model: {'; '.join(changed).replace('the checkpoint', 'the folder')}; leave them out"
        )
    parallel = config.parallel
    validate(config, parallel.tensor * parallel.pipeline * parallel.context)
    return config


def _write_checkpoint(
    weights: Weights, parameters: list[tuple[Name, tuple[int, ...]]], folder: Path, config: Config
) -> None:
    alone = replace(config, parallel=ParallelConfig())
    joined = torch.distributed.is_initialized()
    if not joined:
        world.join(alone)
    try:
        # Mapped from the files: what is written is not held.
        model = {
            name.megatron: ShardedTensor.from_rank_offsets(name.megatron, weights[name.hf]) for name, _ in parameters
        }
        write_shards({"model": model} | checkpoint.WEIGHTS_ONLY, folder)
    finally:
        if not joined:
            world.leave()
    checkpoint.complete(folder, config, 0)
