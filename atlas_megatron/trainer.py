"""The training loop, from Megatron-Core's public parts: schedule, gradients, optimizer, checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.utils.data import Dataset

from atlas_megatron import checkpoint, non_finite
from atlas_megatron.checkpoint import Position, Trained
from atlas_megatron.config import WITH_MEMORY, Config, has, to_toml
from atlas_megatron.config_checks import sequences_together
from atlas_megatron.data import Batches, build_datasets, bytes_per_token
from atlas_megatron.metrics import LOW_MEMORY_SHARE, Record, RunLog, Speed, bits_per_byte
from atlas_megatron.mixers.base import Documents
from atlas_megatron.mixers.memory import AtlasMixer
from atlas_megatron.model import build_chunks, flops_per_token
from atlas_megatron.non_finite import NonFiniteError
from atlas_megatron.optimizer import build_optimizer, wrap
from atlas_megatron.parallel import world
from atlas_megatron.parallel.context import settle
from atlas_megatron.parallel.cpu import device
from atlas_megatron.positions import SlidingWindows
from atlas_megatron.stopping import StopSignals

Batch = dict[str, Tensor]
POSITION_LOSS = "position_loss.json"


class Trainer:
    """One process's share of a run. `join` the world first; every process builds one and calls `train`."""

    def __init__(self, config: Config, signals: StopSignals | None = None) -> None:
        """Build data, model and optimizer, and load the newest whole checkpoint of the run, if there is one.

        signals: those that the caller already notes, so that none is lost while all this is built; None: from `train`
        on. Raises ValueError for data that cannot be trained on or a checkpoint of another model.
        """
        self.config = config
        directory = Path(config.run.directory)
        resumed, skipped = checkpoint.latest(directory)
        if resumed:
            checkpoint.check_same_model(resumed, config)
        train, validate_every = config.train, config.train.validate_every
        sequences = train.validate_sequences if validate_every else 0
        train_set, self._validation_set = build_datasets(config, train.steps * train.global_batch, sequences)
        self._bytes_per_token = bytes_per_token(config)
        self.trained = _build(config)
        self.position = checkpoint.restore(resumed, config, self.trained) if resumed else Position()
        self._saver = checkpoint.Saver(config)
        self._batches = Batches(train_set, config, self.position.consumed_samples)
        self._speed = Speed(config, flops_per_token(config).training, torch.distributed.get_world_size())
        self._has_memory = has(config.model.pattern, WITH_MEMORY)
        self._warned: set[str] = set()
        self._signals = signals or StopSignals()
        self.log: RunLog | None = None
        if world.rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / checkpoint.CONFIG).write_text(to_toml(config), encoding="utf-8")
            self.log = RunLog(config, self.position.step)
        for folder in skipped:
            self._say(f"skipped the half-written checkpoint {folder}")
        if resumed:
            self._say(f"resumed from {resumed}")

    def train(self) -> bool:
        """Train to the last step; False where SIGTERM or SIGUSR1 ended it before, with a checkpoint.

        Raises NonFiniteError, with step and layer, where NaN or inf appears: nothing is saved from then on; and
        LostProcessError where another process ended.
        """
        try:
            with self._signals, world.naming_the_lost(self.config):
                return self._train()
        finally:
            if self.log:
                self.log.close()

    def _train(self) -> bool:
        every, last = self.config.checkpoint.every, self.config.train.steps
        while self.position.step < last:
            step = self.position.step + 1
            record, stop = self._step(step)
            self._saver.poll()
            if self._validates(step):
                record |= self._validate(step)
            if self.log:
                self.log.write(record)
            if step % every == 0 or step == last or stop:
                saved = self._saver.save(self.trained, self.position)
                if stop and step < last:
                    self._saver.finish()
                    asked = self._signals.asked or "another process was asked"
                    self._say(f"{asked}: stopped after step {step}, saved {saved}; the same command resumes there")
                    return False
        self._saver.finish()
        return True

    def _say(self, line: str) -> None:
        if self.log:
            self.log.say(line)

    def _step(self, step: int) -> tuple[Record, bool]:
        """One optimizer step; its record, and whether any process was asked to stop."""
        start = time.perf_counter()
        train, trained = self.config.train, self.trained
        batches = [next(self._batches) for _ in range(_micro_batches(self.config, train.global_batch))]
        measures = self._has_memory and (step == 1 or step % train.stats_every == 0)
        mixers = _measured(trained.chunks) if measures else []
        for _, mixer in mixers:
            mixer.measure = True
        for chunk in trained.chunks:
            chunk.zero_grad_buffer()
        trained.optimizer.zero_grad()
        outputs = self._run(batches, forward_only=False)
        loss, stop = self._agree([output["loss"] for output in outputs])
        if not math.isfinite(loss):
            layer = non_finite.in_forward(trained.chunks, self.config, lambda: self._run(batches, forward_only=True))
            raise self._diverged(step, f"loss is {loss}", layer)
        # Before the update: step 1 of the warm-up then already moves the parameters.
        trained.scheduler.step(1)
        _, grad_norm, _ = trained.optimizer.step()
        if not math.isfinite(grad_norm):
            raise self._diverged(
                step, f"gradient norm is {grad_norm}", non_finite.in_gradients(trained.chunks, self.config)
            )
        self.position = Position(step, self.position.consumed_samples + train.global_batch)
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": float(grad_norm),
            "lr": trained.optimizer.param_groups[0]["lr"],
            "tokens": step * self._speed.tokens_per_step,
            **self._speed.after(step, time.perf_counter() - start),
        }
        # Also where this stage has no memory: all processes gather.
        if measures:
            record["layers"] = self._measurements(step, mixers)
            self._warn(step, record["layers"])
        return record, stop

    def _run(self, batches: list[Batch], *, forward_only: bool) -> list[dict[str, Tensor]]:
        """Core's schedule over the micro-batches; what the loss function returned, on the last stage."""
        outputs = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, self.config.data.packed),
            # Every stage reads all of them; the first takes their tokens, the last their labels.
            data_iterator=[iter(batches) for _ in self.trained.chunks],
            model=self.trained.chunks,
            num_microbatches=len(batches),
            seq_length=self.config.model.seq_length,
            micro_batch_size=self.config.train.micro_batch,
            forward_only=forward_only,
        )
        settle()
        return outputs

    def _agree(self, losses: list[Tensor]) -> tuple[float, bool]:
        """The loss averaged over replicas, on every stage, and whether any process was asked to stop."""
        mean = torch.stack(losses).double().mean() if losses else torch.zeros((), dtype=torch.float64, device=device())
        both = torch.stack((mean, torch.tensor(float(bool(self._signals.asked)), dtype=torch.float64, device=device())))
        torch.distributed.all_reduce(both)
        total, asked = both.tolist()
        # One stage has losses, the same on each tensor-parallel rank; those of context-parallel ranks are parts of one.
        parallel = self.config.parallel
        return total * parallel.pipeline * parallel.context / torch.distributed.get_world_size(), asked > 0

    def _measurements(self, step: int, mixers: list[tuple[int, Any]]) -> dict[str, dict[str, Any]]:
        """What every memory layer measured, by layer number, over the processes that hold a part of it."""
        own: dict[int, dict[str, Any]] = {}
        for number, mixer in mixers:
            mixer.measure = False
            own.setdefault(number, {}).update({name: value.tolist() for name, value in mixer.measurements.items()})
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, own)
        merged = {}
        for number in sorted({number for part in everywhere for number in part}):
            parts = [part[number] for part in everywhere if number in part]
            merged[str(number)] = {name: _over_processes([part[name] for part in parts]) for name in parts[0]}
            found = {n: v if isinstance(v, list) else [v] for n, v in merged[str(number)].items()}
            bad = [name for name, values in found.items() if not all(map(math.isfinite, values))]
            if bad:
                raise self._diverged(step, f"{bad[0]} is not finite", non_finite.describe(number, self.config))
        return merged

    def _warn(self, step: int, layers: dict[str, dict[str, Any]]) -> None:
        """Say, once a layer, that its memory has collapsed: the loss alone does not show it."""
        for number, layer in layers.items():
            share = layer.get("memory_share", 1.0)
            if share < LOW_MEMORY_SHARE and number not in self._warned:
                self._warned.add(number)
                where = non_finite.describe(int(number), self.config)
                self._say(
                    f"warning: step {step}: the memory carries {share:.1%} of what varies in the output of {where}, "
                    f"less than {LOW_MEMORY_SHARE:.0%}: the layer runs on its attention alone"
                )

    def _diverged(self, step: int, what: str, where: str) -> NonFiniteError:
        # The good one that may still be being written.
        self._saver.finish()
        last, _ = checkpoint.latest(self.config.run.directory)
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        return NonFiniteError(
            f"step {step}: {what}, first seen in {where}; {kept}: "
            "lower train.lr or memory.eta_start, or take memory.norm=layer, and start again"
        )

    def _validates(self, step: int) -> bool:
        every = self.config.train.validate_every
        return self._validation_set is not None and (step % every == 0 or step == self.config.train.steps)

    def _validate(self, step: int) -> Record:
        """The loss on the fixed validation sequences; after the last step also its course along the context."""
        assert self._validation_set is not None
        sums = self._evaluate(self._validation_set)
        if step == self.config.train.steps:
            self._write_position_loss(step)
        loss = (sums[0].sum() / sums[1].sum()).item()
        bits = None if self._bytes_per_token is None else bits_per_byte(loss, self._bytes_per_token)
        record = {"validation_loss": loss, "validation_bits_per_byte": bits}
        if self.config.train.validate_silenced and self._has_memory:
            with _silenced(self.trained.chunks):
                silenced = self._evaluate(self._validation_set)
            record["validation_loss_silenced"] = (silenced[0].sum() / silenced[1].sum()).item()
        return record

    def _write_position_loss(self, step: int) -> None:
        sequences = self.config.train.validate_sequences
        together = sequences_together(self.config, torch.distributed.get_world_size())
        windows = SlidingWindows(self.config, sequences, multiple=together)
        sums = self._evaluate(windows)
        # Of too few windows no token stands at every place.
        if self.log and len(windows) and bool((sums[1] > 0).all()):
            by_position = {
                "step": step,
                "stride": windows.stride,
                "tokens_a_position": sums[1].mean().item(),
                "loss": (sums[0] / sums[1]).tolist(),
            }
            (Path(self.config.run.directory) / POSITION_LOSS).write_text(json.dumps(by_position))

    def _evaluate(self, dataset: Dataset) -> Tensor:
        """Sums of loss and mask at each position [2, seq_length] over the first validation sequences of a set."""
        batches = Batches(dataset, self.config)
        count = min(len(batches), _micro_batches(self.config, self.config.train.validate_sequences))
        sums = torch.zeros(2, self.config.model.seq_length, device=device())
        if count:
            for chunk in self.trained.chunks:
                chunk.eval()
            with torch.no_grad():
                outputs = self._run([next(batches) for _ in range(count)], forward_only=True)
            for chunk in self.trained.chunks:
                chunk.train()
            own = parallel_state.get_context_parallel_rank()
            for output in outputs:
                sums.chunk(self.config.parallel.context, 1)[own].add_(output["positions"])
        torch.distributed.all_reduce(sums)
        return sums


