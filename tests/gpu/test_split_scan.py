"""A memory's chain shared by several programs: against the chunk form, and against the chain of one program.

Without a GPU each phase of a chunk is a launch of its own, and how programs wait for each other is not tested.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlas_kernels import MemoryRule
from atlas_kernels.gpu import scan
from atlas_kernels.gpu.scan import pieces, split
from tests.support.device_problems import (
    BFLOAT16_ON_A_GPU,
    CHUNK,
    ROUNDED_TOLERANCE,
    compare,
    compare_rounded,
    outputs_and_gradients,
    rounded,
    small,
)
from tests.support.problems import assert_close, gradients, relative_rms, state_tensors

BASE = MemoryRule(window=5, chunk=CHUNK, ns_steps=0, norm="layer")
PRESET = {"key": 64, "value": 64, "hidden": 256}

# The interpreter's sigmoid of a very negative number: 1 / (1 + inf), which is right.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.fixture(autouse=True)
def launched(monkeypatch) -> list[tuple[str, int]]:
    """A device with room for many programs; the kernels that are split there, with their slices."""
    monkeypatch.setattr(split, "multiprocessors", lambda device: 132)
    found = []

    def launch_split(form, slices, *arguments, **options):
        found.append(("write_backward" if form.backward else "write", slices))
        split.launch_split(form, slices, *arguments, **options)

    monkeypatch.setattr(scan, "launch_split", launch_split)
    return found


def both(slices: int) -> set[tuple[str, int]]:
    return {("write", slices), ("write_backward", slices)}


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "sum"])
@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
@pytest.mark.parametrize("norm,loss", [("layer", "l2"), ("none", "dot")])
def test_every_rule(launched, memory, norm, loss, momentum):
    compare(small(replace(BASE, memory=memory, norm=norm, loss=loss, momentum=momentum), 2 * CHUNK + 5))
    assert set(launched) == both(2)


@pytest.mark.parametrize("share", [0, 0.3])
def test_outer_gradient_in_part_through_the_anchors(launched, share):
    compare(small(replace(BASE, anchor_gradient=share), CHUNK + 5))
    assert set(launched) == both(2)


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, 4 * CHUNK + 1])
def test_lengths(launched, tokens):
    compare(small(replace(BASE, window=1 if tokens == CHUNK else 5), tokens, pair=tokens != 1, seed=tokens))
    assert set(launched) == both(2)


@pytest.mark.parametrize("slices", [4, 8])
def test_more_slices_of_several_heads_at_widths_between_powers_of_two(launched, slices):
    rule = replace(BASE, memory="gated_mlp" if slices == 4 else "mlp")
    compare(small(rule, CHUNK + 3, batch=2, heads=2, residual=True, key=48, value=32, hidden=16 * slices))
    assert set(launched) == both(slices)


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "sum"])
@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
def test_half_precision_products(launched, memory, momentum):
    compare_rounded(small(replace(BASE, memory=memory, momentum=momentum), 2 * CHUNK + 5, hidden=64), torch.float16)
    assert {kernel for kernel, _ in launched} == {"write", "write_backward"}


def test_the_states_own_gradients(launched):
    """With respect to an incoming state, cut inside a chunk, whose anchor is not its weights."""
    p = small(BASE, 2 * CHUNK, pair=False)
    _, start = p.run("chunked", 0, CHUNK + 3)
    start = start.map(lambda t: t.detach().clone().requires_grad_())
    results = {}
    for impl in ("chunked", "triton"):
        y, state = p.run(impl, CHUNK + 3, None, start)
        results[impl] = gradients([y, *state.tensors()], state_tensors(start))
    assert_close(results["triton"], results["chunked"])
    assert all(g.abs().max() > 0 for g in results["triton"].values())
    assert set(launched) == both(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks between the phases, which a GPU runs in one launch")
def test_no_slice_takes_what_one_ahead_overwrites(monkeypatch):
    """While one slice takes, another that has taken may have given at the next chunk: NaN stands there."""
    p = small(BASE, 4 * CHUNK + 5)
    expected = outputs_and_gradients(p, "triton")
    launch, spoiled = split.launch, []

    def spoiling(kernel, grid, arguments, *rest, **options):
        meeting = arguments[-1]
        if meeting.step.takes:
            following = meeting.step.n + (1 if meeting.parts.x_pointer is None else -1)
            for part in (part for part in meeting.parts[1:] if part is not None):
                part[following % split.ROUNDS] = float("nan")
                spoiled.append(part)
        launch(kernel, grid, arguments, *rest, **options)

    monkeypatch.setattr(split, "launch", spoiling)
    for name, value in outputs_and_gradients(p, "triton").items():
        assert torch.equal(value, expected[name]), name
    assert spoiled


def shape(F: int, BLOCK_F: int) -> pieces.Shape:
    fields = dict.fromkeys(pieces.Shape._fields) | {"F": F, "BLOCK_F": BLOCK_F, "SLICES": 1}
    return pieces.Shape(**fields)


@pytest.mark.parametrize(
    "memories,hidden,block,slices",
    [(16, 256, 32, 8), (17, 256, 32, 4), (33, 256, 16, 4), (34, 256, 32, 2), (66, 256, 32, 2), (67, 256, 32, 1)]
    + [(1, 64, 32, 2), (1, 64, 16, 4), (1, 48, 16, 1), (1, 16, 16, 1), (200, 256, 32, 1)],
)
def test_how_many_slices(memories, hidden, block, slices):
    assert split.slices_of(memories, shape(hidden, block), torch.device("cpu")) == slices


def with_programs(p, monkeypatch, count: int) -> dict[str, torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(split, "multiprocessors", lambda device: count)
        return outputs_and_gradients(p, "triton")


def test_as_the_chain_of_one_program(launched, monkeypatch):
    p = small(replace(BASE, memory="gated_mlp"), 2 * CHUNK + 5)
    alone = with_programs(p, monkeypatch, 1)
    assert not launched
    assert_close(outputs_and_gradients(p, "triton"), alone)
    assert set(launched) == both(2)


PTX = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from atlas_kernels.gpu.scan import variants

for v in variants():
    if "_split 8 slices" in v.name:
        source = ASTSource(v.kernel, v.signature, dict(v.constants), dict(v.hints))
        options = {"num_warps": v.num_warps, "num_stages": v.num_stages}
        print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"], end="// next\\n")
"""


