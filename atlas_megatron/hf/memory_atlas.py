"""The ATLAS layer (`M`): projections, short convolutions, gates, and the memory that learns at test time.

Dims: B batch, T tokens, H heads, K = V head size, F memory hidden, D lifted key, W window, G gates of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_atlas import AtlasConfig
from .convolution_atlas import ShortConvolution, edge_starts, wide
from .kernels_atlas import (
    DualState,
    Gates,
    MemoryRule,
    MemoryState,
    State,
    budgeted,
    gated_norm,
    initial_coefficients,
    lift,
    lifted_width,
    omega_memory,
    read_memory,
    retained,
    unrounded,
    write_gate,
    write_logit,
)
from .mixer_atlas import Mixer
from .place_atlas import Place

logger = logging.get_logger(__name__)

# As in pretraining: a learned step size stays below so many times its start.
ETA_HEADROOM = 10.0
W1_GAIN = 0.02
SHORT = 100  # tokens
# The start of an orthogonalised write's step, for each token that it stands for.
STEP, GATED_STEP = 0.01, 0.0015
RETENTION = 0.99  # where a retention beside it starts


@dataclass(frozen=True)
class AtlasState:
    """What a layer carries over a cut: the memory, and the inputs that its convolutions still need [B, 3HK, taps-1]."""

    memory: State
    tail: Tensor

    def ended(self) -> AtlasState:
        """The same, whose memory no gradient goes back through."""
        return AtlasState(self.memory.map(Tensor.detach), self.tail)


class AtlasMemory(Mixer):
    """Sequence mixer of an `M` layer. A row of `linear_qkvg` belongs to one head: its q, k, v and output gate."""

    section = "memory"
    states = (AtlasState, MemoryState, DualState)

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
        self.rule = rule_of(memory)
        # Longer calls end their gradients; where a reach is given, all calls do.
        self.trained = config.seq_length if config.gradient_reach is None else 0
        self.gradient_reach = reach_of(config)
        self.write_budget = 0.0  # of the loss, for each token's write gate; a trainer sets it
        self.epsilon, self.init_std = config.norm_epsilon, config.init_std
        hidden, heads, width = config.hidden_size, memory.heads, memory.heads * memory.head_dim
        self.gate_widths, self.gate_logits = gate_widths(memory), gate_starts(memory, config.seq_length)
        gates = len(self.gate_logits)
        self.linear_qkvg = nn.Linear(hidden, 4 * width, bias=False)
        self.linear_out = nn.Linear(width, hidden, bias=False)
        self.gate_down = nn.Parameter(torch.empty(memory.gate_rank, hidden))
        self.linear_gates = nn.Linear(memory.gate_rank, heads * gates, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(heads, gates))
        self.convolution = ShortConvolution(heads, memory.head_dim, memory.conv_size)
        learned = start_coefficients(memory)
        self.coefficients = None if learned is None else nn.Parameter(torch.empty(heads, len(learned)))
        self.norm_gain = nn.Parameter(torch.empty(heads, memory.head_dim))
        self.branch_bias = nn.Parameter(torch.empty(heads, memory.head_dim)) if memory.open_gate else None
        self.write_view = nn.Parameter(torch.empty(heads, 2 * memory.head_dim)) if memory.write_gate else None
        matrices = [nn.Parameter(torch.empty(heads, *shape)) for shape in weight_shapes(memory)]
        self.start_first, self.start_second, self.start_gate = (matrices + [None, None])[:3]  # type: ignore[list-item]

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
        learned = start_coefficients(memory)
        if learned is not None:
            own["coefficients"] = learned.repeat(memory.heads, 1)
        first, *over_input = weight_shapes(memory)
        own["start_first"] = torch.empty(memory.heads, *first).normal_(std=first_gain(memory) * first[1] ** -0.5)
        # Entries of a gate of about 1: it then leaves the hidden width its size, as if it were not there.
        for name, shape, gain in zip(("start_second", "start_gate"), over_input, (1.0, first[1] ** 0.5), strict=False):
            drawn = [nn.init.orthogonal_(torch.empty(*shape)) for _ in range(memory.heads)]
            own[name] = torch.stack(drawn) * gain
        return own | edge_starts(memory, self.linear_qkvg, self.convolution)

    def forward(self, x: Tensor, state: AtlasState | None, place: Place) -> tuple[Tensor, AtlasState]:
        """[B, T, hidden] -> [B, T, hidden] and the state after."""
        projected = self.linear_qkvg(x).unflatten(-1, (-1, 4, self.memory.head_dim))
        qkv, branch = projected.split((3, 1), dim=-2)
        held, tail = (state.memory, state.tail) if state else (None, None)
        q, k, v, tail = self.convolution(qkv, tail, place.documents)
        gates = self.gates(x, k, v)
        with unrounded(x):
            y, after = self.scanned(q, k, v, gates, held, place.documents, qkv.dtype)
            branch = branch.squeeze(-2) if self.branch_bias is None else branch.squeeze(-2) + self.branch_bias
            y = gated_norm(y, branch, self.norm_gain, self.epsilon, self.memory.impl)
        return self.linear_out(y.flatten(2)), AtlasState(after, tail)

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
                residual=(q[:, part], k[:, part]) if self.own_residual else None,
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
        q = F.normalize(wide(q), dim=-1)
        held, residual = state.memory if state else None, q if self.own_residual else None
        with unrounded(q):
            return read_memory(self.lifted(q), self.start_weights(), self.rule, held, residual)

    def gates(self, x: Tensor, k: Tensor, v: Tensor) -> Gates:
        """The gates of every token [B, T, H], at least float32: sigmoids, eta scaled to its bound.

        k, v [B, T, H, K]: what a token would write, which its write gate sees.
        """
        memory = self.memory
        logits = wide(self.linear_gates(F.linear(x, self.gate_down))).unflatten(-1, self.gate_bias.shape)
        logits = logits + self.gate_bias
        sizes = list(self.gate_widths.values())
        gates = dict(zip(self.gate_widths, logits.sigmoid().split(sizes, -1), strict=True))
        if memory.write_gate:
            raw = dict(zip(self.gate_widths, logits.split(sizes, -1), strict=True))
            assert self.write_view is not None
            seen = (torch.cat([k, v], -1) * wide(self.write_view)).sum(-1, keepdim=True)
            gates["eta"] = budgeted(write_gate(raw["eta"] + seen), self.write_budget)
            if memory.retention:
                gates["alpha"] = retained(raw["alpha"], gates["eta"])
        eta = gates["eta"].squeeze(-1) * (ETA_HEADROOM * eta_start(memory))
        one = torch.ones_like(eta)
        # Titans: the step scales the gradient that enters the momentum, not the write.
        step, gamma = (one, eta) if memory.step_in_momentum else (eta, one)
        if memory.omega_gates == "pair":
            gamma = gates["gamma"]
        elif memory.omega_gates == "source":
            gamma = gates["gamma"].squeeze(-1)
        if memory.write_gate and memory.ns_steps:
            # Newton-Schulz gives every momentum the same size: what writes little must be little in it.
            gamma = gamma * (gates["eta"] if gamma.dim() == 4 else gates["eta"].squeeze(-1))
        return Gates(
            alpha=gates["alpha"].squeeze(-1) if memory.retention else one,
            eta=step,
            theta=gates["theta"].squeeze(-1) if memory.momentum else torch.zeros_like(one),
            gamma=gamma,
        )

    def lifted(self, x: Tensor, *, key: bool = False) -> Tensor:
        """phi(x); an exponential kernel's scale goes to the query."""
        if self.memory.kernel == "lifted":
            return lift(x, self.memory.feature_map, self.coefficients, self.memory.sketch_width)
        assert self.coefficients is not None
        return x if key else x * self.coefficients

    @property
    def own_residual(self) -> bool:
        """Whether the memory's residual is the unlifted input: where the lifted one has another meaning or width."""
        memory = self.memory
        return memory.memory != "linear" and (memory.kernel != "lifted" or lifted(memory) != memory.head_dim)

    def start_weights(self) -> tuple[Tensor, ...]:
        """The memory before the first token, [H, rows, cols] each."""
        return tuple(wide(w) for w in (self.start_first, self.start_second, self.start_gate) if w is not None)


