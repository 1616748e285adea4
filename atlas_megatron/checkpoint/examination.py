"""Whether one checkpoint is what was written, with the processes of a world sharing the reading."""

from __future__ import annotations

from pathlib import Path

import torch

from atlas_megatron.files import integrity
from atlas_megatron.parallel import world


def wrong_with(folder: Path) -> str:
    """What is wrong with a marked checkpoint's files; empty where every byte is what was written.

    Every process of the world, if there is one, calls it, and is told the same: each reads its share.
    """
    joined = torch.distributed.is_initialized()
    share, shares = (world.rank(), torch.distributed.get_world_size()) if joined else (0, 1)
    (bad,) = world.from_first([integrity.wrong_size(folder) if share == 0 else ""])
    return bad or next(filter(None, world.gathered(integrity.wrong_content(folder, share, shares))), "")
