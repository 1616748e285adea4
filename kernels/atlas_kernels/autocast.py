"""What keeps its precision: the inner loop, whose many small steps half precision would round away, both ways.

torch runs a backward under the autocast of whoever calls it. Where that call stands inside the `torch.autocast` block,
as in many training loops, products of a backward that is written by hand would come in two precisions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Given = ParamSpec("Given")
Gradients = TypeVar("Gradients")


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider: gates near 1 and small steps do not survive bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unrounded(x: Tensor) -> AbstractContextManager[object]:
    """Around what autocast shall not round. x: any tensor of the call, whose device says which autocast."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def unrounded_backward(backward: Callable[Given, Gradients]) -> Callable[Given, Gradients]:
    """The backward(ctx, *gradients) of an autograd function, in the precision of its gradients."""

    @functools.wraps(backward)
    def outside(*given: Any, **named: Any) -> Any:
        gradient = next((t for t in given if isinstance(t, Tensor)), None)
        if gradient is None:
            return backward(*given, **named)
        with unrounded(gradient):
            return backward(*given, **named)

    return outside