def _build(config: Config) -> Trained:
    chunks: list[MegatronModule] = []
    for model in build_chunks(config):
        model.to(device())
        core = get_model_config(model)
        chunk = wrap(Float16Module(core, model) if core.bf16 else model, core, first=not chunks)
        # Replicas start from replica 0's parameters, whatever each drew.
        chunk.broadcast_params()
        chunks.append(chunk)
    # The schedule reads the first chunk's.
    core = get_model_config(chunks[0])
    optimizer, scheduler = build_optimizer(config, chunks, bf16=core.bf16)
    core.finalize_model_grads_func = finalize_model_grads
    core.grad_scale_func = optimizer.scale_loss
    core.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return Trained(chunks, optimizer, scheduler)


def _forward_step(packed: bool, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, partial]:
    batch = next(batches)
    documents = Documents(batch["position_ids"]) if packed else None
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=documents)
    return output, partial(_loss, batch["loss_mask"], batch["counted"])


def _loss(mask: Tensor, counted: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """This shard's part of a micro-batch's mean loss, and what is kept of it.

    losses and mask are [micro_batch, tokens of a shard]; counted: the mask's sum over the whole sequences.
    """
    masked = losses.float() * mask
    loss = masked.sum() / counted.clamp(min=1)
    # A copy: core scales the first in place, by the shards that its average over all of them divides by among others.
    return loss, {"loss": loss.detach().clone(), "positions": torch.stack((masked.detach().sum(0), mask.sum(0)))}


def _micro_batches(config: Config, sequences: int) -> int:
    """How many micro-batches one replica runs of `sequences` sequences; `validate` has seen that it divides."""
    return sequences // (config.train.micro_batch * parallel_state.get_data_parallel_world_size())


def _measured(chunks: list[MegatronModule]) -> list[tuple[int, Any]]:
    """The mixers of these stages that can measure themselves, by layer number."""
    return [(m.layer_number, m) for chunk in chunks for m in chunk.modules() if hasattr(m, "measurements")]


@contextmanager
def _silenced(chunks: list[MegatronModule]) -> Iterator[None]:
    """Every memory of these stages at its start weights."""
    memories = [module for chunk in chunks for module in chunk.modules() if isinstance(module, AtlasMixer)]
    for memory in memories:
        memory.silent = True
    try:
        yield
    finally:
        for memory in memories:
            memory.silent = False


def _over_processes(parts: list[Any]) -> Any:
    """One measurement of several processes: counts are summed, all else is averaged."""
    if not isinstance(parts[0], list):
        return fmean(parts)
    return [sum(each) if isinstance(each[0], int) else fmean(each) for each in zip(*parts, strict=True)]
