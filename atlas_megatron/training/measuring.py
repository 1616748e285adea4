"""What memories measure of themselves as a run trains, over all processes, and a warning where one has collapsed."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from megatron.core.transformer import MegatronModule

from atlas_megatron.config import Config, uses
from atlas_megatron.mixers.base import Mixer
from atlas_megatron.parallel import world
from atlas_megatron.resilience import non_finite
from atlas_megatron.training.metrics import LOW_MEMORY_SHARE


class LayerMeasurements:
    """The measurements of a run's memories, on step 1 and every `train.stats_every`-th; all processes make all calls.

    chunks: this process's stages. say: takes a line for the log.
    """

    def __init__(self, config: Config, chunks: list[MegatronModule], say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self._mixers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, Mixer)]
        self._has_memory = uses(config.model.pattern, "memory")
        self._warned: set[str] = set()

    def are_due(self, step: int) -> bool:
        return self._has_memory and (step == 1 or step % self._config.train.stats_every == 0)

    def gathered(self) -> dict[str, dict[str, Any]]:
        """What every memory layer measured last, by layer number, over the processes that hold a part of it."""
        own: dict[int, dict[str, Any]] = {}
        for mixer in self._mixers:
            found = {name: value.tolist() for name, value in mixer.measurements.items()}
            own.setdefault(mixer.layer_number, {}).update(found)
        everywhere = world.gathered(own)
        merged = {}
        for number in sorted({number for part in everywhere for number in part}):
            parts = [part[number] for part in everywhere if number in part]
            merged[str(number)] = {name: _over_processes([part[name] for part in parts]) for name in parts[0]}
        return merged

    def warn(self, step: int, layers: dict[str, dict[str, Any]]) -> None:
        """Say, once a layer, that its memory has collapsed: the loss alone does not show it."""
        for number, layer in layers.items():
            share = layer.get("memory_share", 1.0)
            if share < LOW_MEMORY_SHARE and number not in self._warned:
                self._warned.add(number)
                where = non_finite.describe(int(number), self._config)
                self._say(
                    f"warning: step {step}: the memory carries {share:.1%} of what varies in the output of {where}, "
                    f"less than {LOW_MEMORY_SHARE:.0%}: the layer runs on its attention alone"
                )


def _over_processes(parts: list[Any]) -> Any:
    """One measurement of several processes: counts are summed, all else is averaged."""
    if not isinstance(parts[0], list):
        return fmean(parts)
    return [sum(each) if isinstance(each[0], int) else fmean(each) for each in zip(*parts, strict=True)]
