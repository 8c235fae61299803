"""Sampled certificates: how many rows are looked at, and how often the sentence is true."""

import numpy as np
import pytest
from scipy.stats import binom

from adaattn_core import AttentionProblem, ErrorBudget, HeadPlan, Landmark, Mask, Plan
from adaattn_core.certificates.certifier import ROUNDS, Certifier, rows_asked, rows_drawn
from adaattn_core.facts import RawResult, RowErrors, RunFacts

ROWS = 4096
BUDGET = ErrorBudget(rel=0.1, rows=0.95, confidence=0.95)


class Oracle:
    """A backend whose row errors are given, in units of the output's rms."""

    name = "oracle"

    def __init__(self, errors):
        self.errors = errors
        self.asked = []

    def row_errors(self, problem, raw, rows, *, enough=0.0):
        self.asked.append({index: len(drawn) for index, drawn in rows.items()})
        return {
            index: RowErrors(self.errors[drawn], np.ones(len(drawn)), 0.0)
            for index, drawn in rows.items()
        }


def certify(errors, seed=0, budget=BUDGET):
    x = np.ones((1, 1, len(errors), 8), np.float32)
    problem = AttentionProblem.from_arrays(x, x, x, mask=Mask.causal())
    plan = Plan.uniform(problem, HeadPlan(structure=Landmark()))
    facts = RunFacts(share=0.5, output_rms=1.0, keys_max=len(errors), value_norm_upper=1.0)
    backend = Oracle(np.asarray(errors))
    certifier = Certifier(problem, backend, budget, seed)
    raw = RawResult(out=None, lse=None, facts={(0, 0): facts})
    return certifier.certify(raw, plan, [(0, 0)])[0, 0], backend.asked, certifier


def test_as_many_rows_are_drawn_as_the_budget_asks_for():
    head, asked, _ = certify(np.full(ROWS, 0.01))
    assert head.upper == pytest.approx(0.01)
    assert asked == [{(0, 0): rows_drawn(BUDGET.rows, BUDGET.confidence)}]
    assert asked[0][0, 0] < ROWS // 10


@pytest.mark.parametrize("rows", [0.5, 0.9, 0.95, 0.99])
def test_a_certificate_asks_for_a_larger_share_of_what_it_drew(rows):
    """Heads whose error at that share of the rows keeps the budget pass every other time."""
    share, count = rows_asked(rows, 0.95), rows_drawn(rows, 0.95)
    assert rows < share < 1
    budget = ErrorBudget(rel=0.1, rows=rows, confidence=0.95)
    errors = np.linspace(0, 0.1 / share, ROWS)
    passed = np.mean([certify(errors, seed, budget)[0].upper <= 0.1 for seed in range(60)])
    assert 0.2 < passed < 0.8
    assert share * count == pytest.approx(round(share * count))


def test_short_heads_are_computed_whole():
    errors = np.linspace(0, 0.2, 200)
    head, asked, _ = certify(errors)
    assert asked == [{(0, 0): 200}]
    assert head.confidence == 1
    assert head.upper == pytest.approx(errors[189])  # the 190th of 200


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
