"""The recurrent cells against torch's GRUCell and LSTMCell, in float64, with every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from atlas_kernels.cells import (
    BIASES,
    Carried,
    Cell,
    cell_inputs,
    gru_cell,
    initial_cell_bias,
    initial_recurrence,
    lstm_cell,
    run_cell,
)

BATCH, HEADS, WIDTH, TOKENS = 2, 3, 5, 11
CELLS: dict[str, tuple[Cell, type, int, int]] = {
    "GRU": (gru_cell, nn.GRUCell, 3, 1),
    "LSTM": (lstm_cell, nn.LSTMCell, 4, 2),
}


def leaf(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def by_torch(kind: type, projected: Tensor, carried: Carried, bias: Tensor, recurrence: Tensor) -> list[Carried]:
    """The state after each token [T, B, H, G, K], head by head, by the functional form of torch's cell."""
    gates, one = projected.shape[-2], torch.eye(projected.shape[-2] * WIDTH, dtype=torch.float64)
    heads = []
    for head in range(HEADS):
        own, inside = bias[head].split((gates, BIASES - gates))
        # What torch adds behind the product; of a GRU's inner gate it lies inside the reset.
        hidden_bias = torch.cat([bias.new_zeros((2 * gates - BIASES) * WIDTH), inside.flatten()])
        parameters = {
            "weight_ih": one,
            "weight_hh": recurrence[head].flatten(0, 1),
            "bias_ih": own.flatten(),
            "bias_hh": hidden_bias if gates == 3 else torch.zeros_like(own.flatten()),
        }
        cell = kind(gates * WIDTH, WIDTH).double()
        state, states = tuple(part[head] for part in carried), []
        for token in projected[:, :, head].flatten(2).unbind(0):
            given = state[0] if len(state) == 1 else state
            after = torch.func.functional_call(cell, parameters, (token, given))
            state = (after,) if isinstance(after, Tensor) else after
            states.append(state)
        heads.append(states)
    return [tuple(torch.stack(parts) for parts in zip(*at, strict=True)) for at in zip(*heads, strict=True)]


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_is_torchs(name: str) -> None:
    cell, kind, gates, carries = CELLS[name]
    projected, bias = leaf(TOKENS, BATCH, HEADS, gates, WIDTH, seed=1), leaf(HEADS, BIASES, WIDTH, seed=2)
    recurrence = leaf(HEADS, gates, WIDTH, WIDTH, seed=3)
    start = tuple(leaf(HEADS, BATCH, WIDTH, seed=4 + n) for n in range(carries))
    states = by_torch(kind, projected, start, bias, recurrence)

    x, matrix, inner = cell_inputs(projected, bias, recurrence)
    one = cell(x[0], start, matrix, inner)
    y, after = run_cell(cell, x, start, matrix, inner)
    assert len(one) == len(after) == carries
    for found, expected in zip((*one, *after), (*states[0], *states[-1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected = torch.stack([state[0] for state in states]).transpose(1, 2)  # [T, B, H, K]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    weight = leaf(*y.shape, seed=9).detach()
    leaves = (projected, bias, recurrence, *start)
    ends = ((y, after[-1]), (expected, states[-1][-1]))
    gradients = (torch.autograd.grad((out * weight).sum() + last.square().sum(), leaves) for out, last in ends)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CELLS)
def test_documents_and_cuts(name: str) -> None:
    """Where a document begins nothing is remembered; over a cut all is."""
    cell, _, gates, carries = CELLS[name]
    projected = leaf(TOKENS, BATCH, HEADS, gates, WIDTH, seed=1).detach()
    parameters = leaf(HEADS, BIASES, WIDTH, seed=2).detach(), leaf(HEADS, gates, WIDTH, WIDTH, seed=3).detach()
    x, matrix, inner = cell_inputs(projected, *parameters)
    empty = (x.new_zeros(HEADS, BATCH, WIDTH),) * carries
    first, kept = run_cell(cell, x[:4], empty, matrix, inner)
    second, _ = run_cell(cell, x[4:], kept, matrix, inner)
    whole, _ = run_cell(cell, x, empty, matrix, inner)
    assert torch.equal(torch.cat([first, second]), whole)

    anew, _ = run_cell(cell, x[4:], empty, matrix, inner)
    # The first row begins anew at the fifth token, the second one goes on.
    positions = torch.stack([torch.arange(TOKENS), torch.arange(TOKENS)])
    positions[0, 4:] -= 4
    packed, _ = run_cell(cell, x, empty, matrix, inner, positions)
    torch.testing.assert_close(packed[4:, 0], anew[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed[:, 1], whole[:, 1], rtol=1e-12, atol=1e-12)


def test_bfloat16_is_widened() -> None:
    inputs = (leaf(TOKENS, BATCH, HEADS, 3, WIDTH, seed=1), leaf(HEADS, BIASES, WIDTH, seed=2))
    given = (t.bfloat16() for t in (*inputs, leaf(HEADS, 3, WIDTH, WIDTH, seed=3)))
    assert {t.dtype for t in cell_inputs(*given)} == {torch.float32}


def test_starts() -> None:
    matrices = initial_recurrence(HEADS, 3, WIDTH)
    assert matrices.shape == (HEADS, 3, WIDTH, WIDTH)
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(WIDTH).expand(HEADS, 3, -1, -1), rtol=0, atol=1e-5)
    bias = initial_cell_bias(HEADS, WIDTH)
    assert bias.shape == (HEADS, BIASES, WIDTH)
    assert torch.equal(bias[:, 1], torch.ones(HEADS, WIDTH)) and bias.sum() == HEADS * WIDTH
