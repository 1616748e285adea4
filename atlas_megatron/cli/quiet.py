"""What libraries say at every start, kept off the screen."""

from __future__ import annotations

import logging
import os
import warnings


def quieten() -> None:
    """Leave the screen to the run's own lines, each once; call it before Megatron is imported.

    Core warns of absent accelerators, and of itself, at every start. Other processes than the first would repeat it.
    """
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)  # it raises what it logs
    silent = r"megatron\.|torch\.distributed\.|torch\.utils\.data"
    for kind in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=kind, module=silent)
    # Core asks views of its gradient buffers for a gradient of their own; there is none, as it expects.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
