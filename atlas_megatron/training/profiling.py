"""What the steps of `train.profile` spend their time on: a trace for a viewer, and a table of operators.

The processes of the first data-parallel replica write one each, RUN/profile/steps_START-LAST_rank_N.json and .txt: they
are the ones that do unlike things. A profiled step takes longer than others, and its record says `profiled`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state
from torch.profiler import ProfilerActivity, profile

from atlas_megatron.config import Config
from atlas_megatron.config.watching_checks import profiled_steps
from atlas_megatron.files.scratch import file_beside, write_whole
from atlas_megatron.parallel import world

FOLDER = "profile"
ROWS = 20  # operators of the table


class Profile:
    """Of a run: `begin` stands before each step, `written` behind it, `close` at the end."""

    def __init__(self, config: Config) -> None:
        self._folder = Path(config.run.directory, FOLDER)
        self.steps = profiled_steps(config)
        self._own = bool(self.steps) and parallel_state.get_data_parallel_rank() == 0
        self._profiler: profile | None = None
        self._recorded: list[int] = []

    def begin(self, step: int) -> None:
        """Record from here on, where the step is one of the profile's."""
        if not (self._own and step in self.steps):
            return
        if self._profiler is None:
            on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler, self._recorded = profile(activities=[ProfilerActivity.CPU, *on_gpu]), []
            self._profiler.start()
        self._recorded.append(step)

    def written(self, step: int, *, ends: bool) -> str:
        """Write what was recorded up to this step, where it is the last one or the run ends here; a line of where.

        Empty where there is nothing to write.
        """
        if self._profiler is None or not (ends or step + 1 not in self.steps):
            return ""
        profiler = self._profiler
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps_{self._recorded[0]}-{step}_rank_{world.rank()}.json"
        with file_beside(path) as scratch:
            profiler.export_chrome_trace(str(scratch))
        write_whole(path.with_suffix(".txt"), "\n".join(table(profiler, len(self._recorded))) + "\n")
        return f"steps {self._recorded[0]} to {step} are profiled: {path}, their operators in {path.stem}.txt"

    def close(self) -> None:
        """Record no more."""
        if self._profiler is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._profiler.stop()
            self._profiler = None


def table(profiler: profile, steps: int) -> list[str]:
    """The operators with the most time of their own, of the GPU where there is one, else of the CPU."""
    on_gpu = torch.cuda.is_available()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = sorted(profiler.key_averages(), key=lambda event: getattr(event, name), reverse=True)
    whole = sum(getattr(event, name) for event in found)
    lines = [f"{'ms a step':>12}  {'share':>6}  {'calls':>8}  operator ({'GPU' if on_gpu else 'CPU'} time of its own)"]
    for event in found[:ROWS]:
        own = getattr(event, name)
        share = own / whole if whole else 0.0
        lines.append(f"{own / 1000 / steps:>12.3f}  {share:>6.1%}  {event.count:>8,}  {event.key[:80]}")
    rest = sum(getattr(event, name) for event in found[ROWS:])
    lines.append(f"{rest / 1000 / steps:>12.3f}  {rest / whole if whole else 0.0:>6.1%}  {'':>8}  all others")
    lines.append(f"{whole / 1000 / steps:>12.3f}  {1:>6.0%}  {'':>8}  in all, of {steps} steps")
    return lines
