"""What a run hands back: arrays, facts of every head for theorems, errors of sampled rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from adaattn_core.problem import HeadIndex


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What theorem 7 charges for the arithmetic of an executor.

    A backend states what it knows of its kernels. What it leaves out is bounded for every
    executor that computes as docs/math/08-composition.md describes.

    Attributes
    ----------
    step_keys : int
        Fewest keys of a step of the streaming softmax, the last one of a row aside; 0 where
        that is not known: steps are then taken to have 64 keys, or a score-skip tile's. A key's
        weight is one exponential, and one more for every later step.
    sum_keys_max : int
        Most keys that are summed in one product before it is added to the row's running sums;
        0 where that is not known: a row's keys may then make one long sum.
    score_rel_upper : float or None
        Error of a score's sum of products, relative to ``scale |q| |k|`` of the operands as
        multiplied. None: of a sum in the plan's format, in any order.
    sum_rel_upper : float or None
        Error of a row's sum of weighted values, relative to the sum of their magnitudes. None:
        of a sum in the plan's format, in any order.
    exp_rel_upper : float or None
        Relative error of one exponential. None: 4 ulp.
    tanh_upper : float or None
        Absolute error of a softcap's tanh. None: 4 ulp, relative.
    """

    step_keys: int = 0
    sum_keys_max: int = 0
    score_rel_upper: float | None = None
    sum_rel_upper: float | None = None
    exp_rel_upper: float | None = None
    tanh_upper: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a run found out about one head, exactly or as upper bounds; input to the theorems.

    Norms are Euclidean and taken over visible vectors; `*_residual_upper` bound the difference
    between a vector and what the format (or the feature rank) kept of it. What a backend does
    not state is taken for unknown: no theorem then says anything.

    Attributes
    ----------
    keys_max : int
        Most visible keys of a row.
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
        Largest share of a row's softmax mass that was left out.
    bias_max_abs : float
        Largest magnitude of what the additive mask adds to a score, 0 without one. A backend
        may shift a row's mask as a whole (softmax does not see it), and keys that a row's mask
        leaves no weight that float64 could hold are hidden: they do not count.
    sink_abs : float
        Magnitude of the head's sink; 0 where it is -inf. Read where the problem has sinks.
    arithmetic : Arithmetic
        How it was computed.
    output_rms : float
        Root-mean-square norm of the returned rows, or less.
    nonfinite : bool
        Whether the returned rows hold NaN or Inf.
    """

    keys_max: int
    share: float = 1.0
    rank: int = 0
    query_norm_upper: float = math.inf
    key_norm_upper: float = math.inf
    value_norm_upper: float = math.inf
    query_residual_upper: float = math.inf
    key_residual_upper: float = math.inf
    value_residual_upper: float = math.inf
    value_diameter_upper: float = math.inf
    score_residual_upper: float = math.inf
    query_step_upper: float = 0.0
    key_step_upper: float = 0.0
    dropped_mass_upper: float = math.inf
    bias_max_abs: float = math.inf
    sink_abs: float = math.inf
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    output_rms: float = 0.0
    nonfinite: bool = False

    @classmethod
    def of_nothing(cls) -> RunFacts:
        """Facts of a head whose rows see nothing: they are 0, exactly."""
        zeros: dict[str, Any] = {f.name: 0.0 for f in fields(cls) if f.default == math.inf}
        return cls(keys_max=0, **zeros)


_KINDS = {"bool": np.bool_, "int": np.int64, "float": np.float64}
_COLUMNS = {f.name: _KINDS[str(f.type)] for f in fields(RunFacts) if f.name != "arithmetic"}


@dataclass(frozen=True, slots=True, eq=False)
class FactsTable:
    """Facts of several heads, one array per field of `RunFacts`; a row of it is a `RunFacts`.

    Attributes
    ----------
    index : tuple of (sequence, head)
        Which head each row is.
    columns : dict of str to ndarray, shape (heads,)
        Fields of `RunFacts` by name, `arithmetic` aside.
    arithmetic : tuple of Arithmetic
        Of each row; the same object where it is the same.
    """

    index: tuple[HeadIndex, ...]
    columns: dict[str, NDArray[Any]]
    arithmetic: tuple[Arithmetic, ...]

    @classmethod
    def of(cls, facts: Mapping[HeadIndex, RunFacts], heads: Sequence[HeadIndex]) -> FactsTable:
        """Gather facts of some heads; a mapping that holds a table hands out its own."""
        if isinstance(facts, Tabled):
            return facts.table(heads)
        rows = [facts[index] for index in heads]
        columns: dict[str, NDArray[Any]] = {
            name: np.array([getattr(row, name) for row in rows], kind)
            for name, kind in _COLUMNS.items()
        }
        return cls(tuple(heads), columns, tuple(row.arithmetic for row in rows))

    def row(self, number: int) -> RunFacts:
        """Facts of one row."""
        said: dict[str, Any] = {
            name: column[number].item() for name, column in self.columns.items()
        }
        return RunFacts(arithmetic=self.arithmetic[number], **said)


@runtime_checkable
class Tabled(Protocol):
    """A mapping of facts that knows them as arrays."""

    def table(self, heads: Sequence[HeadIndex]) -> FactsTable:
        """Return facts of some heads."""
        ...


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
    ran_dense : set of (sequence, head)
        Heads that ran dense although the plan names another structure, because a row sees NaN
        or Inf, or because scores might overflow: only then do these reach exactly the rows that
        see them.
    workspace : object
        Opaque, of the backend that ran: what `row_errors` need not prepare again.
    """

    out: Any
    lse: Any
    facts: dict[HeadIndex, RunFacts] = field(default_factory=dict)
    ran_dense: set[HeadIndex] = field(default_factory=set)
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
