"""What a chunk's tokens write, and how a read sees it without forming the weights of any one token.

With the gradients' factors u_i x_i^T, all taken at the chunk's start weights, and Gm the Omega gates:

    S_t = thetas_t S_0 + sum_i B[t,i] u_i x_i^T                   B = TT @ Gm
    M_t = alphas_t W_0 - kappa_t S_0 - sum_i C[t,i] u_i x_i^T     C = TA @ diag(eta) @ B          RawWrites
    M_t = alphas_t W_0 - sum_i C[t,i] u_i x_i^T                   C = TA @ diag(eta) @ Gm         SumWrites
    M_t = alphas_t W_0 - sum_s TA[t,s] eta_s NS(S_s)              s: the writes of `ns_period`    OrthogonalWrites

where the steps eta_s are sums already, if the rule sums them (`summed_steps`). All are built once for the N chunks of a
segment. Matrices are kept as [G, wide, narrow] (see memories.py); scalar factors go to the narrow side.

Dims: G = B x H, C tokens of a chunk, I sources (tokens and halo), K writes of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reads
from .decays import decay_matrix, running_sum
from .memories import Factors, Matrices, WeightView
from .newton_schulz import newton_schulz
from .products import step_pair
from .rule import MemoryRule

# Weights and momentum after a chunk; asked for when its tokens have read.
Leave = Callable[[], tuple[Matrices, Matrices]]


class Writes(Protocol):
    """How the tokens of each chunk change the weights."""

    def advance(self, n: int, weights: Matrices, momentum: Matrices, factors: Factors) -> tuple[WeightView, Leave]:
        """How tokens of chunk n read, and what they leave."""


@dataclass(frozen=True)
class OrthogonalCoefficients:
    """ns_steps > 0: all that the gates say of the N chunks of a segment; differentiable in the gates.

    alphas [N, G, C]: of the weights, as each token sees them. of_writes [N, G, K, C]: of O_k, what each token sees of
    each write. S_j = thetas_j S + sum_i sums_ji u_i x_i^T: thetas [N, G, J], sums [N, G, J, I], at the K writing tokens
    and, where it is none of them, at the last token, whose momentum leaves the chunk: J is K or K + 1.
    """

    alphas: Tensor
    of_writes: Tensor
    thetas: Tensor
    sums: Tensor


# (rule; alpha, eta, theta [N, G, C]; the Omega gates [N, G, C, I]; places of the writing tokens in the chunk), for
# ns_steps > 0.
OrthogonalWriter = Callable[[MemoryRule, Tensor, Tensor, Tensor, Tensor, range], Writes]


@dataclass(frozen=True)
class Coefficients:
    """ns_steps = 0: all that the gates say of the N chunks of a segment; differentiable in the gates.

    How token t reads: alphas [N, G, C, 1] of the weights, kappas [N, G, C, 1] of the momentum, sources [N, G, C, I].
    What leaves the chunk: last [N, G, 3, 1] = what the next weights take of the old ones and of the momentum, and
    the next momentum of the old one; to_weights, to_momentum [N, G, I, 1] = of each source's outer product.
    Without momentum kappas and to_momentum are None and last is [N, G, 1, 1].
    """

    alphas: Tensor
    kappas: Tensor | None
    sources: Tensor
    last: Tensor
    to_weights: Tensor
    to_momentum: Tensor | None


def coefficients_of(rule: MemoryRule, alpha: Tensor, eta: Tensor, theta: Tensor, band: Tensor) -> Coefficients:
    """alpha, eta, theta [N, G, C]; band [N, G, C, I], the Omega gates Gm."""
    retention = decay_matrix(alpha)
    alphas = retention[..., :1] * alpha[..., :1, None]
    steps = retention * -eta.unsqueeze(-2)
    if not rule.momentum:
        sources = _by_source(steps, band)
        return Coefficients(alphas, None, sources, alphas[..., -1:, :], sources[..., -1, :, None], None)
    decay = decay_matrix(theta)
    thetas = decay[..., :1] * theta[..., :1, None]  # prod_{r <= t} theta_r
    sums = _by_source(decay, band)
    kappas, sources = (steps * thetas.mT).sum(-1, keepdim=True), _by_source(steps, sums)
    last = torch.stack([alphas[..., -1, :], kappas[..., -1, :], thetas[..., -1, :]], -2)
    return Coefficients(alphas, kappas, sources, last, sources[..., -1, :, None], sums[..., -1, :, None])


def places_of_writes(rule: MemoryRule, offset: int, tokens: int) -> range:
    """Of the writing tokens among a chunk's `tokens`, the first of which has the place `offset` in its chunk."""
    return range(-(offset + 1) % rule.ns_period, tokens, rule.ns_period)


