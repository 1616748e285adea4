"""The ATLAS layer: projections, short convolutions, gates, and the memory that learns at test time (paper Fig 3).

Dims: B batch, T tokens, H heads of this tensor-parallel rank, K = V head size, F memory hidden, W window,
G gates of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
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

from atlas_kernels import Gates, MemoryState, initial_coefficients, lift, omega_memory
from atlas_megatron.config import MemoryConfig
from atlas_megatron.mixers.linears import MixerLinears

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams

    from atlas_megatron.streaming import StreamContext

# A learned step size may grow to this many times its start: without Newton-Schulz, larger sums of steps diverge.
ETA_HEADROOM = 10.0
W1_GAIN = 0.02


@dataclass(frozen=True)
class AtlasState:
    """What a layer carries over a cut: the memory, and the inputs that its convolutions still need [B, 3HK, taps-1]."""

    memory: MemoryState
    tail: Tensor


def eta_start(memory: MemoryConfig) -> float:
    """The step size at initialisation, given or derived as MemoryConfig says."""
    if memory.eta_start > 0:
        return memory.eta_start
    if memory.ns_steps > 0:
        return 0.01 * memory.ns_period
    theta = memory.theta_start if memory.momentum else 0.0
    return memory.eta_sum * (1.0 - theta) / (memory.gamma_start * memory.window * memory.chunk)


def weight_shapes(memory: MemoryConfig) -> tuple[tuple[int, int], ...]:
    """(rows, cols) of each matrix of one head's memory, in the order of `omega_memory`."""
    width = memory.head_dim
    if memory.memory == "linear":
        return ((width, width),)
    return (width, memory.expansion * width), (memory.expansion * width, width)


def gate_starts(memory: MemoryConfig) -> list[float]:
    """Start logits of one head's gates, in the order in which `AtlasMixer` reads them: alpha, eta, theta, gamma."""
    starts = [memory.alpha_start, 1.0 / ETA_HEADROOM]
    if memory.momentum:
        starts.append(memory.theta_start)
    starts += [memory.gamma_start] * (memory.window if memory.omega_gates == "pair" else 1)
    return [math.log(p / (1.0 - p)) for p in starts]


