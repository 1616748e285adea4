"""A run that begins with another's weights: `train.start_from`, the second stage of training at another chunk.

Weights alone are taken. Once a run has a checkpoint of its own it goes on from that, and the other is not read again.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.checkpoint.provenance import Provenance
from atlas_megatron.config import Config, continued, load_saved, uses
from atlas_megatron.config.chunks import said
from atlas_megatron.files import integrity
from atlas_megatron.parallel import world


def origin(config: Config) -> Path:
    """The checkpoint that train.start_from names: a run's newest whole one, or itself.

    Every process of the world, if there is one, calls it. Raises ValueError where there is none, or it is damaged.
    """
    folder = Path(config.train.start_from)
    if not folder.is_dir():
        raise ValueError(f"train.start_from={folder} is no folder; give a run's directory, or one of its checkpoints")
    if not integrity.is_marked(folder):
        if not checkpoint.folder_of(folder).is_dir():
            raise ValueError(f"train.start_from={folder} holds no checkpoints; give a run's directory, or one of them")
        return checkpoint.to_read(folder)
    joined = torch.distributed.is_initialized()
    share, shares = (world.rank(), torch.distributed.get_world_size()) if joined else (0, 1)
    wrong = integrity.wrong_size(folder) or integrity.wrong_content(folder, share, shares)
    wrong = next(filter(None, world.gathered(wrong)), "")
    if wrong:
        raise ValueError(f"train.start_from={folder} is damaged ({wrong}); give another, or bring its files back")
    return folder


def begun(config: Config, source: Path) -> Config:
    """The configuration of a new run with a checkpoint's weights: its memory steps as they were trained.

    Raises ValueError naming the keys in which it is of another model.
    """
    try:
        return continued(config, load_saved(source / checkpoint.CONFIG))
    except ValueError as error:
        raise ValueError(f"train.start_from={config.train.start_from}: {error}") from error


def resumed(config: Config, before: Config) -> Config:
    """The configuration of a run that goes on from its own checkpoint, whose configuration is `before`.

    Raises ValueError where the run did not begin with what train.start_from names.
    """
    ours, theirs = config.train.start_from, before.train.start_from
    if ours and not (theirs and os.path.abspath(ours) == os.path.abspath(theirs)):
        began = f"began with the weights of {theirs}" if theirs else "began with weights of its own"
        raise ValueError(
            f"train.start_from={ours}, but {config.run.directory} {began} and has checkpoints; name another "
            f"run.directory, or set train.start_from={theirs!r} to go on"
        )
    return replace(config, train=replace(config.train, start_from=theirs))


def check_tokenizer(config: Config, source: Path) -> None:
    """Raise ValueError where the weights are of another tokenizer than the data, unless data.allow_change says so."""
    if not config.data.allow_change and "tokenizer" in Provenance.of(config).changes_since(source):
        raise ValueError(
            f"train.start_from: {source} was trained with another tokenizer than data.tokenizer="
            f"{config.data.tokenizer}; give that one (a checkpoint carries its files), or set data.allow_change=true"
        )


def line(source: Path, config: Config) -> str:
    """What a run of this configuration, as `begun` gives it, begins with."""
    before = load_saved(source / checkpoint.CONFIG)
    changed = said(before.memory, config.memory) if uses(config.model.pattern, "memory") else ""
    return f"begins with the weights of {source}{f'; {changed}' if changed else ''}"
