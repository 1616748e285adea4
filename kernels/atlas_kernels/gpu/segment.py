"""What scan and chain share: an autograd function over all matrices of a segment, as the torch code calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atlas_kernels import memories
from atlas_kernels.chunked import SegmentScan, Tokens
from atlas_kernels.rule import MemoryRule


def segment_scan_of(function: type[torch.autograd.Function], products: torch.dtype) -> SegmentScan:
    """The scan of one segment by `function`, with its products' operands rounded to `products`.

    function takes the rule, products, the tokens, what the gates alone give, and all weights, anchors and momenta. It
    gives y and what leaves. Sums and states stay float32.
    """

    def scan(
        rule: MemoryRule,
        of_gates: Any,
        tokens: Tokens,
        weights: memories.Matrices,
        momentum: memories.Matrices,
        anchor: memories.Matrices,
    ) -> tuple[Tensor, memories.Matrices, memories.Matrices]:
        matrices = (*weights, *anchor, *(momentum if rule.momentum else ()))
        y, *left = function.apply(rule, products, *vars(tokens).values(), *vars(of_gates).values(), *matrices)
        count = len(weights)
        return y, tuple(left[:count]), tuple(left[count:]) if rule.momentum else momentum

    return scan
