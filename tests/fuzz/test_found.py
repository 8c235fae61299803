"""The smallest examples of what the hostile laws once found, so that it stays found."""

from __future__ import annotations

import pytest

from adaattn_core.testing.hostile.calls import HostileCall
from adaattn_core.testing.hostile.definition import HAS_EXTENDED_RANGE
from adaattn_core.testing.hostile.problems import HostileMask, HostileProblem
from adaattn_core.testing.hostile.suite import LAWS, Case, Run
from adaattn_core.testing.hostile.values import Fill

pytestmark = pytest.mark.skipif(
    not HAS_EXTENDED_RANGE, reason="the definition needs a longdouble wider than float64"
)

FOUND: dict[str, Case] = {
    "f64 inputs planned for a machine without f64: KeyError": (
        HostileProblem(dtype="f64"),
        HostileCall(how="budget", budget={"rel": 0.1}, target="sm90"),
    ),
    "partial sums that are flushed after the last key: range() of step 0": (
        HostileProblem(),
        HostileCall(how="frozen", head={"qk": "i8", "pv": "e4m3", "flush_keys": 0}),
    ),
    "a smoothed key whose own score overflows, alone in its row: lse NaN, not flagged": (
        HostileProblem(len_q=1, len_kv=1, dim_qk=16, dtype="f64", key=Fill("largest")),
        HostileCall(how="frozen", head={"qk": "i8", "pv": "f32"}),
    ),
    "NaN in an additive mask: keys that it hides came back as NaN in every row": (
        HostileProblem(
            poison=("bias", "nan"), mask=HostileMask(bias="normal", hide=0.3, blind=0.3)
        ),
        HostileCall(),
    ),
}


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_what_was_found_holds(case: Case) -> None:
    run = Run("found")
    LAWS["certificates"].attack(run, case)
    assert not run.ledger.refused
