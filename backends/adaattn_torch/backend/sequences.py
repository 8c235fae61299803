"""One sequence of a problem as tensors: operands in a format, masks, and which heads are sound.

Keys that no row's interval reaches are cut off at once, so that nothing they hold matters.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from adaattn_core.problem import AttentionProblem, SequenceSpan
from adaattn_torch.backend.masking import SequenceMask
from adaattn_torch.backend.operands import (
    SCALE_RANGE,
    SCORE_RANGE,
    Operands,
    diameter_upper,
    float32_is_exact,
    peak,
    rounded,
    row_norms_upper,
)
from adaattn_torch.backend.tensors import DTYPES, as_tensor

NARROW = ("f16", "bf16")


TAME = 1e15
"""Numbers up to this do no harm where they are not seen."""


class Sequence:
    """See the module's text.

    Attributes
    ----------
    span : SequenceSpan
    mask : SequenceMask
    query, key, value : Tensor, shape (heads, len, dim)
        In the input's dtype, views.
    """

    def __init__(self, problem: AttentionProblem, index: int) -> None:
        self.span: SequenceSpan = problem.sequences[index]
        self.scale, self.dtype = problem.scale, problem.dtype
        query, key, value = (as_tensor(x) for x in (problem.query, problem.key, problem.value))
        mask = SequenceMask.of(problem, index, query.device)
        low, high = mask.seen_range
        rows = slice(self.span.q_start, self.span.q_stop)
        keys = slice(self.span.kv_start + low, self.span.kv_start + high)
        batch = self.span.batch
        self.query, self.key, self.value = (
            query[batch, :, rows], key[batch, :, keys], value[batch, :, keys],
        )  # fmt: skip
        self._mask = mask.cut(low, high)
        self._forget_unseen()
        self._operands: dict[Any, Operands] = {}

    def _forget_unseen(self) -> None:
        """Replace what no row sees by zeros where it could do harm: NaN, Inf, huge numbers."""
        mask = self._mask
        whole = bool((mask.stop > mask.start).all())
        if not (whole and mask.structural) and not is_tame(self.query):
            live, _ = mask.visibility
            self.query = torch.where(live[..., None], self.query, 0)
        if not mask.structural and not (is_tame(self.key) and is_tame(self.value)):
            _, seen = mask.visibility
            if len(seen) > 1:
                seen = seen.unflatten(0, (len(self.key), -1)).any(dim=1)
            self.key, self.value = (
                torch.where(seen[..., None], x, 0) for x in (self.key, self.value)
            )

    @cached_property
    def mask(self) -> SequenceMask:
        """The masks; an additive one with the sizes that it is weighed against."""
        mask = self._mask
        if mask.bias is not None:
            whole = self.plain
            largest = peak(whole.key_norms).repeat_interleave(whole.group_size)
            mask.reach = whole.query_norms * self.scale * largest[:, None]
            mask.value_max = float(peak(whole.value_norms).max())
        return mask

    def operands(self, dtype: torch.dtype) -> Operands:
        """Return inputs in a working dtype, converted once."""
        if dtype not in self._operands:
            inputs = Operands(self.query, self.key, self.value, self.scale)
            self._operands[dtype] = inputs.to(dtype)
        return self._operands[dtype]

    @property
    def plain(self) -> Operands:
        """Inputs as norms are taken of them: float32, or float64 as they are."""
        return self.operands(torch.float64 if self.dtype == "f64" else torch.float32)

    def working(self, qk: str, pv: str) -> torch.dtype:
        """Dtype in which a pair of formats is multiplied.

        On a CPU 16-bit formats are multiplied in float32: it is as fast without AMX, and what
        sums of 16-bit products are kept in differs between libraries (some round them to 16
        bits). So is a format that the inputs do not have, after rounding to it. Where float32
        products are not what they say (`float32_is_exact`), float64 does the work.
        """
        if qk == "f64":
            return torch.float64
        on_cpu = self.query.device.type == "cpu"
        if qk == pv == self.dtype and qk in NARROW and not on_cpu:
            return DTYPES[qk]
        return torch.float32 if float32_is_exact() else torch.float64

    def formatted(self, qk: str, pv: str) -> Operands:
        """Operands rounded to a pair of formats."""
        base = self.operands(self.working(qk, pv))
        if {qk, pv} <= {"f32", "f64", self.dtype}:
            return base
        if (qk, pv) not in self._operands:
            self._operands[qk, pv] = Operands(
                rounded(base.query, qk), rounded(base.key, qk), rounded(base.value, pv),
                self.scale,
            )  # fmt: skip
        return self._operands[qk, pv]

    def careful(self, qk: str, pv: str) -> Operands:
        """Return them in float64, for numbers that fused kernels would not survive."""
        wide = self.operands(torch.float64)
        return Operands(
            rounded(wide.query, qk), rounded(wide.key, qk), rounded(wide.value, pv), self.scale
        )

    # -- what heads are like -------------------------------------------------------------------
    @cached_property
    def live(self) -> torch.Tensor:
        """Rows that see a key: (heads or 1, len_q)."""
        return self.mask.known.live

    @cached_property
    def seen_keys(self) -> torch.Tensor | None:
        """Keys that a head's rows see: (heads_q or 1, len_kv); None for all that are kept."""
        return None if self.mask.structural else self.mask.known.seen_keys

    def key_peaks(self, norms: torch.Tensor) -> torch.Tensor:
        """Largest of norms (heads_kv, len_kv) over the keys that each query head sees."""
        size = len(self.query) // len(self.key)
        if self.seen_keys is None:
            return peak(norms).repeat_interleave(size)
        return peak(norms.repeat_interleave(size, dim=0), self.seen_keys)

    @cached_property
    def query_peaks(self) -> torch.Tensor:
        """Largest norm of a query row of each head that sees a key."""
        return peak(self.plain.query_norms, self.live)

    @cached_property
    def sizes(self) -> dict[str, list[float]]:
        """Norms and diameters of what each head's rows see, by the names of `RunFacts`."""
        whole = self.plain
        return {
            "query_norm_upper": self.query_peaks.tolist(),
            "key_norm_upper": self.key_peaks(whole.key_norms).tolist(),
            "value_norm_upper": self.key_peaks(whole.value_norms).tolist(),
            "value_diameter_upper": self._diameters().tolist(),
        }

    def _diameters(self) -> torch.Tensor:
        whole, size = self.plain, self.plain.group_size
        if self.seen_keys is None:
            return diameter_upper(whole.value).repeat_interleave(size)
        value = whole.value.repeat_interleave(size, dim=0)
        return diameter_upper(value, self.seen_keys.expand(len(value), whole.len_kv))

    @cached_property
    def regular(self) -> list[bool]:
        """Whether a head's numbers are finite and no score of it can overflow in float32.

        Hidden keys count as well: fused kernels multiply them before they hide them.
        """
        whole = self.plain
        size = whole.group_size
        key, value = (
            peak(norms).repeat_interleave(size)
            for norms in (whole.key_norms, whole.value_norms)
        )
        reach = peak(whole.query_norms) * max(self.scale, 1.0)
        largest = torch.stack(
            [reach, reach * key, key.clone(), value * max(whole.len_kv, 1)]
        ).amax(dim=0)
        sound = largest < SCORE_RANGE[whole.query.dtype]
        if whole.query.dtype == torch.float32:
            sound &= SCALE_RANGE[0] < self.scale < SCALE_RANGE[1]
        if self.mask.bias is not None:
            sound &= ~self.mask.known.nonfinite
        return [bool(x) for x in sound.tolist()]

    @cached_property
    def fits_float32(self) -> bool:
        """Whether float64 inputs may be cast to float32 without leaving its range."""
        if self.dtype != "f64":
            return True
        most = SCORE_RANGE[torch.float32]
        whole = self.plain
        reach = float(peak(whole.query_norms).max()) * max(self.scale, 1.0)
        key, value = (float(peak(x).max()) for x in (whole.key_norms, whole.value_norms))
        largest = max(reach, reach * key, key, value * max(whole.len_kv, 1))
        return largest < most and SCALE_RANGE[0] < self.scale < SCALE_RANGE[1]

    def residuals(self, qk: str, pv: str) -> dict[str, torch.Tensor]:
        """Largest norm of what rounding took of a vector that counts, by head."""
        heads = len(self.query)
        none = self.query_peaks.new_zeros(heads)
        names = ("query", "key", "value")
        given = (self.dtype if self.dtype in NARROW else "f32", "f64")
        if all(name in ("f32", "f64") or name == given[0] for name in (qk, pv)):
            return dict.fromkeys((f"{n}_residual_upper" for n in names), none)
        base, kept = self.operands(torch.float32), self.formatted(qk, pv).to(torch.float32)
        query, key, value = (
            row_norms_upper(getattr(base, n) - getattr(kept, n)) for n in names
        )
        return {
            "query_residual_upper": peak(query, self.live),
            "key_residual_upper": self.key_peaks(key),
            "value_residual_upper": self.key_peaks(value),
        }


def is_tame(x: torch.Tensor) -> bool:
    """Whether every number is finite, and small enough that products cannot overflow."""
    if not x.numel():
        return True
    low, high = (float(edge) for edge in torch.aminmax(x))
    return low >= -TAME and high <= TAME
