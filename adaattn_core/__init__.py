"""AdaAttn: attention computed to a stated tolerance, with a certificate of its error."""

from adaattn_core.api import attention
from adaattn_core.budget import ErrorBudget
from adaattn_core.certificates.data import Certificate, HeadCertificate
from adaattn_core.errors import AdaAttnError
from adaattn_core.mask import Mask
from adaattn_core.paged import PagedKV
from adaattn_core.pages import Pages, quantise_pages
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.plugins.registry import get_backend, list_backends
from adaattn_core.policies import (
    BudgetPolicy,
    CalibratedPolicy,
    EntropyPolicy,
    FixedPolicy,
    PagedPolicy,
)
from adaattn_core.problem import AttentionProblem
from adaattn_core.result import AttentionResult
from adaattn_core.structure import BlockSparse, Dense, Landmark, LowRank, ScoreSkip

__version__ = "0.1.0"

__all__ = [
    "AdaAttnError",
    "AttentionProblem",
    "AttentionResult",
    "BlockSparse",
    "BudgetPolicy",
    "CalibratedPolicy",
    "Certificate",
    "Dense",
    "EntropyPolicy",
    "ErrorBudget",
    "FixedPolicy",
    "HeadCertificate",
    "HeadPlan",
    "Landmark",
    "LowRank",
    "Mask",
    "PagedKV",
    "PagedPolicy",
    "Pages",
    "Plan",
    "ScoreSkip",
    "__version__",
    "attention",
    "get_backend",
    "list_backends",
    "quantise_pages",
]
