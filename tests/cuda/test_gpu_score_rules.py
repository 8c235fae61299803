"""Softcap and sinks in both kernel families, against the formula in float64 on the device."""

from __future__ import annotations

import math
from typing import Any

import pytest

from adaattn_core import ErrorBudget, attention
from adaattn_core.mask import Mask
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.problem import AttentionProblem
from adaattn_cuda.backend import CudaBackend

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

LEN_Q, LEN_KV = 200, 330
PACKED = Mask.ragged([0, 70, 70, 200], [0, 100, 130, 330])


@pytest.fixture(scope="module")
def backend() -> Any:
    return CudaBackend()


def arrays(dtype: str, dims: tuple[int, int], batch: int = 1, size: float = 3.0) -> list[Any]:
    shapes = ((4, LEN_Q, dims[0]), (2, LEN_KV, dims[0]), (2, LEN_KV, dims[1]))
    made = [torch.randn((batch, *s), device="cuda") for s in shapes]
    made[0] *= size  # scores of about `size`: the cap bites
    return [x.to(getattr(torch, dtype)) for x in made]


def masks(batch: int) -> dict[str, Mask]:
    allowed = torch.rand((1, 1, LEN_Q, LEN_KV), device="cuda") > 0.4
    allowed[..., 5, :] = False
    return {
        "none": Mask.none(),
        "causal": Mask.causal("bottom_right"),
        "rows without a key": Mask.sliding_window(40, 0, "top_left")
        & Mask.key_lengths([90] * batch),
        "packed": PACKED,
        "boolean": Mask.boolean(allowed),
        "additive": Mask.additive(torch.randn((1, 4, 1, LEN_KV), device="cuda")),
    }


def visible(mask: Mask) -> Any:
    """Which scores a structural or boolean mask leaves, shape (LEN_Q, LEN_KV)."""
    seen = torch.zeros((LEN_Q, LEN_KV), dtype=torch.bool)
    spans = [(0, LEN_Q, 0, LEN_KV)]
    if mask.cu_seqlens_q is not None:
        q, k = mask.cu_seqlens_q, mask.cu_seqlens_kv
        spans = [(q[i], q[i + 1], k[i], k[i + 1]) for i in range(len(q) - 1)]
    if mask.lengths is not None:
        spans = [(0, LEN_Q, 0, mask.lengths[0])]
    for first, last, low, high in spans:
        start, stop = mask.intervals(last - first, high - low)
        for row in range(last - first):
            seen[first + row, low + start[row] : low + stop[row]] = True
    seen = seen.cuda()
    return seen & mask.allowed[0, 0] if mask.allowed is not None else seen


def formula(
    three: list[Any], mask: Mask, softcap: float | None, sinks: Any, kind: Any = torch.float64
) -> tuple[Any, Any]:
    """out and lse; with `kind` the inputs' own format, what a naive computation makes of it."""
    wide = torch.float64 if kind == torch.float64 else torch.float32
    q, k, v = (x.to(wide) for x in three)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[3])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask.bias is not None:
        scores = scores + mask.bias.to(wide)
    scores = scores.masked_fill(~visible(mask), -torch.inf)
    if sinks is not None:
        column = sinks.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], 3)
    lse = scores.logsumexp(3)
    weights = torch.exp(scores - torch.where(lse.isneginf(), 0, lse)[..., None])
    weights = weights[..., : v.shape[2]]
    return (weights.to(kind).to(wide) @ v).to(kind), lse


