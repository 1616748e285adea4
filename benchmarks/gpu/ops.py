"""The memory op: where its time goes, how long it takes, and its edges."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from functools import partial

import torch

from atlas_megatron.config.memory_flops import memory_flops
from benchmarks.contenders import edges_of
from benchmarks.gpu.bench import MEMBERS, NAMES, SIDE, Bench, Call, member_op

KERNELS_SHOWN = 40  # of a profile, those that take most
NCU_SECONDS = 25
ON_A_GPU = torch.autograd.DeviceType.CUDA


def profile(bench: Bench, name: str) -> None:
    """Of one forward and backward every kernel's calls and microseconds, and the host's seconds."""
    run = bench.op(name)
    if bench.dry:
        bench.times(name, contenders={"forward and backward": run})
        return
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    launched = time.perf_counter() - start
    torch.cuda.synchronize()
    bench.measured(name, "seconds", "host, until all is launched", value=launched)
    bench.measured(name, "seconds", "until all is done", value=time.perf_counter() - start)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.device_type == ON_A_GPU]
    events.sort(key=lambda event: -event.self_device_time_total)
    bench.measured(name, "kernels", "calls", value=sum(event.count for event in events))
    bench.measured(name, "kernels", "microseconds", value=sum(event.self_device_time_total for event in events))
    for event in events[:KERNELS_SHOWN]:
        figures = {"calls": event.count, "microseconds": event.self_device_time_total}
        bench.measured(name, "by kernel", event.key[:80], value=figures)


def op(bench: Bench, name: str) -> None:
    """The op eager and as a CUDA graph, beside the large product; its floor is its FLOPs at that product's rate."""
    memory, batch, tokens = MEMBERS[name]
    own = f"{NAMES[name]}: triton"
    contenders: dict[str, Call] = {own: bench.op(name)}
    contenders |= bench.graphs(contenders=contenders)
    seconds = bench.times(contenders=contenders | {"matmul": bench.product()})
    floor = 3 * batch * memory_flops(memory, tokens) * seconds["matmul"] / (2 * SIDE**3)
    bench.measured("times_floor", NAMES[name], value=seconds[own] / floor)
    if not bench.dry:
        bench.measured("peak_bytes", NAMES[name], value=torch.cuda.max_memory_allocated())


def in_torch(bench: Bench) -> None:
    """OmegaNet's op without kernels, the chunk form."""
    contenders = {f"{NAMES['omeganet']}: chunked": bench.op("omeganet", "chunked")}
    bench.times(contenders=contenders | bench.graphs(contenders=contenders), rounds=3)


def edges(bench: Bench) -> None:
    """Kernels, torch, torch compiled; the rate of copying a tensor is the floor."""
    memory, batch, tokens = MEMBERS["omeganet"]
    copied = torch.empty(2**28, device=bench.device, dtype=torch.bfloat16)
    shape = (batch, bench.tokens(tokens), memory.heads, memory.head_dim)
    for name, (call, moved) in edges_of(shape, bench.device).items():
        contenders: dict[str, Call] = {"kernel": partial(call, "triton"), "torch": partial(call, "torch")}
        contenders["torch.compile"] = partial(bench.compiled(call), "torch")
        seconds = bench.times(name, contenders=contenders | {"copy": copied.clone})
        rate = 2 * copied.nbytes / seconds["copy"]
        bench.measured(name, "share_of_copy_rate", value=moved / rate / seconds["kernel"])


def ncu(bench: Bench, kernel: str) -> None:
    """What NVIDIA's profiler says of one launch of a scan kernel."""
    program = shutil.which("ncu")
    code = "from benchmarks.gpu.ops import once; once('omeganet')"
    command = [program or "ncu", "-k", kernel, "-c", "1", "--set", "full", sys.executable, "-c", code]
    if bench.dry or program is None:
        bench.figure(kernel, value="ncu is not installed" if program is None else "not run on the fake GPU")
        return
    limit = max(1.0, min(NCU_SECONDS, bench.seconds_left - 2))
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    said = [line.strip() for line in done.stdout.splitlines() if line.startswith("    ")]
    bench.figure(kernel, value=said or (done.stderr or done.stdout).strip().splitlines()[-1:])


def once(name: str) -> None:
    """One forward and backward of a member's op, for a profiler that watches the process."""
    member_op(name, "triton", "cuda", MEMBERS[name][2])()
    torch.cuda.synchronize()
