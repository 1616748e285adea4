"""The machine that a dry run is for: its devices, and what each can hold. No process is asked."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from atlas_megatron.config import Config

UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Where nothing is said and no GPU is seen: a node, and an A100 or H100.
DEVICES_PER_NODE, MEMORY = 8, 80 * 2**30


@dataclass(frozen=True)
class Machine:
    """Devices in all (None: as many as the layout needs), and bytes on each."""

    devices: int | None
    memory: float

    @staticmethod
    def of(words: Sequence[str]) -> Machine:
        """From `world=N` and `memory=SIZE`; without the second, this machine's GPU or 80 GiB.

        Raises ValueError for another word, and for what is no number of devices or bytes.
        """
        given = {"world": "", "memory": ""}
        for word in words:
            name, equals, value = word.partition("=")
            if name not in given or not equals:
                raise ValueError(
                    f"{word!r} is neither an override nor a word of a dry run; write section.key=value, world=1024 "
                    "or memory=80GiB"
                )
            given[name] = value
            if name == "world" and not (value.isdecimal() and int(value) > 0):
                raise ValueError(f"{word!r} is no number of devices; write for example world=1024")
        memory = float(MEMORY)
        if given["memory"]:
            memory = _bytes(given["memory"])
        elif torch.cuda.is_available():
            memory = float(torch.cuda.get_device_properties(0).total_memory)
        return Machine(int(given["world"]) if given["world"] else None, memory)

    def world_size(self, config: Config) -> int:
        """Devices of a run: as said, else what torchrun says, and no fewer than the layout's axes."""
        parallel = config.parallel
        least = parallel.tensor * parallel.pipeline * parallel.context
        return self.devices or max(int(os.environ.get("WORLD_SIZE", "1")), least)


def is_machine_word(word: str) -> bool:
    """Whether a word of the command line has no section, so that it is none of the config's."""
    return "." not in word.partition("=")[0]


def in_nodes(config: Config) -> Config:
    """With the devices of a node filled in where neither the config nor the launcher says them."""
    if config.parallel.devices_per_node or os.environ.get("LOCAL_WORLD_SIZE"):
        return config
    return replace(config, parallel=replace(config.parallel, devices_per_node=DEVICES_PER_NODE))


def _bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]+)", text)
    size = float(found[1]) * UNITS.get(found[2], 0) if found else 0.0
    if size <= 0:
        raise ValueError(f"'memory={text}' is no size; write a number and one of {', '.join(UNITS)}: memory=80GiB")
    return size
