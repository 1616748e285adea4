"""The ATLAS layer (`M`): projections, short convolutions, gates, and the memory that learns at test time.

Dims: B batch, T tokens, H heads, K = V head size, F memory hidden, D lifted key, W window, G gates of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_atlas import AtlasConfig
from .convolution_atlas import ShortConvolution, edge_starts
from .kernels_atlas import (
    DualState,
    Gates,
    LocalMemories,
    LocalParameters,
    LocalState,
    MemoryRule,
    MemoryState,
    State,
    at_least_float32,
    gated_norm,
    layer_start,
    local_memories,
    omega_memory,
    read_locals,
    read_memory,
    unrounded,
)
from .mixer_atlas import Mixer
from .place_atlas import TokenPositions

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class AtlasState:
    """What a layer carries over a cut: memories, and the inputs that its convolutions still need [B, 3HK, taps-1]."""

    memory: State
    tail: Tensor
    locals: LocalState | None = None  # None: it has none

    def ended(self) -> AtlasState:
        """The same, whose memory no gradient goes back through."""
        beside = None if self.locals is None else self.locals.map(Tensor.detach)
        return AtlasState(self.memory.map(Tensor.detach), self.tail, beside)


class AtlasMemory(Mixer):
    """Sequence mixer of an `M` layer. A row of `linear_qkvg` belongs to one head: its q, k, v and output gate."""

    section = "memory"
    states = (AtlasState, LocalState, MemoryState, DualState)

    @classmethod
    def grows(cls, config: AtlasConfig) -> bool:
        """By the exponential kernels' sources."""
        return config.section("memory").kernel != "lifted"

    @classmethod
    def alike(cls, config: AtlasConfig) -> str:
        kernel = config.section("memory").kernel
        return "" if kernel == "lifted" else f"memory.kernel={kernel!r}, whose sources are those of every row"

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        self.memory = memory = config.section("memory")
        self.rule, self.local_rules = MemoryRule.of(memory), local_memories.rules_of(memory)
        # Longer calls end their gradients; where a reach is given, all calls do.
        self.trained = config.seq_length if config.gradient_reach is None else 0
        self.gradient_reach = reach_of(config)
        self.write_budget = 0.0  # of the loss, for each token's write gate; a trainer sets it
        self.epsilon, self.init_std = config.norm_epsilon, config.init_std
        hidden, heads, width = config.hidden_size, memory.heads, memory.heads * memory.head_dim
        self.gate_logits = layer_start.gate_starts(memory, config.seq_length)
        gates = len(self.gate_logits)
        self.linear_qkvg = nn.Linear(hidden, 4 * width, bias=False)
        self.linear_out = nn.Linear(width, hidden, bias=False)
        self.gate_down = nn.Parameter(torch.empty(memory.gate_rank, hidden))
        beside = len(memory.locals)
        self.linear_gates = nn.Linear(memory.gate_rank, heads * (1 + beside) * gates, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(heads, gates))
        self.convolution = ShortConvolution(heads, memory.head_dim, memory.conv_size)
        learned = layer_start.coefficient_count(memory)
        self.coefficients = nn.Parameter(torch.empty(heads, learned)) if learned else None
        self.norm_gain = nn.Parameter(torch.empty(heads, memory.head_dim))
        self.branch_bias = nn.Parameter(torch.empty(heads, memory.head_dim)) if memory.open_gate else None
        self.write_view = nn.Parameter(torch.empty(heads, 2 * memory.head_dim)) if memory.write_gate else None
        matrices = [nn.Parameter(torch.empty(heads, *shape)) for shape in layer_start.weight_shapes(memory)]
        self.start_first, self.start_second, self.start_gate = (matrices + [None, None])[:3]  # type: ignore[list-item]
        several = lambda *shape: nn.Parameter(torch.empty(heads, beside, *shape)) if beside else None  # noqa: E731
        self.local_bias = several(gates)
        self.local_view = several(2 * memory.head_dim) if memory.write_gate else None
        starts = [several(*shape) for shape in layer_start.weight_shapes(memory)]
        self.local_first, self.local_second, self.local_gate = (*starts, None, None)[:3]

    def start(self) -> dict[str, Tensor]:
        """What this module's own parameters begin with, where no checkpoint gives them."""
        memory = self.memory
        own = {
            "gate_down": torch.empty(self.gate_down.shape).normal_(std=self.init_std),
            "gate_bias": torch.tensor(self.gate_logits).repeat(memory.heads, 1),
            "norm_gain": torch.ones(self.norm_gain.shape),
        }
        if self.write_view is not None:
            own["write_view"] = torch.zeros(self.write_view.shape)
        learned = layer_start.start_coefficients(memory)
        if learned is not None:
            own["coefficients"] = learned.repeat(memory.heads, 1)
        names = ("start_first", "start_second", "start_gate")
        own |= zip(names, layer_start.initial_weights(memory), strict=False)
        if memory.locals:
            own["local_bias"] = local_memories.local_gate_starts(memory).repeat(memory.heads, 1, 1)
            names = ("local_first", "local_second", "local_gate")
            own |= zip(names, local_memories.local_weights(memory), strict=False)
        if self.local_view is not None:
            own["local_view"] = torch.zeros(self.local_view.shape)
        return own | edge_starts(memory, self.linear_qkvg, self.convolution)

    def forward(self, x: Tensor, state: AtlasState | None, place: TokenPositions) -> tuple[Tensor, AtlasState]:
        """[B, T, hidden] -> [B, T, hidden] and the state after."""
        projected = self.linear_qkvg(x).unflatten(-1, (-1, 4, self.memory.head_dim))
        qkv, branch = projected.split((3, 1), dim=-2)
        held, tail, beside = (state.memory, state.tail, state.locals) if state else (None, None, None)
        q, k, v, tail = self.convolution(qkv, tail, place.documents)
        gates, local_gates = self.gates(x, k, v)
        with unrounded(x):
            y, after = self.scanned(q, k, v, gates, held, place.documents, qkv.dtype)
            if local_gates:
                local = LocalMemories(self.memory, self.local_rules, self.local_parameters(), self.lifted, qkv.dtype)
                more, beside = read_locals(local, q, k, v, local_gates, beside, place.documents)
                y = y + more
            branch = branch.squeeze(-2) if self.branch_bias is None else branch.squeeze(-2) + self.branch_bias
            y = gated_norm(y, branch, self.norm_gain, self.epsilon, self.memory.impl)
        return self.linear_out(y.flatten(2)), AtlasState(after, tail, beside)

    def scanned(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        state: State | None,
        documents: Tensor | None,
        products: torch.dtype,
    ) -> tuple[Tensor, State]:
        """What q [B, T, H, K] read while k and v are written, and the memory after; gradients end at `gradient_reach`.

        Beyond the length of training the product of Jacobians, one a chunk, may be of any size: at 8 times that length
        a fresh omeganet's gradient had a norm of 1e19.
        """
        tokens, outputs = q.shape[1], []
        reach = self.reach_in(tokens)
        for first in range(0, tokens, reach or tokens):
            part = slice(first, first + (reach or tokens))
            y, state = omega_memory(
                self.lifted(q[:, part]),
                self.lifted(k[:, part], key=True),
                v[:, part],
                Gates(gates.alpha[:, part], gates.eta[:, part], gates.theta[:, part], gates.gamma[:, part]),
                self.start_weights(),
                self.rule,
                state=state.map(Tensor.detach) if first and state is not None else state,
                residual=(q[:, part], k[:, part]) if layer_start.own_residual(self.memory) else None,
                impl=self.memory.impl,
                positions=None if documents is None else documents[:, part],
                products=products,
            )
            outputs.append(y)
        assert state is not None
        return torch.cat(outputs, 1), state

    def reach_in(self, tokens: int) -> int:
        """Tokens over which gradients go back in a call of so many; 0: all. Said where training had fewer."""
        reach = self.gradient_reach if torch.is_grad_enabled() and tokens > self.trained else 0
        if reach and self.trained:
            logger.warning_once(
                f"{tokens} tokens are read at once, more than the {self.trained} of training: gradients go back over "
                f"{reach} tokens of a memory; config.gradient_reach says how far, 0 over all"
            )
        return reach

    def read(self, q: Tensor, state: AtlasState | None) -> Tensor:
        """What the memory as it stands answers to q [B, T, H, K], without a write: [B, T, H, K]."""
        q = F.normalize(at_least_float32(q), dim=-1)
        held, residual = state.memory if state else None, q if layer_start.own_residual(self.memory) else None
        with unrounded(q):
            return read_memory(self.lifted(q), self.start_weights(), self.rule, held, residual)

    def gates(self, x: Tensor, k: Tensor, v: Tensor) -> tuple[Gates, tuple[Gates, ...]]:
        """The gates of the memory and of the local ones. k, v [B, T, H, K]: what a token would write."""
        said = (self.linear_gates(F.linear(x, self.gate_down)), self.gate_bias, k, v, self.write_view)
        if not self.memory.locals:
            return layer_start.gates_of(self.memory, *said, self.write_budget), ()
        return local_memories.gates_of_all(self.memory, *said, self.local_parameters(), self.write_budget)

    def local_parameters(self) -> LocalParameters:
        assert self.local_bias is not None
        starts = (self.local_first, self.local_second, self.local_gate)
        return LocalParameters(self.local_bias, self.local_view, tuple(s for s in starts if s is not None))

    def lifted(self, x: Tensor, *, key: bool = False) -> Tensor:
        """phi(x) of queries, or keys."""
        return layer_start.lifted_for(self.memory, x, self.coefficients, key=key)

    def start_weights(self) -> tuple[Tensor, ...]:
        """The memory before the first token, [H, rows, cols] each."""
        start = (self.start_first, self.start_second, self.start_gate)
        return tuple(at_least_float32(w) for w in start if w is not None)


def reach_of(config: AtlasConfig) -> int:
    """Tokens over which gradients go back through a memory: given, or, in calls longer than training, a quarter of its
    length, in whole chunks; 0: all, as exponential kernels need, which keep their sources as they are."""
    memory, given = config.section("memory"), config.gradient_reach
    if memory.kernel != "lifted":
        return 0
    return max(1, config.seq_length // 4 // memory.chunk) * memory.chunk if given is None else given
