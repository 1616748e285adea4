"""The arrows between the rooms, their sizes, and the pins, held by reading the sources."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

from atlas_megatron.config import LAYERS

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "atlas_megatron", "experiments", "benchmarks", "tools", "docs", "tests")
SOURCES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
KERNELS = [file for file in SOURCES if file.is_relative_to(ROOT / "kernels")]
HF = ROOT / "atlas_megatron/hf"
MEGATRON = [file for file in SOURCES if file.is_relative_to(ROOT / "atlas_megatron")]

# Within a package, a module imports only what stands left of it; the rest is free.
KERNEL_ARROW = ("reference", "chunked", "op", "gated_delta")
# The layers' mathematics, which mixers/ and hf/ both call.
LAYER_FUNCTIONS = ("layer_start", "short_conv", "gated_norm", "gated_delta", "attention", "cells")
# Each room imports only rooms that stand left of it; the last four are commands.
MEGATRON_ARROW = (
    "cli", "files", "config", "parallel", "data", "mixers", "model", "estimate", "resilience", "checkpoint", "training",
    "hf", "inference", "serving", "reports", "scaling", "evaluate", "finetune", "train", "generate", "doctor",
    "commands",
)  # fmt: skip
# Where symbols of model.pattern are told apart; everyone else asks these tables, or the classes in them.
SYMBOL_TABLES = ("config/", "mixers/", "hf/registry_atlas.py")
MAIN_LINES = 60  # of a script of tools/
LINES = 450


def imports(file: Path) -> set[str]:
    """The absolute names of all modules that a file imports, at whatever depth.

    Relative imports belong to the files that travel with an exported model alone.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = travelling_package(file)
            assert node.level == 0 or (package and node.level == 1), f"{file}: relative import; write the absolute name"
            module = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


def travelling_package(file: Path) -> str:
    """The package of a file that an exported model takes along, flat among the others; empty for one that stays."""
    if file.parent == ROOT / "kernels/atlas_kernels":
        return "atlas_kernels"
    return "atlas_megatron.hf" if file.parent == HF and file.name.endswith("_atlas.py") else ""


def functions(file: Path) -> set[str]:
    """The names of a file's functions, but for methods."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def reaches(names: set[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in names)


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.name)
def test_the_mathematics_knows_no_megatron(file: Path) -> None:
    names = imports(file)
    for module in ("megatron", "torch.distributed", "atlas_megatron"):
        assert not reaches(names, module), f"{file} imports {module}"


@pytest.mark.parametrize("file", [*KERNELS, *MEGATRON], ids=lambda file: file.name)
def test_packages_import_no_outer_room(file: Path) -> None:
    names = imports(file)
    for module in ("tools", "launch", "tests", "configs", "experiments", "benchmarks"):
        assert not reaches(names, module), f"{file} imports {module}"


def test_kernels_arrow_points_one_way() -> None:
    folder = ROOT / "kernels/atlas_kernels"
    for place, module in enumerate(KERNEL_ARROW):
        file = folder / f"{module}.py"
        assert file.is_file(), f"{module} is gone; correct the arrow"
        for later in KERNEL_ARROW[place + 1 :]:
            assert not reaches(imports(file), f"atlas_kernels.{later}"), f"{file} imports {later}"


def test_the_layers_mathematics_stands_once() -> None:
    """What a layer's parameters pass through is written in atlas_kernels, and neither here nor there again."""
    once = {name for module in LAYER_FUNCTIONS for name in functions(ROOT / f"kernels/atlas_kernels/{module}.py")}
    assert {"gates_of", "banded_attention", "gru_cell", "gated_delta_rule"} <= once
    for file in (*HF.glob("*.py"), *(ROOT / "atlas_megatron/mixers").glob("*.py")):
        assert not functions(file) & once, f"{file} defines {functions(file) & once} again"


def test_every_room_has_its_place_in_the_arrow_and_says_what_it_is_for() -> None:
    rooms = {path.stem for path in (ROOT / "atlas_megatron").iterdir() if path.name[0] not in "._"}
    assert rooms == set(MEGATRON_ARROW)
    for folder in (path for path in (ROOT / "atlas_megatron").iterdir() if path.is_dir() and path.name[0] != "_"):
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder


@pytest.mark.parametrize("room", MEGATRON_ARROW)
def test_rooms_import_only_what_stands_left_of_them(room: str) -> None:
    """No arrow upwards, imports inside functions and for types alone included; so no circle either."""
    later = MEGATRON_ARROW[MEGATRON_ARROW.index(room) + 1 :]
    for file in MEGATRON:
        if file.relative_to(ROOT / "atlas_megatron").with_suffix("").parts[0] == room:
            for other in later:
                assert not reaches(imports(file), f"atlas_megatron.{other}"), f"{file} imports {other}"


