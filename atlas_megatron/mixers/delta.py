"""DeltaNet (`D`) and Gated DeltaNet (`G`): linear memories under the delta rule of `atlas_kernels.gated_delta`.

Dims: B batch, T tokens, H heads of this tensor-parallel rank, K = V head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from atlas_kernels import MemoryState, at_least_float32, gated_norm, initial_state
from atlas_kernels.gated_delta import RULE, gated_delta_rule, initial_decay, log_decay
from atlas_kernels.gated_norm import open_gate
from atlas_kernels.short_conv import initial_taps
from atlas_megatron.config import Config, MemoryConfig
from atlas_megatron.config.memory_flops import memory_flops
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.mixers.base import Mixer
from atlas_megatron.mixers.convolution import convolved, start_edges
from atlas_megatron.mixers.costs import FLOAT, Halo, Matrix, fused
from atlas_megatron.mixers.linears import MixerLinears

logger = logging.getLogger(__name__)

# The decay where a packed document begins: nothing is left in float32; sums of 64 of these keep three decimals.
LOG_NOTHING = -100.0
# Head size that flash-linear-attention's kernels take.
FLASH_WIDEST = 256

# (q, k, v [B, T, H, K], beta, log alpha or None [B, T, H], positions in packed documents or None [B, T], what it left
# before or None) -> (y [B, T, H, K], what it leaves).
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class DeltaState:
    """What a layer carries over a cut: the memory, as its kernel keeps it, and the convolutions' tail."""

    memory: Any
    tail: Tensor


class DeltaNet(Mixer):
    """q, k, v through short convolutions, the delta rule, a norm and an output gate; split along heads.

    Laid out by head first, as `AtlasMixer`: a row of `linear_qkvg` or of `linear_gates` belongs to one head.
    """

    gates: ClassVar[int] = 1  # beta

    def build(self, settings: Config, linears: MixerLinears, groups: ProcessGroupCollection) -> None:
        delta, hidden = settings.delta, settings.model.hidden_size
        self.head_dim = delta.head_dim
        self.kernel = choose_kernel(delta.impl, self.config.params_dtype, delta.head_dim)
        self.edges = "chunked" if delta.impl == "chunked" else "auto"
        width = delta.heads * delta.head_dim
        self.linear_qkvg = linears.column(hidden, 4 * width, self.config, self.tp_group)
        self.linear_gates = linears.gates(hidden, delta.heads * self.gates, self.config, self.tp_group)
        self.linear_out = linears.row(width, hidden, self.config, self.tp_group)
        self.convolution = self.by_head(initial_taps(delta.heads, delta.head_dim, delta.conv_size))
        start_edges(delta, self.linear_qkvg, self.convolution, self.linear_out)
        self.norm_gain = self.by_head(torch.ones(delta.heads, delta.head_dim))
        self.branch_bias = self.by_head(open_gate(delta.heads, delta.head_dim)) if delta.open_gate else None
        for parameter in self.parameters(recurse=False):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    @classmethod
    def num_params(cls, settings: Config) -> int:
        delta, hidden = settings.delta, settings.model.hidden_size
        width = delta.heads * delta.head_dim
        edges = width * (3 * delta.conv_size + (2 if delta.open_gate else 1))  # taps, norm after, output gate's bias
        return hidden * (5 * width + delta.heads * cls.gates) + edges

    @classmethod
    def matrices(cls, settings: Config) -> tuple[Matrix, ...]:
        return fused("linear_qkvg", 4, settings.delta, settings.model.hidden_size)

    @classmethod
    def flops_per_token(cls, settings: Config) -> tuple[float, float]:
        """q, k, v and output gate, output projection, gates, the convolutions' taps, the memory in blocks."""
        delta, model = settings.delta, settings.model
        width = delta.heads * delta.head_dim
        memory = MemoryConfig(**PRESETS["delta"], heads=delta.heads, head_dim=delta.head_dim)
        inner = memory_flops(memory, model.seq_length) / model.seq_length
        linears = model.hidden_size * (5 * width + delta.heads * cls.gates)
        return 2 * (linears + 3 * width * delta.conv_size) + inner, inner

    @classmethod
    def linears(cls, settings: Config) -> tuple[int, int]:
        """Of q, k, v and output gate, and of the gates."""
        return 2 * settings.model.hidden_size, 1

    @classmethod
    def halos(cls, settings: Config) -> tuple[Halo, ...]:
        delta = settings.delta
        return (Halo("convolution", delta.conv_size - 1, 3 * delta.heads * delta.head_dim),)

    @classmethod
    def exchanged_numbers(cls, settings: Config) -> int:
        """q, k, v and the answer; the gates."""
        return 4 * settings.delta.head_dim + cls.gates

    @classmethod
    def state_numbers(cls, settings: Config, position: int) -> int:
        return settings.delta.heads * settings.delta.head_dim**2

    @classmethod
    def state_size(cls, settings: Config) -> int:
        return settings.delta.heads * settings.delta.head_dim**2

    @classmethod
    def activation_bytes(cls, settings: Config, size: int) -> float:
        """q, k, v before and after the convolution and normalised in float32, gates and the read."""
        delta = settings.delta
        width = delta.heads * delta.head_dim
        wide = 5 * width + 2 * cls.gates * delta.heads
        return (8 * width * size + wide * FLOAT) / settings.parallel.tensor

    def mix(
        self, hidden_states: Tensor, state: DeltaState | None, positions: Tensor | None = None
    ) -> tuple[Tensor, DeltaState]:
        projected = self.linear_qkvg(hidden_states)[0].transpose(0, 1)  # Megatron's [T, B, D]: [B, T, D] from here
        qkv, branch = projected.unflatten(-1, (-1, 4, self.head_dim)).split((3, 1), dim=-2)
        before, held = (state.tail, state.memory) if state else (None, None)
        q, k, v, tail = convolved(qkv, self.convolution, before, positions, self.shards.tokens, self.edges)
        logits = self.linear_gates(hidden_states)[0].transpose(0, 1)
        logits = at_least_float32(logits).unflatten(-1, (-1, self.gates))
        log_alpha = self.log_decay(logits)
        tokens = (q, k, v, logits[..., 0].sigmoid(), *(() if log_alpha is None else (log_alpha,)))
        y, memory = self.shards.scan(self, tokens, held, positions, sliced=not self.mode.keep_state)

        branch = branch.squeeze(-2) if self.branch_bias is None else branch.squeeze(-2) + self.branch_bias
        y = gated_norm(y, branch, self.norm_gain, self.config.layernorm_epsilon, self.edges)
        return self.linear_out(y.flatten(2).transpose(0, 1).contiguous())[0], DeltaState(memory, tail)  # [T, B, D]

    def advance(
        self, tokens: tuple[Tensor, ...], heads: slice, state: Any, positions: Tensor | None
    ) -> tuple[Tensor, Any]:
        """tokens: q, k, v, beta, and log alpha if anything decays. The heads are alike: nothing of them is learned."""
        q, k, v, beta, *decay = tokens
        return self.kernel(q, k, v, beta, decay[0] if decay else None, positions, state)

    def empty_state(self, tokens: tuple[Tensor, ...], heads: slice, position: int | Tensor) -> Any:
        """An empty memory at this position."""
        _, k, v, *_ = tokens
        if self.kernel is flash_kernel:
            return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
        empty = v.new_zeros(v.shape[2], v.shape[3], k.shape[3])
        return initial_state(RULE, (empty,), k, v, residuals=False, source_gates=True).at(position)

    def to_message(self, state: Any) -> tuple[Tensor, ...]:
        return state.weights if isinstance(state, MemoryState) else (state,)

    def from_message(self, empty: Any, message: tuple[Tensor, ...]) -> Any:
        (weights,) = message
        return replace(empty, weights=message, anchor=message) if isinstance(empty, MemoryState) else weights

    def final_state(self, after: DeltaState) -> DeltaState:
        """The memory stays with the rank that has its heads; the convolutions' tail is of all heads."""
        return DeltaState(self.shards.chain.from_last(after.memory), self.shards.tokens.from_last(after.tail))

    def log_decay(self, logits: Tensor) -> Tensor | None:
        """log alpha [B, T, H] from the gates' logits [B, T, H, gates]; None: nothing decays."""
        return None


