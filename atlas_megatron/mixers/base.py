"""What all sequence mixers share: their place in a layer, heads over tensor-parallel ranks, state, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn

from atlas_megatron.config import Config
from atlas_megatron.mixers.costs import Costs
from atlas_megatron.mixers.linears import MixerLinears
from atlas_megatron.mixers.stream import StreamContext
from atlas_megatron.parallel.scan import Shards


@dataclass(frozen=True)
class Documents:
    """Where documents begin in packed sequences. It reaches the mixers in place of core's PackedSeqParams."""

    positions: Tensor  # [B, T] int64, of each token in its own document
    qkv_format: str = "sbhd"  # core asks


@dataclass(frozen=True)
class Mode:
    """What a mixer's forward does besides computing its output. `in_mode` changes it."""

    measure: bool = False  # leave statistics in `measurements`
    ablate: bool = False  # read memories at their start weights and write nothing; for whole sequences
    keep_state: bool = False  # return the final state


class Mixer(Costs, MegatronModule):
    """The sequence mixer of one layer: [T, B, hidden] -> [T, B, hidden], with a state at any cut of T.

    A subclass builds its modules in `build` and computes in `mix`. The methods of `Costs` say what it costs; three have
    no default: `num_params`, `flops_per_token` and `activation_bytes`. Its own parameters are split along their first
    dimension, the heads, over the tensor-parallel group (`by_head`). `replicated` names those that are not.
    """

    replicated: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixerLinears,
        d_model: int,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int,
        settings: Config,
        name: str | None = None,
        shards: Shards | None = None,
    ) -> None:
        """Takes the arguments that core gives a layer's mixer. shards: None takes the layout of `pg_collection`."""
        super().__init__(config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.mode = Mode()
        self.measurements: dict[str, Tensor] = {}
        self.shards = Shards.of(pg_collection, settings.parallel.context_slices) if shards is None else shards
        self.build(settings, submodules, pg_collection)

    def build(self, settings: Config, linears: MixerLinears, groups: ProcessGroupCollection) -> None:
        """Make the modules and parameters."""
        raise NotImplementedError

    def mix(self, hidden_states: Tensor, state: Any | None, positions: Tensor | None = None) -> tuple[Tensor, Any]:
        """[T, B, hidden] and the state before -> (y [T, B, hidden], the state after).

        state: what `mix` returned for the tokens before; None at the start of a sequence.
        positions [B, T] int64: each token's position in its own document, where several are packed into a sequence.
        Under context parallelism the tokens are this rank's. Every rank is given the state before the whole sequence.
        It returns the state after its own tokens, or None where nobody asks for a state.
        """
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: StreamContext | None = None,
        packed_seq_params: Documents | None = None,
    ) -> tuple[Tensor, None]:
        """[T, B, hidden] -> [T, B, hidden]. With a context: goes on from its state, and leaves the new one there."""
        state = inference_context.states.get(self.layer_number) if inference_context is not None else None
        positions = () if packed_seq_params is None else (packed_seq_params.positions,)
        with in_mode(self, keep_state=inference_context is not None):
            y, after = self.mix(hidden_states, state, *positions)
        if inference_context is not None:
            inference_context.states[self.layer_number] = self.final_state(after)
        return y, None

    def final_state(self, after: Any) -> Any:
        """The state after the whole sequence, from the states after each rank's tokens."""
        return self.shards.tokens.from_last(after)

    def placed(self, tensor: Tensor) -> Tensor:
        """On this rank's device, in the model's dtype."""
        return tensor.to(device=torch.cuda.current_device(), dtype=self.config.params_dtype)

    def by_head(self, whole: Tensor) -> nn.Parameter:
        """This rank's heads of a [heads, ...] tensor. All are drawn, so the start does not depend on the split."""
        parameter = nn.Parameter(self.placed(whole.chunk(self.tp_group.size())[self.tp_group.rank()].clone()))
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def on_every_rank(self, tensor: Tensor) -> nn.Parameter:
        """A parameter that every rank holds whole. Name it in `replicated`."""
        parameter = nn.Parameter(self.placed(tensor))
        # Under sequence parallelism each rank sees its own tokens only: core then sums the gradients.
        parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """What a checkpoint holds: this layer's own parameters, split along heads, and its modules'."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {name: 0 for name in own if name not in self.replicated},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return sharded


@contextmanager
def in_mode(*modules: nn.Module, **changed: bool) -> Iterator[None]:
    """Within: all mixers in these modules run with these fields of their `Mode` changed.

    Afterwards each mixer has the mode that it had, also where an exception ends the block.
    """
    mixers = [mixer for module in modules for mixer in module.modules() if isinstance(mixer, Mixer)]
    before = [mixer.mode for mixer in mixers]
    within = [replace(mode, **changed) for mode in before]
    try:
        for mixer, mode in zip(mixers, within, strict=True):
            mixer.mode = mode
        yield
    finally:
        for mixer, mode in zip(mixers, before, strict=True):
            mixer.mode = mode