@pytest.mark.slow
def test_what_waiting_is_compiled_to():
    """All that a program stored stands before its arrival, all that it takes behind the wait; caches hold no copy."""
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "kernels"), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", PTX], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    kernels = run.stdout.split("// next\n")[:-1]
    assert len(kernels) == 2
    barrier = "bar.sync"
    for ptx in kernels:
        before, arrival, behind = re.split(r"(atom\S*\.release\S*add)", ptx)
        assert barrier in before[before.rindex("st.global") :]
        wait = re.search(r"(ld|atom)\S*\.acquire", behind)
        assert arrival and wait and "st.global" not in behind[: wait.start()]
        taken = re.search(r"ld\.global\.[vb]", behind)
        assert taken and barrier in behind[wait.end() : taken.start()]
        assert "ld.global.nc" not in ptx


@BFLOAT16_ON_A_GPU
@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "sum"])
@pytest.mark.parametrize("memory,heads,slices", [("mlp", 16, 8), ("gated_mlp", 16, 8), ("mlp", 32, 4), ("mlp", 64, 2)])
def test_programs_that_wait_for_each_other(launched, monkeypatch, memory, heads, slices, momentum):
    """Equal calls give equal bits; phase by phase, and by one program a memory, they come to the same."""
    if torch.cuda.get_device_properties("cuda").multi_processor_count < slices * heads:
        pytest.skip(f"has fewer than {slices * heads} multiprocessors")
    rule = MemoryRule(memory, norm="layer", ns_steps=0, momentum=momentum)
    low, _ = rounded(small(rule, 2100, heads=heads, **PRESET), torch.bfloat16)
    first = outputs_and_gradients(low, "triton")
    assert set(launched) == both(slices)
    for _ in range(9):
        for name, value in outputs_and_gradients(low, "triton").items():
            assert torch.equal(value, first[name]), f"{name} differs between equal calls"
    with monkeypatch.context() as patch:
        patch.setattr(split, "can_wait", lambda kernel: False)
        apart = outputs_and_gradients(low, "triton")
    alone = with_programs(low, monkeypatch, 1)
    for name, value in first.items():
        # Of one source, but compiled apart: a sum may be rounded otherwise, and so a factor of a product.
        assert relative_rms(value.double(), apart[name].double()) <= 1e-2, f"{name}, phase by phase"
        assert relative_rms(value.double(), alone[name].double()) <= ROUNDED_TOLERANCE[torch.bfloat16, memory], name