class AtlasMixer(MegatronModule):
    """The sequence mixer of an `M` layer; heads are split over the tensor-parallel group.

    Every split parameter is laid out by head first (a row of `linear_qkvg` belongs to one head, whose q, k,
    v and output gate lie together), so that a shard is whole heads, at any group size.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MixerLinears,
        d_model: int,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int,
        memory: MemoryConfig,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.memory = memory
        self.rule = memory.rule()
        self.measure = False  # set it, and forward leaves its statistics in `measurements`
        self.measurements: dict[str, Tensor] = {}

        width = memory.heads * memory.head_dim
        self.linear_qkvg = submodules.column(d_model, 4 * width, config, self.tp_group)
        self.linear_gates = submodules.column(
            memory.gate_rank, memory.heads * len(gate_starts(memory)), config, self.tp_group
        )
        self.linear_out = submodules.row(width, d_model, config, self.tp_group)
        self._build_parameters(d_model)
        for parameter in (*self.parameters(recurse=False), *self.linear_gates.parameters()):
            parameter.no_weight_decay = True

    def _build_parameters(self, d_model: int) -> None:
        memory, config = self.memory, self.config
        down = torch.empty(memory.gate_rank, d_model)
        config.init_method(down)
        self.gate_down = nn.Parameter(self._placed(down))
        # Replicated, but under sequence parallelism each rank sees its own tokens only.
        self.gate_down.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

        bound = memory.conv_size**-0.5
        taps = torch.empty(memory.heads, 3 * memory.head_dim, memory.conv_size).uniform_(-bound, bound)
        self.convolution = self._by_head(taps)
        self.gate_bias = self._by_head(torch.tensor(gate_starts(memory)).repeat(memory.heads, 1))
        coefficients = initial_coefficients(memory.feature_map, memory.degree)
        self.coefficients = None if coefficients is None else self._by_head(coefficients.repeat(memory.heads, 1))
        self.norm_gain = self._by_head(torch.ones(memory.heads, memory.head_dim))

        *outer, (rows, cols) = weight_shapes(memory)
        # The output matrix starts near zero (a linear memory is nothing else): reads begin as the residual alone.
        first_rows, first_cols = outer[0] if outer else (rows, cols)
        first = torch.empty(memory.heads, first_rows, first_cols).normal_(std=W1_GAIN * first_cols**-0.5)
        self.start_first = self._by_head(first)
        self.start_second = None
        if outer:
            second = torch.stack([nn.init.orthogonal_(torch.empty(rows, cols)) for _ in range(memory.heads)])
            self.start_second = self._by_head(second)

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=torch.cuda.current_device(), dtype=self.config.params_dtype)

    def _by_head(self, whole: Tensor) -> nn.Parameter:
        """This rank's heads of a [heads, ...] tensor: drawn whole, so that the start does not depend on the split."""
        parameter = nn.Parameter(self._placed(whole.chunk(self.tp_group.size())[self.tp_group.rank()].clone()))
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: StreamContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, None]:
        """[T, B, hidden] -> [T, B, hidden]; continues from the context's state, if there is one, and leaves its own."""
        if packed_seq_params is not None:
            raise ValueError("packed sequences were given; a memory reads one document a row, so unpack the batch")
        state = inference_context.states.get(self.layer_number) if inference_context is not None else None
        projected = self.linear_qkvg(hidden_states)[0].transpose(0, 1)  # Megatron's [T, B, D]: [B, T, D] from here
        qkv, branch = projected.unflatten(-1, (-1, 4, self.memory.head_dim)).split((3, 1), dim=-2)
        gates = self._gates(hidden_states)
        q, k, v, tail = self._convolved(qkv, state.tail if state else None)
        y, after = self._memory(q, k, v, gates, state.memory if state else None)
        if inference_context is not None:
            inference_context.states[self.layer_number] = AtlasState(after, tail)
        if self.measure:
            self._measure(k, v, gates, state.memory if state else None, after)

        y = F.rms_norm(y, y.shape[-1:], eps=self.config.layernorm_epsilon) * self.norm_gain.to(y.dtype)
        y = y.to(branch.dtype) * F.silu(branch.squeeze(-2))
        return self.linear_out(y.flatten(2).transpose(0, 1).contiguous())[0], None  # [T, B, D] again

    def _convolved(self, qkv: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, T, H, 3, K] -> lifted q and k, v, [B, T, H, K] each, at least float32; and the tail for what follows."""
        before = self.memory.conv_size - 1
        channels = qkv.flatten(2).transpose(1, 2)
        channels = F.pad(channels, (before, 0)) if tail is None else torch.cat([tail, channels], -1)
        taps = self.convolution.reshape(-1, 1, self.memory.conv_size)
        mixed = F.silu(F.conv1d(channels, taps, groups=channels.shape[1]))
        q, k, v = _wide(mixed.transpose(1, 2)).unflatten(-1, qkv.shape[2:]).unbind(-2)
        q, k = (lift(F.normalize(x, dim=-1), self.memory.feature_map, self.coefficients) for x in (q, k))
        return q, k, v, channels[..., channels.shape[-1] - before :]

    def _gates(self, hidden_states: Tensor) -> Gates:
        """The gates of every token [B, T, H], at least float32: sigmoids, eta scaled to its bound."""
        logits = self.linear_gates(F.linear(hidden_states, self.gate_down))[0].transpose(0, 1)
        values = (_wide(logits).unflatten(-1, self.gate_bias.shape) + self.gate_bias).sigmoid()
        alpha, eta, *theta, gamma = values.split([1] * (2 + self.memory.momentum) + [self._gammas()], dim=-1)
        pair = self.memory.omega_gates == "pair"
        return Gates(
            alpha=alpha.squeeze(-1),
            eta=eta.squeeze(-1) * (ETA_HEADROOM * eta_start(self.memory)),
            theta=theta[0].squeeze(-1) if theta else torch.zeros_like(alpha.squeeze(-1)),
            gamma=gamma if pair else gamma.squeeze(-1),
        )

    def _gammas(self) -> int:
        return self.memory.window if self.memory.omega_gates == "pair" else 1

    def _memory(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: MemoryState | None
    ) -> tuple[Tensor, MemoryState]:
        return omega_memory(q, k, v, gates, self._start(), self.rule, state=state, impl=self.memory.impl)

    def _start(self) -> tuple[Tensor, ...]:
        """The memory before the first token, [H, rows, cols] each."""
        return tuple(_wide(w) for w in (self.start_first, self.start_second) if w is not None)

    @torch.no_grad()
    def _measure(self, k: Tensor, v: Tensor, gates: Gates, before: MemoryState | None, after: MemoryState) -> None:
        """Statistics of this forward, float32 scalars: gates, norms, and the inner loss around the write."""
        found: dict[str, Tensor] = {}
        for name, gate in vars(gates).items():
            found[f"{name}_mean"], found[f"{name}_std"] = gate.mean(), gate.std(correction=0)
        found["memory_norm"] = _mean_norm(after.weights)
        found["momentum_norm"] = _mean_norm(after.momentum)
        found["start_norm"] = _mean_norm(self._start())
        # M_t read at the next key, and at the newest key that a write has surely reached: of each ns_period
        # tokens the last one writes.
        for name, shift in (("surprise_before", -1), ("surprise_after", self.memory.ns_period - 1)):
            if k.shape[1] > abs(shift):
                read, _ = self._memory(k.roll(shift, 1), k, v, gates, before)
                loss = (read - v.roll(shift, 1)).square().sum(-1) / 2
                found[name] = (loss[:, :shift] if shift < 0 else loss[:, shift:]).mean()
        self.measurements = {name: value.float() for name, value in found.items()}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """What a checkpoint holds: this layer's own parameters, split along heads, and its linears'."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {name: 0 for name in own if name != "gate_down"},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return sharded


def _wide(x: Tensor) -> Tensor:
    """At least float32: gates near 1 and small steps of the inner loop do not survive bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean_norm(matrices: tuple[Tensor, ...]) -> Tensor:
    """Frobenius norm of each matrix, averaged over all of them."""
    return torch.stack([m.norm(dim=(-2, -1)).mean() for m in matrices]).mean()
