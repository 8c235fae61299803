"""The suite itself is tested: it catches backends that are broken on purpose, and counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure

from adaattn_core.testing.hostile.__main__ import main
from adaattn_core.testing.hostile.calls import HostileCall
from adaattn_core.testing.hostile.definition import HAS_EXTENDED_RANGE
from adaattn_core.testing.hostile.laws import Lie, Trial, binomial_excess
from adaattn_core.testing.hostile.problems import HostileProblem
from adaattn_core.testing.hostile.suite import LAWS, Ledger, Run
from adaattn_core.testing.hostile.values import EXPONENTS, Fill
from adaattn_core.testing.sabotage import SABOTAGES, sabotage
from adaattn_reference.backend import NumpyBackend

pytestmark = pytest.mark.skipif(
    not HAS_EXTENDED_RANGE, reason="the definition needs a longdouble wider than float64"
)

CAUGHT_BY = dict.fromkeys(SABOTAGES, "certificates") | {
    "leaky_padding": "causality",
    "restless": "replay",
}


@pytest.mark.parametrize("name", sorted(SABOTAGES))
def test_a_broken_backend_is_caught(name: str) -> None:
    law = LAWS[CAUGHT_BY[name]]
    run = Run(CAUGHT_BY[name], sabotage(name, NumpyBackend()))

    @settings(
        max_examples=400,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(law.cases)
    def attack(case: Any) -> None:
        law.attack(run, case)

    with pytest.raises((Lie, ExceptionGroup, FlakyFailure)):
        attack()


def test_an_example_is_rebuilt_from_its_repr() -> None:
    spec = HostileProblem(key=Fill("rows", 30), hidden="mixed", seed=7)
    again = eval(repr(spec), {c.__name__: c for c in (HostileProblem, Fill)} | MASK)
    assert again.build().content() == spec.build().content()


MASK = {"HostileMask": type(HostileProblem().mask)}


@pytest.mark.parametrize("dtype", sorted(EXPONENTS))
def test_values_are_finite_and_reach_the_ends_of_the_format(dtype: str) -> None:
    for exponent in EXPONENTS[dtype]:
        arrays = HostileProblem(dtype=dtype, key=Fill("normal", exponent)).build()
        assert np.isfinite(arrays.key.astype(np.float64)).all()
        assert (arrays.key.astype(np.float64) != 0).any()


def test_hidden_keys_do_not_change_the_seed() -> None:
    call = HostileCall()
    first, second = (HostileProblem(hidden=h) for h in ("same", "nan"))
    assert call.seed(first) == call.seed(second)
    assert call.seed(first) != call.seed(HostileProblem(seed=1))


def test_too_many_failures_are_a_lie() -> None:
    ledger = Ledger()
    ledger.add([Trial("sampled certificate", 0.95, held=i >= 40) for i in range(1000)])
    ledger.check_shares()
    ledger.add([Trial("sampled certificate", 0.95, held=False)] * 100)
    with pytest.raises(Lie, match="140 of 1100"):
        ledger.check_shares()
    assert binomial_excess(1000, 0, 0.95) == 1.0


def test_a_ledger_is_saved_and_merged() -> None:
    ledger = Ledger()
    ledger.examples["certificates"] += 3
    ledger.add([Trial("sampled certificate", 0.5, held=True)])
    twice = Ledger.from_json(ledger.to_json())
    twice.merge(ledger)
    assert twice.examples["certificates"] == 6
    assert twice.trials["sampled certificate", 0.5, True] == 2


def test_a_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ledger.json"
    calm = st.builds(lambda seed: (HostileProblem(seed=seed), HostileCall()), st.integers(0))
    monkeypatch.setitem(LAWS, "calm", replace(LAWS["certificates"], cases=calm))
    for examples in ("20", "60"):
        command = ["hostile", "--law", "calm", "--chunk", "20", "--ledger", str(path)]
        monkeypatch.setattr("sys.argv", [*command, "--examples", examples])
        assert main() == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["20", "40", "60"]
