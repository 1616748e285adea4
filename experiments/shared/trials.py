"""What the recipe search tries and the project does not have; `recipe_rows.py` names these as a row's trial.

A trial changes the running process, which trains one model and ends. It takes only whole chunks, as training brings
them. No tests hold its results. What wins is written into `atlas_kernels` with its tests, and leaves this file.

The numbers that docstrings begin with are those of `recipe_rows.HYPOTHESES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import atlas_kernels
from atlas_kernels import chunked, layer_start, memories, op
from atlas_kernels.chunked import Kernels
from atlas_kernels.decays import decay_matrix
from atlas_kernels.layer_norm import layer_norm
from atlas_kernels.memories import Factors, Matrices, Mlp, WeightView, memory_of, oriented
from atlas_kernels.newton_schulz import direct_form, newton_schulz, schedule
from atlas_kernels.rule import MemoryRule, MemoryState
from atlas_kernels.writes import Leave, OrthogonalWrites, SourceReader, Writes, orthogonal_coefficients_of
from atlas_megatron.mixers import memory as mixer
from atlas_megatron.mixers.memory import AtlasMixer

DECAYS_ALL, DECAYS_W1 = (True, True, True), (True, False, False)


class Trial(OrthogonalWrites):
    """`OrthogonalWrites` with its parts as methods: what a matrix's momentum becomes, and what the weights do then."""

    # Whether each matrix is written (and decays): W1, W2, W3.
    written: tuple[bool, ...] = DECAYS_ALL

    def __init__(
        self, rule: MemoryRule, alpha: Tensor, eta: Tensor, theta: Tensor, band: Tensor, writes: range
    ) -> None:
        self.period = rule.ns_period
        eta, band = self.weighed(eta, band)
        super().__init__(rule, orthogonal_coefficients_of(rule, alpha, eta, theta, band, writes), writes)
        self.raw = self.provisional(alpha, eta, theta, band)

    def weighed(self, eta: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
        """The step of each token and the Omega gates. Only the steps of writing tokens count, as sums over a period."""
        return eta, band

    def provisional(self, alpha: Tensor, eta: Tensor, theta: Tensor, band: Tensor) -> tuple[Tensor, ...] | None:
        """What each token also reads of its period's sources, [G, C, I] a chunk; None for nothing."""
        return None

    def direction(self, j: int, momentum: Tensor) -> Tensor:
        """What is written for matrix j's momentum, [G, K, wide, narrow], before its step."""
        return newton_schulz(momentum, self.rule.ns_steps, self.rule.ns_coefficients)

    def settled(self, j: int, new: Tensor, old: Tensor) -> Tensor:
        """The weights that leave a chunk."""
        return new

    def advance(self, n: int, weights: Matrices, momentum: Matrices, factors: Factors) -> tuple[WeightView, Leave]:
        alphas = [self.of_weights[n] if w else torch.ones_like(self.of_weights[n]) for w in self.written]
        directions, written, moved = [], [], []
        for j, (W, S, (wide, narrow)) in enumerate(zip(weights, momentum, factors, strict=True)):
            formed = self.thetas[n] * S.unsqueeze(1) + wide.mT.unsqueeze(1) @ (self.sums[n] * narrow.unsqueeze(1))
            new = formed[:, : len(self.writes)]
            O = self.direction(j, new) if self.written[j] else torch.zeros_like(new)  # noqa: E741
            directions.append(O)
            after = alphas[j][:, -1:] * W + torch.einsum("gk,gkmn->gmn", self.of_writes[n][:, -1], O)
            written.append(self.settled(j, after, W))
            moved.append(formed[:, -1])
        raw = None if self.raw is None else SourceReader(self.raw[n], factors, [() for _ in weights])
        reader = _TrialReader(alphas, self.of_writes[n], self.writes, weights, tuple(directions), raw)
        return reader, lambda: (tuple(written), tuple(moved))


class _TrialReader:
    """The reader of `OrthogonalWrites`, with a decay for each matrix and with provisional sources."""

    def __init__(
        self,
        alphas: list[Tensor],
        of_writes: Tensor,
        writes: range,
        weights: Matrices,
        directions: Matrices,
        raw: SourceReader | None,
    ) -> None:
        self.alphas, self.of_writes, self.first = alphas, of_writes, writes[0]
        self.weights, self.directions, self.raw = weights, directions, raw

    def widen(self, j: int, x: Tensor) -> Tensor:
        out = self._read(j, x, self.weights[j].mT, self.directions[j].mT)
        if self.raw is None:
            return out
        wide, narrow = self.raw.factors[j]
        return out + (self.raw.sources * (x @ narrow.mT)) @ wide

    def narrow(self, j: int, h: Tensor) -> Tensor:
        out = self._read(j, h, self.weights[j], self.directions[j])
        if self.raw is None:
            return out
        wide, narrow = self.raw.factors[j]
        return out + (self.raw.sources * (h @ wide.mT)) @ narrow

    def _read(self, j: int, x: Tensor, weights: Tensor, directions: Tensor) -> Tensor:
        out = self.alphas[j] * torch.bmm(x, weights)
        seen = torch.einsum("gck,gkcm->gcm", self.of_writes[:, self.first :], x[:, None, self.first :] @ directions)
        return torch.cat([out[:, : self.first], out[:, self.first :] + seen], 1)


class Weighed(Trial):
    """3 and 4: each token's eta weighs the gradients of its window inside the momentum, too."""

    def weighed(self, eta: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
        sums = eta.unflatten(-1, (-1, self.period))
        own = torch.cat([sums[..., :1], sums.diff(dim=-1)], -1).flatten(-2)
        return eta, band * own.unsqueeze(-1)


class Steepest(Trial):
    """10: a write times the nuclear norm <NS(S), S>, which is steepest descent in the spectral norm."""

    def direction(self, j: int, momentum: Tensor) -> Tensor:
        written = super().direction(j, momentum)
        return written * (written * momentum).sum((-2, -1), keepdim=True) / UNIT


class Sized(Trial):
    """10: a write times the momentum's Frobenius norm."""

    def direction(self, j: int, momentum: Tensor) -> Tensor:
        return super().direction(j, momentum) * momentum.norm(dim=(-2, -1), keepdim=True) / UNIT


class Saturating(Trial):
    """4: a write times |S| / (|S| + UNIT): a weak momentum is written weakly."""

    def direction(self, j: int, momentum: Tensor) -> Tensor:
        size = momentum.norm(dim=(-2, -1), keepdim=True)
        return super().direction(j, momentum) * (size / (size + UNIT))


class Floored(Trial):
    """4: S / max(|S|_F, floor) enters the iteration, which multiplies small singular values by 3.44 a step.

    So singular values well under `corner` are written as they are, in units of it. Those above it are written as ones.
    """

    corner = 1.0

    def direction(self, j: int, momentum: Tensor) -> Tensor:
        table = schedule(self.rule.ns_steps, self.rule.ns_coefficients)
        floor = self.corner * prod(a for a, _, _ in table)
        X = momentum / momentum.norm(dim=(-2, -1), keepdim=True).clamp(min=floor)
        return direct_form(X.mT, table).mT


class FlooredAt3(Floored):
    corner = 3.0


class FlooredAt10(Floored):
    corner = 10.0


class Clipped(Trial):
    """10: the momentum without Newton-Schulz. Its norm is at most MOST, about that of an orthogonal matrix."""

    def direction(self, j: int, momentum: Tensor) -> Tensor:
        return momentum * (MOST / momentum.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).clamp(max=1.0)


class Tall(Trial):
    """8: Muon's scale, sqrt(max(1, rows / cols)) of W2 [F, D]."""

    def direction(self, j: int, momentum: Tensor) -> Tensor:
        rows, cols = momentum.shape[-2:]
        return super().direction(j, momentum) * (1.0 if j == 0 else max(1.0, rows / cols) ** 0.5)


class LastLayer(Trial):
    """11: tokens write W1 alone; the outer loop alone learns W2."""

    written = DECAYS_W1


class Bounded(Trial):
    """6: after each chunk the weights of every hidden unit are scaled back to the length that they had."""

    def settled(self, j: int, new: Tensor, old: Tensor) -> Tensor:
        return new * (old.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp(min=1e-7))


class Provisional(Trial):
    """5: until its period's write, a token reads the period's raw gradients."""

    share = 0.03

    def provisional(self, alpha: Tensor, eta: Tensor, theta: Tensor, band: Tensor) -> tuple[Tensor, ...] | None:
        tokens = torch.arange(alpha.shape[-1], device=alpha.device)
        period = tokens // self.period
        same = (period[:, None] == period[None, :]) & (tokens % self.period != self.period - 1)[:, None]
        whole = eta[..., self.period - 1 :: self.period].repeat_interleave(self.period, -1)
        steps = decay_matrix(alpha) * -(self.share / self.period * whole).unsqueeze(-2) * same
        return (steps @ (decay_matrix(theta) * same) @ band).unbind()


class ProvisionalOwn(Trial):
    """5: as `Provisional`, with each raw gradient at its own token's step. So nothing comes from later tokens."""

    def provisional(self, alpha: Tensor, eta: Tensor, theta: Tensor, band: Tensor) -> tuple[Tensor, ...] | None:
        tokens = torch.arange(alpha.shape[-1], device=alpha.device)
        period = tokens // self.period
        same = (period[:, None] == period[None, :]) & (tokens % self.period != self.period - 1)[:, None]
        steps = decay_matrix(alpha) * -(eta / self.period).unsqueeze(-2) * same
        return (steps @ (decay_matrix(theta) * same) @ band).unbind()


class _DecayToStart:
    """Writes whose decay acts on what was written alone, whatever the rule writes."""

    def __init__(self, writes: Writes, start: Matrices) -> None:
        self.writes, self.start = writes, start

    def advance(self, n: int, weights: Matrices, momentum: Matrices, factors: Factors) -> tuple[WeightView, Leave]:
        written = tuple(W - start for W, start in zip(weights, self.start, strict=True))
        reader, leave = self.writes.advance(n, written, momentum, factors)

        def left() -> tuple[Matrices, Matrices]:
            written, moved = leave()
            return tuple(W + start for W, start in zip(written, self.start, strict=True)), moved

        return _WithStart(reader, self.start), left


class _WithStart:
    """Reads what was written, and adds the read of the start weights."""

    def __init__(self, written: WeightView, start: Matrices) -> None:
        self.written, self.start = written, start

    def widen(self, j: int, x: Tensor) -> Tensor:
        return self.written.widen(j, x) + x @ self.start[j].mT

    def narrow(self, j: int, h: Tensor) -> Tensor:
        return self.written.narrow(j, h) + h @ self.start[j]


# UNIT: the size of a momentum that counts as one. MOST: the largest of `Clipped`.
UNIT, MOST = 10.0, 4.0
WRITERS: dict[str, type[Trial]] = {
    "weighed": Weighed, "steepest": Steepest, "sized": Sized,
    "saturating": Saturating, "floor 1": Floored, "floor 3": FlooredAt3, "floor 10": FlooredAt10,
    "clipped": Clipped, "tall": Tall, "last layer": LastLayer, "bounded": Bounded,
    "provisional": Provisional, "provisional, own steps": ProvisionalOwn,
}  # fmt: skip


def read_norm() -> None:
    """1: a layer norm on what is read, not in the inner loss."""
    memories.Mlp.output = lambda self, o, r: r + layer_norm(o)  # type: ignore[method-assign]


def no_residual() -> None:
    """8: M(x) = W1 act(W2 x)."""

    def error(self: Mlp, anchor: WeightView, h: Tensor, v: Tensor, r: Tensor) -> Tensor:
        return anchor.narrow(0, h) - v

    memories.Mlp.error = error  # type: ignore[method-assign]
    memories.Mlp.output = lambda self, o, r: o  # type: ignore[method-assign]


def read_residual() -> None:
    """The residual is added in reads only: the inner loss compares W1 act(W2 k) with v."""
    memories.Mlp.error = lambda self, anchor, h, v, r: anchor.narrow(0, h) - v  # type: ignore[method-assign]


def to_start() -> None:
    """2: only what was written decays. Without writes the weights return to their start, not to zero."""
    by_segment, scan, writes_of = chunked._by_segment, chunked.scan, chunked.writes_of
    starts: list[Matrices] = []  # of the scan that runs

    def whole(rule: MemoryRule, state: MemoryState[int], *arguments: Any, **named: Any) -> Any:
        if state.position:
            raise ValueError("the trial 'to start' reads sequences from their first token")
        start = tuple(m.flatten(0, 1).contiguous() for m in oriented(memory_of(rule), state.weights))

        def with_start(*arguments: Any) -> Any:
            starts.append(start)
            try:
                return scan(*arguments)
            finally:
                starts.pop()

        # A segment that is recomputed in the backward finds its own start in this closure.
        chunked.scan = with_start  # type: ignore[assignment]
        return by_segment(rule, state, *arguments, **named)

    def writes(*arguments: Any) -> Writes:
        return _DecayToStart(writes_of(*arguments), starts[-1])

    chunked._by_segment, chunked.writes_of = whole, writes  # type: ignore[assignment]


def next_value() -> None:
    """Convolutions start so that a token's value lies under the key of the token before it."""
    drawn = mixer.initial_taps

    def shifted(heads: int, head_dim: int, size: int) -> Tensor:
        taps = drawn(heads, head_dim, size)
        q, k, v = taps.view(heads, 3, head_dim, size).unbind(1)
        for part, back in ((q, 1), (k, 2), (v, 1)):
            part.mul_(0.2)[..., size - back] += 1.0
        return torch.stack([q, k, v], 1).view_as(taps)

    mixer.initial_taps = shifted


def _starts(change: Callable[[AtlasMixer], None]) -> None:
    """Change a memory layer's weights as they are drawn."""
    build = AtlasMixer.build

    def changed(self: AtlasMixer, *arguments: Any) -> None:
        build(self, *arguments)
        with torch.no_grad():
            change(self)

    AtlasMixer.build = changed  # type: ignore[method-assign]


def _late_keys(self: AtlasMixer, heads: slice) -> None:
    rows = self.linear_qkvg.weight.unflatten(0, (len(self.convolution), 4, -1))[heads]
    changed, taps = atlas_kernels.late_keys(rows, self.convolution[heads])
    rows.copy_(changed)
    self.convolution[heads] = taps


def late_keys_half() -> None:
    """`late_keys`, for every second head."""
    _starts(lambda self: _late_keys(self, slice(None, None, 2)))


def keys_as_queries() -> None:
    """Keys start as queries."""

    def tied(self: AtlasMixer) -> None:
        width = self.memory.head_dim
        rows = self.linear_qkvg.weight.view(-1, 4, width, self.linear_qkvg.weight.shape[-1])
        rows[:, 1] = rows[:, 0]
        taps = self.convolution.view(-1, 3, width, self.convolution.shape[-1])
        taps[:, 1] = taps[:, 0]

    _starts(tied)


def spread(*spans: float) -> Callable[[], None]:
    """2: each head starts by remembering so many tokens. The longer it remembers, the less it writes."""

    def started(self: AtlasMixer) -> None:
        places = list(layer_start.gate_widths(self.memory))
        for head, bias in enumerate(self.gate_bias):
            span = spans[head % len(spans)]
            step = 1 / (1 - layer_start.RETENTION) / span / layer_start.ETA_HEADROOM
            bias[places.index("alpha")] = math.log(span - 1)
            bias[places.index("eta")] = math.log(step / (1 - step))

    return lambda: _starts(started)


def own_first(others: float) -> Callable[[], None]:
    """2: the Omega gates start at one half for a token's own gradient, and near zero for the others of its window.

    So the rule starts as an online one and learns to widen.
    """

    def started(self: AtlasMixer) -> None:
        window = self.memory.window
        self.gate_bias[:, -window:] = math.log(others / (1 - others))
        self.gate_bias[:, -window] = 0.0

    return lambda: _starts(started)


def second(gain: float) -> Callable[[], None]:
    """8: W2 starts as an orthogonal matrix times `gain`.

    With keys of length 1, hidden units then leave the middle of the activation, where it is a line.
    """
    return lambda: _starts(lambda self: self.start_second.mul_(gain))  # type: ignore[union-attr,arg-type,return-value]


def large_start() -> None:
    """8: W1 starts at the scale of any linear layer."""
    layer_start.W1_GAIN = 1.0


def _edges(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
    """Change q, k (both of length 1) and v (of any length) before the memory gets them."""
    convolved = mixer.convolved

    def changed(*arguments: Any) -> tuple[Tensor, ...]:
        q, k, v, tail = convolved(*arguments)
        return (*change(q, k, v), tail)

    mixer.convolved = changed  # type: ignore[assignment]


def unit_values() -> None:
    """8: values of length 1, as the keys and the residual are."""
    _edges(lambda q, k, v: (q, k, F.normalize(v, dim=-1)))


def linear_keys() -> None:
    """8: no SiLU on q and k. SiLU gives all keys one large mean, and so their gradients too."""

    def convolved(qkv: Tensor, taps: Tensor, tail: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        channels = F.pad(qkv.flatten(2).transpose(1, 2), (taps.shape[-1] - 1, 0))
        mixed = F.conv1d(channels, taps.flatten(0, 1).unsqueeze(1), groups=channels.shape[1]).transpose(1, 2)
        q, k, v = mixed.unflatten(-1, qkv.shape[2:]).unbind(-2)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), F.silu(v), channels[..., channels.shape[-1] - 3 :]

    mixer.convolved = convolved  # type: ignore[assignment]


PATCHES: dict[str, Callable[[], None]] = {
    "to start": to_start, "read norm": read_norm, "no residual": no_residual, "read residual": read_residual,
    "next value": next_value, "unit values": unit_values, "linear keys": linear_keys, "large start": large_start,
    "spans of 25 to 1600": spread(25, 100, 400, 1600), "spans of 50 to 400": spread(50, 100, 200, 400),
    "own gradient first": own_first(0.02), "own gradient first, 0.1": own_first(0.1),
    "W2 x 2": second(2.0), "W2 x 4": second(4.0), "W2 x 8": second(8.0),
    "late keys of half the heads": late_keys_half, "keys as queries": keys_as_queries,
}  # fmt: skip


def install(names: str) -> None:
    """Install trials in this process, by names joined with " + ". Raises KeyError for an unknown name."""
    for name in names.split(" + "):
        if name in PATCHES:
            PATCHES[name]()
        else:
            op.TORCH = Kernels(orthogonal=WRITERS[name])
