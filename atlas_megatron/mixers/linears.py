"""The linears that mixers are built from: core's own or Transformer Engine's, behind one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class MixerLinears:
    """Tensor-parallel linears without bias, [T, B, inputs] -> [T, B, outputs]; each returns (y, None).

    gates_type: a column-parallel one that stays out of FP8, and takes any sizes.
    """

    column_type: type
    row_type: type
    gates_type: type

    def column(
        self, inputs: int, outputs: int, config: TransformerConfig, group: torch.distributed.ProcessGroup
    ) -> torch.nn.Module:
        """Outputs split over the group; a sequence-parallel input is gathered first."""
        return self._column(self.column_type, inputs, outputs, config, group)

    def gates(
        self, inputs: int, outputs: int, config: TransformerConfig, group: torch.distributed.ProcessGroup
    ) -> torch.nn.Module:
        """As `column`, never in FP8: a decay of 0.999 a token is what a memory's length hangs on."""
        return self._column(self.gates_type, inputs, outputs, config, group)

    @staticmethod
    def _column(
        kind: type, inputs: int, outputs: int, config: TransformerConfig, group: torch.distributed.ProcessGroup
    ) -> torch.nn.Module:
        return kind(
            inputs,
            outputs,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=group,
        )

    def row(
        self, inputs: int, outputs: int, config: TransformerConfig, group: torch.distributed.ProcessGroup
    ) -> torch.nn.Module:
        """Inputs split over the group; outputs summed, and scattered along T under sequence parallelism."""
        return self.row_type(
            inputs,
            outputs,
            config=config,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            bias=False,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=group,
        )
