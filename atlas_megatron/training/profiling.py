"""What the steps of `train.profile` spend their time on: a trace for a viewer, and a table of operators.

The processes of the first data-parallel replica write one each, RUN/profile/steps_START-LAST_rank_N.json and .txt: they
are the ones that do unlike things. A profiled step takes longer than others, and its record says `profiled`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from atlas_megatron.config import Config
from atlas_megatron.config.watching_checks import profiled_steps
from atlas_megatron.files.scratch import file_beside, write_whole
from atlas_megatron.parallel import world

FOLDER = "profile"
ROWS = 20  # operators of the table


class Profile:
    """Of a run: `begin` stands before each step, `is_complete` behind it, `close` at the end."""

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

    def is_complete(self, step: int, *, ends: bool) -> bool:
        """Whether this process has something to write after this step: its last one, or the run ends here."""
        return self._profiler is not None and (ends or step + 1 not in self.steps)

    def write(self) -> str:
        """Write what was recorded, and record no more; a line of where it is."""
        assert self._profiler is not None
        profiler = self._profiler
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        first, last = self._recorded[0], self._recorded[-1]
        path = self._folder / f"steps_{first}-{last}_rank_{world.rank()}.json"
        with file_beside(path) as scratch:
            profiler.export_chrome_trace(str(scratch))
        write_whole(path.with_suffix(".txt"), "\n".join(table(profiler, len(self._recorded))) + "\n")
        return f"steps {first} to {last} are profiled: {path}, their operators in {path.stem}.txt"

    def close(self) -> None:
        """Record no more."""
        if self._profiler is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._profiler.stop()
            self._profiler = None


def table(profiler: profile, steps: int) -> list[str]:
    """Where most time goes: the GPU's kernels where there is one, else the CPU's operators, without what they call."""
    on_gpu = torch.cuda.is_available()
    # An operator's GPU time is that of the kernels it starts, which are events of their own; so are named stretches.
    counted = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
        for event in profiler.key_averages()
        if not on_gpu or (event.device_type == DeviceType.CUDA and not event.is_user_annotation)
    ]
    counted.sort(key=lambda pair: pair[0], reverse=True)
    whole = sum(own for own, _ in counted)

    def line(microseconds: float, calls: str, name: str) -> str:
        share = microseconds / whole if whole else 0.0
        return f"{microseconds / 1000 / steps:>12.3f}  {share:>6.1%}  {calls:>8}  {name}"

    lines = [f"{'ms a step':>12}  {'share':>6}  {'calls':>8}  {'kernel' if on_gpu else 'operator'}"]
    lines += [line(own, f"{event.count:,}", event.key[:80]) for own, event in counted[:ROWS]]
    lines.append(line(sum(own for own, _ in counted[ROWS:]), "", "all others"))
    lines.append(line(whole, "", f"in all, of {steps} steps"))
    return lines
