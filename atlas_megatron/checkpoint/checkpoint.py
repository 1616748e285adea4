"""Checkpoints: whole or not there at all, and enough in them that a resumed run ends where an unbroken one does.

`checkpoints/step_00000200` is written under an `.unfinished` name and renamed once `complete.json`, which lists every
file's size and checksum, is on the disk. Sharding is Megatron's (`dist_checkpointing`): another layout can load it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from atlas_megatron.checkpoint import best, step_folders
from atlas_megatron.checkpoint.examination import wrong_with
from atlas_megatron.checkpoint.moments import allocate_moments, check_same_states, load_moments, true_offsets
from atlas_megatron.checkpoint.provenance import Provenance
from atlas_megatron.checkpoint.safe_loading import load_common, load_sharded
from atlas_megatron.checkpoint.shards import ShardWriting, checksums_of_own, write_shards
from atlas_megatron.config import CheckpointConfig, Config, ParallelConfig, load_saved, model_differences, to_toml
from atlas_megatron.estimate import room
from atlas_megatron.files import integrity
from atlas_megatron.files.integrity import MARKER
from atlas_megatron.model.build import build_model
from atlas_megatron.parallel import world
from atlas_megatron.parallel.device import device
from atlas_megatron.parallel.random_state import random_state, set_random_state

CONFIG = "config.toml"
SET_ASIDE = "damaged.json"  # the marker of a checkpoint that was found damaged; named back, it counts again
# What marks a checkpoint of weights from elsewhere: a run starts from it at step 0, with fresh optimizer and schedule.
WEIGHTS_ONLY = {"weights_only": True}


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0  # that the weights have been trained on
    skipped: int = 0  # batches that were passed over for NaN or inf
    returns: int = 0  # times it went back to a checkpoint for them


@dataclass(frozen=True)
class TrainState:
    """What changes while a run trains."""

    chunks: list[MegatronModule]  # this rank's pipeline stages, each wrapped for data parallelism
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def folder_of(run_directory: str | Path) -> Path:
    return Path(run_directory) / "checkpoints"


def latest(run_directory: str | Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, and the half-written ones that are newer than it."""
    parent = folder_of(run_directory)
    found = step_folders.checkpoints(parent) + step_folders.unfinished(parent)
    skipped: list[Path] = []
    for folder in sorted(found, key=lambda path: (step_folders.step_of(path), path.name), reverse=True):
        if folder.suffix != step_folders.UNFINISHED and is_whole(folder):
            return folder, skipped
        skipped.append(folder)
    return None, skipped


def is_whole(folder: Path) -> bool:
    """Whether every file that the marker lists is there in its full size."""
    return integrity.is_marked(folder) and not integrity.wrong_size(folder)


def to_resume(run_directory: str | Path) -> tuple[Path | None, list[str]]:
    """As `newest`, for a run that goes on: markers of damaged ones after it are set aside: none of them counts."""
    folder, wrong = newest(run_directory)
    if folder and world.rank() == 0:
        for later in step_folders.checkpoints(folder_of(run_directory)):
            if step_folders.step_of(later) > step_folders.step_of(folder) and integrity.is_marked(later):
                os.replace(later / MARKER, later / SET_ASIDE)
    return folder, wrong


