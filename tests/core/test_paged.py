"""Pages and their table: what is refused, what a page keeps, and budgets over a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core import (
    ErrorBudget,
    Mask,
    PagedKV,
    PagedPolicy,
    Pages,
    attention,
    quantise_pages,
)
from adaattn_core.errors import (
    AdaAttnError,
    ArgumentError,
    BudgetInfeasibleError,
    DTypeError,
    ShapeError,
    UnsupportedError,
)
from adaattn_core.paged import HOLE
from adaattn_core.policies import PolicyContext
from adaattn_core.stats import MeasureRequest
from adaattn_core.testing.oracles import exact_attention
from adaattn_core.testing.paged import PagedSpec, paged_specs

SPEC = PagedSpec(starts=(0, 3), lengths=(37, 50), heads_kv=2, group=2, dim_qk=8, dim_v=4)


NARROW = quantise_pages(np.ones((1, 16, 8)), "i8")


class Asking(PagedPolicy):
    def request(self, context: PolicyContext) -> MeasureRequest:
        return MeasureRequest(0.95, (), 0.1, (), False, 0)


def parts(spec: PagedSpec = SPEC) -> dict[str, Any]:
    kv = spec.paged()
    return {"key": kv.key, "value": kv.value, "table": np.array(kv.table),
            "lengths": np.array(kv.lengths), "starts": np.array(kv.starts)}  # fmt: skip


def three_lines(error: AdaAttnError) -> list[str]:
    return str(error).splitlines()


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (lambda p: p["table"].__setitem__((1, 0, 0), 99), ArgumentError, "entry 99"),
        (lambda p: p["table"].__setitem__((1, 0, 1), HOLE), ArgumentError, "a hole"),
        (lambda p: p["table"].__setitem__((0, 1, 1), p["table"][0, 1, 0]), ArgumentError,
         "comes twice"),
        (lambda p: p["lengths"].__setitem__(1, 99), ArgumentError, "keys 3 to 99"),
        (lambda p: p["lengths"].__setitem__(0, 49), ArgumentError, "a hole for page 3"),
        (lambda p: p["starts"].__setitem__(0, 38), ArgumentError, "keys 38 to 37"),
        (lambda p: p.update(lengths=p["lengths"][:1]), ShapeError, "1 lengths"),
        (lambda p: p.update(table=p["table"][0]), ShapeError, "table="),
        (lambda p: p.update(table=p["table"] * 1.0), ShapeError, "table="),
        (lambda p: p.update(value=Pages.wide(p["value"].data[:-1])), ShapeError, "page counts"),
        (lambda p: p.update(value=Pages.wide(p["value"].data[:, :-1])), ShapeError,
         "page lengths"),
        (lambda p: p.update(value=Pages.wide(p["value"].data.astype(np.float16))), DTypeError,
         "f32 .keys. and f16"),
        (lambda p: p.update(key_narrow=NARROW), ArgumentError, "alone"),
        (lambda p: p.update(key=NARROW), ArgumentError, "key=Pages"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_three_lines(
    change: Any, kind: type[AdaAttnError], says: str
) -> None:
    given_parts = parts()
    PagedKV.from_pages(**given_parts)
    change(given_parts)
    with pytest.raises(kind, match=says) as caught:
        PagedKV.from_pages(**given_parts)
    assert [line.split(":")[0] for line in three_lines(caught.value)] == [
        "got", "needed", "do this",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"query": np.ones((2, 3, 1, 8), "f4")}, ShapeError, "belongs to this model"),
        ({"query": np.ones((2, 4, 1, 6), "f4")}, ShapeError, "belongs to this model"),
        ({"query": np.ones((3, 4, 1, 8), "f4")}, ShapeError, "belongs to this model"),
        ({"query": np.ones((2, 4, 1, 8), "f8")}, DTypeError, "wide pages: f32"),
        ({"value": np.ones((2, 2, 37, 4), "f4")}, ArgumentError, "the pages hold it"),
        ({"mask": Mask.causal()}, ArgumentError, "bottom_right"),
        ({"mask": Mask.key_lengths([1, 1])}, ArgumentError, "the pages state lengths"),
        ({"mask": Mask.boolean(np.ones((1, 1), bool))}, ArgumentError, "mask arrays"),
        ({"policy": Asking(), "budget": 0.1}, UnsupportedError, "nothing is measured"),
    ],
)
def test_a_cache_of_another_model_is_refused(
    arguments: dict[str, Any], kind: type[AdaAttnError], says: str
) -> None:
    query = arguments.pop("query", SPEC.arrays[0])
    with pytest.raises(kind, match=says):
        attention(query, SPEC.paged(), **arguments)


def test_a_device_is_not_another(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = replace(SPEC.paged(), device="cuda:1")
    with pytest.raises(ShapeError, match="query on cpu, pages on cuda:1"):
        attention(SPEC.arrays[0], kv)


@pytest.mark.parametrize("format", ["i8", "e4m3"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_narrow_page_knows_what_it_lost(format: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = data.draw(st.sampled_from(((1, 1, 1), (3, 16, 8), (2, 64, 5))))
    x = rng.standard_normal(shape) * 10.0 ** data.draw(st.integers(-30, 25))
    x = x * 10.0 ** rng.integers(-4, 4, shape[2]) + data.draw(st.sampled_from((0.0, 1.0, 1e6)))
    x = x.astype(data.draw(st.sampled_from(("f4", "f8"))))
    pages = quantise_pages(x, format)
    held = np.stack([pages.read(n) for n in range(pages.count)]).astype(np.float64)
    lost = np.sqrt(((x.astype(np.float64) - held) ** 2).sum(axis=2)).max(axis=1)
    assert (lost <= pages.residual_upper).all()
    # No channel loses more than half a step of its own range (e4m3: 2^-4 of half of it), f16
    # scales and the rounding of the unit aside.
    reach = (x.max(axis=1) - x.min(axis=1)).astype(np.float64) / 2
    unit = pages.unit[:, None].astype(np.float64)
    step = {"i8": 0.5 / 127, "e4m3": 2.0**-4}[format]
    allowed = reach * step * 1.02 + unit * (2.0**-11 * step + 2.0**-22)
    assert (np.abs(x - held).max(axis=1) <= allowed).all()


def test_constant_and_zero_pages_are_kept_exactly() -> None:
    x = np.stack([np.zeros((16, 4)), np.full((16, 4), 0.75)]).astype("f4")
    pages = quantise_pages(x, "i8")
    assert (np.stack([pages.read(0), pages.read(1)]) == x).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**101])
def test_pages_that_no_code_can_hold_stay_wide(value: float) -> None:
    x = np.ones((2, 4, 4))
    x[1, 2, 3] = value
    with pytest.raises(ArgumentError, match="1 pages with NaN, Inf or huge"):
        quantise_pages(x, "i8")


@given(spec=paged_specs())
@settings(max_examples=40, deadline=None)
def test_gather_undoes_the_pages(spec: PagedSpec) -> None:
    """Wide keys come back bit for bit, narrow ones within the residuals, in their order."""
    kv = spec.paged()
    dense = spec.dense()
    for got, exact, side in zip(kv.gather(), (dense.key, dense.value), (0, 1), strict=True):
        for b, h in np.ndindex(kv.batch, kv.heads_kv):
            n = kv.visible[b]
            lost = np.linalg.norm(got[b, h, :n] - exact[b, h, :n].astype(np.float64), axis=1)
            assert (lost <= kv.residuals(b, h)[side] * (1 + 1e-6)).all()
            assert spec.narrow or (lost == 0).all()
            assert (got[b, h, n:] == 0).all()


def test_footprint_of_eight_bits() -> None:
    spec = PagedSpec(lengths=(4096,), page_len=128, dim_qk=128, dim_v=128, dtype="f16",
                     narrow="i8")  # fmt: skip
    key, value = (x[0].reshape(-1, 128, 128) for x in spec.arrays[1:])
    narrow = [quantise_pages(x.astype("f4"), "i8") for x in (key, value)]
    empty = Pages.wide(np.zeros((0, 128, 128), "f2"))
    kv = PagedKV.from_pages(empty, empty, table=np.arange(32)[None, None], lengths=[4096],
                            key_narrow=narrow[0], value_narrow=narrow[1])  # fmt: skip
    assert kv.footprint()["ratio"] <= 0.53
    wide = replace(spec, narrow="").paged().footprint()["ratio"]
    assert 1.0 <= wide <= 1.001


@pytest.mark.parametrize("narrow", ["", "i8"])
def test_budgets_over_pages_hold_by_theorem(narrow: str) -> None:
    """A peaked row: most value pages are left out, and the certificate says what that costs."""
    spec = PagedSpec(lengths=(700,), page_len=64, dim_qk=32, dim_v=32, heads_kv=2,
                     narrow=narrow, skew=3.0, seed=5)  # fmt: skip
    asked = ErrorBudget(0.05, 1.0, 1.0, "worst_case", "report" if narrow else "escalate")
    result = attention(spec.arrays[0], spec.paged(), budget=asked, scale=3.0)
    exact = exact_attention(replace(spec.dense(), scale=3.0)).out
    size = np.linalg.norm(result.out, axis=-1)
    error = np.linalg.norm(result.out - exact, axis=-1)
    assert (error <= result.certificate.upper[:, :, None] * size).all()
    assert set(result.certificate.guarantee.flat) == {"worst_case"}
    assert result.plan.policy == "paged"
    assert min(facts.share for facts in result.facts.values()) < 0.5
    assert narrow or (result.certificate.upper <= 0.05).all()


def test_a_budget_that_8_bits_cannot_keep_is_said() -> None:
    spec = replace(SPEC, narrow="e4m3", lengths=(48, 50))
    with pytest.raises(BudgetInfeasibleError):
        attention(spec.arrays[0], spec.paged(), budget=1e-3)
