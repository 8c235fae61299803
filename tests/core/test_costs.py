"""What 8 bits cost on a machine: products, exponentials, and what must be quantised first."""

from __future__ import annotations

import pytest

from adaattn_core.costs import get_cost_model
from adaattn_core.plan import HeadPlan
from adaattn_core.stats import HeadStats


def head(length: int, dim: int, causal: bool = False) -> HeadStats:
    visible = length * length // (2 if causal else 1)
    return HeadStats(
        len_q=length, len_kv=length, dim_qk=dim, dim_v=dim, visible=visible, sampled_rows=0
    )


@pytest.mark.parametrize(
    ("length", "dim", "causal", "pays"),
    [
        (1024, 128, False, False),  # an H100 took 1.5 times as long
        (4096, 128, False, True),  # 0.90
        (16_384, 128, False, True),  # 0.82 to 0.88
        (65_536, 128, True, True),
        (4096, 64, False, False),
        (16_384, 64, False, False),  # 0.99: not worth an error
    ],
)
def test_8_bits_pay_on_hopper_where_they_were_measured_to(
    length: int, dim: int, causal: bool, pays: bool
) -> None:
    costs, stats = get_cost_model("sm90"), head(length, dim, causal)
    narrow = costs.dense_cost(stats, "i8", "e4m3")
    assert (narrow < costs.dense_cost(stats, "bf16", "bf16")) is pays


def test_what_is_quantised_is_charged() -> None:
    costs, stats = get_cost_model("sm90"), head(1024, 128)
    numbers = 1024 * 128
    for qk, pv, count in (("i8", "e4m3", 3), ("i8", "bf16", 2), ("bf16", "e4m3", 1)):
        plan = HeadPlan(qk=qk, pv=pv)
        assert costs.quantise_seconds(stats, plan) == count * numbers / costs.quantise_rate
    assert costs.quantise_seconds(stats, HeadPlan(qk="bf16", pv="bf16")) == 0
    assert get_cost_model("cpu").quantise_seconds(stats, HeadPlan(qk="i8", pv="i8")) == 0
