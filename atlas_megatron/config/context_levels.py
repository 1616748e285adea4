"""How a context-parallel group is divided: ranks that exchange heads, and ranks that hand a memory's state on."""

from __future__ import annotations

import math
import os

from atlas_megatron.config.layers import LAYERS, heads_of
from atlas_megatron.config.sections import Config, layers_of


def context_levels(config: Config) -> tuple[int, int]:
    """(ranks that exchange heads, ranks that hand on): what `parallel.context_mode` means for this model.

    Raises ValueError where its heads do not divide so.
    """
    parallel = config.parallel
    context, mode = parallel.context, parallel.context_mode
    known = [symbol for symbol in layers_of(config) if symbol in LAYERS]
    dealt = [heads_of(config, symbol) for symbol in known if LAYERS[symbol].exchanges_heads]
    heads = math.gcd(*dealt) // parallel.tensor if dealt else 1
    node = parallel.devices_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    # Ranks of a context-parallel group lie `tensor` apart.
    near = max(1, node // parallel.tensor) if node else context
    shares = [d for d in range(1, context + 1) if heads % d == context % d == 0]
    fitting = {
        "auto": [d for d in shares if d <= near],
        "heads": [d for d in shares if d == context],
        "handoff": [1],
        "heads+handoff": [d for d in shares if 1 < d < context and d <= near],
    }[mode]
    if not fitting:
        raise ValueError(
            f"parallel.context_mode={mode!r} cannot exchange {heads} heads of a tensor-parallel rank among "
            f"parallel.context={context} ranks, {near} of them in a node; ranks that could: "
            f"{', '.join(map(str, shares))}: take context_mode='auto', or another parallel.context"
        )
    return fitting[-1], context // fitting[-1]
