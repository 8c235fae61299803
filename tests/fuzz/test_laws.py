"""The hostile laws of ``adaattn_core.testing.hostile`` on the NumPy backend: a taste of them.

The same laws run for 100,000 examples and more by ``python -m adaattn_core.testing.hostile``;
docs/reference/fuzzing.md records the last such run.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from adaattn_core.testing.hostile.definition import HAS_EXTENDED_RANGE
from adaattn_core.testing.hostile.suite import LAWS, Run

pytestmark = pytest.mark.skipif(
    not HAS_EXTENDED_RANGE, reason="the definition needs a longdouble wider than float64"
)

EXAMPLES = 1000
"""In all: about 15 s."""


@pytest.mark.parametrize("name", LAWS)
def test_law(name: str) -> None:
    law, run = LAWS[name], Run(name)

    @settings(
        max_examples=max(round(EXAMPLES * law.share), 100),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(law.cases)
    def attack(case: Any) -> None:
        law.attack(run, case)

    attack()
    run.ledger.check_shares()
    assert run.ledger.examples[name] >= 100
    calls = run.ledger.calls[name]
    assert calls >= run.ledger.examples[name] / 2
    assert run.ledger.refused.total() <= calls / 2, "what is refused is not judged"
    if name != "replay":  # which compares bits, and judges no certificate
        assert run.ledger.trials.total() >= run.ledger.examples[name] / 2
    if name == "shares":
        assert any(confidence < 1 for _, confidence, _ in run.ledger.trials)
