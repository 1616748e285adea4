"""What a chunk's tokens write, and how a read sees it without forming the weights of any one token.

With the gradients' factors u_i x_i^T, all taken at the chunk's start weights, and Gm the Omega gates:

    S_t = thetas_t S_0 + sum_i B[t,i] u_i x_i^T                   B = TT @ Gm
    M_t = alphas_t W_0 - kappa_t S_0 - sum_i C[t,i] u_i x_i^T     C = TA @ diag(eta) @ B          RawWrites
    M_t = alphas_t W_0 - sum_s TA[t,s] eta_s NS(S_s)              s: the writes of `ns_period`    OrthogonalWrites

Both are built once for the N chunks of a segment. Matrices are kept as [G, wide, narrow] (see memories.py); scalar
factors go to the narrow side. Dims: G = B x H, C tokens of a chunk, I sources (tokens and halo), K writes of a chunk.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from atlas_kernels.decays import decay_matrix
from atlas_kernels.memories import Factors, Matrices, Reader
from atlas_kernels.newton_schulz import newton_schulz
from atlas_kernels.products import plus_outer, times_transpose


class Writes(Protocol):
    """How the tokens of each chunk change the weights."""

    def advance(
        self, n: int, weights: Matrices, momentum: Matrices, factors: Factors
    ) -> tuple[Reader, Matrices, Matrices]:
        """(how tokens of chunk n read, weights after it, momentum after it)."""


class RawWrites:
    """ns_steps = 0: every token writes its momentum itself."""

    def __init__(self, alpha: Tensor, eta: Tensor, theta: Tensor, band: Tensor) -> None:
        """alpha, eta, theta [N, G, C]; band [N, G, C, I], the Omega gates Gm."""
        retention, decay = decay_matrix(alpha), decay_matrix(theta)
        steps = retention * -eta.unsqueeze(-2)
        thetas = decay[..., :1] * theta[..., :1, None]  # prod_{r <= t} theta_r
        sums = decay @ band
        self.of_weights = (retention[..., :1] * alpha[..., :1, None]).unbind()
        self.of_momentum = (steps @ thetas).unbind()
        self.of_sources = (steps @ sums).unbind()
        self.last_thetas = thetas[..., -1:, :].unbind()
        self.last_sums = sums[..., -1, :, None].unbind()

    def advance(
        self, n: int, weights: Matrices, momentum: Matrices, factors: Factors
    ) -> tuple[Reader, Matrices, Matrices]:
        reader = _RawReader(self.of_weights[n], self.of_momentum[n], self.of_sources[n], weights, momentum, factors)
        alpha, kappa, sources = reader.of_weights[:, -1:], reader.of_momentum[:, -1:], reader.of_sources[:, -1, :, None]
        written, moved = [], []
        for W, S, (wide, narrow) in zip(weights, momentum, factors, strict=True):
            written.append(plus_outer(torch.addcmul(alpha * W, kappa, S), wide, sources * narrow))
            moved.append(plus_outer(self.last_thetas[n] * S, wide, self.last_sums[n] * narrow))
        return reader, tuple(written), tuple(moved)


class _RawReader:
    def __init__(
        self,
        of_weights: Tensor,
        of_momentum: Tensor,
        of_sources: Tensor,
        weights: Matrices,
        momentum: Matrices,
        factors: Factors,
    ) -> None:
        self.of_weights, self.of_momentum, self.of_sources = of_weights, of_momentum, of_sources
        self.weights, self.momentum, self.factors = weights, momentum, factors

    def widen(self, j: int, x: Tensor) -> Tensor:
        wide, narrow = self.factors[j]
        of_start = torch.cat([self.of_weights * x, self.of_momentum * x], -1)
        out = times_transpose(of_start, torch.cat([self.weights[j], self.momentum[j]], -1))
        return out.baddbmm_(self.of_sources * times_transpose(x, narrow), wide)

    def narrow(self, j: int, h: Tensor) -> Tensor:
        wide, narrow = self.factors[j]
        out = self.of_weights * torch.bmm(h, self.weights[j])
        out = torch.addcmul(out, self.of_momentum, torch.bmm(h, self.momentum[j]))
        return out.baddbmm_(self.of_sources * times_transpose(h, wide), narrow)


class OrthogonalWrites:
    """ns_steps > 0: the tokens `writes` write NS(S_t); the others only decay."""

    def __init__(
        self, alpha: Tensor, eta: Tensor, theta: Tensor, band: Tensor, writes: list[int], steps: int, table: str
    ) -> None:
        """As RawWrites; `writes` are positions in the chunk; `steps`, `table` are Newton-Schulz's."""
        retention, decay = decay_matrix(alpha), decay_matrix(theta)
        last = alpha.shape[-1] - 1
        # The last token's momentum leaves the chunk, so it is formed even where it is not written.
        formed = writes if last in writes else [*writes, last]
        self.writes, self.steps, self.table = writes, steps, table
        self.of_weights = (retention[..., :1] * alpha[..., :1, None]).unbind()
        self.of_writes = (retention * -eta.unsqueeze(-2))[..., writes].unbind()
        self.thetas = (decay[..., formed, :1] * theta[..., :1, None]).unsqueeze(-1).unbind()
        self.sums = (decay[..., formed, :] @ band).unsqueeze(-1).unbind()

    def advance(
        self, n: int, weights: Matrices, momentum: Matrices, factors: Factors
    ) -> tuple[Reader, Matrices, Matrices]:
        alphas, of_writes = self.of_weights[n], self.of_writes[n]
        orthogonal, written, moved = [], [], []
        for W, S, (wide, narrow) in zip(weights, momentum, factors, strict=True):
            # [G, K', wide, narrow]: the momentum at each formed token.
            formed = self.thetas[n] * S.unsqueeze(1) + wide.mT.unsqueeze(1) @ (self.sums[n] * narrow.unsqueeze(1))
            O = newton_schulz(formed[:, : len(self.writes)], self.steps, self.table)  # noqa: E741
            orthogonal.append(O)
            written.append(alphas[:, -1:] * W + torch.einsum("gk,gkmn->gmn", of_writes[:, -1], O))
            moved.append(formed[:, -1])
        reader = _OrthogonalReader(alphas, of_writes, self.writes, weights, tuple(orthogonal))
        return reader, tuple(written), tuple(moved)


class _OrthogonalReader:
    def __init__(
        self, of_weights: Tensor, of_writes: Tensor, writes: list[int], weights: Matrices, orthogonal: Matrices
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
