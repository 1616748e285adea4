"""The checkpoint of another run that `train.decay_from` names: a decay begins where that run stood at a step."""

from __future__ import annotations

from pathlib import Path

from atlas_megatron.checkpoint import checkpoint, step_folders
from atlas_megatron.checkpoint.examination import wrong_with
from atlas_megatron.config import Config
from atlas_megatron.config.schedule_checks import branch


def kept(config: Config) -> Path:
    """The folder of that step, whole by its marker. Raises ValueError, with the steps that are kept, without one."""
    directory, step = branch(config.train)
    said = f"train.decay_from={config.train.decay_from!r}"
    if not Path(directory).is_dir():
        raise ValueError(f"{said}: {directory} is no folder; name the directory of a run that has trained")
    if Path(directory).resolve() == Path(config.run.directory).resolve():
        raise ValueError(f"{said} is the run's own directory; choose another run.directory for the decay")
    whole = list(filter(checkpoint.is_whole, step_folders.checkpoints(checkpoint.folder_of(directory))))
    for folder in whole:
        if step_folders.step_of(folder) == step:
            return folder
    steps = ", ".join(str(step_folders.step_of(folder)) for folder in reversed(whole)) or "none"
    raise ValueError(
        f"{said}: {directory} keeps no whole checkpoint of step {step}; kept are {steps}: take one of these, or train "
        "with checkpoint.keep large enough"
    )


def undamaged(config: Config) -> Path:
    """As `kept`, with every byte looked at; every process of the world calls it. Raises as `kept` does."""
    folder = kept(config)
    bad = wrong_with(folder)
    if bad:
        raise ValueError(f"train.decay_from={config.train.decay_from!r}: {folder} is damaged: {bad}; take another step")
    return folder
