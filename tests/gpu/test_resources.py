"""Every kernel compiled for sm_80, sm_90 and sm_100, held to its registers, spills and shared memory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlas_kernels import chunked
from atlas_kernels.gpu import newton_schulz
from atlas_megatron.config import MemoryConfig
from atlas_megatron.config.presets import PRESETS
from benchmarks import kernel_resources
from benchmarks.fake_gpu import DEVICE, fake_gpu
from benchmarks.presets import contender
from benchmarks.tensor_core_work import executed_over_useful, programs_per_sm

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {
    "registers": 64,
    "spilled": 0,
    "shared": 1024,
    "tensor_columns": 0,
    "programs_per_sm": 3,
    "executed_over_useful": 1.0,
    "instructions": ["wgmma"],
    "strays": 0,
}


@pytest.mark.slow
def test_no_kernel_takes_more_than_its_table():
    # Interpreted kernels cannot be compiled: conftest.py asks for the interpreter, a fresh process does not.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--check"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr


def test_what_grew_is_named():
    figures, kept = FIGURES, {"kernel, sm_90": FIGURES}
    assert kernel_resources.faults(kept, kept) == ([], [])
    bad, _ = kernel_resources.faults({"kernel, sm_90": figures | {"registers": 65}}, kept)
    assert bad == ["kernel, sm_90: registers grew from 64 to 65"]
    bad, _ = kernel_resources.faults({"kernel, sm_90": figures | {"instructions": []}}, kept)
    assert bad == ["kernel, sm_90: no tensor-core instructions, it had wgmma"]
    bad, _ = kernel_resources.faults({"kernel, sm_90": figures | {"programs_per_sm": 2}}, kept)
    assert bad == ["kernel, sm_90: programs a multiprocessor fell from 3 to 2"]
    bad, good = kernel_resources.faults({"kernel, sm_90": figures | {"shared": 512}}, kept)
    assert not bad and good == ["kernel, sm_90: shared shrank from 1024 to 512"]


def test_a_stray_operand_is_named():
    figures = FIGURES | {"strays": 2}
    bad, _ = kernel_resources.faults({"kernel, sm_90": figures}, {"kernel, sm_90": FIGURES})
    assert bad == ["kernel, sm_90: 2 wgmma take an operand from the wrong place in shared memory"]


def test_what_cannot_be_launched_is_named():
    figures = FIGURES | {"shared": 170000, "tensor_columns": 640, "instructions": []}
    bad, _ = kernel_resources.faults({name: figures for name in ("k, sm_80", "k, sm_90")}, {"k, sm_80": figures})
    assert any("k, sm_80: shared memory 170000 of 166912 bytes" in line for line in bad)
    assert not any("k, sm_90: shared" in line for line in bad)
    assert any("640 of 512 tensor memory columns" in line for line in bad)
    assert any("k, sm_90: not in resources.json" in line for line in bad)


def test_what_is_done_twice_is_named():
    figures = {name: FIGURES | {"executed_over_useful": 1.5} for name in ("k, sm_80", "k, sm_90")}
    bad, _ = kernel_resources.faults(figures, figures)
    assert bad == ["k, sm_90: executes 1.5 times its products' arithmetic, at most 1.1"]


TWICE = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 32, 16]}>
  %A = ttng.warp_group_dot %x, %y, %z : tensor<64x32xbf16, #d> * !ttg.memdesc<32x64xbf16> -> tensor<64x64xf32, #mma>
  %X = scf.for %i = %c0_i32 to %c3_i32 step %c1_i32 iter_args(%Y = %x) -> (tensor<64x64xf32, #mma1>)  : i32 {
    %B = ttng.warp_group_dot %x, %y, %z : !ttg.memdesc<64x32xf16> * !ttg.memdesc<32x64xf16> -> tensor<64x64xf32, #mma1>
  }
"""


def test_work_that_two_groups_of_warps_do_alike():
    """A product of 64 rows by 8 warps in a column, once; and three times by 4 and 4 side by side."""
    assert executed_over_useful(TWICE) == 1.25
    assert executed_over_useful("  %x = arith.addf %y, %z : tensor<64x64xf32, #mma>") is None


def test_how_many_programs_fit():
    assert programs_per_sm(90, 4, 162, 49152, 0) == 3  # 168 registers of 128 threads
    assert programs_per_sm(90, 4, 32, 100000, 0) == 2  # shared memory
    assert programs_per_sm(90, 8, 16, 0, 0) == 8  # warps
    assert programs_per_sm(100, 4, 32, 0, 256) == 2  # tensor memory


@pytest.mark.parametrize("m,n", [(64, 64), (64, 256), (128, 128), (128, 512)])
def test_newton_schulz_holds_its_registers_and_repeats_no_product(m, n):
    """By the table: no spill on sm_90 and sm_100, and as many programs at once as the launch takes for granted."""
    kernels = json.loads(kernel_resources.TABLE.read_text())["kernels"]
    for arch in kernel_resources.SHARED:
        own = {name: now for name, now in kernels.items() if name.endswith(f"{m}x{n} bf16, sm_{arch}")}
        own = {name: now for name, now in own.items() if name.startswith(("forward", "backward"))}
        assert len(own) == 4
        at_once = newton_schulz.plan(m, n, torch.bfloat16, True, arch).at_once
        for name, now in own.items():
            # On sm_80 two registers of a backward.
            assert now["spilled"] <= (8 if arch == 80 and "backward" in name else 0), name
            assert arch != 90 or now["executed_over_useful"] <= 1.1, name
            assert "forward" in name or now["programs_per_sm"] >= at_once, name


def test_launches_of_a_layer(monkeypatch):
    """Exact ATLAS, 12 heads of 64 and 8 sequences of 1,024 tokens, its graph held: forward and backward."""
    monkeypatch.setattr(chunked, "HELD_BYTES", 1 << 50)
    memory = replace(MemoryConfig(heads=12, head_dim=64), **PRESETS["atlas"] | {"ns_period": 1, "expansion": 1})
    run = contender(memory, batch=8, tokens=1024, products=torch.bfloat16, device=DEVICE, impl="triton")
    with fake_gpu() as counts:
        run()
    assert counts.launches <= 500 and counts.torch_launches <= 700, (counts.kernels, counts.operators)