def orthogonal_coefficients_of(
    rule: MemoryRule, alpha: Tensor, eta: Tensor, theta: Tensor, band: Tensor, writes: range
) -> OrthogonalCoefficients:
    """Arguments as of an `OrthogonalWriter`."""
    theta = theta if rule.momentum else torch.zeros_like(theta)
    retention, decay = decay_matrix(alpha), decay_matrix(theta)
    # A slice: a list as an index would be copied to a GPU, which waits for it.
    at = slice(writes.start, None, writes.step)
    formed = decay[..., at, :]
    if alpha.shape[-1] - 1 not in writes:
        formed = torch.cat([formed, decay[..., -1:, :]], -2)
    return OrthogonalCoefficients(
        alphas=retention[..., 0] * alpha[..., :1],
        of_writes=(retention * -eta.unsqueeze(-2))[..., at].mT,
        thetas=formed[..., 0] * theta[..., :1],
        sums=formed @ band,
    )


def _by_source(steps: Tensor, band: Tensor) -> Tensor:
    """steps band [..., C, I], source by source in memory: rows of C tokens fill a CPU's vectors, of C + W - 1 they do
    not, and the product takes half the time."""
    return (band.mT @ steps.mT).mT


class RawWrites:
    """ns_steps = 0: every token writes its momentum itself."""

    def __init__(self, of: Coefficients) -> None:
        assert of.kappas is not None and of.to_momentum is not None
        self.reads = list(zip(of.alphas.unbind(), of.kappas.unbind(), of.sources.unbind(), strict=True))
        outer = (of.to_weights.unbind(), of.to_momentum.unbind())
        self.leaving = list(zip(of.last.unbind(), *outer, strict=True))

    def advance(self, n: int, weights: Matrices, momentum: Matrices, factors: Factors) -> tuple[WeightView, Leave]:
        last, to_weights, to_momentum = self.leaving[n]
        after = [
            step_pair(W, S, last, to_weights, to_momentum, wide, narrow)
            for W, S, (wide, narrow) in zip(weights, momentum, factors, strict=True)
        ]
        written, moved = zip(*after, strict=True)
        alphas, kappas, sources = self.reads[n]
        terms: list[tuple[Tensor, ...]] = [(alphas, W, kappas, S) for W, S in zip(weights, momentum, strict=True)]
        return SourceReader(sources, factors, terms), lambda: (written, moved)


class SumWrites:
    """ns_steps = 0 without momentum: every token writes its window's gradients themselves."""

    def __init__(self, of: Coefficients) -> None:
        self.reads = list(zip(of.alphas.unbind(), of.sources.unbind(), strict=True))
        self.leaving = list(zip(of.last.unbind(), of.to_weights.unbind(), strict=True))

    def advance(self, n: int, weights: Matrices, momentum: Matrices, factors: Factors) -> tuple[WeightView, Leave]:
        last, outer = self.leaving[n]
        written = tuple(
            torch.baddbmm(last * W, wide.mT, outer * narrow) for W, (wide, narrow) in zip(weights, factors, strict=True)
        )
        alphas, sources = self.reads[n]
        return SourceReader(sources, factors, [(alphas, W) for W in weights]), lambda: (written, momentum)


class SourceReader:
    """Reads through the matrices of the chunk's start and its sources; terms[j]: c_1, M_1, ... of matrix j."""

    def __init__(self, sources: Tensor, factors: Factors, terms: list[tuple[Tensor, ...]]) -> None:
        self.sources, self.factors, self.terms = sources, factors, terms

    def widen(self, j: int, x: Tensor) -> Tensor:
        return reads.widen(x, self.sources, *self.factors[j], *self.terms[j])

    def narrow(self, j: int, h: Tensor) -> Tensor:
        return reads.narrow(h, self.sources, *self.factors[j], *self.terms[j])


