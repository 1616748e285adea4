"""What the recipe search tries and the project does not have; `recipe_rows.py` names these as a row's trial.

A trial changes the running process, which trains one model and ends. It takes only whole chunks, as training brings
them. Tests hold that each runs, not what it gives. What wins is written into `atlas_kernels` with its tests, and leaves
this file.

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

from atlas_kernels import layer_start, memories, op
from atlas_kernels.chunked import Kernels
from atlas_kernels.decays import decay_matrix
from atlas_kernels.layer_norm import layer_norm
from atlas_kernels.memories import Factors, Matrices, WeightView
from atlas_kernels.newton_schulz import direct_form, newton_schulz, schedule
from atlas_kernels.rule import MemoryRule
from atlas_kernels.writes import Leave, OrthogonalWrites, SourceReader, orthogonal_coefficients_of
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
            formed = self.formed(n, S, wide, narrow)
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


class FlooredAt3(Trial):
    """4: S / max(|S|_F, floor) enters the iteration, which multiplies small singular values by 3.44 a step.

    So singular values well under `corner` are written as they are, in units of it. Those above it are written as ones.
    """

    corner = 3.0

    def direction(self, j: int, momentum: Tensor) -> Tensor:
        table = schedule(self.rule.ns_steps, self.rule.ns_coefficients)
        floor = self.corner * prod(a for a, _, _ in table)
        X = momentum / momentum.norm(dim=(-2, -1), keepdim=True).clamp(min=floor)
        return direct_form(X.mT, table).mT


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
    """5: until its period's write, a token reads the period's raw gradients, each at its own token's step."""

    def provisional(self, alpha: Tensor, eta: Tensor, theta: Tensor, band: Tensor) -> tuple[Tensor, ...] | None:
        tokens = torch.arange(alpha.shape[-1], device=alpha.device)
        period = tokens // self.period
        same = (period[:, None] == period[None, :]) & (tokens % self.period != self.period - 1)[:, None]
        steps = decay_matrix(alpha) * -(eta / self.period).unsqueeze(-2) * same
        return (steps @ (decay_matrix(theta) * same) @ band).unbind()


# UNIT: the size of a momentum that counts as one. MOST: the largest of `Clipped`.
UNIT, MOST = 10.0, 4.0
WRITERS: dict[str, type[Trial]] = {
    "weighed": Weighed, "steepest": Steepest, "sized": Sized,
    "saturating": Saturating, "floor 3": FlooredAt3, "clipped": Clipped, "tall": Tall, "last layer": LastLayer,
    "bounded": Bounded, "provisional": Provisional,
}  # fmt: skip


def read_norm() -> None:
    """1: a layer norm on what is read, not in the inner loss."""
    memories.Mlp.output = lambda self, o, r: r + layer_norm(o)  # type: ignore[method-assign]


def _starts(change: Callable[[AtlasMixer], None]) -> None:
    """Change a memory layer's weights as they are drawn."""
    build = AtlasMixer.build

    def changed(self: AtlasMixer, *arguments: Any) -> None:
        build(self, *arguments)
        with torch.no_grad():
            change(self)

    AtlasMixer.build = changed  # type: ignore[method-assign]


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


def second(size: Callable[[float], float]) -> Callable[[], None]:
    """8: W2 starts with columns of another length; `size` gives it, of the default's."""

    def changed() -> None:
        drawn = layer_start.second_gain
        layer_start.second_gain = lambda memory: size(drawn(memory))

    return changed


def first(gain: float) -> Callable[[], None]:
    """8: W1 starts with this gain. 1 is the scale of any linear layer."""

    def changed() -> None:
        layer_start.W1_GAIN = gain

    return changed


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
    "read norm": read_norm, "unit values": unit_values, "linear keys": linear_keys,
    "spans of 50 to 3200": spread(50, 200, 800, 3200), "large start": first(1.0), "small start": first(0.004),
    "W2 of length 1": second(lambda length: 1.0), "W2 x 2": second(lambda length: 2.0 * length),
}  # fmt: skip


def install(names: str) -> None:
    """Install trials in this process, by names joined with " + ". Raises KeyError for an unknown name."""
    for name in names.split(" + "):
        if name in PATCHES:
            PATCHES[name]()
        else:
            op.TORCH = Kernels(orthogonal=WRITERS[name])