def reach_of(config: AtlasConfig) -> int:
    """Tokens over which gradients go back through a memory: given, or, in calls longer than training, a quarter of its
    length, in whole chunks; 0: all, as exponential kernels need, which keep their sources as they are."""
    memory, given = config.section("memory"), config.gradient_reach
    if memory.kernel != "lifted":
        return 0
    return max(1, config.seq_length // 4 // memory.chunk) * memory.chunk if given is None else given


def rule_of(memory: SimpleNamespace) -> MemoryRule:
    """What the kernels learn by; raises ValueError where the section does not fit together."""
    own = {f.name: getattr(memory, f.name) for f in fields(MemoryRule)}
    return MemoryRule(**{**own, "anchor_gradient": 1.0 if memory.memory == "linear" else memory.anchor_gradient})


def lifted(memory: SimpleNamespace) -> int:
    """D: features of a lifted key."""
    return lifted_width(memory.feature_map, memory.head_dim, memory.degree, memory.sketch_width)


def weight_shapes(memory: SimpleNamespace) -> list[tuple[int, int]]:
    """(rows, cols) of each matrix of one head's memory, in the order of `omega_memory`."""
    width, features = memory.head_dim, lifted(memory)
    if memory.memory == "linear":
        return [(width, features)]
    hidden = memory.expansion * width
    return [(width, hidden), *[(hidden, features)] * (2 if memory.memory == "gated_mlp" else 1)]


def start_coefficients(memory: SimpleNamespace) -> Tensor | None:
    """Of the feature map; of an exponential kernel its scale."""
    if memory.kernel != "lifted":
        return torch.ones(1)
    return initial_coefficients(memory.feature_map, memory.degree)


def gate_widths(memory: SimpleNamespace) -> dict[str, int]:
    """How many of each gate one head has, in the order in which a checkpoint has them."""
    widths = {"alpha": 1} if memory.retention else {}
    widths["eta"] = 1
    if memory.momentum:
        widths["theta"] = 1
    if memory.omega_gates != "none":
        widths["gamma"] = memory.window if memory.omega_gates == "pair" else 1
    return widths


def gate_starts(memory: SimpleNamespace, tokens: int) -> list[float]:
    """Start logits of one head's gates. A retention that is not given is RETENTION with Newton-Schulz; without, it
    keeps a third over so many tokens, or SHORT."""
    derived = RETENTION if memory.ns_steps else 1.0 - 1.0 / max(SHORT, tokens)
    step, kept = 1.0 / ETA_HEADROOM, memory.alpha_start or derived
    if memory.write_gate:
        kept **= ETA_HEADROOM  # a token then keeps a^w, and w starts at `step`
    start = {"alpha": kept, "eta": step, "theta": memory.theta_start, "gamma": memory.gamma_start}
    logits = {name: math.log(share / (1.0 - share)) for name, share in start.items()}
    if memory.write_gate:
        logits["eta"] = write_logit(step)
    return [logits[name] for name, width in gate_widths(memory).items() for _ in range(width)]


def eta_start(memory: SimpleNamespace) -> float:
    """The step size at initialisation, given or derived: without Newton-Schulz, the steps of a chunk sum to eta_sum."""
    if memory.eta_start > 0:
        return memory.eta_start
    if memory.ns_steps > 0:
        step = GATED_STEP if memory.memory == "gated_mlp" else STEP
        return step if memory.ns_step == "sum" else step * memory.ns_period
    gradients = memory.window * (1.0 if memory.omega_gates == "none" else memory.gamma_start)
    if memory.momentum:
        gradients /= 1.0 - memory.theta_start
    feedback = memory.memory != "linear" or memory.loss != "dot"
    return memory.eta_sum / (gradients * (memory.chunk if feedback else 1))


def first_gain(memory: SimpleNamespace) -> float:
    """Of the start of the output matrix: near zero, but as large as a chunk's steps where the output norm divides."""
    if memory.norm == "layer" and memory.ns_steps == 0:
        return (2.0 * memory.expansion * memory.head_dim) ** 0.25
    return W1_GAIN
