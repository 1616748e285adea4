"""The paper, token by token: one function an equation, in the paper's letters. Never optimised.

Everything else in this package is tested against this file, and this file against autograd. Numbers in
brackets are equations of arXiv 2505.23735.

W: the memory's matrices, each [B, H, rows, cols]; S: their momenta, same shapes. x = phi(k) [B, I, H, D],
v and r [B, I, H, V]: I sources at once (the tokens of one window).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .newton_schulz import newton_schulz
from .rule import Inputs, MemoryRule, MemoryState, initial_state

LAYER_NORM_EPSILON = 1e-5

Matrices = tuple[Tensor, ...]


def times(W: Tensor, x: Tensor) -> Tensor:
    """W x, for each head: W [B, H, m, n], x [B, I, H, n] -> [B, I, H, m]."""
    return torch.einsum("bhmn,bihn->bihm", W, x)


def gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    """act(z), tanh form, and its derivative act'(z)."""
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * c * (1 + 3 * 0.044715 * z**2)


def layer_norm(o: Tensor) -> tuple[Tensor, Tensor]:
    """n = (o - mean) / sd over the last dimension, and sd."""
    sd = (o.var(-1, keepdim=True, unbiased=False) + LAYER_NORM_EPSILON).sqrt()
    return (o - o.mean(-1, keepdim=True)) / sd, sd


def hidden(rule: MemoryRule, W: Matrices, x: Tensor) -> Tensor:
    """h of a deep memory: act(W2 x) (mlp, Eq 42), act(W2 x) * W3 x (gated_mlp, Eq 43)."""
    h, _ = gelu(times(W[1], x))
    return h * times(W[2], x) if rule.memory == "gated_mlp" else h


def memory(rule: MemoryRule, W: Matrices, x: Tensor, r: Tensor) -> Tensor:
    """M(x): W x (linear), else r + W1 h, or r + LN(W1 h)."""
    if rule.memory == "linear":
        return times(W[0], x)
    o = times(W[0], hidden(rule, W, x))
    return r + (layer_norm(o)[0] if rule.norm == "layer" else o)


