"""8-bit attention on a device: the quantiser bit by bit, the kernel against float64."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from adaattn_core import attention
from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import UnsupportedError
from adaattn_core.formats import SCALE_BLOCKS
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies.fixed import FixedPolicy
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.backend import CudaBackend
from adaattn_cuda.device.views import view
from adaattn_cuda.kernels import sm90_attn_fwd_8bit as eight_bit
from adaattn_cuda.kernels.task import Task
from adaattn_cuda.quantised import VALUE_STEP
from adaattn_cuda.tuning.sm90_attn_fwd_8bit import TILE_KEYS, TILE_SCALES
from adaattn_reference import quantise

torch = pytest.importorskip("torch")
PAIRS = (("i8", "e4m3"), ("i8", "bf16"), ("bf16", "e4m3"))


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not on_hopper(), reason="needs a GPU of compute capability 9.0"),
]


def randn(*shape: int, dtype: Any = torch.bfloat16, seed: int = 0) -> Any:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def seen_by(problem: AttentionProblem) -> Any:
    """Boolean mask (batch, 1, len_q, len_kv), from the intervals."""
    batch, _, len_q, _ = problem.query.shape
    seen = torch.zeros(batch, 1, len_q, problem.len_kv, dtype=torch.bool)
    for span in problem.sequences:
        start, stop = problem.mask.intervals(span.len_q, span.len_kv)
        for row in range(span.len_q):
            low, high = span.kv_start + int(start[row]), span.kv_start + int(stop[row])
            seen[span.batch, 0, span.q_start + row, low : max(low, high)] = True
    return seen.cuda()


def oracle(problem: AttentionProblem) -> tuple[Any, Any]:
    """Exact out and lse in float64; hidden NaN reach nobody."""
    group = problem.query.shape[1] // problem.key.shape[1]
    key, value = (
        x.nan_to_num(0.0, 0.0, 0.0).repeat_interleave(group, 1).double()
        for x in (problem.key, problem.value)
    )
    scores = problem.query.double() @ key.mT * problem.scale
    scores = scores.masked_fill(~seen_by(problem), -math.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return weights @ value, torch.logsumexp(scores, -1)


def run(problem: AttentionProblem, qk: str, pv: str, **fields: Any) -> tuple[Any, Any, Any]:
    raw = CudaBackend().run(problem, Plan.uniform(problem, HeadPlan(qk=qk, pv=pv, **fields)))
    return raw.out.double(), raw.lse.double(), raw.facts


def relative(found: Any, truth: Any) -> float:
    return float((found - truth).norm() / truth.norm())


# --- the quantiser ----------------------------------------------------------------------
@pytest.mark.parametrize("dim", [64, 128, 40])
@pytest.mark.parametrize("length", [5, 130, 700])
def test_codes_scales_and_centres_are_those_of_the_twin(dim: int, length: int) -> None:
    query, key, value = (randn(1, heads, length, dim, seed=heads) for heads in (4, 2, 3))
    value = value[:, :2].contiguous()
    key[0, 0, length - 1] *= 100
    key[0, 1, : length // 2] = 1e-33
    value[0, 0] *= 1e-20
    value[0, 1, 3] = 0
    if length > 60:
        query[0, 1, 7, 1] = key[0, 0, 50, 3] = math.nan
        value[0, 0, 40, 2] = math.inf
    problem = AttentionProblem.from_arrays(query, key, value)
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3], device="cuda")
    arrays = (*map(view, (query, key, value, out, lse)), None, None)
    stream = torch.cuda.current_stream().cuda_stream
    launch = eight_bit.launch(Task.of(problem, arrays, ("i8", "e4m3"), None), stream)
    scratch = [
        torch.full((size,), 77, dtype=torch.uint8, device="cuda")
        for size in launch.scratch_bytes
    ]
    pointers = [x.data_ptr() for x in (query, key, value, out, lse)]
    launch.start((*pointers, 0, 0, *(x.data_ptr() for x in scratch)), 0, stream)
    codes, scales = (x.cpu().numpy() for x in scratch)
    layout, blocks = launch.layout, SCALE_BLOCKS["tile"]
    places, (held, _) = layout.codes()[0], layout.scales()
    rows = layout.rows_kv

    def part(raw: Any, start: int, kind: Any, *shape: int) -> Any:
        size = math.prod(shape) * np.dtype(kind).itemsize
        return raw[start : start + size].view(kind).reshape(shape)

    query_codes = part(codes, places["query_codes"], np.int8, 4, length, layout.dim_qk)
    key_codes = part(codes, places["key_codes"], np.int8, 2, rows, layout.dim_qk)
    stored = part(codes, places["value_codes"], ml_dtypes.float8_e4m3fn, 2, layout.dim_v, rows)
    query_steps = part(scales, held["query_scales"], np.float32, 4, length)
    records = part(scales, held["tile_scales"], np.float32, 2, rows // TILE_KEYS, TILE_SCALES)
    centres = part(scales, held["centres"], np.float32, 2, layout.dim_qk)
    # Byte 4 t + b of sixteen is key 2 t + b, or 2 t + 8 + b - 2.
    byte = np.arange(rows) % 16
    lane, within = byte // 4, byte % 4
    place = 16 * (np.arange(rows) // 16) + 2 * lane + np.where(within < 2, within, within + 6)
    value_codes = np.empty(stored.shape, np.float32)
    value_codes[:, :, place] = stored.astype(np.float32)
    at = np.arange(length)
    for head in range(2):
        plain = key[0, head].float().cpu().numpy()
        centre = quantise.centre(plain, np.ones(length, bool))
        np.testing.assert_array_equal(centres[head, :dim], centre)
        groups = blocks.key_groups(length)
        wanted, steps = quantise.codes(plain - centre, groups, "i8")
        whole = np.ones(groups.max() + 1, bool)
        np.logical_and.at(whole, groups, np.isfinite(plain).all(axis=1))
        good = whole[groups]
        np.testing.assert_array_equal(key_codes[head, :length, :dim][good], wanted[good])
        found = records[head, at // TILE_KEYS, 4 * (at % TILE_KEYS // 64) + at % 8 // 2]
        np.testing.assert_array_equal(found[good], steps[groups][good])
        assert np.isnan(found[~good]).all()
        plain = value[0, head].float().cpu().numpy()
        finite = np.isfinite(plain)
        wanted, steps = quantise.codes(plain, blocks.value_groups(length), "e4m3")
        found = value_codes[head, :dim, :length].T
        np.testing.assert_array_equal(found[finite], wanted[finite])
        assert np.isnan(found[~finite]).all()
        np.testing.assert_array_equal(records[head, : len(steps), VALUE_STEP], steps)
        assert not key_codes[head, length:].any()
        assert not value_codes[head, :, length:].any()
    for head in range(4):
        plain = query[0, head].float().cpu().numpy()
        finite = np.isfinite(plain).all(axis=1)
        wanted, steps = quantise.codes(plain, blocks.query_groups(length), "i8")
        np.testing.assert_array_equal(query_codes[head, :, :dim][finite], wanted[finite])
        np.testing.assert_array_equal(query_steps[head][finite], steps[finite])
        assert np.isnan(query_steps[head][~finite]).all()


# --- the kernel ----------------------------------------------------------------------
MASKS = {
    "full": None,
    "causal top-left": Mask.causal("top_left"),
    "causal bottom-right": Mask.causal("bottom_right"),
    "window": Mask.sliding_window(100, 30, "bottom_right"),
    "lengths": Mask.key_lengths([512, 450]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (128, 64), (64, 128), (56, 104)])
@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_against_float64(pair: tuple[str, str], dims: tuple[int, int], mask: Any) -> None:
    """Rounding i8 codes takes about 1%, e4m3 weights and values 2.5% each."""
    query, key = randn(2, 4, 384, dims[0]), randn(2, 2, 512, dims[0], seed=1)
    value = randn(2, 2, 512, dims[1], seed=2)
    if mask is MASKS["lengths"]:
        key[1, :, 450:], value[1, :, 450:] = math.nan, math.inf
    problem = AttentionProblem.from_arrays(query, key, value, mask=mask)
    out, lse, _ = run(problem, *pair)
    truth, exact_lse = oracle(problem)
    assert relative(out, truth) < (0.045 if pair[1] == "e4m3" else 0.02)
    blind = exact_lse == -math.inf
    assert (lse[blind] == -math.inf).all()
    assert (out[blind] == 0).all()
    assert (lse - exact_lse)[~blind].abs().max() < (0.05 if pair[0] == "i8" else 1e-3)


@pytest.mark.parametrize("dim", [64, 128])
def test_packed_sequences(dim: int) -> None:
    edges_q = tuple(accumulate((5, 300, 0, 257), initial=0))
    edges_kv = tuple(accumulate((70, 300, 10, 512), initial=0))
    for causal in (None, "bottom_right"):
        mask = Mask(
            cu_seqlens_q=edges_q, cu_seqlens_kv=edges_kv,
            right=None if causal is None else 0, alignment=causal,
        )  # fmt: skip
        problem = AttentionProblem.from_arrays(
            randn(1, 4, 562, dim), randn(1, 2, 892, dim, seed=1),
            randn(1, 2, 892, dim, seed=2), mask=mask,
        )  # fmt: skip
        out, _, _ = run(problem, "i8", "e4m3")
        truth, _ = oracle(problem)
        assert relative(out, truth) < 0.045


BLIND = {
    "tiles of rows before the first key": ((400, 100), Mask.causal("bottom_right")),
    "rows behind the last key": ((96, 20), Mask.sliding_window(3, 0, alignment="top_left")),
    "an entry without keys": ((96, 90), Mask.key_lengths([0, 90])),
    "no entry with keys": ((96, 90), Mask.key_lengths([0, 0])),
    "a sequence without keys": ((96, 90), Mask.ragged([0, 40, 96], [0, 0, 90])),
    "a later one, at an odd key": ((96, 50), Mask.ragged([0, 40, 96], [0, 50, 50])),
}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("lengths", "mask"), BLIND.values(), ids=BLIND)
@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_rows_that_see_no_key(
    pair: tuple[str, str], lengths: tuple[int, int], mask: Mask, dim: int
) -> None:
    """Tiles of them lie outside every array, far outside: nothing is read there."""
    batch = 2 if mask.lengths is not None else 1
    query = randn(batch, 4, lengths[0], dim)
    key, value = (randn(batch, 2, lengths[1], dim, seed=i) for i in (1, 2))
    problem = AttentionProblem.from_arrays(query, key, value, mask=mask)
    out, lse, _ = run(problem, *pair)
    truth, exact_lse = oracle(problem)
    blind = exact_lse == -math.inf
    assert blind.any()
    assert (lse[blind] == -math.inf).all()
    assert (out[blind] == 0).all()
    assert (out - truth)[~blind].norm() <= 0.05 * truth[~blind].norm()


@pytest.mark.parametrize("dim", [64, 128])
def test_a_poisoned_future_reaches_nobody(dim: int) -> None:
    query, key, value = (randn(1, 2, 600, dim, seed=i) for i in range(3))
    key[0, 0, 500], value[0, 1, 505] = math.nan, math.inf
    problem = AttentionProblem.from_arrays(query, key, value, mask=Mask.causal("top_left"))
    out, lse, _ = run(problem, "i8", "e4m3")
    truth, exact_lse = oracle(problem)
    assert relative(out[0, 0, :500], truth[0, 0, :500]) < 0.045
    assert relative(out[0, 1, :505], truth[0, 1, :505]) < 0.045
    assert (lse - exact_lse)[0, 0, :500].abs().max() < 0.1
    assert out[0, 0, 500:].isnan().all()  # who sees a NaN key knows nothing


def outliers(dim: int) -> tuple[Any, Any, Any]:
    made = []
    for seed in range(3):
        x = randn(1, 2, 1024, dim, dtype=torch.float32, seed=seed)
        chosen = torch.rand(x.shape, device="cuda") < 0.001
        made.append((x + chosen * 10 * torch.randn_like(x)).bfloat16())
    return tuple(made)


def hostile(name: str, dim: int) -> tuple[Any, Any, Any]:
    query, key, value = (randn(1, 2, 1024, dim, seed=i) for i in range(3))
    if name == "common mean":
        key = key + 50 * randn(1, 2, 1, dim, seed=9)
    elif name == "zero and constant channels":
        value[..., : dim // 4], value[..., dim // 4 : dim // 2] = 0, 3
    elif name == "denormals":
        key, value = key * 1e-39, value * 1e-39
    elif name == "one huge head":
        key[:, 1], value[:, 1] = key[:, 1] * 1e4, value[:, 1] * 1e30
    elif name == "zeros":
        key, value = key * 0, value * 0
    return query, key, value


HOSTILE = ("outliers", "common mean", "zero and constant channels", "denormals",
           "one huge head", "zeros")  # fmt: skip


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values(name: str, dim: int) -> None:
    """Within the theorem's certificate on every row, and finite."""
    arrays = outliers(dim) if name == "outliers" else hostile(name, dim)
    budget = ErrorBudget(
        rel=1e300, rows=1.0, confidence=1.0, guarantee="worst_case", on_violation="report"
    )
    result = attention(
        *arrays, budget=budget, policy=FixedPolicy(qk="i8", pv="e4m3"), backend="cuda"
    )
    problem = AttentionProblem.from_arrays(*arrays)
    truth, _ = oracle(problem)
    assert result.out.isfinite().all()
    for head in range(2):
        error = (result.out[0, head].double() - truth[0, head]).norm(dim=-1).max()
        rms = result.out[0, head].double().norm(dim=-1).square().mean().sqrt()
        upper = result.certificate[0, head].upper
        if upper < math.inf:  # what is all below the smallest scale has no bound
            assert float(error) <= upper * float(rms) * (1 + 1e-6) + 1e-40
    if name == "zeros":
        assert all(result.certificate[0, head].upper == 0 for head in range(2))
    if name in ("outliers", "common mean", "zero and constant channels"):
        assert relative(result.out.double(), truth) < 0.06


