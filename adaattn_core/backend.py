"""The backend contract: what a plugin provides (what it hands back: adaattn_core.facts).

Every backend is a `Backend`. Further protocols are optional, and a backend has one by having
its methods: one that `Samples` serves sampled certificates, one that `Measures` policies that
measure as well, one that `Forwards` computes exact attention without either, and one that
`Differentiates` its gradients. The last, `adaattn_core.deciding.Decides`, is for backends that
plan on a device.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from numpy.typing import NDArray

from adaattn_core.costs import CostModel
from adaattn_core.facts import RawResult, RowErrors
from adaattn_core.mask import Mask
from adaattn_core.plan import Plan
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_core.stats import MeasureRequest, ProblemStats
from adaattn_core.structure import Structure


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do, as data that policies and error messages read.

    Whether it measures is no capability: it is one that `Measures`, or it is not.

    Attributes
    ----------
    qk_formats, pv_formats : tuple of str
        Operand formats it runs (or emulates).
    structures : tuple of str
        Structure kinds it runs.
    array_devices : tuple of str
        Device kinds of the arrays it accepts (``"cpu"``, ``"cuda"``).
    target : str
        Cost model that describes it (a name in adaattn_core.costs).
    emulated_formats : tuple of str
        Formats computed by rounding operands and multiplying in a wider format: right numbers,
        no time saved.
    masks : tuple of str
        Kinds of masks accepted: "causal", "window", "lengths", "ragged", "boolean", "additive".
    rules : tuple of (str, tuple of str)
        Score rules it knows ("softcap", "sinks"; `adaattn_core.scores`), each with the
        structure kinds that it runs under it. A problem with another rule is refused.
    rule_formats : tuple of str or None
        Operand formats that it runs under score rules; None: all of them.
    sizes : tuple of Structure
        Structures with the sizes (tiles, groups, bands, ...) that it prefers to run; policies
        change what they leave out. Kinds that are not named come in the policy's own sizes.
    paged : tuple of str
        Structure kinds it runs where keys and values come as pages
        (`adaattn_core.paged.PagedKV`); empty where it takes no pages.
    narrow : tuple of (str, str)
        Pairs of operand formats, one of them of 8 bits, in which a backend that decides
        (`adaattn_core.deciding.Decides`) runs dense heads first, to run those again at the
        inputs' own precision whose certificates miss the budget.
    costs : mapping of str to CostModel
        By kind of device: prices that were measured on this machine. Plans are made with those
        of `target` where there are none.
    """

    qk_formats: tuple[str, ...]
    pv_formats: tuple[str, ...]
    structures: tuple[str, ...]
    array_devices: tuple[str, ...]
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
    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()
    rule_formats: tuple[str, ...] | None = None
    sizes: tuple[Structure, ...] = ()
    paged: tuple[str, ...] = ()
    narrow: tuple[tuple[str, str], ...] = ()
    costs: Mapping[str, CostModel] = field(default_factory=dict, compare=False)


@runtime_checkable
class Backend(Protocol):
    """A mechanism: it computes what a plan says, and decides nothing."""

    name: str

    def capabilities(self) -> Capabilities:
        """Return what this backend can do on this machine."""
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

    def provenance(self) -> dict[str, str]:
        """Return what computed the result: library versions, device, kernel."""
        ...


BACKEND_PARTS = ("name", "capabilities", "run", "provenance")
"""What a `Backend` must have."""


ORACLE_SHARE = 0.1
"""Share of the error asked for that exact rows may have themselves."""


@runtime_checkable
class Samples(Protocol):
    """A backend that looks at rows after a plan has run: sampled certificates need no more."""

    def row_errors(
        self,
        problem: AttentionProblem,
        raw: RawResult,
        rows: Mapping[HeadIndex, NDArray[Any]],
        *,
        enough: float = 0.0,
    ) -> dict[HeadIndex, RowErrors]:
        """Compare returned rows with exact attention of the same rows.

        Parameters
        ----------
        rows : mapping of (sequence, head) to ndarray of int64
            Row numbers within the sequence; repeats are allowed.
        enough : float
            Relative error that a certificate of these rows is asked for (`ErrorBudget.rel`).
            Exact rows may be as far from the truth as `ORACLE_SHARE` of it, in units of the
            head's `RunFacts.output_rms`, where that is cheaper; 0, the default: they are as
            near to it as the backend makes them. How near is said in either case
            (`RowErrors.oracle_upper`).
        """
        ...