class GatedDeltaNet(DeltaNet):
    """DeltaNet whose memory decays before each step, alpha = exp(-rate softplus(a + bias))."""

    gates = 2  # beta, a

    def build(self, settings: Config, linears: MixerLinears, groups: ProcessGroupCollection) -> None:
        rate_log, bias = initial_decay(settings.delta.heads)
        self.decay_rate_log, self.decay_bias = self.by_head(rate_log), self.by_head(bias)
        super().build(settings, linears, groups)

    @classmethod
    def num_params(cls, settings: Config) -> int:
        return super().num_params(settings) + 2 * settings.delta.heads

    def log_decay(self, logits: Tensor) -> Tensor | None:
        return log_decay(logits[..., 1], self.decay_rate_log, self.decay_bias)


def flash_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_alpha: Tensor | None,
    positions: Tensor | None,
    memory: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernels of flash-linear-attention; memory [B, H, K, V], float32."""
    # Optional, and not importable without Triton.
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    # They refuse float32; what they sum, and the memory, they keep in float32 themselves.
    q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
    fixed = {"scale": 1.0, "initial_state": memory, "output_final_state": True}
    if positions is not None:
        log_alpha = (torch.zeros_like(beta) if log_alpha is None else log_alpha).masked_fill(
            positions.unsqueeze(-1) == 0, LOG_NOTHING
        )
    if log_alpha is None:
        return chunk_delta_rule(q=q, k=k, v=v, beta=beta, **fixed)
    return chunk_gated_delta_rule(q=q, k=k, v=v, g=log_alpha, beta=beta, **fixed)


@cache
def choose_kernel(impl: str, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel that `delta.impl` means on this machine for a model in `dtype`; says once which.

    Raises ValueError for impl = "fla" where it cannot run.
    """
    lacking = ""
    if not torch.cuda.is_available():
        lacking = "no GPU is visible"
    elif find_spec("fla") is None:
        lacking = "flash-linear-attention is not installed (pip install flash-linear-attention)"
    elif dtype != torch.bfloat16:
        lacking = f"flash-linear-attention takes bfloat16, not {dtype}"
    elif head_dim > FLASH_WIDEST:
        lacking = f"flash-linear-attention takes heads up to {FLASH_WIDEST} wide, delta.head_dim={head_dim} is wider"
    if impl == "fla" and lacking:
        raise ValueError(f"delta.impl='fla' but {lacking}; mend that, or set delta.impl='auto'")
    if impl == "chunked" or lacking:
        logger.info("[delta] runs on atlas_kernels: %s", lacking or "delta.impl='chunked'")
        return gated_delta_rule
    logger.info("[delta] runs on flash-linear-attention")
    return flash_kernel
