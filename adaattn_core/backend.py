"""The backend contract: what a plugin provides (what it hands back: adaattn_core.facts)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from adaattn_core.facts import RawResult, RowErrors
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

        The one exception is said in the result: heads of which a row sees NaN or Inf run dense
        (`RawResult.ran_dense`), whatever their structure.

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
