"""Policies: stats and a budget in, a plan out; pure functions of small numbers."""

from adaattn_core.policies.base import Policy, PolicyContext
from adaattn_core.policies.budget import BudgetPolicy
from adaattn_core.policies.calibrated import CalibratedPolicy
from adaattn_core.policies.entropy import EntropyPolicy
from adaattn_core.policies.fixed import ExactPolicy, FixedPolicy

__all__ = [
    "BudgetPolicy",
    "CalibratedPolicy",
    "EntropyPolicy",
    "ExactPolicy",
    "FixedPolicy",
    "Policy",
    "PolicyContext",
]