def inner_loss(rule: MemoryRule, W: Matrices, x: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """loss(M(x), v), [B, I, H]: 1/2 |M(x) - v|^2 (l2), -<M(x), v> (dot)."""
    y = memory(rule, W, x, r)
    return 0.5 * (y - v).square().sum(-1) if rule.loss == "l2" else -(y * v).sum(-1)


def inner_gradient(rule: MemoryRule, W: Matrices, x: Tensor, v: Tensor, r: Tensor, gamma: Tensor) -> Matrices:
    """sum_i gamma_i d/dW loss(M(x_i), v_i), by hand; each source adds a rank-one matrix. gamma [B, I, H]."""
    e = memory(rule, W, x, r) - v if rule.loss == "l2" else -v  # dloss / dM

    def outer(left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("bih,bihm,bihn->bhmn", gamma, left, right)

    if rule.memory == "linear":
        return (outer(e, x),)
    act, slope = gelu(times(W[1], x))
    h = hidden(rule, W, x)
    if rule.norm == "layer":  # e' = J^T e: through the layer norm, to W1's output
        n, sd = layer_norm(times(W[0], h))
        e = (e - e.mean(-1, keepdim=True) - n * (e * n).mean(-1, keepdim=True)) / sd
    back = times(W[0].mT, e)
    if rule.memory == "mlp":
        return outer(e, h), outer(back * slope, x)
    return outer(e, h), outer(back * times(W[2], x) * slope, x), outer(back * act, x)


def momentum(theta: Tensor, S: Matrices, G: Matrices) -> Matrices:
    """S_t = theta_t S_{t-1} + G_t (Eq 33). theta [B, H]."""
    return tuple(theta[..., None, None] * s + g for s, g in zip(S, G, strict=True))


def write(rule: MemoryRule, alpha: Tensor, eta: Tensor, W: Matrices, S: Matrices, position: int) -> Matrices:
    """M_t = alpha_t M_{t-1} - eta_t NS_k(S_t) (Eq 32); between the writes of `ns_period` only the decay.

    eta: the token's, or the sum over its period up to it where the rule sums steps.
    """
    decayed = tuple(alpha[..., None, None] * w for w in W)
    if not rule.writes_at(position):
        return decayed
    O = (newton_schulz(s, rule.ns_steps, rule.ns_coefficients) for s in S)  # noqa: E741
    return tuple(w - eta[..., None, None] * o for w, o in zip(decayed, O, strict=True))


def omega_memory_reference(
    rule: MemoryRule, state: MemoryState[int], inputs: Inputs, start: Matrices
) -> tuple[Tensor, MemoryState[int]]:
    """The whole recurrence, from the `start` weights [H, rows, cols] on wherever a shard begins.

    Inputs as in `omega_memory`, checked and in one dtype; the state is given.
    """
    outputs, first, length = [], 0, inputs.q.shape[1]
    while first < length:
        left = rule.shard - state.position % rule.shard if rule.shard else length
        own = inputs.map(lambda t: t[:, first : first + left])  # noqa: B023  used before the next turn
        if rule.shard and left == rule.shard:
            kept = {"residuals": state.residuals is not None, "source_gates": state.gamma is not None}
            state = initial_state(rule, start, own.k, own.v, **kept).at(state.position)
        y, state = _from(rule, state, own)
        outputs.append(y)
        first += left
    return torch.cat(outputs, 1), state


def _from(rule: MemoryRule, state: MemoryState[int], inputs: Inputs) -> tuple[Tensor, MemoryState[int]]:
    """The recurrence over tokens of one shard."""
    q, gates, c, T = inputs.q, inputs.gates, rule.window, inputs.q.shape[1]
    X, V = torch.cat([state.keys, inputs.k], 1), torch.cat([state.values, inputs.v], 1)
    r_q, R = q, X
    if inputs.residual is not None and state.residuals is not None:
        r_q, R = inputs.residual[0], torch.cat([state.residuals, inputs.residual[1]], 1)
    elif not rule.residual:
        r_q, R = torch.zeros_like(inputs.v), torch.zeros_like(V)
    sources = None if state.gamma is None else torch.cat([state.gamma, gates.gamma], 1)

    W, S, A, y = state.weights, state.momentum, state.anchor, []
    pending = state.pending
    for t in range(T):
        position = state.position + t
        if position % rule.chunk == 0:
            A = W  # every gradient of a chunk is taken at its first weights (Eq 16)
        at = rule.anchor_of(A)
        window = slice(t, t + c)  # sources t-c+1 .. t, counted from the start of the halo
        # Pair gates count backwards from the reader: entry j is source t-j.
        gamma = gates.gamma[:, t].flip(-1).transpose(1, 2) if sources is None else sources[:, window]
        G = inner_gradient(rule, at, X[:, window], V[:, window], R[:, window], gamma)  # Omega rule (Eq 9)
        S = momentum(gates.theta[:, t], S, G) if rule.momentum else G
        eta = gates.eta[:, t] if pending is None else pending + gates.eta[:, t]
        W = write(rule, gates.alpha[:, t], eta, W, S, position)
        if pending is not None:
            pending = torch.zeros_like(eta) if rule.writes_at(position) else eta
        read = A if rule.read == "chunk" else W  # W: after the write
        y.append(memory(rule, read, q[:, t : t + 1], r_q[:, t : t + 1]))

    last = slice(T, T + c - 1)
    after = MemoryState(
        weights=W,
        momentum=S if rule.momentum else state.momentum,
        anchor=W if (state.position + T) % rule.chunk == 0 else A,
        keys=X[:, last],
        values=V[:, last],
        residuals=None if state.residuals is None else R[:, last],
        gamma=None if sources is None else sources[:, last],
        position=state.position + T,
        pending=pending,
    )
    return torch.cat(y, 1), after
