"""The adapter on a CUDA device: accuracy, streams, recorded graphs, budgets, the hook."""

from __future__ import annotations

import importlib.util
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn import attention as hooks

import adaattn_torch
from adaattn_core.plugins.registry import get_backend
from adaattn_torch import FallbackWarning, enable, listening
from adaattn_torch import scaled_dot_product_attention as sdpa

_spec = importlib.util.spec_from_file_location("held", Path(__file__).with_name("conftest.py"))
held = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(held)
oracle = held.oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("error::adaattn_torch.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators"),
]

# Products of f32 are three of TF32 on a GPU: at most this relative error, where PyTorch's own
# kernel has less. 16-bit results may be twice as far off as PyTorch's.
F32_MOST = 2e-6
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def qkv(dtype, heads_kv=4, len_q=200, len_kv=200, requires_grad=False):
    """Laid out as (batch, len, heads, dim), as models have them."""
    shapes = ((2, len_q, 4, 64), (2, len_kv, heads_kv, 64), (2, len_kv, heads_kv, 64))
    made = [torch.randn(s, device="cuda").to(dtype).transpose(1, 2) for s in shapes]
    return [x.requires_grad_(requires_grad) for x in made]


def assert_as_good(ours, theirs, exact):
    """At most twice PyTorch's own error against float64, or the stated error of f32."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    error, known = (
        float((x.detach().double() - exact.detach()).norm() / exact.detach().norm())
        for x in (ours, theirs)
    )
    assert error <= max(2 * known, F32_MOST if ours.dtype == torch.float32 else 0.0)


def masks(len_q, len_kv, dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    allowed = torch.rand(2, 1, len_q, len_kv, device="cuda", generator=generator) < 0.7
    bias = torch.randn(1, 4, len_q, len_kv, device="cuda", generator=generator)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": allowed},
        "additive": {"attn_mask": bias.to(dtype)},
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "causal", "boolean", "additive"])
@pytest.mark.parametrize("heads_kv", [4, 2])
@pytest.mark.parametrize("lengths", [(200, 200), (1, 333)])
def test_as_good_as_pytorch(dtype, name, heads_kv, lengths):
    q, k, v = qkv(dtype, heads_kv, *lengths)
    options = masks(*lengths, dtype)[name] | {"enable_gqa": True}
    ours = sdpa(q, k, v, **options)
    theirs = F.scaled_dot_product_attention(q, k, v, **options)
    exact = torch.from_numpy(
        oracle(q, k, v, options.get("attn_mask"), is_causal=name == "causal", enable_gqa=True)[
            0
        ].astype(float)
    ).cuda()
    assert_as_good(ours, theirs, exact)
    assert ours.stride() == q.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "causal", "boolean", "additive"])
def test_gradients_as_good_as_pytorchs(dtype, name):
    given = qkv(dtype, requires_grad=True)
    options = masks(200, 200, dtype)[name]
    weight = torch.randn(2, 4, 200, 64, device="cuda").to(dtype)
    ours = torch.autograd.grad(sdpa(*given, **options), given, weight)
    theirs = torch.autograd.grad(
        F.scaled_dot_product_attention(*given, **options), given, weight
    )
    wide = [x.detach().double().requires_grad_() for x in given]
    if name == "additive":
        options = {"attn_mask": options["attn_mask"].double()}
    with hooks.sdpa_kernel(hooks.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*wide, **options)
    truth = torch.autograd.grad(out, wide, weight.double())
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert_as_good(a, b, c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_the_short_way_gives_the_same_bits(dtype, causal):
    assert callable(getattr(get_backend("cuda"), "forward", None))
    given = qkv(dtype, heads_kv=2)
    options = {"is_causal": causal, "enable_gqa": True}
    ordinary, info = sdpa(*given, **options, return_info=True)
    assert info.certificate is not None
    for _ in range(2):  # the first call of a layout, and one that finds it again
        out = sdpa(*given, **options)
        assert torch.equal(out, ordinary)
        assert out.stride() == ordinary.stride()


@pytest.mark.parametrize("ask", [{}, {"return_info": True}], ids=["short", "certified"])
def test_calls_follow_the_current_stream_and_do_not_wait(ask):
    q, k, v = qkv(torch.bfloat16)
    sdpa(q, k, v, **ask)  # compiles
    source, side = torch.randn_like(q), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)
        q.copy_(source)
        started = time.perf_counter()
        out = sdpa(q, k, v, **ask)
        took = time.perf_counter() - started
        behind = not side.query()
    side.synchronize()
    assert behind, "the stream was idle: nothing was shown"
    assert took < 0.05
    assert torch.equal(out[0] if ask else out, sdpa(source, k, v))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_exact_calls_synchronise_nothing():
    given = qkv(torch.bfloat16)
    sdpa(*given, is_causal=True)
    try:
        torch.cuda.set_sync_debug_mode("error")
        sdpa(*given, is_causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("budget", [None, 0.1])
def test_compiles_whole(backend, budget):
    torch._dynamo.reset()
    function = torch.compile(
        lambda q, k, v: sdpa(q, k, v, is_causal=True, budget=budget),
        fullgraph=True, backend=backend, dynamic=True,
    )  # fmt: skip
    for length in (64, 200, 201):
        given = qkv(torch.bfloat16, len_q=length, len_kv=length, requires_grad=True)
        out = function(*given)
        eager = sdpa(*given, is_causal=True, budget=budget)
        assert torch.equal(out, eager)
        ours = torch.autograd.grad(out.sum(), given)
        for a, b in zip(ours, torch.autograd.grad(eager.sum(), given), strict=True):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("frozen", [False, True], ids=["exact", "frozen plan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_graphs_record_it(frozen, dtype):
    q, k, v = qkv(dtype)
    plan = sdpa(q, k, v, is_causal=True, return_info=True)[1].plan if frozen else None
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        sdpa(q, k, v, is_causal=True, plan=plan)
    warm.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sdpa(q, k, v, is_causal=True, plan=plan)
    for _ in range(2):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, sdpa(q, k, v, is_causal=True, plan=plan))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_budget_is_kept_by_theorem(dtype, causal):
    q, k, v = qkv(dtype, len_q=500, len_kv=500)
    out, info = sdpa(q, k, v, is_causal=causal, budget=0.1, return_info=True)
    assert info.fell_back is None
    assert info.provenance["backend"] == "cuda"
    assert info.certificate.upper.shape == (2, 4)
    assert (info.certificate.upper <= 0.1).all()
    exact = torch.from_numpy(oracle(q, k, v, is_causal=causal)[0].astype(float)).cuda()
    error = (out.double() - exact).norm(dim=-1)
    rms = exact.square().sum(-1).mean(-1).sqrt()
    for batch in range(2):
        for head in range(4):
            entry = info.certificate[batch, head]
            within = error[batch, head] <= entry.upper * rms[batch, head]
            assert within.double().mean() >= entry.rows


def test_the_mode_keeps_a_budget():
    given = qkv(torch.bfloat16)
    with enable(budget=0.1) as mode:
        F.scaled_dot_product_attention(*given, is_causal=True)
    assert [info.fell_back for info in mode.infos] == [None]
    assert (mode.infos[0].certificate.upper <= 0.1).all()


def test_float64_goes_to_pytorch_visibly():
    given = qkv(torch.float64)
    with pytest.warns(FallbackWarning), listening([]) as infos:
        out = sdpa(*given)
    assert torch.equal(out, F.scaled_dot_product_attention(*given))
    assert infos[0].fell_back is not None


@pytest.fixture
def hook():
    name = adaattn_torch.register_flash_attention("cuda")
    hooks.activate_flash_attention_impl(name)
    yield name
    hooks.restore_flash_attention_impl(_raise_warn=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_pytorchs_own_function_runs_our_kernel_by_the_hook(hook, dtype, causal):
    given = qkv(dtype, requires_grad=True)
    weight = torch.randn(2, 4, 200, 64, device="cuda").to(dtype)
    with hooks.sdpa_kernel(hooks.SDPBackend.FLASH_ATTENTION):
        with listening([]) as infos:
            out = F.scaled_dot_product_attention(*given, is_causal=causal)
        ours = torch.autograd.grad(out, given, weight)
        hooks.restore_flash_attention_impl()
        with listening([]) as after:
            own = F.scaled_dot_product_attention(*given, is_causal=causal)
        theirs = torch.autograd.grad(own, given, weight)
    assert [info.fell_back for info in infos] == [None]
    assert infos[0].provenance["backend"] == "cuda"
    assert after == []  # restored: PyTorch's own again
    assert torch.equal(out, sdpa(*given, is_causal=causal))
    wide = [x.detach().double().requires_grad_() for x in given]
    with hooks.sdpa_kernel(hooks.SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(*wide, is_causal=causal)
    assert_as_good(out, own, exact)
    # The backward pass is PyTorch's kernel, on our output and lse.
    truth = torch.autograd.grad(exact, wide, weight.double())
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert_as_good(a, b, c)


def test_the_hook_hands_dropout_to_the_kernel_before(hook):
    given = qkv(torch.bfloat16)
    with hooks.sdpa_kernel(hooks.SDPBackend.FLASH_ATTENTION):
        torch.manual_seed(1)
        with pytest.warns(FallbackWarning, match="dropout"):
            ours = F.scaled_dot_product_attention(*given, dropout_p=0.5)
        hooks.restore_flash_attention_impl()
        torch.manual_seed(1)
        theirs = F.scaled_dot_product_attention(*given, dropout_p=0.5)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("padded", [False, True])
def test_a_transformers_model_in_bf16(padded):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    key = adaattn_torch.register_transformers()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True,
        sliding_window=16, max_window_layers=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).cuda().eval()
    ids = torch.randint(1, 97, (2, 65), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, 40:] = 1 - padded
    found = {}
    for name, implementation, dtype in (
        ("truth", "sdpa", torch.float64),
        ("theirs", "sdpa", torch.bfloat16),
        ("ours", key, torch.bfloat16),
    ):
        model.to(dtype).set_attn_implementation(implementation)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            logits = model(ids, attention_mask=mask).logits
        found[name] = logits[mask.bool()]
    assert_as_good(found["ours"], found["theirs"], found["truth"])