def newest(run_directory: str | Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in which every byte is what was written, and what is wrong with those after it.

    Every process of the world, if there is one, calls it: each reads its share. Raises ValueError where checkpoints
    that were whole are all damaged now: to begin anew would cost the run.
    """
    found: Found | None = None
    while found is None:
        found = _examined(folder_of(run_directory))
    if found.folder is None and found.damaged:
        raise ValueError(
            f"no checkpoint of {run_directory} is left undamaged ({'; '.join(found.damaged)}); bring the files back "
            f"from a copy, or, to begin at step 0, remove {folder_of(run_directory)}"
        )
    return found.folder, found.wrong


class Found(NamedTuple):
    """The newest undamaged checkpoint, if any; lines on what is wrong with those after it, the damaged ones besides."""

    folder: Path | None
    wrong: list[str]
    damaged: list[str]


def _examined(parent: Path) -> Found | None:
    """What there is; None where one was removed meanwhile, as a run that trains on does: then there is a newer one."""
    # What the first process sees: a shared disk may show others an older state.
    folders = [*step_folders.unfinished(parent), *step_folders.checkpoints(parent)]
    folders.sort(key=step_folders.step_of, reverse=True)
    (found,) = world.from_first([[(folder, integrity.is_marked(folder)) for folder in folders]])
    wrong: list[str] = []
    damaged: list[str] = []
    for folder, marked in found:
        if not marked:
            wrong.append(f"skipped the half-written checkpoint {folder}")
            continue
        bad = wrong_with(folder)
        if not bad:
            return Found(folder, wrong, damaged)
        (gone,) = world.from_first([not integrity.is_marked(folder)])
        if gone:
            return None
        damaged.append(f"{folder}: {bad}")
        wrong.append(f"skipped the damaged checkpoint {damaged[-1]}")
    return Found(None, wrong, damaged)


class Saver:
    """Writes checkpoints, whole or not at all; every process makes the same calls.

    With checkpoint.async_save a copy is written by a thread while training goes on, and gets its name once `poll`,
    `finish` or the next `save` has seen every process's part written.
    """

    def __init__(self, config: Config, provenance: Provenance | None = None) -> None:
        """provenance: what the run is trained with; None: what the configuration names when it is saved."""
        self._config, self._provenance = config, provenance
        self._pending: _Pending | None = None

    def save(self, trained: TrainState, progress: Progress, validation_loss: float | None = None) -> Path:
        """Write a checkpoint of `progress`, or begin to, then drop the oldest ones; where it is, or will be.

        validation_loss: that of this step, by which the best is kept; None: it was not validated.
        Raises OSError, with what to do, where the disk does not take it, or the one before; what was saved stays.
        """
        self.finish()
        folder = folder_of(self._config.run.directory) / step_folders.name_of(progress.step)
        pending = _Pending(folder, progress.step, validation_loss)
        if world.rank() == 0:
            shutil.rmtree(pending.temporary, ignore_errors=True)
            pending.temporary.mkdir(parents=True)
        torch.distributed.barrier()
        state = _state(trained, self._config.parallel, loading=False)
        state |= vars(progress)
        state["layout"] = _layout(self._config.parallel)
        with pending.complaints():
            if self._config.checkpoint.async_save:
                pending.writing = ShardWriting(state, pending.temporary)
            else:
                write_shards(state, pending.temporary)
        self._pending = pending
        if not pending.writing:
            self.finish()
        return folder

    def poll(self) -> None:
        """Give a pending checkpoint its name if all processes have written their parts of it."""
        if self._pending and self._pending.writing:
            busy = torch.tensor(float(self._pending.writing.busy()), device=device())
            torch.distributed.all_reduce(busy)
            if not busy.item():
                self.finish()

    def finish(self) -> None:
        """Wait for a pending checkpoint and give it its name. Raises as `save` does."""
        if not self._pending:
            return
        pending, self._pending = self._pending, None
        with pending.complaints():
            if pending.writing:
                pending.writing.finish()
                own = pending.writing.checksums
            else:
                own = checksums_of_own(pending.temporary)
            known = {name: value for sums in world.gathered(own) for name, value in sums.items()}
            if world.rank() == 0:
                complete(pending.temporary, self._config, pending.step, known, self._provenance)
                # One may be there of a run that went back behind it.
                step_folders.make_room(pending.folder)
                os.rename(pending.temporary, pending.folder)
                integrity.sync(pending.folder.parent)
                if self._config.checkpoint.keep_best and pending.validation_loss is not None:
                    best.note(pending.folder.parent, pending.step, pending.validation_loss)
                _drop_old(pending.folder.parent, self._config.checkpoint)
        torch.distributed.barrier()


@dataclass
class _Pending:
    """A checkpoint that does not have its name yet."""

    folder: Path
    step: int
    validation_loss: float | None = None
    writing: ShardWriting | None = None

    @property
    def temporary(self) -> Path:
        return self.folder.with_suffix(step_folders.UNFINISHED)

    @contextmanager
    def complaints(self) -> Iterator[None]:
        """Within: what goes wrong in writing is said with what to do."""
        try:
            yield
        except (OSError, CheckpointException) as error:
            raise _not_saved(self.temporary, self.step, error) from error


def restore(folder: Path, config: Config, trained: TrainState) -> Progress:
    """Load a checkpoint into a model, optimizer and schedule of the same configuration; every process calls it.

    Raises ValueError where the checkpoint is of another model.
    """
    check_same_model(folder, config)
    common = load_common(folder)
    if common.keys() >= WEIGHTS_ONLY.keys():
        return take_weights(folder, trained)
    check_same_states(config, before := load_saved(folder / CONFIG))
    same_layout = common["layout"] == _layout(config.parallel)
    allocate_moments(trained.optimizer)
    state = _state(trained, config.parallel, loading=True)
    if not same_layout:
        # Random streams belong to a shard; shards of another layout start theirs from the seed.
        del state["random"]
    loaded = load_sharded(state, folder)
    for name, chunk in _named(trained.chunks).items():
        chunk.load_state_dict(loaded["model"][name])
    load_moments(trained.optimizer, loaded["optimizer"], config)
    # Core adds what it loads to what there is.
    trained.scheduler.num_steps = 0
    trained.scheduler.load_state_dict(loaded["scheduler"])
    if same_layout:
        set_random_state(loaded["random"])
    # Runs from before batches could be skipped, or tokens were counted, have not saved all of it.
    found = {f.name: loaded.get(f.name, f.default) for f in fields(Progress)}
    found["tokens"] = found["tokens"] or found["step"] * before.train.global_batch * before.model.seq_length
    return Progress(**found)


def take_weights(folder: Path, trained: TrainState) -> Progress:
    """Load a checkpoint's weights alone, of any layout: the progress of a run at its start; every process calls it."""
    _load_parameters(folder, _named(trained.chunks))
    trained.optimizer.reload_model_params()
    return Progress()


def check_same_model(folder: Path, config: Config) -> None:
    """Raise ValueError naming the fields in which the checkpoint's model is another than the configuration's."""
    differences = model_differences(config, load_saved(folder / CONFIG))
    if differences:
        raise ValueError(
            f"checkpoint {folder} is of another model: {'; '.join(differences)}; "
            "set them as the checkpoint has them, or choose another run.directory"
        )


def to_read(run_directory: str | Path) -> Path:
    """As `newest`; what is wrong with later ones goes to standard error. Raises ValueError where there is none."""
    folder, wrong = newest(run_directory)
    if folder is None:
        raise ValueError(f"{run_directory} holds no whole checkpoint; train first: atlas-train CONFIG.toml")
    for line in wrong if world.rank() == 0 else ():
        print(line, file=sys.stderr)
    return folder


def read_newest[T](run_directory: str | Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of the newest whole checkpoint, in a single process.

    A run that trains on may remove it meanwhile: then of the newer one that is there instead. Raises as `to_read` and
    `read` do.
    """
    while True:
        folder = to_read(run_directory)
        try:
            return read(folder)
        except (OSError, ValueError):
            if integrity.is_marked(folder):
                raise


def load_model(run_directory: str | Path, parallel: ParallelConfig | None = None) -> tuple[MegatronModule, Config]:
    """The model of the run's newest whole checkpoint, as `load_checkpoint`."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return load_checkpoint(to_read(run_directory), parallel)
    return read_newest(run_directory, lambda folder: load_checkpoint(folder, parallel))


def load_checkpoint(folder: Path, parallel: ParallelConfig | None = None) -> tuple[MegatronModule, Config]:
    """A whole checkpoint's model, in evaluation mode, and its configuration, in a single process.

    parallel: or in the processes of this layout, one pipeline stage each. Joins the world if that has not been done;
    its groups must be those of the layout.
    """
    config = load_saved(folder / CONFIG)
    stages = config.model.pattern.replace("|", "")
    config = replace(config, parallel=parallel or ParallelConfig(), model=replace(config.model, pattern=stages))
    room.check_reading(config)
    if not torch.distributed.is_initialized():
        world.join(config)
    model = build_model(config)
    _load_parameters(folder, {"model": model})
    return model.eval(), config


def save_weights(model: MegatronModule, config: Config) -> Path:
    """Make a model's weights the checkpoint of step 0 of config.run.directory, replacing one that is there; in a
    single process. A run starts from it with fresh optimizer and schedule."""
    folder = folder_of(config.run.directory) / step_folders.name_of(0)
    temporary = folder.with_suffix(step_folders.UNFINISHED)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # Under one name, as an import has it: parameters are found by their own.
    write_shards({"model": model.sharded_state_dict(metadata=sharding_metadata())} | WEIGHTS_ONLY, temporary)
    complete(temporary, config, 0)
    step_folders.make_room(folder)
    os.rename(temporary, folder)
    return folder


def _load_parameters(folder: Path, chunks: dict[str, MegatronModule]) -> None:
    """The parameters of these stages. Raises ValueError where the checkpoint has not all of them."""
    state = {name: chunk.sharded_state_dict(metadata=sharding_metadata()) for name, chunk in chunks.items()}
    loaded = load_sharded(state, folder, StrictHandling.IGNORE_ALL)
    for name, chunk in chunks.items():
        # Beside its weight a linear keeps a state of its own (FP8's scales), which weights from elsewhere come without.
        found = chunk.load_state_dict(loaded[name], strict=False)
        lost = [key for key in found.missing_keys if not key.endswith("_extra_state")]
        if lost or found.unexpected_keys:
            raise ValueError(f"checkpoint {folder} lacks {', '.join(lost + found.unexpected_keys)}; restore its files")


def sharding_metadata() -> dict[str, Any]:
    """How core shards what it saves; a new dict each time, as core notes the run's process groups in it."""
    # The distributed optimizer's default cannot be saved by this Megatron; this one reshards over any layout. Without a
    # prefix a state's name is its parameter's, whichever optimizer of a chain holds it.
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _layout(parallel: ParallelConfig) -> list[int]:
    return [parallel.tensor, parallel.pipeline]


def _named(chunks: list[MegatronModule]) -> dict[str, MegatronModule]:
    # The names stand for places in this rank alone: what is saved is found again by its layer's number in the model.
    return {f"chunk {place}": unwrap_model(chunk) for place, chunk in enumerate(chunks)}


def _state(trained: TrainState, parallel: ParallelConfig, *, loading: bool) -> dict[str, Any]:
    sharding = sharding_metadata()
    model = {name: chunk.sharded_state_dict(metadata=sharding) for name, chunk in _named(trained.chunks).items()}
    # is_loading allocates the moments to load into; without it they would be left out silently.
    with true_offsets(trained.optimizer):
        optimizer = trained.optimizer.sharded_state_dict(model, is_loading=loading, metadata=sharding)
    shard = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank())
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    generators = ShardedObject("random", random_state(), tuple(_layout(parallel)), shard, replica)
    return {"model": model, "optimizer": optimizer, "scheduler": trained.scheduler.state_dict(), "random": generators}


def complete(
    folder: Path,
    config: Config,
    step: int,
    known: dict[str, str] | None = None,
    provenance: Provenance | None = None,
) -> None:
    """Add what makes the checkpoint stand alone, and the marker, and bring it all to the disk.

    known: checksums of files in it, for those that are there already; the others are computed.
    """
    (folder / CONFIG).write_text(to_toml(config), encoding="utf-8")
    (provenance or Provenance.of(config)).write(folder)
    integrity.mark(folder, {"step": step}, known or {})


def _drop_old(folder: Path, options: CheckpointConfig) -> None:
    """Remove all but the newest whole checkpoints and the best, and what killed processes left half-written."""
    found = step_folders.checkpoints(folder)
    oldest = [path for path in found if integrity.is_marked(path)][: options.keep][-1]
    kept = best.read(folder) if options.keep_best else None
    for path in found:
        step = step_folders.step_of(path)
        if step < step_folders.step_of(oldest) and not (kept and step == kept.step):
            step_folders.remove(path)
    for path in step_folders.unfinished(folder):
        step_folders.remove(path)


def _not_saved(temporary: Path, step: int, error: BaseException) -> OSError:
    free = shutil.disk_usage(temporary.parent).free
    if world.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    reason = error.strerror if isinstance(error, OSError) else "a process could not write its part"
    return OSError(
        f"the checkpoint of step {step} was not saved: {reason} ({free / 2**20:.0f} MiB free in {temporary.parent}); "
        "earlier checkpoints are untouched: make room there, then start the same command again"
    )