def scores_size(three: list[Any], softcap: float | None, head: int) -> Any:
    """Return the largest score of a head, before masks."""
    query, key = three[0][:, head].double(), three[1][:, head // 2].double()
    largest = (query @ key.mT).abs().max() / math.sqrt(query.shape[-1])
    return largest if softcap is None else softcap * torch.tanh(largest / softcap)


RULES: dict[str, tuple[float | None, tuple[float, ...] | None]] = {
    "softcap": (2.5, None),
    "sinks": (None, (0.5, -3.0, 7.0, -math.inf)),
    "both": (50.0, (40.0, -40.0, 0.0, 2.0)),
}
DIMS = [(64, 64), (128, 128), (256, 256), (192, 128), (40, 72)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_within_twice_the_naive_error(backend: Any, dtype: str, dims: Any, rule: str) -> None:
    """And within the certificate; the two ways in give the same bits, twice."""
    softcap, of_heads = RULES[rule]
    sinks = None if of_heads is None else torch.tensor(of_heads, device="cuda")
    if dtype == "float32" and dims not in ((64, 64), (256, 256)):
        pytest.skip("the sm80 family is the same for all of them")
    for name, mask in masks(1).items():
        three = arrays(dtype, dims)
        out, lse = formula(three, mask, softcap, sinks)
        naive, _ = formula(three, mask, softcap, sinks, three[0].dtype)
        budget = ErrorBudget(rel=1.0, guarantee="worst_case", on_violation="report")
        asked: dict[str, Any] = {"mask": mask, "softcap": softcap, "sinks": sinks}
        found = attention(*three, backend=backend, budget=budget, policy="exact", **asked)
        for head in range(4):  # a head under a large sink is tiny: each by its own size
            error, allowed = (
                (x[:, head].double() - out[:, head]).norm() for x in (found.out, naive)
            )
            size = out[:, head].norm()
            unit = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-21}[dtype]
            # A score errs in proportion to its size, and a weight by as much as its score does.
            # Where keys hold a row's sum most of that cancels; where a sink holds it, nothing.
            felt = 0.0 if sinks is None else 2.0**-21 * size * scores_size(three, softcap, head)
            assert error <= max(2 * allowed, unit * size + felt), (name, head, error / size)
        reached = lse.isfinite()
        assert torch.equal(found.lse.isfinite(), reached), name
        assert torch.equal(found.lse[~reached], lse[~reached].float()), name
        assert (found.lse - lse)[reached].abs().max() <= 2.0**-17 * 64, name
        if mask.cu_seqlens_q is None:
            rms = found.out.double().square().sum(-1).mean(-1).sqrt()
            worst = (found.out.double() - out).norm(dim=-1).amax(-1)
            upper = torch.from_numpy(found.certificate.upper).cuda()
            assert (worst <= torch.where(upper.isinf(), upper, upper * rms)).all(), name
            if dtype == "float32":
                assert upper.isfinite().all(), name
        family = "sm80" if dtype == "float32" or not mask.is_structural else "sm90"
        if torch.cuda.get_device_capability() == (9, 0):
            assert family in found.provenance["kernels"]
        assert "+" in found.provenance["kernels"]
        for _ in range(2):
            again, lse_again = backend.forward(*three, **asked)
            assert torch.equal(again, found.out), name
            assert torch.equal(lse_again, found.lse), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nothing_leaks_from_hidden_keys(backend: Any, dtype: str) -> None:
    three = arrays(dtype, (64, 64))
    sinks = torch.zeros(4, device="cuda")
    for mask in (Mask.key_lengths([200]), Mask.causal("top_left")):
        asked: dict[str, Any] = {"mask": mask, "softcap": 2.0, "sinks": sinks}
        exact, exact_lse = formula(three, mask, 2.0, sinks)
        dirty = [x.clone() for x in three]
        dirty[1][:, :, 200:], dirty[2][:, :, 200:] = math.inf, math.nan
        out, lse = backend.forward(*dirty, **asked)
        unit = 2.0**-7 if dtype == "bfloat16" else 2.0**-19
        assert (out.double() - exact).norm() <= unit * exact.norm()
        assert (lse - exact_lse).abs().max() <= 2.0**-18 * 8


def test_a_sink_of_minus_infinity_is_none(backend: Any) -> None:
    for dtype in ("bfloat16", "float32"):
        three = arrays(dtype, (128, 128))
        none = torch.full((4,), -math.inf, device="cuda")
        out, lse = backend.forward(*three, mask=Mask.causal("top_left"))
        same, same_lse = backend.forward(*three, mask=Mask.causal("top_left"), sinks=none)
        assert torch.equal(lse, same_lse)
        assert (out.double() - same.double()).abs().max() <= 2.0**-7


def test_sinks_are_passed_by_address(backend: Any) -> None:
    """The second call has other sinks of the same layout; a captured one reads them anew."""
    three = arrays("bfloat16", (64, 64))
    mask = Mask.causal("bottom_right")
    first, second = (torch.randn(4, device="cuda") for _ in range(2))
    for sinks in (first, second):
        out, _ = backend.forward(*three, mask=mask, sinks=sinks)
        exact, _ = formula(three, mask, None, sinks)
        assert (out.double() - exact).norm() <= 2.0**-7 * exact.norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = backend.forward(*three, mask=mask, sinks=first)
    first.copy_(second + 1)
    graph.replay()
    exact, _ = formula(three, mask, None, second + 1)
    assert (out.double() - exact).norm() <= 2.0**-7 * exact.norm()


def test_a_plan_of_some_heads(backend: Any) -> None:
    """Heads in formats of their own read their own sinks."""
    three = arrays("float32", (64, 64))
    sinks = torch.tensor([0.0, 3.0, -1.0, 5.0], device="cuda")
    problem = AttentionProblem.from_arrays(*three, softcap=4.0, sinks=sinks)
    heads = {
        index: HeadPlan(qk=name, pv=name)
        for index, name in zip(problem.heads(), ("f32", "bf16", "f16", "tf32"), strict=True)
    }
    raw = backend.run(problem, Plan(heads, seed=0, policy="test", target="sm90"))
    exact, _ = formula(three, Mask.none(), 4.0, sinks)
    wide = [x.view(torch.int32) for x in three]
    rounded = {
        "f32": three,
        "bf16": [x.bfloat16().float() for x in three],
        "f16": [x.half().float() for x in three],
        "tf32": [((x + 0x1000) & ~0x1FFF).view(torch.float32) for x in wide],
    }
    units = {"f32": 2.0**-20, "bf16": 2.0**-9, "f16": 2.0**-12, "tf32": 2.0**-12}
    for head, name in enumerate(units):
        # Rounded operands are most of the error of a naive computation; weights are the rest.
        naive, _ = formula(rounded[name], Mask.none(), 4.0, sinks)
        usual, error = ((x[:, head].double() - exact[:, head]).norm() for x in (naive, raw.out))
        assert error <= 2 * (usual + units[name] * exact[:, head].norm()), (name, error, usual)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_through_pytorch(dtype: str) -> None:
    """Of queries, keys, values and sinks, against autograd through the formula."""
    from adaattn_torch import scaled_dot_product_attention as sdpa  # noqa: PLC0415

    three = [x.requires_grad_() for x in arrays(dtype, (64, 64))]
    sinks = torch.randn(4, device="cuda", dtype=three[0].dtype, requires_grad=True)
    out = sdpa(*three, enable_gqa=True, softcap=2.5, sinks=sinks, strict=True)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), (*three, sinks))
    wide = [x.detach().double().requires_grad_() for x in (*three, sinks)]
    exact, lse = formula(wide[:3], Mask.none(), 2.5, wide[3])
    theirs = torch.autograd.grad((exact * weight.double()).sum(), wide)
    # A sink's gradient is a sum over rows that cancel; each errs as its rounded output does.
    of_rows = (torch.exp(wide[3][:, None] - lse) * (exact * weight.double()).sum(-1)).detach()
    sizes = [*(x.norm() for x in theirs[:3]), of_rows.norm()]
    unit = {"bfloat16": 2.0**-7, "float32": 2.0**-17}[dtype]
    for one, other, size in zip(ours, theirs, sizes, strict=True):
        assert (one.double() - other).norm() <= unit * size
