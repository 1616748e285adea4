"""How far the outer gradient goes back through a memory: it ends every `train.gradient_reach` tokens of a sequence.

Beyond the length that a model was trained at, the product of a memory's Jacobians, one a chunk, may be of any size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, autograd

from atlas_kernels import State


class _Ends(autograd.Function):
    """x, and zeros for its gradient: a rank to the left waits for one, where `detach` would send it none."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient.new_zeros(gradient.shape)


def ended(state: State) -> State:
    """The same state, which no gradient goes back through."""
    return state.map(_Ends.apply)


def stretches(tokens: int, first: int, reach: int) -> Iterator[tuple[slice, bool]]:
    """Of the tokens from `first` of a sequence on: parts, and whether the gradient ends before each. reach 0: one."""
    start = 0
    while start < tokens:
        place = first + start
        stop = min(tokens, start + reach - place % reach) if reach else tokens
        yield slice(start, stop), bool(reach) and place > 0 and place % reach == 0
        start = stop
