"""What a chunk's tokens write, and how a read sees it without forming the weights of any one token.

With the gradients' factors u_i x_i^T, all taken at the chunk's start weights, and Gm the Omega gates:

    S_t = thetas_t S_0 + sum_i B[t,i] u_i x_i^T                   B = TT @ Gm
    M_t = alphas_t W_0 - kappa_t S_0 - sum_i C[t,i] u_i x_i^T     C = TA @ diag(eta) @ B          RawWrites
    M_t = alphas_t W_0 - sum_s TA[t,s] eta_s NS(S_s)              s: the writes of `ns_period`    OrthogonalWrites

Both are built once for the N chunks of a segment. Dims: G = B x H, C tokens of a chunk, I sources (tokens and halo),
K writes of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atlas_kernels.decays import decay_matrix
from atlas_kernels.memories import Apply, Factors
from atlas_kernels.newton_schulz import newton_schulz

Matrices = tuple[Tensor, ...]


class RawWrites:
    """ns_steps = 0: every token writes its momentum itself."""

    def __init__(self, alpha: Tensor, eta: Tensor, theta: Tensor, band: Tensor) -> None:
        """alpha, eta, theta [N, G, C]; band [N, G, C, I], the Omega gates Gm."""
        retention, decay = decay_matrix(alpha), decay_matrix(theta)
        steps = retention * eta.unsqueeze(-2)
        thetas = decay[..., :1] * theta[..., :1, None]  # prod_{r <= t} theta_r
        sums = decay @ band
        self.of_weights = (retention[..., :1] * alpha[..., :1, None]).unbind()
        self.of_momentum = (steps @ thetas).unbind()
        self.of_sources = (steps @ sums).unbind()
        self.last_thetas = thetas[..., -1:, :].unbind()
        self.last_sums = sums[..., -1, :, None].unbind()

    def advance(
        self, n: int, weights: Matrices, momentum: Matrices, factors: Factors
    ) -> tuple[Apply, Matrices, Matrices]:
        """(how tokens of chunk n read, weights after it, momentum after it)."""
        alphas, kappa, sources = self.of_weights[n], self.of_momentum[n], self.of_sources[n]

        def apply(j: int, x: Tensor) -> Tensor:
            left, right = factors[j]
            out = torch.bmm(alphas * x, weights[j].mT)
            out = torch.baddbmm(out, kappa * x, momentum[j].mT, alpha=-1)
            return torch.baddbmm(out, sources * torch.bmm(x, right.mT), left, alpha=-1)

        written, moved = [], []
        for W, S, (left, right) in zip(weights, momentum, factors, strict=True):
            kept = alphas[:, -1:] * W - kappa[:, -1:] * S
            written.append(torch.baddbmm(kept, (sources[:, -1, :, None] * left).mT, right, alpha=-1))
            moved.append(torch.baddbmm(self.last_thetas[n] * S, (self.last_sums[n] * left).mT, right))
        return apply, tuple(written), tuple(moved)


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
        self.of_writes = (retention * eta.unsqueeze(-2))[..., writes].unbind()
        self.thetas = (decay[..., formed, :1] * theta[..., :1, None]).unsqueeze(-1).unbind()
        self.sums = (decay[..., formed, :] @ band).unsqueeze(-1).unbind()

    def advance(
        self, n: int, weights: Matrices, momentum: Matrices, factors: Factors
    ) -> tuple[Apply, Matrices, Matrices]:
        """(how tokens of chunk n read, weights after it, momentum after it)."""
        alphas, of_writes = self.of_weights[n], self.of_writes[n]
        orthogonal, written, moved = [], [], []
        for W, S, (left, right) in zip(weights, momentum, factors, strict=True):
            # [G, K', rows, cols]: the momentum at each formed token.
            formed = self.thetas[n] * S.unsqueeze(1) + (self.sums[n] * left.unsqueeze(1)).mT @ right.unsqueeze(1)
            O = newton_schulz(formed[:, : len(self.writes)], self.steps, self.table)  # noqa: E741
            orthogonal.append(O)
            written.append(alphas[:, -1:] * W - torch.einsum("gk,gkmn->gmn", of_writes[:, -1], O))
            moved.append(formed[:, -1])

        def apply(j: int, x: Tensor) -> Tensor:
            out = torch.bmm(alphas * x, weights[j].mT)
            if not self.writes:
                return out
            # Tokens before the first write see none of them.
            first = self.writes[0]
            seen = torch.einsum("gck,gkcm->gcm", of_writes[:, first:], x[:, None, first:] @ orthogonal[j].mT)
            return torch.cat([out[:, :first], out[:, first:] - seen], 1)

        return apply, tuple(written), tuple(moved)