@runtime_checkable
class Measures(Samples, Protocol):
    """A backend that looks at heads before a plan is made, too."""

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


@runtime_checkable
class Forwards(Protocol):
    """A backend with a short way: exact attention, and nothing that anybody could ask about it.

    Callers that hand no certificate on take it (adaattn_torch).
    """

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        mask: Mask | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Any = None,
    ) -> tuple[Any, Any]:
        """Compute what `Backend.run` computes under the plan of `ExactPolicy`, bit for bit.

        Parameters
        ----------
        query : array, shape (batch, heads_q, len_q, dim_qk)
        key : array, shape (batch, heads_kv, len_kv, dim_qk)
        value : array, shape (batch, heads_kv, len_kv, dim_v)
            The arrays that `Backend.run` takes.
        mask : Mask, optional
            Default: every key is visible.
        scale : float, optional
            Factor on the scores; default 1/sqrt(dim_qk).
        softcap : float, optional
        sinks : array, optional, shape (heads_q,)
            Score rules (`adaattn_core.scores`); passed only to backends whose capabilities name
            them, so others need not have the parameters.

        Returns
        -------
        out : array, shape (batch, heads_q, len_q, dim_v)
        lse : array of float32, shape (batch, heads_q, len_q)

        Raises
        ------
        UnsupportedError
            For what this way does not take; the caller then goes the ordinary one.
        """
        ...


class Gradients(NamedTuple):
    """What `Differentiates.backward` returns.

    Attributes
    ----------
    query : array, shape (batch, heads_q, len_q, dim_qk)
    key : array, shape (batch, heads_kv, len_kv, dim_qk)
    value : array, shape (batch, heads_kv, len_kv, dim_v)
        In the library and dtype of the inputs.
    bias : array of float32 or float64, or None
        Of the additive mask, in its own (broadcastable) shape; None unless asked for.
    sinks : array of float32 or float64, shape (heads_q,), or None
        Of the sinks; None without them.
    """

    query: Any
    key: Any
    value: Any
    bias: Any
    sinks: Any = None


@runtime_checkable
class Differentiates(Protocol):
    """A backend that computes the gradients of exact attention.

    Whatever a forward pass approximated, these are exact attention's at the same inputs.
    """

    def backward(
        self,
        query: Any,
        key: Any,
        value: Any,
        grad_out: Any,
        *,
        out: Any = None,
        lse: Any = None,
        grad_lse: Any = None,
        mask: Mask | None = None,
        scale: float | None = None,
        need_bias: bool = False,
        deterministic: bool = False,
        softcap: float | None = None,
        sinks: Any = None,
    ) -> Gradients:
        """Compute the gradients of exact attention.

        Parameters
        ----------
        query : array, shape (batch, heads_q, len_q, dim_qk)
        key : array, shape (batch, heads_kv, len_kv, dim_qk)
        value : array, shape (batch, heads_kv, len_kv, dim_v)
            The arrays that `Backend.run` takes.
        grad_out : array, shape (batch, heads_q, len_q, dim_v)
            Gradient of the output, in the inputs' dtype.
        out : array, shape (batch, heads_q, len_q, dim_v), optional
        lse : array of float32, shape (batch, heads_q, len_q), optional
            Exact attention's own, score rules included, as `Forwards.forward` returns them.
            Both or neither: without them they are computed again. Those of an approximated
            forward are not exact attention's and must be left out.
        grad_lse : array of float32, shape (batch, heads_q, len_q), optional
            Gradient of the lse; where a row sees nothing only a sink has a share of it.
        mask : Mask, optional
            Default: every key is visible.
        scale : float, optional
            Factor on the scores; default 1/sqrt(dim_qk).
        need_bias : bool
            Whether the gradient of the additive mask is wanted too.
        deterministic : bool
            Whether the same call must give the same bits every time.
        softcap : float, optional
        sinks : array, optional, shape (heads_q,)
            Score rules (`adaattn_core.scores`).

        Returns
        -------
        Gradients
            Rows that see nothing and keys that nobody sees have a gradient of 0.

        Raises
        ------
        UnsupportedError
            For what this backend does not differentiate.
        """
        ...
