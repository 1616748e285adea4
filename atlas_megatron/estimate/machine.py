"""The machine that a dry run is for: its devices, and what each can hold. No process is asked."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from atlas_megatron.config import Config

# Dense bfloat16 FLOP/s that the vendor states, by a part of the device's name.
PEAKS = {"A100": 312e12, "H100": 989.4e12, "H200": 989.4e12, "B200": 2250e12}
UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# By a part of a device's name: bytes, and the FLOP/s in float32 that the vendor states (those in bfloat16: PEAKS).
SIZES = {"A100": 80 * 2**30, "H100": 80 * 2**30, "H200": 139 * 2**30, "B200": 178 * 2**30}
FLOAT32 = {"A100": 19.5e12, "H100": 67e12, "H200": 67e12, "B200": 75e12}
# Bytes a second one way that the vendor states: of a device to others of its node (NVLink), and of one network adapter,
# of which the vendor's own nodes of eight have one a device.
LINKS = {"A100": (300e9, 25e9), "H100": (450e9, 50e9), "H200": (450e9, 50e9), "B200": (900e9, 50e9)}
# The part of them that messages get: a guess.
LINK_SHARE = 0.7
# Where nothing is said and no GPU is seen.
DEVICES_PER_NODE, DEVICE = 8, "H100"
MEMORY = SIZES[DEVICE]
# The part of a device's peak that a run gets: a guess, until it is measured (`mfu` in metrics.jsonl).
MFU = 0.3


@dataclass(frozen=True)
class Links:
    """Bytes a second that a device is taken to send."""

    inside: float  # to others of its node
    between: float  # to other nodes


@dataclass(frozen=True)
class Machine:
    """Devices in all (None: as many as the layout needs), bytes on each, which they are, and how well they are used."""

    devices: int | None
    memory: float
    device: str = DEVICE  # a key of SIZES; empty: a GPU of this machine whose rate is not known
    mfu: float = MFU
    said: bool = True  # whether anybody named the device, or it is this machine's
    price: float = 0.0  # of a device for an hour, in any currency; 0: not said

    @staticmethod
    def of(words: Sequence[str]) -> Machine:
        """From `world=N`, `memory=SIZE`, `device=NAME`, `mfu=SHARE` and `price=PRICE`; else this machine's or assumed.

        Raises ValueError for another word, and for what is no number of devices or bytes, no known device, no share or
        no price.
        """
        given = {"world": "", "memory": "", "device": "", "mfu": "", "price": ""}
        for word in words:
            name, equals, value = word.partition("=")
            if name not in given or not equals:
                raise ValueError(
                    f"{word!r} is neither an override nor a word of a dry run; write section.key=value, world=1024, "
                    "memory=80GiB, device=H100, mfu=0.4 or price=2.5"
                )
            given[name] = value
            if name == "world" and not (value.isdecimal() and 0 < int(value) < 10**9):
                raise ValueError(f"{word!r} is no number of devices; write for example world=1024")
        device, memory = _device(given["device"])
        if given["memory"]:
            memory = _bytes(given["memory"])
        said = bool(given["device"]) or torch.cuda.is_available()
        world = int(given["world"]) if given["world"] else None
        return Machine(world, memory, device, _share(given["mfu"]), said, _price(given["price"]))

    def flops(self, *, bf16: bool) -> float | None:
        """What a device is taken to reach, in FLOP/s; None where its peak is not known."""
        peak = (PEAKS if bf16 else FLOAT32).get(self.device)
        return peak * self.mfu if peak else None

    def links(self) -> Links:
        """What messages are taken to get; of a device that is not known, the assumed one's."""
        inside, between = LINKS[self.device or DEVICE]
        return Links(inside * LINK_SHARE, between * LINK_SHARE)

    def world_size(self, config: Config) -> int:
        """Devices of a run: as said, else what torchrun says, and no fewer than the layout's axes."""
        parallel = config.parallel
        least = parallel.tensor * parallel.pipeline * parallel.context
        return self.devices or max(int(os.environ.get("WORLD_SIZE", "1")), least)


def peak_flops() -> float | None:
    """The device's stated bfloat16 peak; None where it is not known (a CPU, another GPU): no MFU then."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def is_machine_word(word: str) -> bool:
    """Whether a word of the command line has no section, so that it is none of the config's."""
    return "." not in word.partition("=")[0]


def in_nodes(config: Config) -> Config:
    """With the devices of a node filled in where neither the config nor the launcher says them."""
    if config.parallel.devices_per_node or os.environ.get("LOCAL_WORLD_SIZE"):
        return config
    return replace(config, parallel=replace(config.parallel, devices_per_node=DEVICES_PER_NODE))


def _device(name: str) -> tuple[str, float]:
    """A device that was named, this machine's, or the assumed one; and its bytes."""
    if name:
        if name not in SIZES:
            raise ValueError(f"'device={name}' is unknown; choose one of {', '.join(SIZES)}, or say memory=80GiB alone")
        return name, float(SIZES[name])
    if not torch.cuda.is_available():
        return DEVICE, float(MEMORY)
    here = torch.cuda.get_device_properties(0)
    return next((part for part in SIZES if part in here.name), ""), float(here.total_memory)


def _share(text: str) -> float:
    try:
        share = float(text or MFU)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"'mfu={text}' is no share of a device's peak; write a number above 0 and up to 1: mfu=0.4")
    return share


def _price(text: str) -> float:
    try:
        price = float(text or 0)
    except ValueError:
        price = -1.0
    if not 0 <= price < math.inf:
        raise ValueError(f"'price={text}' is no price of a device for an hour; write a number: price=2.5")
    return price


def _bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]+)", text)
    size = float(found[1]) * UNITS.get(found[2], 0) if found else 0.0
    if not 0 < size < math.inf:
        raise ValueError(f"'memory={text}' is no size; write a number and one of {', '.join(UNITS)}: memory=80GiB")
    return size
