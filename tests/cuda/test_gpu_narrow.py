"""Budgets that dense heads keep in 8 bits: run so first, certified, run again if that fails."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from adaattn_core import Mask, attention
from adaattn_core.policies import BudgetPolicy

torch = pytest.importorskip("torch")


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not on_hopper(), reason="needs a GPU of compute capability 9.0"),
]
NARROW = ("i8", "e4m3")
EAGER = BudgetPolicy(narrow_worthwhile=0.9)
"""Takes 8 bits from 16,384 tokens on, sooner than the default."""


def normal(*shape: int, seed: int) -> Any:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).bfloat16()


def inputs(heads_q: int = 8, heads_kv: int = 4, length: int = 16_384, dim: int = 128) -> Any:
    return (
        normal(1, heads_q, length, dim, seed=0),
        *(normal(1, heads_kv, length, dim, seed=n) for n in (1, 2)),
    )


def errors(result: Any, q: Any, k: Any, v: Any, *, causal: bool) -> Any:
    """Errors of 512 rows a head relative to the rms row, shape (heads, rows)."""
    rows = torch.arange(0, q.shape[2], q.shape[2] // 512, device="cuda")
    group, found = q.shape[1] // k.shape[1], []
    for head in range(q.shape[1]):
        key, value = (x[0, head // group].double() for x in (k, v))
        scores = q[0, head, rows].double() @ key.T / math.sqrt(q.shape[3])
        if causal:
            hidden = torch.arange(k.shape[2], device="cuda")[None] > rows[:, None]
            scores = scores.masked_fill(hidden, -math.inf)
        away = result.out[0, head, rows].double() - torch.softmax(scores, -1) @ value
        rms = result.out[0, head].double().square().sum(-1).mean().sqrt()
        found.append((away.norm(dim=-1) / rms).cpu().numpy())
    return np.stack(found)


def formats(result: Any) -> list[tuple[str, str]]:
    plan = result.plan
    return [(plan[index].qk, plan[index].pv) for index in sorted(plan.heads)]


def covered(result: Any, found: Any) -> None:
    share = np.quantile(found, 0.95, axis=1)
    upper = result.certificate.upper[0]
    assert (upper <= 0.1).all()
    assert (share > upper).sum() <= 1, (share, upper)
    assert (share <= 1.2 * upper).all(), (share, upper)


@pytest.mark.parametrize("causal", [False, True])
def test_hard_heads_run_in_8_bits_and_keep_the_budget(causal: bool) -> None:
    q, k, v = inputs()
    mask = Mask.causal("top_left") if causal else None
    result = attention(q, k, v, mask=mask, budget=0.1, policy=EAGER, seed=3)
    assert result.provenance["planned_on"] == "device"
    assert formats(result) == [NARROW] * 8
    found = errors(result, q, k, v, causal=causal)
    covered(result, found)
    assert found.max() > 0.01  # 16 bits would err by 0.003
    assert (result.certificate.upper < 0.08).all()


def test_heads_that_miss_the_budget_run_again_in_16_bits() -> None:
    """Values that cancel out: what is left of them is smaller than what e4m3 takes of each."""
    q, k, v = inputs()
    q, k = q * 0.05, k * 0.05  # weights alike
    v[0, 1, ::2] += 4.0
    v[0, 1, 1::2] -= 4.0
    result = attention(q, k, v, budget=0.1, policy=EAGER, seed=3)
    assert formats(result) == [NARROW] * 2 + [("bf16", "bf16")] * 2 + [NARROW] * 4
    assert "i8/e4m3" in result.plan[0, 2].reason
    assert set(result.provenance["escalated"]) == {"0,2", "0,3"}
    covered(result, errors(result, q, k, v, causal=False))


def test_a_small_budget_keeps_16_bit_values_and_a_smaller_one_16_bits() -> None:
    q, k, v = inputs(length=32_768, heads_q=2, heads_kv=2)
    near = BudgetPolicy(narrow_worthwhile=0.95)  # i8 alone saves less
    assert formats(attention(q, k, v, budget=0.05, policy=near)) == [("i8", "bf16")] * 2
    assert formats(attention(q, k, v, budget=0.02, policy=near)) == [("bf16", "bf16")] * 2


def test_landmark_heads_stay_beside_heads_in_8_bits() -> None:
    """One head looks at its neighbours alone, the others everywhere."""
    length, dim = 32_768, 128
    q, k, v = inputs(heads_q=6, heads_kv=3, length=length, dim=dim)
    angle = torch.arange(length, device="cuda")[:, None] * torch.logspace(
        -4, -1, dim // 2, device="cuda"
    )
    turning = torch.cat([angle.cos(), angle.sin()], 1)
    k[0, 1] = turning * 2
    q[0, 2:4] = turning * 2
    policy = BudgetPolicy(worthwhile=0.95, narrow_worthwhile=0.9)
    result = attention(q, k, v, mask=Mask.causal("top_left"), budget=0.1, policy=policy, seed=3)
    kinds = [result.plan[0, head].structure.kind for head in range(6)]
    assert kinds == ["dense"] * 2 + ["landmark"] * 2 + ["dense"] * 2
    assert formats(result) == [NARROW] * 2 + [("bf16", "bf16")] * 2 + [NARROW] * 2
    covered(result, errors(result, q, k, v, causal=True))


@pytest.mark.parametrize("length", [16_384, 32_768])
def test_a_plan_with_8_bit_heads_repeats_bit_for_bit(length: int) -> None:
    q, k, v = inputs(length=length, heads_q=4)
    mask = Mask.causal("top_left")
    first = attention(q, k, v, mask=mask, budget=0.1, policy=EAGER, seed=9)
    assert NARROW in formats(first)
    again = attention(q, k, v, mask=mask, budget=0.1, plan=first.plan)
    assert again.provenance["planned_on"] == "device"
    assert torch.equal(first.out, again.out)
    assert formats(again) == formats(first)


def test_a_replay_is_bit_equal_to_separate_launches() -> None:
    """The first call starts launches one by one, later ones as one graph of several lanes."""
    q, k, v = inputs(heads_q=4)
    outs = []
    for _ in range(4):
        result = attention(q, k, v, budget=0.1, policy=EAGER, seed=2)
        outs.append(result.out.clone())
        del result
    assert all(torch.equal(out, outs[0]) for out in outs[1:])


def test_dims_that_the_kernel_does_not_take_run_in_16_bits() -> None:
    q, k, v = inputs(heads_q=2, heads_kv=2, dim=192)
    result = attention(q, k, v, budget=0.1, policy=EAGER)
    assert formats(result) == [("bf16", "bf16")] * 2


@pytest.mark.parametrize("recipe", [NARROW, ("i8", "bf16")], ids="/".join)
def test_needles_among_131072_keys_are_found_as_in_16_bits(recipe: tuple[str, str]) -> None:
    """Each row looks for one key far away, whose value it must return."""
    from adaattn_core.policies import FixedPolicy  # noqa: PLC0415

    length, dim, needles = 131_072, 128, 64
    q, k, v = inputs(heads_q=1, heads_kv=1, length=length, dim=dim)
    places = torch.randint(0, 100_000, (needles,), device="cuda")
    rows = length - needles + torch.arange(needles, device="cuda")
    q[0, 0, rows] = k[0, 0, places] * 1.6
    mask = Mask.causal("top_left")
    outs = [
        attention(q, k, v, mask=mask, policy=FixedPolicy(qk=qk, pv=pv, p_scale=112.0)).out
        for qk, pv in (("bf16", "bf16"), recipe)
    ]
    wide, narrow = (x[0, 0, rows].double() for x in outs)
    held = v[0, 0, places].double()
    near = torch.cdist(narrow, v[0, 0].double()[places]).argmin(dim=1)
    assert (near == torch.arange(needles, device="cuda")).all()
    assert (narrow - held).norm() <= (wide - held).norm() + 0.05 * held.norm()
