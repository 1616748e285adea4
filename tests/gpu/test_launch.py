"""A launch, and what is noted of it in its place; how many arguments a kernel may take."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from atlas_kernels.gpu.launch import launch, recording
from tests.support.device_problems import DEVICE

GPU = Path(__file__).parents[2] / "kernels/atlas_kernels/gpu"
ARGUMENTS = 8


class Inputs(NamedTuple):
    x_pointer: Any  # [n]
    bias_pointer: Any  # [n], or None
    n: Any


class Constants(NamedTuple):
    BLOCK: int
    SCALE: float


def scaled_kernel(inputs, out_pointer, S: tl.constexpr):
    i = tl.arange(0, S.BLOCK)
    x = tl.load(inputs.x_pointer + i, mask=i < inputs.n, other=0.0) * S.SCALE
    if inputs.bias_pointer is not None:
        x += tl.load(inputs.bias_pointer + i, mask=i < inputs.n, other=0.0)
    tl.store(out_pointer + i, x, mask=i < inputs.n)


@pytest.mark.parametrize("biased", [False, True])
def test_fields_reach_the_kernel(biased):
    x = torch.arange(20.0, device=DEVICE)
    bias = torch.ones_like(x) if biased else None
    out = torch.empty_like(x)
    launch(triton.jit(scaled_kernel), (1,), (Inputs(x, bias, 20), out), Constants(32, 0.5), warps=1)
    assert torch.equal(out, 0.5 * x + (1 if biased else 0))


def test_a_recording_notes_the_call_and_launches_nothing():
    empty = torch.empty(32, device="meta")
    kernel = JITFunction(scaled_kernel)  # as without an interpreter
    with recording("{} 32") as variants:
        launch(kernel, (1,), (Inputs(empty, None, 32), empty.bfloat16()), Constants(32, 0.5), warps=2)
        launch(kernel, (1,), (Inputs(empty, empty.half(), 20), empty), Constants(32, 0.5), warps=4, stages=3)
    first, second = variants
    assert (first.name, first.kernel, first.num_warps, first.num_stages) == ("scaled 32", kernel, 2, 1)
    # The NamedTuple itself: of a plain tuple the compiler would not know the names.
    assert first.signature == {"inputs": Inputs("*fp32", "constexpr", "i32"), "out_pointer": "*bf16", "S": "constexpr"}
    assert isinstance(first.signature["inputs"], Inputs)
    assert first.constants[0, 1] is None
    assert [constant.value for constant in first.constants[2,]] == [32, 0.5]
    sixteen = [["tt.divisibility", 16]]
    assert {path for path, hint in first.hints.items() if hint == sixteen} == {(0, 0), (0, 2), (1,)}
    assert second.signature["inputs"] == Inputs("*fp32", "*fp16", "i32")
    assert {path for path, hint in second.hints.items() if hint == sixteen} == {(0, 0), (0, 1), (1,)}
    assert (second.num_warps, second.num_stages) == (4, 3)


def test_a_kernel_is_launched_on_its_tensors_device(monkeypatch):
    """Which need not be the current one, where Triton would launch it."""
    entered = []

    class DeviceOf:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            entered.append(self.tensor)

        def __exit__(self, *_):
            entered.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: entered.append("launched")

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    x = torch.ones(20, device=DEVICE)
    launch(Kernel(), (1,), (3, Inputs(x, None, 20), torch.empty_like(x)), Constants(32, 0.5), warps=1)
    assert entered[0] is x and entered[1:] == ["launched", "left"]


ORDERS = """
import sys
from importlib import import_module
from triton.runtime.jit import JITFunction
from atlas_kernels.gpu.launch import recording, settle_key

names = "newton_schulz", "orthogonal_writes", "scan", "edges"
modules = [import_module(f"atlas_kernels.gpu.{name}") for name in names]
found = {id(f): f for name in sorted(sys.modules) if name.startswith("atlas_kernels.gpu")
         for f in vars(sys.modules[name]).values() if isinstance(f, JITFunction)}.values()
keys = set()
for turn in (1, -1):
    for f in found:
        f.hash, f.used_global_vals = None, {}
    for f in list(found)[::turn]:
        settle_key(f)
    keys.add(tuple(sorted(f"{f.fn.__module__}.{f.__name__} {f.cache_key}" for f in found)))
assert len(found) > 20 and len(keys) == 1, len(found)
for f in found:
    f.hash, f.used_global_vals = None, {}
variants = [variant for module in modules for variant in module.variants()]
assert {f"{v.kernel.fn.__module__}.{v.kernel.__name__} {v.kernel.cache_key}" for v in variants} <= set(*keys)
"""


def test_the_cache_on_the_disk_knows_a_kernel_in_whatever_order_a_process_met_it():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(GPU.parents[1]), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", ORDERS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", sorted(GPU.rglob("*.py")), ids=lambda file: str(file.relative_to(GPU)))
def test_kernels_take_few_arguments(file):
    """Order is the only contract between a launch and a kernel: past these, a NamedTuple names them."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
            assert len(node.args.args) <= ARGUMENTS, node.name


class Compiled:
    """Stands in for what Triton compiles: notes its grids and arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.calls.append((grid, *arguments))


@pytest.fixture
def compilations(monkeypatch):
    """Those that Triton's own door is asked for."""
    found: list[Compiled] = []

    def run(self, *arguments, grid, **options):
        found.append(Compiled())
        found[-1][grid](*arguments)
        return found[-1]

    monkeypatch.setattr(JITFunction, "run", run)
    return found


def test_a_known_compilation_is_launched_itself(compilations):
    kernel = JITFunction(scaled_kernel)
    x, out = torch.ones(64), torch.empty(64)
    for _ in range(3):
        launch(kernel, (2,), (Inputs(x, None, 20), out), Constants(32, 0.5), warps=1)
    launch(kernel, (5, 3), (Inputs(x, None, 21), out), Constants(32, 0.5), warps=1)
    (compiled,) = compilations
    assert [call[0] for call in compiled.calls] == [(2,), (2, 1, 1), (2, 1, 1), (5, 3, 1)]
    first, *_, last = compiled.calls
    assert first[1].x_pointer is x and last[1].n == 21 and last[2] is out
    assert last[3] == first[3] and isinstance(last[3].BLOCK, tl.constexpr)


@pytest.mark.parametrize(
    "change",
    ["bias", "dtype", "alignment", "one", "multiple of 16", "64 bits", "constants", "warps", "stages", "cooperative"],
)
def test_what_a_compilation_depends_on_makes_another(compilations, change):
    kernel, x, out = JITFunction(scaled_kernel), torch.ones(64), torch.empty(64)
    usual: dict[str, Any] = {"warps": 1, "stages": 1, "cooperative": False}
    launch(kernel, (2,), (Inputs(x, None, 20), out), Constants(32, 0.5), **usual)
    inputs, constants = Inputs(x, None, 20), Constants(32, 0.5)
    match change:
        case "bias":
            inputs = inputs._replace(bias_pointer=x)
        case "dtype":
            inputs = inputs._replace(x_pointer=x.half())
        case "alignment":
            inputs = inputs._replace(x_pointer=x[1:])
        case "one" | "multiple of 16" | "64 bits":
            inputs = inputs._replace(n={"one": 1, "multiple of 16": 32, "64 bits": (1 << 32) + 1}[change])
        case "constants":
            constants = constants._replace(SCALE=0.25)
        case "warps" | "stages":
            usual[change] = 4
        case "cooperative":
            usual[change] = True
    launch(kernel, (2,), (inputs, out), constants, **usual)
    assert len(compilations) == 2
