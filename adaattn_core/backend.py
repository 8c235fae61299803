"""The backend contract: what a plugin provides, and what passes between it and the core."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from adaattn_core.plan import Plan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import MeasureRequest, ProblemStats
from adaattn_core.structure import Structure


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do, as data that policies and error messages read.

    Attributes
    ----------
    qk_formats, pv_formats : tuple of str
        Operand formats it runs (or emulates).
    structures : tuple of str
        Structure kinds it runs.
    array_devices : tuple of str
        Device kinds of the arrays it accepts (``"cpu"``, ``"cuda"``).
    measures : bool
        Whether `Backend.measure` and `Backend.row_errors` are provided.
    target : str
        Cost model that describes it (a name in adaattn_core.costs).
    emulated_formats : tuple of str
        Formats computed by rounding operands and multiplying in a wider format: right numbers,
        no time saved.
    masks : tuple of str
        Kinds of masks accepted: "causal", "window", "lengths", "ragged", "boolean", "additive".
    sizes : tuple of Structure
        Structures with the sizes (tiles, groups, bands, ...) that it prefers to run; policies
        change what they leave out. Kinds that are not named come in the policy's own sizes.
    """

    qk_formats: tuple[str, ...]
    pv_formats: tuple[str, ...]
    structures: tuple[str, ...]
    array_devices: tuple[str, ...]
    measures: bool
    target: str
    emulated_formats: tuple[str, ...] = ()
    masks: tuple[str, ...] = (
        "causal",
        "window",
        "lengths",
        "ragged",
        "boolean",
        "additive",
    )
    sizes: tuple[Structure, ...] = ()


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run found out about one head, exactly or as upper bounds; input to the theorems.

    Norms are Euclidean and taken over visible vectors; `*_residual_upper` bound the difference
    between a vector and what the format (or the feature rank) kept of it.

    Attributes
    ----------
    share : float
        Share of the visible scores that were computed.
    rank : int
        Columns standing for the far field, or feature rank; 0 for structures without one.
    query_norm_upper, key_norm_upper, value_norm_upper : float
    query_residual_upper, key_residual_upper, value_residual_upper : float
        For `key_*`: of the keys as multiplied (after smoothing and projection).
    value_diameter_upper : float
        Largest distance between two visible value vectors (an upper bound).
    score_residual_upper : float
        Largest score error from a feature projection, 0 without one.
    query_step_upper, key_step_upper : float
        Largest spacing between neighbouring representable numbers of the 8-bit operands, in the
        operands' own units (0 for wider formats): what stochastic rounding can move by.
    dropped_mass_upper : float
        Largest share of a row's softmax mass that was left out (inf where nothing is known).
    bias_max_abs : float
        Largest finite magnitude of the additive mask.
    keys_max : int
        Most visible keys of a row.
    sum_keys_max : int
        Most keys that are summed in one product before it is added to the row's running sums;
        0 where that is not known: a row's keys may then make one long sum.
    output_rms : float
        Root-mean-square norm of the returned rows.
    nonfinite : bool
        Whether the returned rows hold NaN or Inf.
    """

    share: float = 1.0
    rank: int = 0
    query_norm_upper: float = 0.0
    key_norm_upper: float = 0.0
    value_norm_upper: float = 0.0
    query_residual_upper: float = 0.0
    key_residual_upper: float = 0.0
    value_residual_upper: float = 0.0
    value_diameter_upper: float = 0.0
    score_residual_upper: float = 0.0
    query_step_upper: float = 0.0
    key_step_upper: float = 0.0
    dropped_mass_upper: float = 0.0
    bias_max_abs: float = 0.0
    keys_max: int = 0
    sum_keys_max: int = 0
    output_rms: float = 0.0
    nonfinite: bool = False


@dataclass(slots=True)
class RawResult:
    """What a run returns; later runs of single heads write into the same arrays.

    Attributes
    ----------
    out : array, shape (batch, heads_q, len_q, dim_v)
        In the backend's own library and the input's dtype.
    lse : array of float32, shape (batch, heads_q, len_q)
        Natural log; -inf where a row sees nothing.
    facts : dict of (sequence, head) to RunFacts
    workspace : object
        Opaque, of the backend that ran: what `row_errors` need not prepare again.
    """

    out: Any
    lse: Any
    facts: dict[HeadIndex, RunFacts] = field(default_factory=dict)
    workspace: Any = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Errors of sampled rows of one head.

    Attributes
    ----------
    error : ndarray of float64, shape (rows,)
        ``|out_i - exact_i|`` as computed.
    exact_norm : ndarray of float64, shape (rows,)
        ``|exact_i|``.
    oracle_upper : float
        Upper bound of the error of the "exact" rows themselves, same unit as `error`.
    """

    error: NDArray[np.float64]
    exact_norm: NDArray[np.float64]
    oracle_upper: float


@runtime_checkable
class Backend(Protocol):
    """A mechanism: it measures and computes, and decides nothing."""

    name: str

    def capabilities(self) -> Capabilities:
        """Return what this backend can do on this machine."""
        ...

    def measure(
        self, problem: AttentionProblem, request: MeasureRequest
    ) -> tuple[ProblemStats, Any]:
        """Measure what `request` asks for.

        Returns
        -------
        stats : ProblemStats
        workspace : object
            Opaque; handed back to `run` so that nothing is measured twice. Running without it
            must give the same result.
        """
        ...

    def run(
        self,
        problem: AttentionProblem,
        plan: Plan,
        *,
        workspace: Any = None,
        heads: Collection[HeadIndex] | None = None,
        into: RawResult | None = None,
    ) -> RawResult:
        """Do exactly what the plan says, or raise UnsupportedError.

        Parameters
        ----------
        heads : collection of (sequence, head), optional
            Compute only these (an escalation); the others in `into` stay.
        into : RawResult, optional
            Result of an earlier run of the same problem, updated in place.
        """
        ...

    def row_errors(
        self, problem: AttentionProblem, raw: RawResult, rows: Mapping[HeadIndex, NDArray[Any]]
    ) -> dict[HeadIndex, RowErrors]:
        """Compare returned rows with exact attention of the same rows.

        Parameters
        ----------
        rows : mapping of (sequence, head) to ndarray of int64
            Row numbers within the sequence; repeats are allowed.
        """
        ...

    def provenance(self) -> dict[str, str]:
        """Return what computed the result: library versions, device, kernel."""
        ...
