"""Policies: stats and a budget in, a plan out; pure functions of small numbers."""

from adaattn_core.policies.base import Policy, PolicyContext
from adaattn_core.policies.budget import BudgetPolicy
from adaattn_core.policies.calibrated import CalibratedPolicy
from adaattn_core.policies.compiling import CompiledPolicy, CompilesToTable, compile_policy
from adaattn_core.policies.entropy import EntropyPolicy
from adaattn_core.policies.fixed import ExactPolicy, FixedPolicy
from adaattn_core.policies.paged import PagedPolicy
from adaattn_core.policies.table import DecisionTable, decide_table, escalate_table

__all__ = [
    "BudgetPolicy",
    "CalibratedPolicy",
    "CompiledPolicy",
    "CompilesToTable",
    "DecisionTable",
    "EntropyPolicy",
    "ExactPolicy",
    "FixedPolicy",
    "PagedPolicy",
    "Policy",
    "PolicyContext",
    "compile_policy",
    "decide_table",
    "escalate_table",
]
