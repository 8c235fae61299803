"""HeadStats: what a backend measures about a head before anything is decided.

Facts and estimates only; no decision is taken here. A policy sees these numbers and nothing
else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.structure import Structure


@dataclass(frozen=True, slots=True)
class StructureEstimate:
    """How one structure would do on this head, estimated from held-out probe rows.

    Attributes
    ----------
    structure : Structure
    share : float
        Estimated share of the visible scores that it computes, in [0, 1].
    rank : int
        Columns that stand for a row's far field (landmarks + pools), or the feature rank.
    row_error_estimate : float
        Estimated error at the budget's row quantile, relative to the rms output row.
    frobenius_estimate : float
        Estimated relative Frobenius error.
    """

    structure: Structure
    share: float
    rank: int
    row_error_estimate: float
    frobenius_estimate: float


@dataclass(frozen=True, slots=True)
class HeadStats:
    """Measured facts of one (sequence, head).

    Attributes
    ----------
    len_q, len_kv, dim_qk, dim_v : int
    visible : int
        Scores that the mask leaves.
    entropy : float
        Mean Shannon entropy of the sampled softmax rows, in nats.
    entropy_relative : float
        The same divided by ln(visible keys), in [0, 1].
    score_max_abs : float
        Largest absolute scaled score among the sampled rows.
    saturation : float
        Mean over the sampled rows of the largest softmax weight, in [0, 1].
    query_norm_upper, key_norm_upper, value_norm_upper : float
        Largest Euclidean norm of a query row, key and value (visible ones).
    output_rms_estimate : float
        Root-mean-square norm of the sampled exact output rows.
    stable_rank : float
        ``|K|_F² / |K|_2²`` of the centred visible keys; NaN where it was not found.
    participation_ratio : float
        (Σλ)² / Σλ² of their Gram spectrum; NaN where it was not found.
    landmark_curve : mapping of float to float
        Unrepresented mass -> share of keys needed as landmarks to leave no more than that.
    feature_residual_upper : mapping of int to float
        Feature rank -> upper bound of the score error that this rank leaves (theorem 6).
    format_errors : mapping of (str, str) to float
        (qk, pv) -> estimated row error at the budget's quantile on the sampled rows.
    structures : tuple of StructureEstimate
        Candidates that the backend tried on held-out sampled rows; Dense is implied.
    nonfinite : bool
        Whether a visible input is NaN or Inf, or scores might overflow: only dense is safe.
    sampled_rows : int
        Rows behind the estimates (0 = nothing was sampled).
    """

    len_q: int
    len_kv: int
    dim_qk: int
    dim_v: int
    visible: int
    entropy: float = 0.0
    entropy_relative: float = 0.0
    score_max_abs: float = 0.0
    saturation: float = 0.0
    query_norm_upper: float = 0.0
    key_norm_upper: float = 0.0
    value_norm_upper: float = 0.0
    output_rms_estimate: float = 0.0
    stable_rank: float = float("nan")
    participation_ratio: float = float("nan")
    landmark_curve: Mapping[float, float] = field(default_factory=dict)
    feature_residual_upper: Mapping[int, float] = field(default_factory=dict)
    format_errors: Mapping[tuple[str, str], float] = field(default_factory=dict)
    structures: tuple[StructureEstimate, ...] = ()
    nonfinite: bool = False
    sampled_rows: int = 0


@dataclass(frozen=True, slots=True)
class ProblemStats:
    """Stats of every head of a problem."""

    heads: Mapping[HeadIndex, HeadStats]


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """What a policy wants measured; a backend measures nothing that is not asked for.

    Attributes
    ----------
    rows : float
        Row share whose error quantile is to be estimated.
    structures : tuple of Structure
        Candidates to try on held-out rows, cheapest first.
    enough_error : float
        Candidates of one kind need not be tried beyond the first with this row error or less.
    formats : tuple of (str, str)
        (qk, pv) pairs to try on sampled rows.
    spectrum : bool
        Whether the spectral proxies and feature residuals are wanted.
    seed : int
        Seed of the probe rows.
    enough_share : float
        Other kinds need not be tried once such a candidate keeps at most this share of the
        scores.
    most_share : float
        Landmarks that keep more than this share cannot pay: a head that needs more may be left
        alone as soon as that is seen.
    """

    rows: float
    structures: tuple[Structure, ...]
    enough_error: float
    formats: tuple[tuple[str, str], ...]
    spectrum: bool
    seed: int
    enough_share: float = 1.0
    most_share: float = 1.0


def problem_shapes(problem: AttentionProblem) -> dict[HeadIndex, HeadStats]:
    """Sizes of every head of a problem, as stats without measurements."""
    out = {}
    for sequence in problem.sequences:
        shape = HeadStats(
            len_q=sequence.len_q,
            len_kv=sequence.len_kv,
            dim_qk=problem.dim_qk,
            dim_v=problem.dim_v,
            visible=problem.visible_scores(sequence.index),
        )
        out.update({(sequence.index, head): shape for head in range(problem.heads_q)})
    return out
