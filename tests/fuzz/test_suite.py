"""The suite itself is tested: it catches backends that are broken on purpose, and counts."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from adaattn_core.facts import RawResult
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.hostile.__main__ import main
from adaattn_core.testing.hostile.calls import HostileCall
from adaattn_core.testing.hostile.definition import HAS_EXTENDED_RANGE
from adaattn_core.testing.hostile.laws import (
    Lie,
    Trial,
    binomial_excess,
    judge_same_bounds,
)
from adaattn_core.testing.hostile.problems import HostileMask, HostileProblem
from adaattn_core.testing.hostile.suite import LAWS, Ledger, Run
from adaattn_core.testing.hostile.values import EXPONENTS, Fill
from adaattn_core.testing.sabotage import (
    SABOTAGES,
    Sabotage,
    SabotagedMeasures,
    sabotage,
)
from adaattn_reference.backend import NumpyBackend

pytestmark = pytest.mark.skipif(
    not HAS_EXTENDED_RANGE, reason="the definition needs a longdouble wider than float64"
)

FOUR_HUNDRED = settings(
    max_examples=400,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

CAUGHT_BY = dict.fromkeys(SABOTAGES, "certificates") | {
    "leaky_padding": "causality",
    "restless": "replay",
}


# Pages are no part of hostile problems: the kit judges them.
@pytest.mark.parametrize("name", sorted(set(SABOTAGES) - {"reversed_pages"}))
def test_a_broken_backend_is_caught(name: str) -> None:
    law = LAWS[CAUGHT_BY[name]]
    run = Run(CAUGHT_BY[name], sabotage(name, NumpyBackend()))

    @FOUR_HUNDRED
    @given(law.cases)
    def attack(case: Any) -> None:
        law.attack(run, case)

    with pytest.raises((Lie, ExceptionGroup)) as caught:
        attack()
    assert isinstance(caught.value, Lie) or caught.group_contains(Lie), "a crash, not a finding"


def _broken(how: Sabotage) -> SabotagedMeasures:
    honest = NumpyBackend()
    return SabotagedMeasures(honest, how, honest.name, honest)


def test_bounds_that_count_hidden_keys_are_caught() -> None:
    """They are no lie about the output, but what nobody sees changes them."""

    def count_all(problem: AttentionProblem, raw: RawResult) -> None:
        largest = np.nanmax(np.abs(problem.value.astype(np.float64)), initial=0.0)
        for index, facts in raw.facts.items():
            upper = max(facts.value_norm_upper, largest)
            raw.facts[index] = replace(facts, value_norm_upper=upper)

    law = LAWS["hidden keys"]
    run = Run(
        "hidden keys", _broken(Sabotage("hidden values count", law.promise, after=count_all))
    )

    @FOUR_HUNDRED
    @given(law.cases)
    def attack(case: Any) -> None:
        law.attack(run, case)

    with pytest.raises(Lie, match="hidden keys hold"):
        attack()


def test_sampled_bounds_that_fail_too_often_are_caught() -> None:
    law = LAWS["shares"]
    tenth = Sabotage(
        "a tenth of the errors",
        law.promise,
        errors=lambda e: replace(e, error=e.error / 10),
    )
    run = Run("shares", _broken(tenth))

    @FOUR_HUNDRED
    @given(law.cases)
    def attack(case: Any) -> None:
        with contextlib.suppress(Lie):  # of heads whose every row was looked at
            law.attack(run, case)

    attack()
    with pytest.raises(Lie, match="sampled certificate of confidence"):
        run.ledger.check_shares()


def test_an_example_is_rebuilt_from_its_repr() -> None:
    spec = HostileProblem(key=Fill("rows", 30), hidden="mixed", seed=7)
    again = eval(repr(spec), {c.__name__: c for c in (HostileProblem, HostileMask, Fill)})
    assert again.build().content() == spec.build().content()


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


def test_bounds_that_hidden_keys_move_are_caught() -> None:
    """Also where bits may differ: by a rounding of the unit, and no more."""

    def result(upper: float) -> Any:
        return SimpleNamespace(certificate=SimpleNamespace(upper=np.array([[upper]])))

    judge_same_bounds(result(0.1), result(0.1 * (1 + 2.0**-8)), "a repaired row")
    judge_same_bounds(result(np.inf), result(np.inf), "no bound")
    for other in (0.12, 0.0, np.inf):
        with pytest.raises(Lie, match="hidden"):
            judge_same_bounds(result(0.1), result(other), "hidden keys")
