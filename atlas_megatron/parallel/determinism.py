"""Two runs of one configuration and layout that end bit-equal: what has to be switched, and what has to be refused.

On a CPU a run is so in any case; there the switch makes torch refuse what would not be.
"""

from __future__ import annotations

import os

import torch

from atlas_megatron.config import Config, uses

CUBLAS = (":4096:8", ":16:8")
# As Megatron-LM has them: sums whose order does not depend on what arrives first.
NCCL = ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS")


def switch(config: Config) -> None:
    """Turn torch's deterministic algorithms on or off, as train.deterministic says.

    Raises ValueError where the environment or the configuration asks for what cannot be deterministic.
    """
    wanted = config.train.deterministic
    if wanted and torch.cuda.is_available():
        _check_gpu(config)
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted


def _check_gpu(config: Config) -> None:
    asked = [("CUBLAS_WORKSPACE_CONFIG", CUBLAS), ("NCCL_ALGO", NCCL)]
    if config.model.transformer_engine:
        asked.append(("NVTE_ALLOW_NONDETERMINISTIC_ALGO", ("0",)))
    for name, values in asked:
        if os.environ.get(name) not in values:
            raise ValueError(
                f"train.deterministic=true but {name} is {os.environ.get(name, 'not set')}; set it to one of "
                f"{', '.join(values)} in the environment, or train.deterministic=false"
            )
    if uses(config.model.pattern, "delta") and config.delta.impl != "chunked":
        raise ValueError(
            f"train.deterministic=true but delta.impl={config.delta.impl!r}, whose kernels choose their plan by what "
            "they measure; set delta.impl='chunked', or train.deterministic=false"
        )