@pytest.mark.parametrize("dim", [64, 128])
def test_length_131072(dim: int) -> None:
    query, key, value = (randn(1, 1, 131_072, dim, seed=i) for i in range(3))
    problem = AttentionProblem.from_arrays(query, key, value, mask=Mask.causal("top_left"))
    out, lse, _ = run(problem, "i8", "e4m3")
    rows = torch.randint(100_000, 131_072, (64,), device="cuda")
    scores = query[0, 0, rows].double() @ key[0, 0].double().T * problem.scale
    hidden = torch.arange(131_072, device="cuda")[None] > rows[:, None]
    scores = scores.masked_fill(hidden, -math.inf)
    truth = torch.softmax(scores, -1) @ value[0, 0].double()
    assert relative(out[0, 0, rows], truth) < 0.045
    assert (lse[0, 0, rows] - torch.logsumexp(scores, -1)).abs().max() < 0.05


def test_heads_of_several_formats_run_in_one_call() -> None:
    query, key, value = (randn(1, n, 500, 64, seed=n) for n in (6, 2, 2))
    problem = AttentionProblem.from_arrays(query, key, value)
    formats = [*PAIRS, ("bf16", "bf16"), ("i8", "e4m3"), ("i8", "bf16")]
    plan = Plan({(0, h): HeadPlan(qk=qk, pv=pv) for h, (qk, pv) in enumerate(formats)})
    backend = CudaBackend()
    raw = backend.run(problem, plan)
    truth, _ = oracle(problem)
    assert relative(raw.out.double(), truth) < 0.04
    assert backend.provenance()["kernels"].count("sm90_attn_fwd_8bit") == 3
    assert float((raw.out[:, 3].double() - truth[:, 3]).norm() / truth[:, 3].norm()) < 0.005