def told_apart(tree: ast.AST) -> list[int]:
    """The lines that compare something with symbols of model.pattern, make a set of them, or a table by them."""
    lines = []
    for node in ast.walk(tree):
        held: list[ast.expr | None] = []
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn | ast.Eq | ast.NotEq):
            held = [node.left, *node.comparators]
            names = {part.id if isinstance(part, ast.Name) else getattr(part, "attr", "") for part in held}
            held = held if names & {"symbol", "pattern"} else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "set":
            held = [*node.args]
        elif isinstance(node, ast.Dict) and all(map(of_symbols, node.keys)):
            held = [*node.keys]
        lines += [node.lineno] if any(map(of_symbols, held)) else []
    return lines


def of_symbols(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) \
        and set(node.value) <= set(LAYERS)


def test_only_its_tables_know_what_a_symbol_of_the_pattern_means() -> None:
    found = {}
    for file in MEGATRON:
        name = str(file.relative_to(ROOT / "atlas_megatron"))
        if not name.startswith(SYMBOL_TABLES):
            found[name] = told_apart(ast.parse(file.read_text(encoding="utf-8")))
    assert not {name: lines for name, lines in found.items() if lines}, "ask config.LAYERS, or the layer's class"


def test_what_experiments_share_knows_none_of_them() -> None:
    for file in (ROOT / "experiments/shared").glob("*.py"):
        own = {name for name in imports(file) if reaches({name}, "experiments")}
        assert all(reaches({name}, "experiments.shared") for name in own if name != "experiments"), file


@pytest.mark.parametrize("file", sorted((ROOT / "tools").glob("*.py")), ids=lambda file: file.name)
def test_tools_are_mains(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAIN_LINES


def test_configs_hold_data_alone() -> None:
    assert not list((ROOT / "configs").rglob("*.py"))


def test_nobody_bends_the_path() -> None:
    """A module is found because it is installed or lies in a package of this folder."""
    bends = re.compile(r"sys\.path\.(insert|append)|syspath_prepend")
    bent = [file.name for file in SOURCES if bends.search(file.read_text(encoding="utf-8"))]
    assert bent == ["test_house.py"]


def test_nothing_leaks_a_module_past_its_door() -> None:
    """Code outside atlas_kernels uses its public names, not implementations."""
    for file in MEGATRON:
        for implementation in ("reference", "chunked", "gpu"):
            assert not reaches(imports(file), f"atlas_kernels.{implementation}"), f"{file}: use omega_memory"


@pytest.mark.parametrize("file", sorted(HF.glob("*_atlas.py")), ids=lambda file: file.name)
def test_what_travels_needs_nothing_of_this_project(file: Path) -> None:
    """The door to the kernels alone names a package, whose absence it survives."""
    allowed = {f"atlas_megatron.hf.{name}" for name in [other.stem for other in HF.glob("*_atlas.py")]}
    for name in imports(file):
        for package in ("megatron", *(("atlas_kernels",) if file.name != "kernels_atlas.py" else ())):
            assert not reaches({name}, package), f"{file} imports {name}"
        ours = name.startswith("atlas_megatron.") and file.name != "kernels_atlas.py"
        assert not ours or any(reaches({name}, module) for module in allowed), f"{file} imports {name}"


@pytest.mark.parametrize(
    "file", sorted([*HF.glob("*_atlas.py"), *(ROOT / "kernels/atlas_kernels").glob("*.py")]), ids=lambda file: file.name
)
def test_what_travels_is_read_by_older_pythons(file: Path) -> None:
    """An exported model runs where its reader's Python is not ours; by syntax alone, no older one runs here."""
    assert ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 10)).body


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's `kernels` package"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_files_stay_readable(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LINES, f"{file} has {len(lines)} lines; name the piece that is missing"
    assert file.stem not in ("utils", "helpers", "common"), f"{file}: name it for what it does"


def test_constraints_pin_what_setup_asks_for() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[name.lower().replace("_", "-")] = version
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call))
    asked = {word.arg: word.value for word in call.keywords}
    wanted = ast.literal_eval(asked["install_requires"])
    for extra in ast.literal_eval(asked["extras_require"]).values():
        wanted += extra
    for requirement in wanted:
        name, _, version = re.sub(r"\[.*\]|>=.*", "", requirement).partition("==")
        assert version or name in pinned, f"{name} is pinned neither in setup.py nor in constraints.txt"
        assert not (version and name in pinned) or pinned[name] == version, f"{name}: two versions"


def test_ci_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_every_injected_fault_has_its_test() -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", (ROOT / "docs/faults.md").read_text(encoding="utf-8"))
    assert named
    missing = [f"{f}::{t}" for f, t in named if f"def {t}(" not in (ROOT / "tests" / f).read_text(encoding="utf-8")]
    assert not missing
