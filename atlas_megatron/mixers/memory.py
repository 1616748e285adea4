"""The ATLAS layer: projections, short convolutions, gates, and the memory that learns at test time (paper Fig 3).

Dims: B batch, T tokens, H heads of this tensor-parallel rank, K = V head size, F memory hidden, W window,
G gates of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from atlas_kernels import Gates, MemoryState, initial_coefficients, lift, omega_memory
from atlas_megatron.config import Config
from atlas_megatron.mixers.base import Mixer, wide
from atlas_megatron.mixers.linears import MixerLinears
from atlas_megatron.mixers.memory_layout import (
    ETA_HEADROOM,
    W1_GAIN,
    eta_start,
    gate_starts,
    memory_flops,
    weight_shapes,
)


@dataclass(frozen=True)
class AtlasState:
    """What a layer carries over a cut: the memory, and the inputs that its convolutions still need [B, 3HK, taps-1]."""

    memory: MemoryState
    tail: Tensor


class AtlasMixer(Mixer):
    """The sequence mixer of an `M` layer; heads are split over the tensor-parallel group.

    Every split parameter is laid out by head first (a row of `linear_qkvg` belongs to one head, whose q, k,
    v and output gate lie together), so that a shard is whole heads, at any group size.
    """

    replicated = ("gate_down",)

    def build(self, settings: Config, linears: MixerLinears, groups: ProcessGroupCollection) -> None:
        memory, hidden = settings.memory, settings.model.hidden_size
        self.memory = memory
        self.rule = memory.rule()
        width = memory.heads * memory.head_dim
        self.linear_qkvg = linears.column(hidden, 4 * width, self.config, self.tp_group)
        self.linear_gates = linears.column(
            memory.gate_rank, memory.heads * len(gate_starts(memory)), self.config, self.tp_group
        )
        self.linear_out = linears.row(width, hidden, self.config, self.tp_group)
        self._build_parameters(hidden)
        for parameter in (*self.parameters(recurse=False), *self.linear_gates.parameters()):
            parameter.no_weight_decay = True

    @staticmethod
    def num_params(settings: Config) -> int:
        memory, hidden = settings.memory, settings.model.hidden_size
        width, heads, gates = memory.heads * memory.head_dim, memory.heads, len(gate_starts(memory))
        return (
            5 * hidden * width  # q, k, v, output gate; output projection
            + 3 * width * memory.conv_size
            + memory.gate_rank * (hidden + heads * gates)
            + heads * gates  # gate biases
            + (heads * (memory.degree + 1) if memory.feature_map == "hadamard" else 0)
            + width  # norm after
            + heads * sum(rows * cols for rows, cols in weight_shapes(memory))
        )

    @staticmethod
    def flops_per_token(settings: Config) -> tuple[float, float]:
        """q, k, v and output gate, output projection, both halves of the gates, the convolutions' taps, the memory."""
        memory, model = settings.memory, settings.model
        width = memory.heads * memory.head_dim
        gates = memory.gate_rank * (model.hidden_size + memory.heads * len(gate_starts(memory)))
        inner = memory_flops(memory, model.seq_length) / model.seq_length
        return 2 * (5 * model.hidden_size * width + gates + 3 * width * memory.conv_size) + inner, inner

    def _build_parameters(self, d_model: int) -> None:
        memory, config = self.memory, self.config
        down = torch.empty(memory.gate_rank, d_model)
        config.init_method(down)
        self.gate_down = self.on_every_rank(down)

        bound = memory.conv_size**-0.5
        taps = torch.empty(memory.heads, 3 * memory.head_dim, memory.conv_size).uniform_(-bound, bound)
        self.convolution = self.by_head(taps)
        self.gate_bias = self.by_head(torch.tensor(gate_starts(memory)).repeat(memory.heads, 1))
        coefficients = initial_coefficients(memory.feature_map, memory.degree)
        self.coefficients = None if coefficients is None else self.by_head(coefficients.repeat(memory.heads, 1))
        self.norm_gain = self.by_head(torch.ones(memory.heads, memory.head_dim))

        *outer, (rows, cols) = weight_shapes(memory)
        # The output matrix starts near zero (a linear memory is nothing else): reads begin as the residual alone.
        first_rows, first_cols = outer[0] if outer else (rows, cols)
        first = torch.empty(memory.heads, first_rows, first_cols).normal_(std=W1_GAIN * first_cols**-0.5)
        self.start_first = self.by_head(first)
        self.start_second = None
        if outer:
            second = torch.stack([nn.init.orthogonal_(torch.empty(rows, cols)) for _ in range(memory.heads)])
            self.start_second = self.by_head(second)

    def mix(self, hidden_states: Tensor, state: AtlasState | None) -> tuple[Tensor, AtlasState]:
        projected = self.linear_qkvg(hidden_states)[0].transpose(0, 1)  # Megatron's [T, B, D]: [B, T, D] from here
        qkv, branch = projected.unflatten(-1, (-1, 4, self.memory.head_dim)).split((3, 1), dim=-2)
        gates = self._gates(hidden_states)
        q, k, v, tail = self._convolved(qkv, state.tail if state else None)
        y, after = self._memory(q, k, v, gates, state.memory if state else None)
        if self.measure:
            self._measure(k, v, gates, state.memory if state else None, after)

        y = F.rms_norm(y, y.shape[-1:], eps=self.config.layernorm_epsilon) * self.norm_gain.to(y.dtype)
        y = y.to(branch.dtype) * F.silu(branch.squeeze(-2))
        return self.linear_out(y.flatten(2).transpose(0, 1).contiguous())[0], AtlasState(after, tail)  # [T, B, D]

    def _convolved(self, qkv: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, T, H, 3, K] -> lifted q and k, v, [B, T, H, K] each, at least float32; and the tail for what follows."""
        before = self.memory.conv_size - 1
        channels = qkv.flatten(2).transpose(1, 2)
        channels = F.pad(channels, (before, 0)) if tail is None else torch.cat([tail, channels], -1)
        taps = self.convolution.reshape(-1, 1, self.memory.conv_size)
        mixed = F.silu(F.conv1d(channels, taps, groups=channels.shape[1]))
        q, k, v = wide(mixed.transpose(1, 2)).unflatten(-1, qkv.shape[2:]).unbind(-2)
        q, k = (lift(F.normalize(x, dim=-1), self.memory.feature_map, self.coefficients) for x in (q, k))
        return q, k, v, channels[..., channels.shape[-1] - before :]

    def _gates(self, hidden_states: Tensor) -> Gates:
        """The gates of every token [B, T, H], at least float32: sigmoids, eta scaled to its bound."""
        logits = self.linear_gates(F.linear(hidden_states, self.gate_down))[0].transpose(0, 1)
        values = (wide(logits).unflatten(-1, self.gate_bias.shape) + self.gate_bias).sigmoid()
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
        return tuple(wide(w) for w in (self.start_first, self.start_second) if w is not None)

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


def _mean_norm(matrices: tuple[Tensor, ...]) -> Tensor:
    """Frobenius norm of each matrix, averaged over all of them."""
    return torch.stack([m.norm(dim=(-2, -1)).mean() for m in matrices]).mean()
