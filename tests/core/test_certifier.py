"""Sampled certificates: how many rows are looked at, and how often the sentence is true."""

import numpy as np
import pytest
from scipy.stats import binom

from adaattn_core import AttentionProblem, ErrorBudget, HeadPlan, Landmark, Mask, Plan
from adaattn_core.certificates.certifier import HOPELESS, LOOKS, ROUNDS, Certifier
from adaattn_core.facts import RawResult, RowErrors, RunFacts

ROWS = 4096
BUDGET = ErrorBudget(rel=0.1, rows=0.95, confidence=0.95)


class Oracle:
    """A backend whose row errors are given, in units of the output's rms."""

    name = "oracle"

    def __init__(self, errors):
        self.errors = errors
        self.asked = []

    def row_errors(self, problem, raw, rows):
        self.asked.append({index: len(drawn) for index, drawn in rows.items()})
        return {
            index: RowErrors(self.errors[drawn], np.ones(len(drawn)), 0.0)
            for index, drawn in rows.items()
        }


def certify(errors, seed=0):
    x = np.ones((1, 1, len(errors), 8), np.float32)
    problem = AttentionProblem.from_arrays(x, x, x, mask=Mask.causal())
    plan = Plan.uniform(problem, HeadPlan(structure=Landmark()))
    facts = RunFacts(share=0.5, output_rms=1.0, keys_max=len(errors), value_norm_upper=1.0)
    backend = Oracle(np.asarray(errors))
    certifier = Certifier(problem, backend, BUDGET, seed)
    raw = RawResult(out=None, lse=None, facts={(0, 0): facts})
    return certifier.certify(raw, plan, [(0, 0)])[0, 0], backend.asked, certifier


def test_easy_heads_are_looked_at_once():
    head, asked, _ = certify(np.full(ROWS, 0.01))
    assert head.upper == pytest.approx(0.01)
    assert len(asked) == 1
    assert asked[0][0, 0] < ROWS // 20


def test_near_misses_get_a_longer_look():
    errors = np.full(ROWS, 0.01)
    errors[: int(0.03 * ROWS)] = 1.1 * BUDGET.rel  # 3% of the rows: the sentence is true
    looks = [certify(errors, seed)[:2] for seed in range(40)]
    longer = [(head, asked) for head, asked in looks if len(asked) > 1]
    assert longer
    for _, (first, second) in longer:
        assert second[0, 0] == pytest.approx(first[0, 0] * LOOKS[1] / LOOKS[0], rel=0.01)
    passed = [head.upper <= BUDGET.rel for head, _ in longer]
    assert np.mean(passed) > 0.5


def test_hopeless_heads_are_not_looked_at_again():
    head, asked, _ = certify(np.full(ROWS, 1.01 * HOPELESS * BUDGET.rel))
    assert len(asked) == 1
    assert not head.holds(BUDGET)


def test_short_heads_are_computed_whole():
    errors = np.linspace(0, 0.2, 300)
    head, asked, _ = certify(errors)
    assert asked == [{(0, 0): 300}]
    assert head.confidence == 1
    assert head.upper == pytest.approx(errors[284])  # the 285th of 300


def test_rounds_run_out():
    *_, certifier = certify(np.full(ROWS, 1.0))
    assert not certifier.exhausted((0, 0))
    certifier.rounds[0, 0] = ROUNDS
    assert certifier.exhausted((0, 0))


@pytest.mark.parametrize("shape", ["uniform", "heavy"])
def test_the_sentence_is_true_as_often_as_it_says(shape):
    rng = np.random.default_rng(7)
    errors = rng.uniform(0, 0.11, ROWS) if shape == "uniform" else 0.02 * rng.pareto(2, ROWS)
    draws = 400
    truth = np.sort(errors)[int(np.ceil(BUDGET.rows * ROWS)) - 1]
    false = sum(certify(errors, seed)[0].upper < truth for seed in range(draws))
    assert false <= binom.ppf(1 - 1e-6, draws, 1 - BUDGET.confidence)
