"""The goals' table: what kernels/README.md shows is what the committed figures say."""

from __future__ import annotations

from benchmarks import goals
from benchmarks.static_times import Launch, instructions, matched


def test_the_readme_shows_the_committed_figures() -> None:
    assert goals.committed() in (goals.ROOT / "kernels" / "README.md").read_text(encoding="utf-8")


def test_a_launch_takes_as_long_as_its_busiest_multiprocessor() -> None:
    # 1.75e9 instructions a warp are a second where each scheduler has one warp; four warps share none.
    one = Launch("k", programs=132, warps=4, instructions=1.75e9, flops=0.0, programs_per_sm=1)
    assert one.seconds == 1.0
    assert Launch("k", 133, 4, 1.75e9, 0.0, 1).seconds == 2.0
    assert Launch("k", 132, 8, 1.75e9, 0.0, 1).seconds == 2.0
    # One warp alone cannot use the other schedulers; two programs at once can.
    assert Launch("k", 264, 1, 1.75e9, 0.0, 2).seconds == 1.0
    assert Launch("k", 132, 4, 0.0, 989e12 / 132, 1).seconds == 1.0


CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   FADD R2, R1, R1 ;
        /*0020*/                   FMUL R2, R2, R1 ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/                   EXIT ;
        /*0060*/                   NOP ;
"""


def test_instructions_of_loops_count_as_often_as_they_turn() -> None:
    # Outside: MOV and EXIT. The outer loop: FADD and its branch, three times. The inner one: two, three times five.
    assert instructions(CODE, [3, 5]) == 2 + 3 * 2 + 15 * 2


def test_the_shortest_loops_are_those_that_a_compiler_unrolls() -> None:
    assert matched([8, 2, 5], 2) == [8, 5]
    assert matched([8], 2) == [8, 1]
