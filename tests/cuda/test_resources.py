"""ptxas' report and the header's budget are read as they are written."""

from __future__ import annotations

import pytest

from adaattn_cuda.jit.resources import Resources, parse_budget, parse_log

LOG = """\
ptxas info    : Compiling entry function 'adaattn_entry' for 'sm_90a'
ptxas info    : Function properties for adaattn_entry
ptxas         .     48 bytes stack frame, 72 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size
"""


def test_log() -> None:
    assert parse_log(LOG) == Resources(registers=255, spill_bytes=136, stack_bytes=48)


def test_log_without_a_report_is_not_taken_for_zero() -> None:
    with pytest.raises(ValueError, match="no ptxas resource report"):
        parse_log("ptxas info : 0 bytes gmem")


def test_budget() -> None:
    budget = parse_budget("// a\n// Budget: registers<=168 spill_bytes=0 smem_bytes<=1024\n")
    assert budget.violations(Resources(168, 0, 0), 1024) == []
    found = budget.violations(Resources(169, 4, 0), 1025)
    assert found == [
        "registers is 169, stated registers<=168",
        "spill_bytes is 4, stated spill_bytes=0",
        "smem_bytes is 1025, stated smem_bytes<=1024",
    ]


@pytest.mark.parametrize(
    "header",
    ["no line", "// Budget: registers<=1\n// Budget: registers<=2", "// Budget: warps<=4"],
)
def test_unreadable_budget(header: str) -> None:
    with pytest.raises(ValueError, match=r"Budget|budget"):
        parse_budget(header)
