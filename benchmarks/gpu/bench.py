"""What a section measures with: a GPU and its clock, or the fake GPU, which counts in place of timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from atlas_megatron.config import MemoryConfig
from atlas_megatron.config.presets import PRESETS
from benchmarks.contenders import contender
from benchmarks.fake_gpu import DEVICE as FAKE
from benchmarks.fake_gpu import fake_gpu
from benchmarks.gpu.lines import Lines

Call = Callable[[], object]
# On the fake GPU sequences are cut to this: the host does the same for each chunk.
FEW_TOKENS = 256
SIDE = 8192  # of the product that is the yardstick
_BASE = MemoryConfig(heads=16, head_dim=64)
# name: the memory, batch, tokens of the op that is timed.
MEMBERS: dict[str, tuple[MemoryConfig, int, int]] = {
    "omeganet": (replace(_BASE, **PRESETS["omeganet"]), 8, 4096),
    "titans": (replace(_BASE, **PRESETS["titans"]), 8, 4096),
    "exact": (replace(_BASE, heads=12, **(PRESETS["atlas"] | {"ns_period": 1, "expansion": 1})), 8, 1024),
    "once": (replace(_BASE, **(PRESETS["atlas"] | {"ns_period": _BASE.chunk})), 8, 4096),
}
NAMES = {
    "omeganet": "omeganet", "titans": "titans", "exact": "exact atlas, F = V, T=1024", "once": "atlas, a write a chunk",
}  # fmt: skip


@dataclass
class Compilations:
    """What Triton compiled, and what it found in its cache."""

    hits: int = 0
    misses: int = 0
    seconds: float = 0.0

    def __call__(self, *, cache_hit: bool, times: Any, **_: object) -> None:
        self.hits += cache_hit
        self.misses += not cache_hit
        self.seconds += times.total / 1e6


@dataclass
class Bench:
    """dry: on the fake GPU, where nothing is timed. until: when the process is to be done, by time.monotonic()."""

    lines: Lines
    dry: bool
    until: float
    section: str = ""
    compilations: Compilations = field(default_factory=Compilations)

    @property
    def device(self) -> str:
        return FAKE if self.dry else "cuda"

    @property
    def seconds_left(self) -> float:
        return self.until - time.monotonic()

    def tokens(self, wanted: int) -> int:
        return min(wanted, FEW_TOKENS) if self.dry else wanted

    def figure(self, *at: str, value: object) -> None:
        """Keep what holds on the fake GPU too: a count, a version, a sentence."""
        self.lines.figure((self.section, *at), value)
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{self.section} / {' / '.join(at)}: {shown[:200]}", flush=True)

    def measured(self, *at: str, value: object) -> None:
        """Keep what a GPU's clock gave, or what was made of it; a dry run has no such thing."""
        if not self.dry:
            self.figure(*at, value=value)

    def op(self, name: str, impl: str = "triton") -> Call:
        return member_op(name, impl, self.device, self.tokens(MEMBERS[name][2]))

    def times(self, *at: str, contenders: dict[str, Call], rounds: int = 5) -> dict[str, float]:
        """Median seconds of each, in turn, kept under `at` and "seconds". What fails is named and left out.

        On the fake GPU counts are kept, and every "second" that is given back is 1.
        """
        runs = {}
        for name, run in contenders.items():
            try:
                if self.dry:
                    self._count(*at, name, run=run)
                else:
                    for _ in range(2):
                        run()
                    torch.cuda.synchronize()
                runs[name] = run
            except Exception as error:  # what one contender lacks is no reason to lose the others
                if self.dry or is_lasting(error):
                    raise
                self.figure(*at, "not run", name, value=f"{type(error).__name__}: {error}".splitlines()[0])
        if self.dry:
            return dict.fromkeys(runs, 1.0)
        seconds = medians(runs, rounds)
        for name, figure in seconds.items():
            self.measured(*at, "seconds", name, value=figure)
        return seconds

    def _count(self, *at: str, run: Call) -> None:
        with fake_gpu() as counts:
            run()
        launched = {"kernels": counts.launches, "torch": counts.torch_launches, "torch_bytes": counts.bytes}
        self.figure(*at[:-1], "launches", at[-1], value=launched)

    def graphs(self, *at: str, contenders: dict[str, Call]) -> dict[str, Call]:
        """Those that can be captured, as "name, CUDA graph"; of the others what was in the way is kept."""
        found = {}
        for name, run in contenders.items():
            try:
                found[f"{name}, CUDA graph"] = run if self.dry else graphed(run)
            except RuntimeError as error:
                if is_lasting(error):
                    raise
                self.figure(*at, "not run", f"{name}, CUDA graph", value=str(error).splitlines()[0])
        return found

    def compiled(self, run: Callable[..., Any]) -> Callable[..., Any]:
        return run if self.dry else torch.compile(run, dynamic=False)

    def product(self) -> Call:
        """The yardstick: one large bfloat16 product."""
        a = torch.randn(SIDE, SIDE, device=self.device, dtype=torch.bfloat16)
        return lambda: a @ a

    @contextmanager
    def counting_compilations(self, part: str) -> Iterator[None]:
        """Says how many kernels of the part's were compiled, and how many were in the cache."""
        import triton

        before = replace(self.compilations)
        triton.knobs.compilation.listener = self.compilations
        try:
            yield
        finally:
            triton.knobs.compilation.listener = None
            now = self.compilations
            if now != before:
                hits, misses = now.hits - before.hits, now.misses - before.misses
                found = {"from the cache": hits, "compiled": misses, "seconds": now.seconds - before.seconds}
                self.measured("compilations", part, value=found)


def member_op(name: str, impl: str, device: str, tokens: int) -> Call:
    """Forward and backward of a member's op."""
    memory, batch, _ = MEMBERS[name]
    return contender(memory, batch=batch, tokens=tokens, products=torch.bfloat16, device=device, impl=impl)


def is_lasting(error: BaseException) -> bool:
    """Whether nothing more can be done on the GPU in this process."""
    return any(word in str(error) for word in ("CUDA error", "illegal memory", "unspecified launch failure"))


def medians(runs: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of each on the GPU, in turn, so that a change of its clock meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in seconds.items()}


def graphed(run: Call) -> Call:
    """`run` captured in a CUDA graph: what its kernels take when none waits for its launch. It must read no value."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def relative_rms(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm().clamp(min=1e-30))
