"""The loss on fixed validation sequences, as a run goes on; after its last step also along the context."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule
from torch import Tensor
from torch.utils.data import Dataset

from atlas_megatron.config import Config, uses
from atlas_megatron.config.checks import sequences_together
from atlas_megatron.data.batches import Batch, Batches, bytes_per_token, micro_batches
from atlas_megatron.data.sliding_windows import SlidingWindows
from atlas_megatron.files.scratch import write_whole
from atlas_megatron.mixers.base import in_mode
from atlas_megatron.parallel import world
from atlas_megatron.parallel.device import device
from atlas_megatron.training.metrics import Record, bits_per_byte

POSITION_LOSS = "position_loss.json"


class Validation:
    """The validation of a run; every process makes the same calls.

    dataset: None where there is nothing to validate on. chunks: this process's stages. forward: runs micro-batches
    through all stages and gives what the loss function returned, on the last one.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset | None,
        chunks: list[MegatronModule],
        forward: Callable[[list[Batch]], list[dict[str, Tensor]]],
    ) -> None:
        self._config, self._dataset, self._chunks, self._forward = config, dataset, chunks, forward
        self.bytes_per_token = bytes_per_token(config)

    def is_due(self, step: int) -> bool:
        train = self._config.train
        return self._dataset is not None and (step % train.validate_every == 0 or step == train.steps)

    def after(self, step: int) -> Record:
        """The validation entries of this step's record."""
        assert self._dataset is not None
        sums = self._evaluate(self._dataset)
        if step == self._config.train.steps:
            self._write_position_loss(step)
        loss = (sums[0].sum() / sums[1].sum()).item()
        bits = None if self.bytes_per_token is None else bits_per_byte(loss, self.bytes_per_token)
        record = {"validation_loss": loss, "validation_bits_per_byte": bits}
        if self._config.train.validate_silenced and uses(self._config.model.pattern, "memory"):
            with in_mode(*self._chunks, ablate=True):
                silenced = self._evaluate(self._dataset)
            record["validation_loss_silenced"] = (silenced[0].sum() / silenced[1].sum()).item()
        return record

    def _write_position_loss(self, step: int) -> None:
        sequences = self._config.train.validate_sequences
        together = sequences_together(self._config, torch.distributed.get_world_size())
        windows = SlidingWindows(self._config, sequences, multiple=together)
        sums = self._evaluate(windows)
        # Of too few windows no token stands at every place.
        if world.rank() == 0 and len(windows) and bool((sums[1] > 0).all()):
            by_position = {
                "step": step,
                "stride": windows.stride,
                "tokens_a_position": sums[1].mean().item(),
                "loss": (sums[0] / sums[1]).tolist(),
            }
            write_whole(Path(self._config.run.directory) / POSITION_LOSS, json.dumps(by_position))

    def _evaluate(self, dataset: Dataset) -> Tensor:
        """Sums of loss and mask at each position [2, seq_length] over the first validation sequences of a set."""
        batches = Batches(dataset, self._config)
        count = min(len(batches), micro_batches(self._config, self._config.train.validate_sequences))
        sums = torch.zeros(2, self._config.model.seq_length, device=device())
        if count:
            for chunk in self._chunks:
                chunk.eval()
            with torch.no_grad():
                outputs = self._forward([next(batches) for _ in range(count)])
            for chunk in self._chunks:
                chunk.train()
            own = parallel_state.get_context_parallel_rank()
            for output in outputs:
                sums.chunk(self._config.parallel.context, 1)[own].add_(output["positions"])
        torch.distributed.all_reduce(sums)
        return sums
