"""Whether every `wgmma` of a compiled kernel finds its operands in shared memory, by the machine code alone.

A `wgmma` on sm_90 takes an operand from shared memory by a descriptor of 64 bits in two registers: the low word has the
address, the high word constants of its layout. ptxas 12.8 reads the registers that a descriptor is made of before it
writes them, in some kernels (see atlas_kernels/gpu/assembler.py). The product then takes what lies elsewhere.

Here each register is followed through the code, in the order in which it stands, to what it is made of. A low word that
no address of shared memory went into, or a high word that anything but constants went into, is a stray one. What
control flow does to registers is not followed: a stray that once held another descriptor would not be seen.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
_INSTRUCTION = re.compile(r"^\s+(?:/\*\w+\*/\s*)?(?:@!?\w+\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;/]*);")
_REGISTER = re.compile(r"\b(U?R)(\d+)\b")
# These write predicates, memory or nothing.
_WRITES_NO_REGISTER = re.compile(r"U?[IF]SETP|U?PLOP3|R2P|ST[GSL]?\b|STSM|RED|BAR|BRA|BSSY|BSYNC|EXIT|WARP|NOP|CCTL")
_LOADS = re.compile(r"LD[GS]?\b|LDSM|U?LDC|HMMA|S2U?R")
# What a register is made of: the first address of shared memory, or what is not a constant.
SHARED, OTHER = "shared", "other"
Made = frozenset[str]


def machine_code(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([NVDISASM, "-c", file.name], check=True, capture_output=True, text=True).stdout


def stray_operands(code: str) -> list[str]:
    """The instructions of `code`, what `machine_code` gives, whose operand in shared memory is a stray."""
    held: dict[str, Made] = {}
    strays = []
    for line in code.splitlines():
        if not (found := _INSTRUCTION.match(line)):
            continue
        name, operands = found[1], found[2].strip()
        if name.startswith("HGMMA"):
            if not all(_is_descriptor(held, low) for low in _descriptors(operands)):
                strays.append(f"{name} {operands}")
        elif name.startswith("STL"):
            _spill(held, name, operands)
        elif not _WRITES_NO_REGISTER.match(name):
            _follow(held, name, operands)
    return strays


def _descriptors(operands: str) -> list[int]:
    """The uniform registers of the low words: gdesc[URn] has room for two operands, of which the first may lie in
    registers."""
    base = int(re.search(r"gdesc\[UR(\d+)\]", operands)[1])  # type: ignore[index]
    return [base + 2] if re.match(r"R\d+, *R\d+", operands) else [base, base + 2]


def _is_descriptor(held: dict[str, Made], low: int) -> bool:
    unknown = frozenset({OTHER})
    return SHARED in held.get(f"UR{low}", unknown) and not held.get(f"UR{low + 1}", unknown)


def _spill(held: dict[str, Made], name: str, operands: str) -> None:
    place, source = (part.strip() for part in operands.rsplit(",", 1))
    for word, register in enumerate(_words(source, _width(name))):
        held[_slot(place, word)] = held.get(register, Made())


def _slot(place: str, word: int) -> str:
    offset = re.search(r"\+(-?0x\w+)", place)
    return f"[{(int(offset[1], 16) if offset else 0) + 4 * word}]"


def _follow(held: dict[str, Made], name: str, operands: str) -> None:
    """What the register that the instruction writes is made of from now on."""
    parts = [part.strip() for part in operands.split(",")]
    while parts and re.fullmatch(r"U?P[\dT]", parts[0]):
        del parts[0]
    if not parts or not _REGISTER.match(parts[0]):
        return
    written = _words(parts[0], _width(name))
    if name.startswith("LDL"):
        made = [held.get(_slot(parts[1], word), Made({OTHER})) for word in range(len(written))]
    elif _LOADS.match(name):
        made = [Made({SHARED if "SR_CgaCtaId" in operands else OTHER})] * len(written)
    elif name.startswith("ULOP3") and "0x3c" in parts:  # exclusive or: three of these swap two registers
        made = [held.get(parts[1], Made()) ^ held.get(parts[2], Made())]
    elif "WIDE" in name or "64" not in name.split("."):
        read = [f"{kind}{int(number) + word}" for part in parts[1:] for kind, number in _REGISTER.findall(part)
                for word in range(2 if "WIDE" in name or ".64" in part else 1)]  # fmt: skip
        made = [Made().union(*(held.get(register, Made()) for register in read))] * len(written)
    else:
        sources = [part for part in parts[1:] if _REGISTER.search(part)]
        made = [Made().union(*(held.get(_words(part, 2)[word], Made()) for part in sources)) for word in range(2)]
    held.update(zip(written, made, strict=True))


def _width(name: str) -> int:
    """How many registers after each other an instruction of this name writes, or spills."""
    suffixes = name.split(".")
    if suffixes[0] == "HMMA" or "128" in suffixes or suffixes[-1] == "4":
        return 4
    return 2 if {"64", "WIDE"} & set(suffixes) or suffixes[0] == "CS2R" or suffixes[-1] == "2" else 1


def _words(register: str, count: int) -> list[str]:
    found = _REGISTER.search(register)
    return [f"{found[1]}{int(found[2]) + word}" for word in range(count)] if found else ["RZ"] * count
