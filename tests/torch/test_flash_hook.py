"""PyTorch's hook for flash attention: offered, activated, taken back; the nine outputs.

The operator has no CPU kernel of its own, so one that is recognisable stands in for the one
that was there before.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn import attention as hooks
from torch.nn.attention import _registry

import adaattn_torch
from adaattn_core.errors import BackendUnavailableError, UnsupportedError
from adaattn_torch import FallbackWarning, listening
from adaattn_torch.entries import flash

operator = torch.ops.aten._scaled_dot_product_flash_attention
# The dispatcher says so, once in a process: it is what is wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")


def nine(out, query, key):
    words = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
    return out, out[..., 0], None, None, query.shape[2], key.shape[2], *words, torch.empty(0)


@pytest.fixture
def before():
    """A kernel that was there before: it returns sevens, and its arguments are kept."""
    seen = []

    def kernel(query, key, value, *arguments, **options):
        seen.append((arguments, options))
        return nine(torch.full_like(query, 7), query, key)

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl(flash.OPERATOR, kernel, "CPU")
    yield seen
    library._destroy()


@pytest.fixture
def active(before):
    handle = flash.activate("numpy", "CPU")
    yield before
    handle.remove()


@pytest.fixture
def registry(monkeypatch):
    """torch's registry as it was, afterwards."""
    known = dict(_registry._FLASH_ATTENTION_IMPLS)
    known.pop(flash.NAME, None)
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", known)
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", None)
    yield
    hooks.restore_flash_attention_impl(_raise_warn=False)


def qkv(heads_kv=4, length=7, dtype=torch.float32):
    """Laid out as (batch, len, heads, dim), as models have them."""
    shapes = ((2, length, 4, 16), (2, length, heads_kv, 16), (2, length, heads_kv, 16))
    return [torch.randn(s).to(dtype).transpose(1, 2) for s in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_nine_outputs(active, causal, heads_kv):
    q, k, v = qkv(heads_kv)
    out, lse, *rest = operator(q, k, v, 0.0, causal, False, scale=0.3)
    assert active == []
    expected = F.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), is_causal=causal, scale=0.3, enable_gqa=True
    )
    assert (out - expected).abs().max() <= 16 * 2.0**-24 * expected.abs().max()
    assert out.dtype == q.dtype
    assert out.stride() == q.stride()
    scores = q.double() @ k.double().repeat_interleave(4 // heads_kv, 1).mT * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    assert lse.dtype == torch.float32
    assert (lse - scores.logsumexp(-1)).abs().max() <= 16 * 2.0**-24 * scores.abs().max()
    assert rest[:4] == [None, None, 7, 7]
    assert [(x.dtype, tuple(x.shape)) for x in rest[4:]] == [
        (torch.uint64, (2,)), (torch.uint64, ()), (torch.float32, (0,)),
    ]  # fmt: skip


def test_scale_is_pytorchs_unless_given(active):
    q, k, v = qkv()
    out = operator(q, k, v)[0]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


CASES = {
    "dropout": ((0.5,), {}),
    "debug mask": ((0.0, False, True), {}),
    "scale": ((), {"scale": -1.0}),
    "f64 by a backend that has none": ((), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_ours_goes_to_the_kernel_before_visibly(before, name, monkeypatch):
    arguments, options = CASES[name]
    if name not in ("dropout", "debug mask", "scale"):

        def refuse(*_, **__):
            raise UnsupportedError(got="these", needed="others", do="nothing")

        monkeypatch.setattr(flash, "run", refuse)
    handle = flash.activate("numpy", "CPU")
    with pytest.warns(FallbackWarning), listening([]) as infos:
        out = operator(*qkv(), *arguments, **options)[0]
    handle.remove()
    assert (out == 7).all()
    given, named = before[-1]
    # The dispatcher leaves trailing defaults out or in; what is there is what was asked for.
    assert given[: len(arguments)] == arguments
    assert named.get("scale") == options.get("scale")
    assert infos[0].fell_back is not None


def test_unequal_lengths_under_a_causal_mask_are_the_kernel_befores(active):
    q, k, v = qkv()
    with pytest.warns(FallbackWarning, match="causal mask"):
        assert (operator(q[..., :4, :], k, v, 0.0, True)[0] == 7).all()
    assert not (operator(q[..., :4, :], k, v, 0.0, False)[0] == 7).all()


def test_listeners_hear_of_it(active):
    with listening([]) as infos:
        operator(*qkv())
    assert [info.plan.policy for info in infos] == ["exact"]


def test_the_handle_gives_the_kernel_back(before):
    handle = flash.activate("numpy", "CPU")
    assert not (operator(*qkv())[0] == 7).all()
    handle.remove()
    assert (operator(*qkv())[0] == 7).all()
    handle.remove()  # a second time is nothing


def test_registered_but_not_activated(registry):
    assert flash.NAME not in hooks.list_flash_attention_impls()
    assert adaattn_torch.register_flash_attention() == flash.NAME
    assert flash.NAME in hooks.list_flash_attention_impls()
    assert hooks.current_flash_attention_impl() is None


def test_importing_registers_nothing():
    code = (
        "import adaattn_torch.entries.flash; from torch.nn import attention as a;"
        "assert 'AdaAttn' not in a.list_flash_attention_impls();"
        "assert a.current_flash_attention_impl() is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_activated_and_restored_by_pytorch(registry, before, monkeypatch):
    monkeypatch.setattr(flash.activate, "__defaults__", ("auto", "CPU"))
    name = adaattn_torch.register_flash_attention("numpy")
    hooks.activate_flash_attention_impl(name)
    assert hooks.current_flash_attention_impl() == name
    q, k, v = qkv()
    torch.testing.assert_close(operator(q, k, v)[0], F.scaled_dot_product_attention(q, k, v))
    hooks.activate_flash_attention_impl(name)  # again: the old one is taken back first
    assert not (operator(q, k, v)[0] == 7).all()
    hooks.restore_flash_attention_impl()
    assert hooks.current_flash_attention_impl() is None
    assert (operator(q, k, v)[0] == 7).all()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA kernels")
def test_a_build_without_cuda_says_so(registry):
    adaattn_torch.register_flash_attention()
    with pytest.raises(BackendUnavailableError, match="without a flash attention kernel"):
        hooks.activate_flash_attention_impl(flash.NAME)
    assert hooks.current_flash_attention_impl() is None


def test_an_older_pytorch_says_so(monkeypatch):
    monkeypatch.delattr(hooks, "register_flash_attention_impl")
    with pytest.raises(BackendUnavailableError, match="update PyTorch"):
        adaattn_torch.register_flash_attention()
