"""transformers' Trainer over windows of segments, and what it says as it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from atlas_megatron.finetune import checkpoints
from atlas_megatron.finetune.segments import (
    IGNORED,
    SegmentReader,
    Window,
    segments_with_targets,
    shifted,
    widened,
    windows,
)
from atlas_megatron.hf.weights import WEIGHTS


class StateTrainer(Trainer):
    """Trains a SegmentReader: of each batch one window after the other, each with its own backward.

    Between two windows the memory is detached. All processes read as many windows of as many segments: under ZeRO
    each of them is a collective call.
    """

    model: SegmentReader
    control: Any

    def __init__(
        self, *, detach_every: int, write_budget: float, identity: dict[str, Any], keep: int, **given: Any
    ) -> None:
        """write_budget: as train.write_budget, from the first step on. identity: what a checkpoint's run is told from
        others by. keep: so many of the newest checkpoints."""
        super().__init__(**given)
        self.write_budget = write_budget
        self.detach_every, self.identity, self.keep = detach_every, identity, keep
        self.tokens_read = 0  # by all processes since the start, padding included

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        model.train()
        synchronises = self.accelerator.sync_gradients
        # Processes average their gradients; the loss is of the targets of all of them.
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        total, memory = torch.zeros((), device=self.args.device), None
        pieces = list(self._pieces(inputs))
        self._set_budget(sum(tokens.numel() for _, tokens, _ in pieces))
        for number, (window, tokens, targets) in enumerate(pieces, start=1):
            last = number == len(pieces)
            # As Trainer says it of the micro-batches before a step's last.
            self.accelerator.gradient_state._set_sync_gradients(synchronises and last)
            with self._apart(model, last), torch.set_grad_enabled(window.learns):
                loss, memory = model(tokens, targets, memory, num_items_in_batch)
                if window.learns:
                    loss = loss * self.accelerator.num_processes
                    self.accelerator.backward(loss, **options)
                    total = total + loss.detach()
            memory = memory.detach()
        if synchronises:
            self._complete_gradients()
        # On every process alike, so that none waits for one that has stopped.
        everywhere = float(self.accelerator.reduce(total.clone(), "mean"))
        if not math.isfinite(everywhere):
            raise ValueError(
                f"the loss became {everywhere} at step {self.state.global_step + 1}; go on from a checkpoint with a "
                "smaller --lr, a longer --warmup or a smaller --clip"
            )
        return total

    def _set_budget(self, tokens: int) -> None:
        """Tell the memories what a written token of this micro-batch counts, padding included: the mean over gates,
        layers and tokens counts write_budget. Processes average their gradients, micro-batches add theirs."""
        if not self.write_budget:
            return
        # By their names: the model's code is the folder's.
        memories: list[Any] = [m for m in self.model.modules() if getattr(m, "write_view", None) is not None]
        gates = tokens * sum(memory.write_view.shape[0] for memory in memories)
        for memory in memories:
            memory.write_budget = self.write_budget / (gates * self.args.gradient_accumulation_steps)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss of a held-out token, over all of them; where processes cannot share them out, some count twice."""
        model, sums = self.model_wrapped, torch.zeros(2, dtype=torch.float64, device=self.args.device)
        model.eval()
        count = torch.ones((), device=self.args.device)
        for inputs in self._all_validation():
            memory = None
            for _window, tokens, targets in self._pieces(inputs):
                with torch.no_grad():
                    loss, memory = model(tokens, targets, memory, count)
                sums += torch.stack([loss.double(), (targets != IGNORED).sum().double()])
        lost, counted = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {"eval_loss": lost / counted}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _all_validation(self) -> Any:
        """Its batches, the last one too: Trainer drops one that is not full wherever training is to."""
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return self.get_eval_dataloader()
        finally:
            self.args.dataloader_drop_last = dropped

    def _pieces(self, inputs: dict[str, Any]) -> Iterator[tuple[Window, Tensor, Tensor]]:
        """The windows of a batch, with their tokens and targets; as many of the same length on each process.

        Under ZeRO-3 every module that is called is a collective call, and C layers call theirs by the token.
        """
        inputs = self._prepare_inputs(inputs)
        segment, tokens, targets = self.model.segment, inputs["input_ids"], shifted(inputs["labels"])
        if self.args.world_size > 1:
            longest = torch.tensor(tokens.shape[1], device=tokens.device)
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
            tokens, targets = widened(tokens, targets, int(longest))
        wanted = segments_with_targets(targets, segment).int()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX)
        plan = windows(wanted.bool().tolist(), segment, self.detach_every)
        for window in plan:
            piece = slice(window.start, window.stop)
            if self.model.training:
                self.tokens_read += tokens[:, piece].numel() * self.args.world_size
            yield window, tokens[:, piece], targets[:, piece]

    def _apart(self, model: torch.nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Where gradients stay on their process until the last window; ZeRO has its own way."""
        return nullcontext() if last or self.is_deepspeed_enabled else self.accelerator.no_sync(model)

    def _complete_gradients(self) -> None:
        """Zeros for parameters that no window used (the first memory, where only later ones learn), as ZeRO has it:
        AdamW decays a weight whose gradient is zero and leaves out one that has none."""
        if not self.is_deepspeed_enabled:
            for parameter in self.model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _run_epoch(self, **given: Any) -> None:
        # Trainer looks after a step whether there are more; one that goes on from its last has none.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**given)

    # Checkpoints: of the language model alone, by its own names, and marked when they are whole.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights of a checkpoint, unless DeepSpeed's own files hold them."""
        if self.args.should_save and not self.is_deepspeed_enabled:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_model(self.model.language_model, str(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        safetensors.torch.load_model(self.model.language_model, str(Path(resume_from_checkpoint) / WEIGHTS))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.make_room(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.mark(folder, self.identity)
            checkpoints.drop_old(folder.parent, self.keep)


class Progress(TrainerCallback):
    """A line a log, on the first process."""

    def __init__(self) -> None:
        self.trainer: StateTrainer | None = None
        self._since, self._read = time.perf_counter(), 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        self._since, self._read = time.perf_counter(), self.trainer.tokens_read

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or logs is None or self.trainer is None:
            return
        step = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            print(f"{step}  validation loss {logs['eval_loss']:.4f}", flush=True)
            self._since, self._read = time.perf_counter(), self.trainer.tokens_read
        elif "loss" in logs:
            now, read = time.perf_counter(), self.trainer.tokens_read
            rate = (read - self._read) / (now - self._since)
            self._since, self._read = now, read
            norm = logs.get("grad_norm")
            size = "" if norm is None else f"  gradient norm {norm:.3f}"
            rest = f"learning rate {logs['learning_rate']:.2e}{size}  {rate:,.0f} tokens/s"
            print(f"{step}  loss {logs['loss']:.4f}  {rest}", flush=True)
