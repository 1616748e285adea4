"""A run's curves in Weights & Biases, where `log.wandb` names a project. The package is imported here alone."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from atlas_megatron.config import Config

IDENTITY = "wandb_id"  # a file of the run: what its curves go on by, wherever the directory is moved


def start(config: Config, resumed_step: int) -> Any:
    """The run there, begun or gone on with; it takes `log(numbers, step=)` and `finish()`.

    Raises ValueError, with what to do, where wandb is missing or refuses, as it does without a key.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError("log.wandb is set but wandb is missing; pip install wandb, or unset log.wandb") from error
    directory = Path(config.run.directory)
    identity = _identity(directory, resumed_step)
    try:
        run = wandb.init(
            project=config.log.wandb, name=directory.name, id=identity, resume="allow", dir=config.run.directory
        )
    # All of wandb's own: no key, no network, a project that is another's.
    except wandb.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"log.wandb={config.log.wandb}: Weights & Biases does not start ({reason}); set WANDB_API_KEY or run wandb "
            "login, set WANDB_MODE=offline to keep the curves here (wandb sync sends them later), or unset log.wandb"
        ) from error
    (directory / IDENTITY).write_text(f"{identity}\n", encoding="utf-8")
    return run


def _identity(directory: Path, resumed_step: int) -> str:
    """The run's own there: two directories of one name are two runs."""
    file = directory / IDENTITY
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    # Runs from before it was noted went by their directory's name.
    return directory.name if resumed_step else uuid.uuid4().hex