class OrthogonalWrites:
    """ns_steps > 0: the tokens `writes` write NS(S_t); the others only decay."""

    def __init__(self, rule: MemoryRule, of: OrthogonalCoefficients, writes: range) -> None:
        self.rule, self.writes = rule, writes
        self.of_weights = of.alphas.unsqueeze(-1).unbind()
        self.of_writes = of.of_writes.mT.unbind()
        self.thetas = of.thetas[..., None, None].unbind()
        self.sums = of.sums.mT.unsqueeze(-1).unbind()  # [G, I, K', 1]

    def advance(self, n: int, weights: Matrices, momentum: Matrices, factors: Factors) -> tuple[WeightView, Leave]:
        alphas, of_writes = self.of_weights[n], self.of_writes[n]
        orthogonal, written, moved = [], [], []
        for W, S, (wide, narrow) in zip(weights, momentum, factors, strict=True):
            formed = self.formed(n, S, wide, narrow)
            steps, coefficients = self.rule.ns_steps, self.rule.ns_coefficients
            O = newton_schulz(formed[:, : len(self.writes)], steps, coefficients)  # noqa: E741
            orthogonal.append(O)
            written.append(alphas[:, -1:] * W + torch.einsum("gk,gkmn->gmn", of_writes[:, -1], O))
            moved.append(formed[:, -1])
        reader = _OrthogonalReader(alphas, of_writes, self.writes, weights, tuple(orthogonal))
        return reader, lambda: (tuple(written), tuple(moved))

    def formed(self, n: int, S: Tensor, wide: Tensor, narrow: Tensor) -> Tensor:
        """[G, K', wide, narrow]: the momentum at each formed token of chunk n, all from one product with `wide`."""
        sides = (self.sums[n] * narrow.unsqueeze(2)).flatten(2)
        gradients = torch.bmm(wide.mT, sides).unflatten(-1, (-1, narrow.shape[-1])).transpose(1, 2)
        return self.thetas[n] * S.unsqueeze(1) + gradients


def orthogonal_writes(
    rule: MemoryRule, alpha: Tensor, eta: Tensor, theta: Tensor, band: Tensor, writes: range
) -> OrthogonalWrites:
    """An `OrthogonalWriter`."""
    return OrthogonalWrites(rule, orthogonal_coefficients_of(rule, alpha, eta, theta, band, writes), writes)


class _OrthogonalReader:
    def __init__(
        self, of_weights: Tensor, of_writes: Tensor, writes: range, weights: Matrices, orthogonal: Matrices
    ) -> None:
        self.of_weights, self.of_writes, self.writes = of_weights, of_writes, writes
        self.weights, self.orthogonal = weights, orthogonal  # [G, wide, narrow] and [G, K, wide, narrow]

    def widen(self, j: int, x: Tensor) -> Tensor:
        return self._read(x, self.weights[j].mT, self.orthogonal[j].mT)

    def narrow(self, j: int, h: Tensor) -> Tensor:
        return self._read(h, self.weights[j], self.orthogonal[j])

    def _read(self, x: Tensor, weights: Tensor, orthogonal: Tensor) -> Tensor:
        out = self.of_weights * torch.bmm(x, weights)
        if not self.writes:
            return out
        first = self.writes[0]  # tokens before the first write see none of them
        seen = torch.einsum("gck,gkcm->gcm", self.of_writes[:, first:], x[:, None, first:] @ orthogonal)
        return torch.cat([out[:, :first], out[:, first:] + seen], 1)


def writes_of(
    rule: MemoryRule,
    offset: int,
    gates: tuple[Tensor, Tensor, Tensor],
    band: Tensor,
    orthogonal: OrthogonalWriter = orthogonal_writes,
) -> Writes:
    """How the tokens write under `rule`.

    gates: alpha, eta, theta [N, G, C]; band [N, G, C, I], the Omega gates Gm; offset: the first token's place in its
    chunk; orthogonal: what writes where ns_steps > 0.
    """
    if rule.ns_steps:
        writes = places_of_writes(rule, offset, band.shape[-2])
        return orthogonal(rule, *gates, band, writes)
    of = coefficients_of(rule, *gates, band)
    return RawWrites(of) if rule.momentum else SumWrites(of)


def summed_steps(rule: MemoryRule, eta: Tensor, pending: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token the sum of eta over its period, up to it: what a write takes as its step where the rule sums them.

    eta [B, T, H]; pending [B, H]: the sum since the last write before these tokens; positions [B, T] or [T]: of each
    token in its document. Returns the sums [B, T, H] and what is pending after them [B, H].
    """
    since = rule.since_write(positions).expand(eta.shape[:2])
    place = torch.arange(eta.shape[1], device=eta.device)
    # In double precision: a period's sum is a difference of two sums over the whole sequence.
    totals = F.pad(running_sum(eta.double().mT).mT, (0, 0, 1, 0))
    before = totals.gather(1, (place - since).clamp(min=0).unsqueeze(-1).expand_as(eta))
    begun = (since > place).unsqueeze(-1).to(eta.dtype)  # the period began before these tokens
    sums = (totals[:, 1:] - before).to(eta.dtype) + begun * pending.unsqueeze(1)
    written = since[:, -1:] == rule.ns_period - 1
    return sums, sums[:, -1].masked_fill(written, 0.0)