def test_the_same_call_gives_the_same_bits_and_writes_every_row() -> None:
    query, key, value = (randn(2, 2, 700, 128, seed=i) for i in range(3))
    problem = AttentionProblem.from_arrays(query, key, value, mask=Mask.causal("top_left"))
    plan = Plan.uniform(problem, HeadPlan(qk="i8", pv="e4m3"))
    backend = CudaBackend()
    raw = backend.run(problem, plan)
    first = raw.out.clone(), raw.lse.clone()
    raw.out.fill_(math.nan)
    raw.lse.fill_(math.nan)
    backend.run(problem, plan, into=raw)
    assert torch.equal(raw.out, first[0])
    assert torch.equal(raw.lse, first[1])


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"scales": "token"}, "scales"),
        ({"rounding": "stochastic"}, "rounding"),
        ({"flush_keys": 64}, "flush_keys"),
        ({"p_scale": 500.0}, "p_scale"),
        ({"pv": "i8"}, "i8"),
    ],
)
def test_what_no_kernel_does_is_refused(fields: dict[str, Any], what: str) -> None:
    problem = AttentionProblem.from_arrays(*(randn(1, 1, 64, 64, seed=i) for i in range(3)))
    with pytest.raises(UnsupportedError, match=what):
        run(problem, **{"qk": "i8", "pv": "e4m3", **fields})


def test_array_masks_wide_heads_and_f32_are_refused() -> None:
    arrays = [randn(1, 1, 64, 64, seed=i) for i in range(3)]
    allowed = torch.ones(64, 64, dtype=torch.bool, device="cuda")
    masked = AttentionProblem.from_arrays(*arrays, mask=Mask.boolean(allowed))
    wide = AttentionProblem.from_arrays(*(randn(1, 1, 64, 136, seed=i) for i in range(3)))
    single = AttentionProblem.from_arrays(*(x.float() for x in arrays))
    for problem, why in ((masked, "mask"), (wide, "136"), (single, "f32")):
        with pytest.raises(UnsupportedError, match=why):
            run(problem, "i8", "e4m3")
