"""The Hugging Face side: a model of plain modules that travels with its weights, and the conversion to and from it.

The files named `*_atlas.py` travel: an exported folder holds them beside the files of atlas_kernels, all flat. They
import each other relatively, and neither Megatron nor this package.
"""

import importlib.util

for package in ("transformers", "safetensors"):
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is not installed; install it with: pip install -e '.[hf]' -c constraints.txt")

# Before the others: it refuses a transformers that is too old.
from atlas_megatron.hf import configuration_atlas as configuration_atlas  # noqa: E402
