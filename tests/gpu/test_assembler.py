"""The check that sees a `wgmma` with the wrong operands in machine code, and the ptxas that is taken."""

from types import SimpleNamespace

import pytest
import triton

from atlas_kernels.gpu import assembler
from benchmarks.wgmma_operands import stray_operands

# Two descriptors at an address in shared memory, the second of the first. UR16 and UR17 hold something else before.
BEFORE = """
        /*0000*/                   S2UR UR5, SR_CgaCtaId ;
        /*0010*/                   UMOV UR10, 0x400 ;
        /*0020*/                   ULDC.64 UR16, c[0x0][0x240] ;
        /*0030*/                   ULEA UR4, UR5, UR10, 0x18 ;
        /*0040*/                   USHF.R.U32.HI UR4, URZ, 0x4, UR4 ;
        /*0050*/                   USGXT.U32 UR4, UR4, 0xe ;
        /*0060*/                   UMOV UR5, URZ ;
        /*0070*/                   UMOV UR30, UR4 ;
        /*0080*/                   UMOV UR31, 0xc0000010 ;
"""
COPY = """
        /*0090*/                   UMOV UR16, UR4 ;
        /*00a0*/                   UMOV UR17, UR5 ;
"""
SECOND = """
        /*00b0*/                   UIADD3 UR26, UP1, UR16, 0x20, URZ ;
        /*00c0*/                   UIADD3.X UR27, UR17, -0x3ffffff0, URZ, UP1, !UPT ;
"""
PRODUCTS = """
        /*00d0*/                   HGMMA.64x16x16.F32.BF16 R24, R52, gdesc[UR28].tnspB, RZ, !UPT ;
        /*00e0*/                   HGMMA.64x16x16.F32.BF16 R24, R56, gdesc[UR24].tnspB, R24, gsb0 ;
"""


def test_a_descriptor_computed_before_its_copy_is_a_stray():
    assert stray_operands(BEFORE + COPY + SECOND + PRODUCTS) == []
    strays = stray_operands(BEFORE + SECOND + COPY + PRODUCTS)
    assert strays == ["HGMMA.64x16x16.F32.BF16 R24, R56, gdesc[UR24].tnspB, R24, gsb0"]


@pytest.mark.parametrize("moved", ["", "swapped", "spilled"])
def test_a_descriptor_is_followed_wherever_it_goes(moved):
    first = """
        R2UR UR16, R8 ;
        R2UR UR17, R9 ;
"""
    through = {
        "": "IADD3 R8, RZ, UR4, RZ ;\n MOV R9, UR5 ;",
        "swapped": "\n".join(f"ULOP3.LUT {x}, UR4, UR5, URZ, 0x3c, !UPT ;" for x in ("UR4", "UR5", "UR4"))
        + "\n MOV R8, UR5 ;\n MOV R9, UR4 ;",
        "spilled": "MOV R2, UR4 ;\n MOV R3, UR5 ;\n STL.64 [R1+0x18], R2 ;\n MOV R3, 0x1 ;\n LDL.64 R8, [R1+0x18] ;",
    }
    lines = "\n".join("    " + line for line in through[moved].splitlines())
    assert stray_operands(BEFORE + lines + first + SECOND + PRODUCTS) == []
    assert len(stray_operands(BEFORE + lines + SECOND + first + PRODUCTS)) == 1


def take_from(monkeypatch, usual: str, newer: str, chosen: str | None = None) -> SimpleNamespace:
    """What is taken where Triton brings a ptxas of `usual` and one of `newer`, and a user has `chosen` one or none."""
    tool = lambda version: SimpleNamespace(version=version, path=f"ptxas-{version}")  # noqa: E731
    nvidia = SimpleNamespace(ptxas=tool(usual), ptxas_blackwell=tool(newer))
    monkeypatch.setattr(triton, "knobs", SimpleNamespace(nvidia=nvidia))
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    if chosen:
        monkeypatch.setenv("TRITON_PTXAS_PATH", chosen)
    assembler.take_sound_ptxas()
    return nvidia


def test_the_newer_ptxas_is_taken(monkeypatch):
    assert take_from(monkeypatch, "12.8", "12.9").ptxas == "ptxas-12.9"


@pytest.mark.parametrize(
    ("usual", "newer", "chosen"), [("12.8", "12.9", "/my/ptxas"), ("12.9", "13.3", None), ("12.4", "12.8", None)]
)
def test_a_ptxas_that_is_chosen_sound_or_no_sounder_stays(monkeypatch, usual, newer, chosen):
    assert take_from(monkeypatch, usual, newer, chosen).ptxas.version == usual


def test_kernels_are_compiled_by_a_sound_ptxas():
    import atlas_kernels.gpu.launch  # noqa: F401

    assert assembler._release(triton.knobs.nvidia.ptxas.version) >= assembler.SOUND
