"""The short way: taken only where nobody can see a certificate, with the same output."""

from __future__ import annotations

import pytest
import torch

from adaattn_core import FixedPolicy, attention
from adaattn_core.errors import BackendUnavailableError, UnsupportedError
from adaattn_core.mask import Mask
from adaattn_core.plugins import registry
from adaattn_core.plugins.registry import Registration, Registry
from adaattn_reference.backend import NumpyBackend
from adaattn_torch import FallbackWarning, compat, enable, forward, listening
from adaattn_torch import scaled_dot_product_attention as sdpa
from adaattn_torch.arrays import empty_output


class Quick(NumpyBackend):
    """A backend with a short way."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, query, key, value, *, mask, scale):
        self.calls.append((mask, scale))
        result = attention(query, key, value, mask=mask, scale=scale, backend=NumpyBackend())
        return result.out, result.lse


class Picky(Quick):
    """One whose short way takes nothing."""

    def forward(self, query, key, value, *, mask, scale):
        super().forward(query, key, value, mask=mask, scale=scale)
        raise UnsupportedError(got="this", needed="something else", do="nothing")


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": torch.arange(63).reshape(7, 9) % 3 > 0},
    "additive": {"attn_mask": torch.linspace(-2, 2, 63).reshape(7, 9)},
}


def qkv(requires_grad=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, 7, 4, 16), (2, 9, 2, 16), (2, 9, 2, 12))
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    return [x.transpose(1, 2).requires_grad_(requires_grad) for x in tensors]


@pytest.mark.parametrize("backend", [Quick, Picky])
@pytest.mark.parametrize("name", MASKS)
def test_same_output_and_gradient_by_either_way(name, backend):
    quick, given = backend(), qkv(requires_grad=True)
    out = sdpa(*given, **MASKS[name], scale=0.3, enable_gqa=True, backend=quick)
    ordinary, info = sdpa(
        *given, **MASKS[name], scale=0.3, enable_gqa=True, backend=NumpyBackend(),
        return_info=True,
    )  # fmt: skip
    assert len(quick.calls) == 1
    assert info.certificate is not None
    assert torch.equal(out, ordinary)
    assert out.stride() == ordinary.stride()
    weight = torch.randn(out.shape)
    ours, theirs = (torch.autograd.grad(x, given, weight) for x in (out, ordinary))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_what_the_short_way_refuses_it_is_asked_once(name, gradient):
    picky = Picky()
    with torch.set_grad_enabled(gradient):
        given = qkv(requires_grad=gradient)
        sdpa(*given, **MASKS[name], enable_gqa=True, backend=picky)
    assert len(picky.calls) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype(dtype):
    given = qkv(dtype=dtype)
    out = sdpa(*given, enable_gqa=True, backend=Quick())
    assert torch.equal(out, sdpa(*given, enable_gqa=True, backend=NumpyBackend()))
    assert out.dtype == dtype


@pytest.mark.parametrize(
    "asked",
    [
        {"budget": 0.1},
        {"policy": "exact"},
        {"policy": FixedPolicy(qk="bf16", pv="bf16")},
        {"seed": 3},
        {"return_info": True},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_whoever_asks_gets_a_certificate(asked):
    quick = Quick()
    with torch.no_grad():
        sdpa(*qkv(), enable_gqa=True, backend=quick, **asked)
    assert quick.calls == []


def test_a_plan_is_run_as_it_is():
    quick = Quick()
    _, info = sdpa(*qkv(), enable_gqa=True, return_info=True)
    sdpa(*qkv(), enable_gqa=True, plan=info.plan, backend=quick)
    assert quick.calls == []


def test_listeners_and_modes_get_a_certificate():
    quick = Quick()
    with listening([]) as infos:
        sdpa(*qkv(), enable_gqa=True, backend=quick)
    with enable(backend=quick) as mode:
        torch.nn.functional.scaled_dot_product_attention(*qkv(), enable_gqa=True)
    assert quick.calls == []
    assert all(info.certificate is not None for info in (*infos, *mode.infos))
    assert len(infos) == len(mode.infos) == 1


def test_compiled_graphs_take_it_too():
    torch._dynamo.reset()
    quick, given = Quick(), qkv()
    function = torch.compile(
        lambda *x: sdpa(*x, enable_gqa=True, backend=quick), fullgraph=True, backend="aot_eager"
    )
    out = function(*given)
    assert len(quick.calls) == 1
    with listening([]) as infos:
        assert torch.equal(function(*given), out)
    assert len(quick.calls) == len(infos) == 1
    torch._dynamo.reset()


def test_other_libraries_signatures_take_it(monkeypatch):
    quick, (q, k, v) = Quick(), qkv()
    monkeypatch.setattr(forward, "get_backend", lambda name, device: quick)
    for memory in ("_found", "_forwards"):
        monkeypatch.setattr(forward, memory, {})
    compat.sageattn(q, k, v, is_causal=True)
    ((mask, scale),) = quick.calls
    assert (mask.alignment, mask.right) == ("top_left", 0)
    assert scale == 0.25


def test_errors_of_the_short_way_are_not_hidden():
    class Broken(NumpyBackend):
        def forward(self, query, key, value, *, mask, scale):
            raise MemoryError

    with pytest.raises(MemoryError):
        sdpa(*qkv(), enable_gqa=True, backend=Broken())


def make_registry(probes, name="one"):
    def probe():
        probes.append(name)

    found = Registry()
    found.backends[name] = Registration(
        name, "adaattn_reference.backend:NumpyBackend", "test", probe
    )
    return found


def test_a_backend_is_looked_up_once(monkeypatch):
    probes = []
    first = make_registry(probes)
    for module in (forward, registry):
        monkeypatch.setattr(module, "default_registry", lambda: first)
    found = {id(forward.backend_for(name, "cpu")) for name in ("auto", "one", "auto")}
    assert len(found) == 1
    assert len(probes) == 1  # the driver is asked once
    with pytest.raises(BackendUnavailableError):
        forward.backend_for("none", "cpu")
    second = make_registry(probes)
    for module in (forward, registry):
        monkeypatch.setattr(module, "default_registry", lambda: second)
    assert id(forward.backend_for("auto", "cpu")) not in found  # the old one is forgotten


def test_failures_are_not_remembered(monkeypatch):
    empty = Registry()
    for module in (forward, registry):
        monkeypatch.setattr(module, "default_registry", lambda: empty)
    with pytest.raises(BackendUnavailableError):
        forward.backend_for("auto", "cpu")
    empty.backends.update(make_registry([]).backends)
    assert isinstance(forward.backend_for("auto", "cpu"), NumpyBackend)


def test_masks_are_what_was_asked_for():
    quick = Quick()
    sdpa(*qkv(), is_causal=True, enable_gqa=True, backend=quick)
    assert quick.calls == [(quick.calls[0][0], 0.25)]
    mask = quick.calls[0][0]
    assert isinstance(mask, Mask)
    assert (mask.alignment, mask.left, mask.right) == ("top_left", None, 0)


@pytest.mark.parametrize("shape", [(2, 4, 1, 16), (1, 4, 5, 16), (2, 1, 5, 16), (1, 1, 1, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (3, 2, 1, 0)])
@pytest.mark.parametrize("dim_v", [1, 16])
def test_strides_are_those_that_fake_tensors_promise(shape, order, dim_v):
    """Lengths of 1 included, where memory is the same under several strides."""
    made = torch.randn([shape[axis] for axis in order])
    query = made.permute([order.index(axis) for axis in range(4)])
    value = torch.randn(*shape[:3], dim_v)
    promised = empty_output(query, dim_v).stride()
    out = sdpa(query, query, value, backend=Quick())
    assert out.stride() == promised
    assert torch.equal(out, sdpa(query, query, value, backend="numpy"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_legacy_nested_tensors_go_to_pytorch_visibly():
    parts = [torch.randn(2, n, 8) for n in (3, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.strided)
    with pytest.warns(FallbackWarning, match="nested"):
        out = sdpa(nested, nested, nested, backend=Quick())
    for part, ours in zip(parts, out.unbind(), strict=True):
        torch.testing.assert_close(
            ours, torch.nn.functional.scaled_dot_product_attention(part, part, part)
        )
