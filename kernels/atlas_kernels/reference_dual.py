"""The exponential kernel, token by token: every source and its coefficient written out. Never optimised.

A layer over phi* is a list of sources: W phi*(q) = a W_0 q - sum_i c_i d_i exp(q . x_i). One token multiplies a and
every c_i by its alpha, then adds eta gamma for each source of its window, with d_i the inner gradient's factor at the
chunk's start. Letters as in reference.py; a start at `position` 0 only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import gelu, layer_norm
from .rule import Inputs, MemoryRule


class Layer:
    """W phi*(x) for one head of one sequence."""

    def __init__(self, W0: Tensor, softmax: bool) -> None:
        self.W0, self.softmax = W0, softmax
        self.a = W0.new_ones(())
        self.sources: list[tuple[Tensor, Tensor, Tensor]] = []  # (c, d, x)

    def __call__(self, x: Tensor) -> Tensor:
        y, total = self.W0.new_zeros(self.W0.shape[0]), self.W0.new_zeros(())
        for c, d, x_i in self.sources:
            y = y - c * d * torch.exp(x @ x_i)
            total = total + c * torch.exp(x @ x_i)
        if self.softmax and total > 0:
            y = y / total
        return self.a * (self.W0 @ x) + y

    def decayed(self, alpha: Tensor) -> Layer:
        after = Layer(self.W0, self.softmax)
        after.a = self.a * alpha
        after.sources = [(c * alpha, d, x) for c, d, x in self.sources]
        return after


def omega_memory_dual_reference(rule: MemoryRule, weights: tuple[Tensor, ...], inputs: Inputs) -> Tensor:
    """y [B, T, H, V]. Inputs as in `omega_memory`; weights: the start weights."""
    batch, _, heads, _ = inputs.q.shape
    rows = [torch.stack([_one_head(rule, weights, inputs, b, h) for h in range(heads)], 1) for b in range(batch)]
    return torch.stack(rows)


def _one_head(rule: MemoryRule, weights: tuple[Tensor, ...], inputs: Inputs, b: int, h: int) -> Tensor:
    q, k, v, gates, residual = inputs.q, inputs.k, inputs.v, inputs.gates, inputs.residual
    read, written = (q, k) if residual is None else residual
    if not rule.residual:
        read, written = torch.zeros_like(v), torch.zeros_like(v)
    first = [Layer(W[h], rule.kernel == "softmax") for W in (weights if rule.memory == "linear" else weights[1:])]
    W1 = None if rule.memory == "linear" else weights[0][h]
    outputs = []
    anchor: tuple[Tensor | None, list[Layer]] = (W1, first)
    for t in range(q.shape[1]):
        if t % rule.chunk == 0:
            anchor = _as_anchor(rule, W1, first)
        alpha, eta = gates.alpha[b, t, h], gates.eta[b, t, h]
        first = [layer.decayed(alpha) for layer in first]
        W1 = None if W1 is None else alpha * W1
        for i in range(max(0, t - rule.window + 1), t + 1):
            gamma = gates.gamma[b, t, h, t - i] if gates.pair else gates.gamma[b, i, h]
            r = written[b, i, h]
            ds, dW1 = _gradient(rule, *anchor, k[b, i, h], v[b, i, h], r)
            for layer, d in zip(first, ds, strict=True):
                layer.sources.append((eta * gamma, d, k[b, i, h]))
            W1 = None if W1 is None else W1 - eta * gamma * dW1
        outputs.append(_memory(rule, W1, first, q[b, t, h], read[b, t, h]))
    return torch.stack(outputs)


def _as_anchor(rule: MemoryRule, W1: Tensor | None, first: list[Layer]) -> tuple[Tensor | None, list[Layer]]:
    """The same to read, as the outer gradient sees the weights at which inner gradients are taken."""
    layers = []
    for layer in first:
        same = Layer(rule.as_anchor(layer.W0), layer.softmax)
        same.a = rule.as_anchor(layer.a)
        same.sources = [(rule.as_anchor(c), rule.as_anchor(d), rule.as_anchor(x)) for c, d, x in layer.sources]
        layers.append(same)
    return None if W1 is None else rule.as_anchor(W1), layers


def _hidden(rule, first, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    act, slope = gelu(first[0](x))
    u = first[1](x) if rule.memory == "gated_mlp" else None
    return act if u is None else act * u, act, slope, u


def _memory(rule, W1: Tensor | None, first: list[Layer], x: Tensor, r: Tensor) -> Tensor:
    if W1 is None:
        return first[0](x)
    o = W1 @ _hidden(rule, first, x)[0]
    return r + (layer_norm(o)[0] if rule.norm == "layer" else o)


def _gradient(rule, W1: Tensor | None, first: list[Layer], x: Tensor, v: Tensor, r: Tensor):
    """(d of every layer over phi*, the gradient of W1)."""
    e = _memory(rule, W1, first, x, r) - v if rule.loss == "l2" else -v
    if W1 is None:
        return [e], None
    h, act, slope, u = _hidden(rule, first, x)
    if rule.norm == "layer":
        n, sd = layer_norm(W1 @ h)
        e = (e - e.mean() - n * (e * n).mean()) / sd
    back = W1.T @ e
    ds = [back * slope] if u is None else [back * u * slope, back * act]
    return ds, torch.outer(e, h)
