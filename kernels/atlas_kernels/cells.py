"""Recurrent cells: GRU (arXiv 1406.1078, in the form of torch and cuDNN) and LSTM, one recurrence a head.

Heads lead inside a recurrence, as in its products.

Dims: B batch, T tokens, H heads, K head size, G gates of a cell.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .autocast import at_least_float32

# What a head remembers between two tokens, [H, B, K] each, at least float32; its output first.
Carried = tuple[Tensor, ...]
# (x, carried, matrix, inner) -> carried, of one token: see `gru_cell`.
Cell = Callable[[Tensor, Carried, Tensor, Tensor], Carried]
# Of a head: one for each gate, and the GRU's inside its reset.
BIASES = 4


def gru_cell(x: Tensor, carried: Carried, matrix: Tensor, inner: Tensor) -> Carried:
    """One token of a GRU with the reset gate behind the product, in the order r, z, n:

        r, z = sigmoid(x + R h_{t-1})    n = tanh(x_n + r (R_n h_{t-1} + inner))    h_t = z h_{t-1} + (1 - z) n

    x [H, B, 3K]: the gates' inputs with their biases; carried: (h [H, B, K],); matrix [H, K, 3K]: R transposed;
    inner [H, 1, K]: the bias inside the reset. Returns (h_t,).
    """
    (h,) = carried
    width = h.shape[-1]
    sizes = (2 * width, width)
    (x_gates, x_n), (h_gates, h_n) = x.split(sizes, -1), torch.bmm(h, matrix).split(sizes, -1)
    r, z = (x_gates + h_gates).sigmoid().chunk(2, -1)
    n = torch.addcmul(x_n, r, h_n + inner).tanh()
    return (torch.lerp(n, h, z),)


def lstm_cell(x: Tensor, carried: Carried, matrix: Tensor, inner: Tensor) -> Carried:
    """One token of an LSTM, in the order i, f, g, o:

        i, f, o = sigmoid(x + R h_{t-1})    g = tanh(x_g + R_g h_{t-1})    c_t = f c_{t-1} + i g    h_t = o tanh(c_t)

    x [H, B, 4K]: the gates' inputs with their biases; carried: (h, c), [H, B, K] each; matrix [H, K, 4K]: R transposed;
    inner: not used, for all biases are in x. Returns (h_t, c_t).
    """
    h, c = carried
    i, f, g, o = torch.baddbmm(x, h, matrix).chunk(4, -1)
    c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
    return o.sigmoid() * c.tanh(), c


def cell_inputs(projected: Tensor, bias: Tensor, recurrence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a cell takes, of a layer's projection and parameters: x of all tokens [T, H, B, G K], matrix, inner.

    projected [T, B, H, G, K]; bias [H, BIASES, K]; recurrence [H, G, K, K]. All returned are at least float32.
    """
    gates = projected.shape[-2]
    outer, inner = at_least_float32(bias).split((gates, BIASES - gates), 1)
    x = (at_least_float32(projected) + outer).transpose(1, 2).flatten(3)
    matrix = at_least_float32(recurrence).flatten(1, 2).mT.contiguous()
    return x, matrix, inner.flatten(1).unsqueeze(1)


def run_cell(
    cell: Cell, x: Tensor, carried: Carried, matrix: Tensor, inner: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Carried]:
    """A cell over all tokens: x [T, H, B, G K] and what was carried before -> y [T, B, H, K], what is carried after.

    positions [B, T]: of each token in its own document, where nothing is remembered at 0; None: all is one document.
    """
    kept = None if positions is None else (positions.T != 0).to(x.dtype)[:, None, :, None]
    outputs = []
    for t, token in enumerate(x.unbind(0)):
        if kept is not None:
            carried = tuple(kept[t] * remembered for remembered in carried)
        carried = cell(token, carried, matrix, inner)
        outputs.append(carried[0])
    return torch.stack(outputs).transpose(1, 2), carried


def initial_recurrence(heads: int, gates: int, head_dim: int) -> Tensor:
    """The start [H, G, K, K], float32, of a cell's matrices.

    Orthogonal: a product of many of them neither grows nor shrinks.
    """
    drawn = [nn.init.orthogonal_(torch.empty(head_dim, head_dim)) for _ in range(heads * gates)]
    return torch.stack(drawn).unflatten(0, (heads, gates))


def initial_cell_bias(heads: int, head_dim: int) -> Tensor:
    """The start [H, BIASES, K], float32, of a cell's biases.

    The second gate is the one that keeps: it starts at 0.73 (Jozefowicz et al., 2015), so that what is remembered, and
    its gradient, outlives a few tokens.
    """
    start = torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None].expand(BIASES, head_dim)
    return start.repeat(heads, 1, 1)
