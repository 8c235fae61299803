"""What leaves exact attention unchanged leaves the result so, up to both certificates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaattn_core.arrays import move_axis_layout
from adaattn_core.formats import FORMATS
from adaattn_core.mask import Mask
from adaattn_core.plan import Plan
from adaattn_core.problem import AttentionProblem
from adaattn_core.testing.kit import WORST_CASE, Kit, assert_same_result
from adaattn_core.testing.strategies import STORAGES, ProblemSpec, mask_specs

FEW_VALUES = ("normal", "constant", "outliers")


def _like(host: AttentionProblem, **changed: NDArray[np.generic] | Mask) -> AttentionProblem:
    """Return the problem with some arrays or the mask replaced."""
    parts = {"query": host.query, "key": host.key, "value": host.value, "mask": host.mask}
    parts.update(changed)
    return AttentionProblem.from_arrays(
        parts["query"], parts["key"], parts["value"], mask=parts["mask"], scale=host.scale
    )


@given(data=st.data())
def test_shift_of_all_keys(kit: Kit, data: st.DataObject) -> None:
    """Adding one vector to every key shifts each row's logits by a constant: same output."""
    plan = kit.head()
    spec = data.draw(kit.specs(plan, values=("normal",), poison=st.just(False)))
    host = spec.build()
    # Eighths in [-4, 4] and their sums are exact in every input format.
    dtype = FORMATS[host.dtype].dtype
    rng = np.random.default_rng(spec.seed)
    key = rng.integers(-32, 33, host.key.shape) / 8
    shift = rng.integers(-32, 33, host.dim_qk) / 8
    plain = _like(host, key=key.astype(dtype))
    moved = _like(host, key=(key + shift).astype(dtype))
    first, second = (kit.certify(kit.place(p), plan) for p in (plain, moved))
    assert_same_result(kit, first, plain, second, moved)


@given(data=st.data())
def test_order_of_keys(kit: Kit, data: st.DataObject) -> None:
    """Keys, values and mask columns in another order: same output."""
    plan = kit.head()
    arrays = tuple(k for k in ("boolean", "additive") if k in kit.capabilities.masks)
    spec = data.draw(kit.specs(plan, masks=mask_specs(arrays), values=FEW_VALUES))
    host = spec.build()
    order = np.random.default_rng(spec.seed).permutation(host.len_kv)

    def turned(mask: NDArray[np.generic] | None) -> NDArray[np.generic] | None:
        return mask if mask is None or mask.shape[-1] == 1 else mask[..., order]

    mask = replace(host.mask, allowed=turned(host.mask.allowed), bias=turned(host.mask.bias))
    key, value = (np.take(x, order, axis=2) for x in (host.key, host.value))
    other = _like(host, key=key, value=value, mask=mask)
    first, second = (kit.certify(kit.place(p), plan) for p in (host, other))
    assert_same_result(kit, first, host, second, other)


@given(data=st.data())
def test_grouped_heads_equal_repeated_heads(kit: Kit, data: st.DataObject) -> None:
    """Sharing key/value heads gives what repeating them gives."""
    plan = kit.head()
    host = data.draw(kit.specs(plan, values=FEW_VALUES)).build()
    key, value = (
        np.ascontiguousarray(np.repeat(x, host.group_size, axis=1))
        for x in (host.key, host.value)
    )
    repeated = _like(host, key=key, value=value)
    first, second = (kit.certify(kit.place(p), plan) for p in (host, repeated))
    assert_same_result(kit, first, host, second, repeated)


@pytest.mark.parametrize("storage", STORAGES[1:])
@given(data=st.data())
def test_memory_layout(kit: Kit, storage: str, data: st.DataObject) -> None:
    """The same numbers through strided, padded, transposed or broadcast views: same output."""
    plan = kit.head()
    spec = data.draw(
        kit.specs(plan, values=FEW_VALUES, storages=(storage,), poison=st.just(False))
    )
    host = spec.build()
    names = ("query", "key", "value")
    copied = _like(host, **{n: np.array(getattr(host, n), order="C") for n in names})
    first = kit.certify(spec.build(kit.home.send), plan)
    second = kit.certify(kit.place(copied), plan)
    assert_same_result(kit, first, host, second, copied)


@given(data=st.data())
def test_bshd_equals_bhsd(kit: Kit, data: st.DataObject) -> None:
    """``layout="bshd"`` takes and returns (batch, len, heads, dim) and changes nothing else."""
    plan = kit.head()
    spec: ProblemSpec = data.draw(kit.specs(plan, values=FEW_VALUES))
    problem, host = spec.build(kit.home.send), spec.build()
    first = kit.certify(problem, plan)
    turned = [move_axis_layout(x, "bshd") for x in (problem.query, problem.key, problem.value)]
    second = kit.attend(
        problem,
        arrays=turned,
        layout="bshd",
        plan=Plan.uniform(problem, plan),
        budget=WORST_CASE,
    )
    assert tuple(second.out.shape) == (host.batch, host.len_q, host.heads_q, host.dim_v)
    second = replace(second, out=move_axis_layout(second.out, "bshd"))
    assert_same_result(kit, first, host, second, host)
