"""The training loop, from Megatron-Core's public parts: schedule, gradients, optimizer, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config
from torch import Tensor

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.checkpoint.checkpoint import Progress, TrainState
from atlas_megatron.checkpoint.provenance import Provenance, refusal
from atlas_megatron.cli.ending import NonFiniteError, line_of
from atlas_megatron.config import Config, to_toml
from atlas_megatron.config.batch_ramp import schedule_of
from atlas_megatron.config.checks import data_parallel_size
from atlas_megatron.data import epochs
from atlas_megatron.data.batches import Batch, Batches, build_datasets, trained_bytes_per_token
from atlas_megatron.files.scratch import write_whole
from atlas_megatron.mixers.base import Documents, in_mode
from atlas_megatron.model.build import build_chunks, flops_per_token
from atlas_megatron.parallel import world
from atlas_megatron.parallel.context import settle
from atlas_megatron.parallel.device import device
from atlas_megatron.resilience import non_finite, out_of_memory
from atlas_megatron.resilience.non_finite import Action, Decision, Policy, Trouble
from atlas_megatron.resilience.run_lock import RunLock
from atlas_megatron.resilience.stop_signals import StopSignals
from atlas_megatron.resilience.stragglers import Stragglers
from atlas_megatron.resilience.watchdog import Watchdog
from atlas_megatron.training.capture import captured_schedule
from atlas_megatron.training.expert_balance import expert_balance
from atlas_megatron.training.measuring import LayerMeasurements
from atlas_megatron.training.metrics import Record, RunLog, Speed
from atlas_megatron.training.optimizer import build_optimizer, gradient_norm, wrap
from atlas_megatron.training.profiling import Profile
from atlas_megatron.training.resuming import Start, going_on, said_of, samples_as_long, start_of
from atlas_megatron.training.validation import Validation
from atlas_megatron.training.watching import Watcher, unchanged
from atlas_megatron.training.write_budget import set_budget


class Trainer:
    """One process's share of a run. `join` the world first; every process builds one and calls `train`."""

    def __init__(
        self,
        config: Config,
        signals: StopSignals | None = None,
        lock: RunLock | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """Build data, model and optimizer, and load the checkpoint that the run goes on from or begins with, if any.

        signals: those that the caller already notes, so that none is lost while all this is built; None: from `train`
        on. lock: the run's, looked at before anything is saved. watcher: what looks at the model on the way. Raises
        ValueError for data that cannot be trained on, and as `start_of`.
        """
        directory = Path(config.run.directory)
        start = start_of(config)
        resumed = start.folder
        self.config = config = going_on(start.config, start.before)
        train = config.train
        if watcher is None and (train.evaluate_every or train.sample_every):
            raise ValueError("train.evaluate_every and sample_every want a watcher; start the run by atlas-train")
        sequences = train.validate_sequences if train.validate_every else 0
        train_set, validation_set = build_datasets(config, train.steps * train.global_batch, sequences)
        provenance = Provenance.of(config)
        changes = provenance.changes_since(resumed) if resumed else []
        if resumed and changes and not config.data.allow_change:
            raise ValueError(refusal(resumed, config, changes))
        self.trained = _build(config)
        self._validation = Validation(
            config, validation_set, self.trained.chunks, partial(self._run, forward_only=True)
        )
        self.progress = self._restored(start)
        consumed = 0 if "data" in changes else samples_as_long(config, start.before, self.progress.consumed_samples)
        self.progress = replace(self.progress, consumed_samples=consumed)
        self._saver = checkpoint.Saver(config, provenance)
        self._batches = Batches(train_set, config, self.progress.consumed_samples, endless=True)
        self._batch_size = StepBatchsizeNumMicroBatchesCalculator(
            train.micro_batch, data_parallel_size(config, torch.distributed.get_world_size()),
            decrease_batch_size_if_needed=False, rank=world.rank(), schedule=schedule_of(config),
            seq_length=config.model.seq_length,
        )  # fmt: skip
        self._speed = Speed(config, flops_per_token(config).training, torch.distributed.get_world_size())
        self._measurements = LayerMeasurements(config, self.trained.chunks, self._say)
        self._signals = signals or StopSignals()
        self._lock, self._watcher = lock, watcher
        self._watchdog = Watchdog(config)
        self._stragglers = Stragglers(config.resilience.straggler_every)
        self._profile = Profile(config)
        self._captured = captured_schedule() if train.cuda_graph else None
        counts = {"skipped": self.progress.skipped, "returns": self.progress.returns}
        self._policy = Policy(config.resilience, self._say, **counts)
        self.log = self._open_log()
        if world.rank() == 0:
            # What a finished run was trained with stays; whoever reads it finds all of it or what was there.
            if self.progress.step < config.train.steps or not (directory / checkpoint.CONFIG).is_file():
                write_whole(directory / checkpoint.CONFIG, to_toml(config))
        held = [samples * config.model.seq_length for samples in train_set.passes]
        of_data = epochs.lines(config, epochs.drawn(config, train_set.weights, held))
        for line in (*said_of(start, config, self.progress.step), *of_data):
            self._say(line)
        if changes:
            self._say(f"another {' and other '.join(changes)} than before, as data.allow_change=true allows")

    def _restored(self, start: Start) -> Progress:
        if start.folder:
            return checkpoint.restore(start.folder, self.config, self.trained)
        return checkpoint.take_weights(start.weights, self.trained) if start.weights else Progress()

    def _open_log(self) -> RunLog | None:
        """The first process's; what keeps it from opening one ends every process, not the others by waiting for it."""
        log, refused = None, ""
        if world.rank() == 0:
            # Of the training data where their folders say, else of the validation's: the same text, nearly.
            bytes_per_token = trained_bytes_per_token(self.config) or self._validation.bytes_per_token
            Path(self.config.run.directory).mkdir(parents=True, exist_ok=True)
            try:
                log = RunLog(self.config, self.progress.step, bytes_per_token)
            except (ValueError, OSError) as error:
                refused = line_of(error)
        (refused,) = world.from_first([refused])
        if refused:
            raise ValueError(refused)
        return log

    def train(self) -> bool:
        """Train to the last step; False where SIGTERM, SIGUSR1 or Ctrl-C ended it before, with a checkpoint.

        Raises NonFiniteError, with step and layer, where NaN or inf appears and is not, or not any more, passed over:
        nothing is saved from then on; and LostProcessError where another process ended.
        """
        try:
            with self._signals, world.naming_the_lost(self.config), self._watchdog:
                return self._train()
        except torch.OutOfMemoryError as error:
            raise out_of_memory.explained(error, self.config, self.progress.step + 1) from error
        finally:
            self._profile.close()
            if self.log:
                self.log.close()

    def _train(self) -> bool:
        saving, last = self.config.checkpoint, self.config.train.steps
        self._signals.can_save = True
        while self.progress.step < last:
            step = self.progress.step + 1
            self._profile.begin(step)
            record, stop = self._step(step)
            self._watchdog.beat()
            # A batch passed over: whoever asked to stop is heard again after the next.
            if record is None:
                continue
            if self._profile.is_complete(step, ends=stop or step == last):
                with self._watchdog.patient():
                    self._say(self._profile.write())
            self._saver.poll()
            if self._validation.is_due(step):
                with self._watchdog.patient():
                    record |= self._validation.after(step)
            if self._watcher and self._watcher.is_due(step):
                record |= self._watched(self._watcher, step)
            if self.log:
                self.log.write(record)
            if step % saving.every == 0 or (step == last and saving.last) or stop:
                saved = self._save(record.get("validation_loss"), wait=stop or step == last)
                if stop and step < last:
                    asked = self._signals.asked or "another process was asked"
                    self._say(f"{asked}: stopped after step {step}, saved {saved}; the same command resumes there")
                    return False
        # Where no step was left to take: the one that an earlier one began.
        self._saver.finish()
        return True

    def _watched(self, watcher: Watcher, step: int) -> Record:
        try:
            with self._watchdog.patient(), unchanged(self.trained.chunks):
                found, lines = watcher.after(step, self.config, self.trained.chunks)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"step {step}: memory does not suffice to evaluate or sample beside the training; set shorter "
                "train.evaluate_lengths, or train.evaluate_every=0 and sample_every=0, and run atlas-eval on a "
                "checkpoint"
            ) from error
        for line in lines:
            self._say(f"step {step}: {line}")
        return found

    def _save(self, validation_loss: float | None, *, wait: bool) -> Path:
        """Save the progress, with the loss of this step's validation, if any; wait: until it is on the disk."""
        if self._lock:
            self._lock.check()
        with self._watchdog.patient():
            saved = self._saver.save(self.trained, self.progress, validation_loss)
            if wait:
                self._saver.finish()
        return saved

    def _say(self, line: str) -> None:
        if self.log:
            self.log.say(line)

    def _step(self, step: int) -> tuple[Record | None, bool]:
        """One optimizer step: its record, None where the batch was passed over; and whether any was asked to stop."""
        start = time.perf_counter()
        train, trained = self.config.train, self.trained
        with self._stragglers.own():
            batches = [next(self._batches) for _ in range(self._micro_batches())]
        measures = self._measurements.are_due(step)
        for chunk in trained.chunks:
            chunk.zero_grad_buffer()
        trained.optimizer.zero_grad()
        tokens = len(batches) * train.micro_batch * self.config.model.seq_length
        set_budget(trained.chunks, self.config, step, tokens)
        with in_mode(*trained.chunks, measure=measures):
            # What a measuring step notes, a graph would not.
            outputs = self._run(batches, forward_only=False, eager=measures)
        balance = expert_balance(self.config, len(batches))
        loss, stop = self._agree([output["loss"] for output in outputs])
        # Also where this stage has no memory: all processes gather.
        layers = self._measurements.gathered() if measures else {}
        repeat, norm = partial(self._run, batches, forward_only=True), partial(gradient_norm, trained.optimizer)
        trouble = non_finite.before_update(trained.chunks, self.config, loss, layers, repeat, norm)
        decision = self._policy.decide(step, trouble)
        if trouble:
            self._pass_over(step, trouble, decision)
            return None, stop
        # Before the update: step 1 of the warm-up then already moves the parameters.
        trained.scheduler.step(1)
        _, grad_norm, _ = trained.optimizer.step()
        trouble = non_finite.in_norm(trained.chunks, self.config, grad_norm)
        if trouble:
            raise self._diverged(step, trouble)
        sequences = self._batch_size.get_current_global_batch_size()
        read = sequences * self.config.model.seq_length
        self._move_on(step=step, tokens=self.progress.tokens + read)
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": float(grad_norm),
            "lr": trained.optimizer.param_groups[0]["lr"],
            "tokens": self.progress.tokens,
            **balance,
            **self._speed.after(
                step, time.perf_counter() - start, read, self.progress.tokens, profiled=step in self._profile.steps
            ),
        }
        if train.batch_ramp:
            record["sequences"] = sequences
        if measures:
            record["layers"] = layers
            self._measurements.warn(step, layers)
        if self.progress.skipped:
            record |= {"skipped": self.progress.skipped, "returns": self.progress.returns}
        own = self._stragglers.after(step)
        slow = self._stragglers.line(own)
        if slow:
            self._say(f"step {step}: {slow}")
        return record | own, stop

    def _micro_batches(self) -> int:
        """How many of them this replica runs in the next step, by the tokens that the weights were trained on."""
        trained = self.progress.tokens // self.config.model.seq_length
        self._batch_size.update(trained, consistency_check=True)
        return self._batch_size.get()

    def _pass_over(self, step: int, trouble: Trouble, decision: Decision) -> None:
        """Leave a batch out, and go back to a checkpoint or end the run where the policy says so."""
        if decision.action is Action.STOP:
            raise self._diverged(step, trouble, decision.why)
        self._move_on()
        if decision.action is Action.RETURN:
            self._go_back(step, trouble)

    def _move_on(self, **changed: int) -> None:
        """Count what has just been read as consumed."""
        policy = self._policy
        consumed = self.progress.consumed_samples + self._batch_size.get_current_global_batch_size()
        counts = {"skipped": policy.skipped, "returns": policy.returns}
        self.progress = replace(self.progress, consumed_samples=consumed, **counts, **changed)

    def _go_back(self, step: int, trouble: Trouble) -> None:
        """To the weights, moments and schedule of the newest whole checkpoint; the data goes on from here."""
        with self._watchdog.patient():
            self._saver.finish()
            folder, wrong = checkpoint.to_resume(self.config.run.directory)
            for line in wrong:
                self._say(line)
            saved = checkpoint.restore(folder, self.config, self.trained) if folder else Progress()
            if not saved.step:
                raise self._diverged(step, trouble, "there is nothing to go back to")
        self.progress = replace(self.progress, step=saved.step, tokens=saved.tokens)
        if self.log:
            self.log.rewind(saved.step)
        limit = self.config.resilience.most_returns
        self._say(
            f"went back to {folder} (return {self.progress.returns} of at most {limit}): step {saved.step + 1} comes "
            "next, with data that was not read before"
        )

    def _run(self, batches: list[Batch], *, forward_only: bool, eager: bool = True) -> list[dict[str, Tensor]]:
        """Core's schedule over the micro-batches; what the loss function returned, on the last stage.

        eager: not from a CUDA graph, even with train.cuda_graph.
        """
        forward = partial(_forward_step, self.config.data.packed)
        captured = None if forward_only or eager else self._captured
        outputs = (captured or get_forward_backward_func())(
            # A clock inside a graph would tell nothing.
            forward_step_func=forward if forward_only or captured else self._stragglers.timed(forward),
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

    def _diverged(self, step: int, trouble: Trouble, why: str = "") -> NonFiniteError:
        # The good one that may still be being written.
        self._saver.finish()
        return non_finite.error(step, trouble, why, checkpoint.latest(self.config.run.directory)[0])


def _build(config: Config) -> TrainState:
    chunks: list[MegatronModule] = []
    for model in build_chunks(config):
        core = get_model_config(model)
        chunk = wrap(Float16Module(core, model) if core.bf16 else model, core, config, first=not chunks)
        # Replicas start from replica 0's parameters, whatever each drew.
        chunk.broadcast_params()
        chunks.append(chunk)
    # The schedule reads the first chunk's.
    core = get_model_config(chunks[0])
    optimizer, scheduler = build_optimizer(config, chunks, bf16=core.bf16)
    core.finalize_model_grads_func = finalize_model_grads
    core.grad_scale_func = optimizer.scale_loss
    core.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return TrainState(chunks, optimizer, scheduler)


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
