"""The ATLAS layer: projections, short convolutions, gates, and the memory that learns at test time (paper Fig 3).

Dims: B batch, T tokens, H heads of this tensor-parallel rank, K = V head size, F memory hidden, W window,
G gates of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from atlas_kernels import (
    Gates,
    LocalMemories,
    LocalParameters,
    LocalState,
    MemoryState,
    State,
    at_least_float32,
    check_implementation,
    gated_norm,
    initial_state,
    newton_schulz,
    omega_memory,
    read_memory,
)
from atlas_kernels.gated_norm import open_gate
from atlas_kernels.layer_start import (
    ETA_HEADROOM,
    eta_start,
    gate_count,
    gate_starts,
    gate_widths,
    gates_of,
    initial_weights,
    lifted,
    lifted_for,
    own_residual,
    start_coefficients,
)
from atlas_kernels.local_memories import gates_of_all, groups_of, local_gate_starts, local_weights, rules_of
from atlas_kernels.short_conv import initial_taps
from atlas_megatron.config import Config
from atlas_megatron.mixers.base import Mixer
from atlas_megatron.mixers.convolution import convolved, start_edges
from atlas_megatron.mixers.linears import MixerLinears
from atlas_megatron.mixers.memory_costs import MemoryCosts
from atlas_megatron.mixers.reach import ended, stretches

HISTOGRAM_BINS = 32
SPECTRUM_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
ALL = slice(None)  # heads of this rank
SPECTRUM_HEADS = 2  # of the first sequence: a singular value decomposition is slow


@dataclass(frozen=True)
class AtlasState:
    """What a layer carries over a cut: memories, and the inputs that its convolutions still need [B, 3HK, taps-1]."""

    memory: State | None  # None: at its start weights, where an ablated layer leaves it
    tail: Tensor
    locals: LocalState | None = None  # None: it has none, or they stand at their start weights


class AtlasMixer(MemoryCosts, Mixer):
    """The sequence mixer of an `M` layer; heads are split over the tensor-parallel group.

    Every split parameter is laid out by head first (a row of `linear_qkvg` belongs to one head, whose q, k,
    v and output gate lie together), so that a shard is whole heads, at any group size.
    """

    replicated = ("gate_down",)

    def build(self, settings: Config, linears: MixerLinears, groups: ProcessGroupCollection) -> None:
        memory, hidden = settings.memory, settings.model.hidden_size
        self.memory = memory
        self.write_budget = 0.0  # of the loss, for each token's write gate; the trainer sets it
        # An exponential kernel keeps its sources as they are: there is nothing to end.
        self.gradient_reach = settings.train.gradient_reach if memory.kernel == "lifted" else 0
        self.rule, self.local_rules = memory.rule(), rules_of(memory)
        width = memory.heads * memory.head_dim
        self.linear_qkvg = linears.column(hidden, 4 * width, self.config, self.tp_group)
        gates = memory.heads * (1 + len(memory.locals)) * gate_count(memory)
        self.linear_gates = linears.gates(memory.gate_rank, gates, self.config, self.tp_group)
        self.linear_out = linears.row(width, hidden, self.config, self.tp_group)
        self._build_parameters(hidden, settings.model.seq_length)
        check_implementation(memory.impl, self.rule, self._start(ALL), self.config.params_dtype)
        for parameter in (*self.parameters(recurse=False), *self.linear_gates.parameters()):
            parameter.no_weight_decay = True

    def _build_parameters(self, d_model: int, tokens: int) -> None:
        memory, config = self.memory, self.config
        down = torch.empty(memory.gate_rank, d_model)
        config.init_method(down)
        self.gate_down = self.on_every_rank(down)

        self.convolution = self.by_head(initial_taps(memory.heads, memory.head_dim, memory.conv_size))
        start_edges(memory, self.linear_qkvg, self.convolution, self.linear_out)
        self.gate_bias = self.by_head(torch.tensor(gate_starts(memory, tokens)).repeat(memory.heads, 1))
        coefficients = start_coefficients(memory)
        self.coefficients = None if coefficients is None else self.by_head(coefficients.repeat(memory.heads, 1))
        self.norm_gain = self.by_head(torch.ones(memory.heads, memory.head_dim))
        self.branch_bias = self.by_head(open_gate(memory.heads, memory.head_dim)) if memory.open_gate else None
        # The hidden state of a first layer is one token: what to write is told by the convolved key and value.
        view = torch.zeros(memory.heads, 2 * memory.head_dim)
        self.write_view = self.by_head(view) if memory.write_gate else None

        first, *over_input = (self.by_head(drawn) for drawn in initial_weights(memory))
        self.start_first = first
        self.start_second = over_input[0] if over_input else None
        self.start_gate = over_input[1] if len(over_input) > 1 else None
        self._build_locals()

    def _build_locals(self) -> None:
        """Of every head the starts and gates of its local memories, [H, N, ...] each."""
        memory, count = self.memory, len(self.memory.locals)
        biases = self.by_head(local_gate_starts(memory).repeat(memory.heads, 1, 1)) if count else None
        view = torch.zeros(memory.heads, count, 2 * memory.head_dim)
        starts = [self.by_head(drawn) for drawn in local_weights(memory)]
        self.local_bias = biases
        self.local_view = self.by_head(view) if count and memory.write_gate else None
        self.local_first, self.local_second, self.local_gate = (*starts, None, None, None)[:3]

    def mix(
        self, hidden_states: Tensor, state: AtlasState | None, positions: Tensor | None = None
    ) -> tuple[Tensor, AtlasState]:
        projected = self.linear_qkvg(hidden_states)[0].transpose(0, 1)  # Megatron's [T, B, D]: [B, T, D] from here
        qkv, branch = projected.unflatten(-1, (-1, 4, self.memory.head_dim)).split((3, 1), dim=-2)
        before = state.tail if state else None
        q, k, v, tail = convolved(qkv, self.convolution, before, positions, self.shards.tokens, self.memory.impl)
        held = state.memory if state else None
        after: State | None
        beside = state.locals if state else None
        if self.mode.ablate:
            y, after = self.read(q, state), held
        else:
            gates, local_gates = self._gates(hidden_states, k, v)
            tokens = (q, k, v, *vars(gates).values())
            sliced = not (self.mode.keep_state or self.mode.measure)
            y, after = self._scanned(tokens, held, positions, sliced=sliced)
            if local_gates:
                first = self._first_token(held, q)
                # At a shard's border nothing of it is read; a rank that did would wait for the others' gradients.
                told = beside if self.shards.tokens.size == 1 else None
                more, beside = self._locals()(q, k, v, local_gates, told, positions, first)
                y = y + more

        branch = branch.squeeze(-2) if self.branch_bias is None else branch.squeeze(-2) + self.branch_bias
        y = gated_norm(y, branch, self.norm_gain, self.config.layernorm_epsilon, self.memory.impl)
        out = self.linear_out(y.flatten(2).transpose(0, 1).contiguous())[0]  # [T, B, D]
        return out, AtlasState(after, tail, beside)

    def _gates(self, hidden_states: Tensor, k: Tensor, v: Tensor) -> tuple[Gates, tuple[Gates, ...]]:
        """The gates of the memory and of the local ones. k, v [B, T, H, K]: what a token would write."""
        logits = self.linear_gates(F.linear(hidden_states, self.gate_down))[0].transpose(0, 1)
        said = (logits, self.gate_bias, k, v, self.write_view)
        if not self.memory.locals:
            return gates_of(self.memory, *said, self.write_budget), ()
        return gates_of_all(self.memory, *said, self._local_parameters(), self.write_budget)

    def _local_parameters(self) -> LocalParameters:
        assert self.local_bias is not None
        starts = (self.local_first, self.local_second, self.local_gate)
        return LocalParameters(self.local_bias, self.local_view, tuple(s for s in starts if s is not None))

    def _locals(self) -> LocalMemories:
        return LocalMemories(
            self.memory, self.local_rules, self._local_parameters(), self._lifted, self.config.params_dtype
        )

    def _first_token(self, held: State | None, tokens: Tensor) -> int:
        """The position of this rank's first token. Raises ValueError where ranks have no whole shards of a memory.

        held: the memory before the whole sequence; tokens [B, t, ...]: this rank's. Packed documents have positions of
        their own, and are refused with context parallelism: 0.
        """
        known = held.position if held is not None else 0
        if not isinstance(known, int):
            return 0
        ranks, count = self.shards.tokens, tokens.shape[1]
        shards = [shard for _, shard in groups_of(self.memory)] + ([self.rule.shard] if self.rule.shard else [])
        # All ranks say it: one that went on would wait for the others.
        for shard in shards if ranks.size > 1 else []:
            if known % shard or count % shard:
                raise ValueError(
                    f"{ranks.size} context-parallel ranks read {count} tokens each from token {known} on, which cuts a "
                    f"shard of {shard} tokens of a memory (memory.shard, memory.locals); give each rank whole shards"
                )
        return known + ranks.rank * count

    def _scanned(
        self, tokens: tuple[Tensor, ...], held: State | None, positions: Tensor | None, *, sliced: bool
    ) -> tuple[Tensor, State | None]:
        """The memory over all ranks; one that begins anew every shard: over this rank's shards, which wait for none."""
        if not self.rule.shard or self.shards.tokens.size == 1:
            return self.shards.scan(self, tokens, held, positions, sliced=sliced)
        empty = self.empty_state(tokens, ALL, self._first_token(held, tokens[0]))
        return self.advance(tokens, ALL, empty, positions)

    def advance(
        self, tokens: tuple[Tensor, ...], heads: slice, state: State | None, positions: Tensor | None
    ) -> tuple[Tensor, State]:
        """tokens: q and k of length 1, not lifted, v, and the gates in their order, of these heads of this rank's."""
        q, k, v, *gates = tokens
        y, after = self._memory(q, k, v, Gates(*gates), heads, state, positions)
        if self.mode.measure:
            self._measure(k, v, Gates(*gates), heads, state, after)
        return y, after

    def _memory(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        heads: slice,
        state: State | None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        outputs, tokens = [], q.shape[1]
        # A state's position is the sequence's, but of packed documents.
        known = state.position if state is not None else None
        first = known if isinstance(known, int) else self.shards.chain.rank * tokens
        for part, ends in stretches(tokens, first, self.gradient_reach if torch.is_grad_enabled() else 0):
            own = (q[:, part], k[:, part])
            y, state = omega_memory(
                self._lifted(own[0], heads),
                self._lifted(own[1], heads, key=True),
                v[:, part],
                Gates(**{name: gate[:, part] for name, gate in vars(gates).items()}),
                self._start(heads),
                self.rule,
                state=ended(state) if ends and state is not None else state,
                residual=own if own_residual(self.memory) else None,
                impl=self.memory.impl,
                positions=None if positions is None else positions[:, part],
                products=self.config.params_dtype,
            )
            outputs.append(y)
        assert state is not None
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state

    def empty_state(self, tokens: tuple[Tensor, ...], heads: slice, position: int | Tensor) -> MemoryState:
        """Before any token, but for its position."""
        _, k, v, *_ = tokens
        keys = k[..., :1].expand(*k.shape[:-1], lifted(self.memory))
        own, source = own_residual(self.memory), self.memory.omega_gates != "pair"
        start = initial_state(self.rule, self._start(heads), keys, v, residuals=own, source_gates=source)
        return start.at(position)

    def to_message(self, state: State) -> tuple[Tensor, ...]:
        """Only matrices are handed on: the exponential kernels' growing state is refused with the configuration."""
        assert isinstance(state, MemoryState)
        return state.to_message(self.rule)

    def from_message(self, empty: State, message: tuple[Tensor, ...]) -> MemoryState:
        assert isinstance(empty, MemoryState)
        return empty.from_message(self.rule, message)

    def empty_layer_state(self, batch: int, position: int) -> AtlasState:
        """Before any token of so many sequences, but for its position; all heads of this rank."""
        heads, channels, taps = self.convolution.shape
        tail = self.convolution.new_zeros(batch, heads * channels, taps - 1)
        none = self.norm_gain.new_zeros(batch, 0, heads, self.memory.head_dim)
        return AtlasState(None if self.mode.ablate else self.empty_state((none, none, none), ALL, position), tail)

    def all_to_message(self, state: AtlasState) -> tuple[Tensor, ...]:
        """As `to_message`, with the convolutions' tail."""
        return (state.tail, *(() if state.memory is None else self.to_message(state.memory)))

    def all_from_message(self, empty: AtlasState, message: tuple[Tensor, ...]) -> AtlasState:
        tail, *rest = message
        return AtlasState(None if empty.memory is None else self.from_message(empty.memory, tuple(rest)), tail)

    def final_state(self, after: AtlasState) -> AtlasState:
        """The memory stays with the rank that has its heads; the rest is of all heads, and so are shards."""
        last = self.shards.tokens.from_last
        memory = last(after.memory) if self.rule.shard else self.shards.chain.from_last(after.memory)
        return AtlasState(memory, last(after.tail), last(after.locals))

    def _lifted(self, x: Tensor, heads: slice = ALL, *, key: bool = False) -> Tensor:
        """phi(x) of these heads' queries, or keys."""
        coefficients = None if self.coefficients is None else self.coefficients[heads]
        return lifted_for(self.memory, x, coefficients, key=key)

    def read(self, q: Tensor, state: AtlasState | None) -> Tensor:
        """What the memory as it stands in `state` answers to q [B, T, H, K], without a write: [B, T, H, K].

        An ablated memory stands at its start weights, whatever the state.
        """
        q = F.normalize(at_least_float32(q), dim=-1)
        held = state.memory if state and not self.mode.ablate else None
        y = read_memory(self._lifted(q), self._start(), self.rule, held, q if own_residual(self.memory) else None)
        return y + self._locals().at_start(q) if self.memory.locals else y

    def _start(self, heads: slice = ALL) -> tuple[Tensor, ...]:
        """The memory before the first token, [H, rows, cols] each."""
        start = (self.start_first, self.start_second, self.start_gate)
        return tuple(at_least_float32(w[heads]) for w in start if w is not None)

    @torch.no_grad()
    def _measure(self, k: Tensor, v: Tensor, gates: Gates, heads: slice, before: State | None, after: State) -> None:
        """Statistics of this forward: gates, norms, and the inner loss around the write, float32 scalars; counts of
        each learned gate [HISTOGRAM_BINS], whole numbers; spectra of the momentum (see `_spectra`), float32."""
        found: dict[str, Tensor] = {}
        for name, gate in vars(gates).items():
            found[f"{name}_mean"], found[f"{name}_std"] = gate.mean(), gate.std(correction=0)
        if self.memory.write_gate:
            found["unwritten"] = ((gates.gamma if self.memory.step_in_momentum else gates.eta) == 0).float().mean()
        found["memory_norm"] = _mean_norm(after.weights)
        if isinstance(after, MemoryState):
            found["momentum_norm"] = _mean_norm(after.momentum)
        found["start_norm"] = _mean_norm(self._start(heads))
        # M_t read at the next key, and at the newest key that a write has surely reached: of each ns_period
        # tokens the last one writes.
        for name, shift in (("surprise_before", -1), ("surprise_after", self.memory.ns_period - 1)):
            if k.shape[1] > abs(shift):
                read, _ = self._memory(k.roll(shift, 1), k, v, gates, heads, before)
                loss = (read - v.roll(shift, 1)).square().sum(-1) / 2
                found[name] = (loss[:, :shift] if shift < 0 else loss[:, shift:]).mean()
        if isinstance(after, MemoryState) and self.rule.ns_steps > 0 and self.rule.momentum:
            found |= self._spectra(after.momentum)
        self.measurements = {name: value.float() for name, value in found.items()} | self._histograms(gates)

    def _histograms(self, gates: Gates) -> dict[str, Tensor]:
        """How many gates fall into each of HISTOGRAM_BINS bins: eta's over [0, its bound], the others' over [0, 1]."""
        held = {**vars(gates), "eta": gates.gamma if self.memory.step_in_momentum else gates.eta}
        tops = {"eta": ETA_HEADROOM * eta_start(self.memory)}
        return {f"{name}_histogram": counts(held[name], tops.get(name, 1.0)) for name in gate_widths(self.memory)}

    def _spectra(self, momentum: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """SPECTRUM_QUANTILES of the singular values of all matrices of a few heads, of the momentum and of what
        Newton-Schulz makes of it, on one scale: 1 is an orthogonal matrix's. The momentum, whose size Newton-Schulz
        does not see, is divided by the root mean square of its singular values."""
        some = [m[0, :SPECTRUM_HEADS].float() for m in momentum]
        written = [newton_schulz(m, self.rule.ns_steps, self.rule.ns_coefficients) for m in some]
        raw = [singular_values(m) for m in some]
        scaled = [s / s.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30) for s in raw]
        return {
            "momentum_spectrum": _quantiles(scaled),
            "orthogonalised_spectrum": _quantiles([singular_values(m) for m in written]),
        }


def _mean_norm(matrices: tuple[Tensor, ...]) -> Tensor:
    """Frobenius norm of each matrix, averaged over all of them."""
    return torch.stack([m.norm(dim=(-2, -1)).mean() for m in matrices]).mean()


def counts(gate: Tensor, top: float) -> Tensor:
    """How many values lie in each of HISTOGRAM_BINS equal bins over [0, top], int64; top itself lies in the last."""
    # A NaN must not fail here: the trainer finds it in the mean, and says where.
    bins = (gate.flatten() * HISTOGRAM_BINS / top).nan_to_num(0.0).long().clamp(0, HISTOGRAM_BINS - 1)
    return bins.bincount(minlength=HISTOGRAM_BINS)


def singular_values(matrices: Tensor) -> Tensor:
    """[..., m, n] -> [..., min(m, n)]; all NaN where a matrix is not finite, for which LAPACK would raise."""
    finite = matrices.isfinite().all(-1).all(-1)
    return torch.linalg.svdvals(matrices.nan_to_num(0.0, 0.0, 0.0)).where(finite.unsqueeze(-1), torch.nan)


def _quantiles(values: list[Tensor]) -> Tensor:
    every = torch.cat([v.flatten() for v in values])
    return every.quantile(every.new_tensor(SPECTRUM_QUANTILES))
