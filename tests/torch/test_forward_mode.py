"""Tangents, batches of gradients and transforms: right, or refused; never dropped."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_core.errors import UnsupportedError
from adaattn_core.mask import Mask
from adaattn_torch import FallbackWarning, attend, compat, enable
from adaattn_torch import scaled_dot_product_attention as sdpa
from adaattn_torch.call import Asked, encode

# PyTorch's own first use of a tangent compiles some of its formulas in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def theirs(*arguments, **options):
    """PyTorch's function by its formula, the only one of its kernels with tangents."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*arguments, **options)


def tensors(seed=0, dtype=torch.float64, mask=None, gradient=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2))
    found = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    if mask == "additive":
        found.append(torch.randn(4, 5, 6, generator=generator, dtype=dtype))
    elif mask == "boolean":
        allowed = torch.rand(5, 6, generator=generator) < 0.7
        allowed[2] = False
        found.append(allowed)
    return [x.requires_grad_(gradient and x.is_floating_point()) for x in found]


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_both_modes_and_their_batches_are_consistent(mask):
    *given, last = tensors(mask=mask)
    given, rest = (given, [last]) if mask == "boolean" else ([*given, last], [])

    def function(*x):
        return sdpa(*x, *rest, enable_gqa=True)

    assert torch.autograd.gradcheck(
        function, given, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True, fast_mode=True,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(
        function, given, check_fwd_over_rev=True, fast_mode=True
    )


@pytest.mark.parametrize(
    "mask",
    [
        Mask.none(), Mask.causal("bottom_right"), Mask.sliding_window(1, 1, "top_left"),
        Mask.key_lengths((3, 0)), Mask.key_lengths((6, 2)) & Mask.causal("top_left"),
    ],
    ids=["none", "causal", "window", "lengths", "lengths and causal"],
)  # fmt: skip
def test_tangents_of_output_and_lse_under_structural_masks(mask, monkeypatch):
    from adaattn_torch import gradient  # noqa: PLC0415

    monkeypatch.setattr(gradient, "CHUNK_BYTES", 400)  # several chunks even here

    def function(*x):
        attended = attend(*x, mask=mask, scale=0.7)
        return attended.out, attended.lse.where(attended.lse > -torch.inf, 0).double()

    given = tensors()
    assert torch.autograd.gradcheck(
        lambda *x: function(*x)[0], given, check_forward_ad=True, check_batched_grad=True,
        fast_mode=True,
    )  # fmt: skip
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach(), y.detach()) for x, y in zip(
            given, tensors(1), strict=True
        )]  # fmt: skip
        tangent = forward_ad.unpack_dual(function(*duals)[1]).tangent
    step = 1e-4  # the lse is a float32
    ahead, behind = (
        function(
            *(
                x.detach() + sign * step * y.detach()
                for x, y in zip(given, tensors(1), strict=True)
            )
        )
        for sign in (1, -1)
    )
    assert (tangent - (ahead[1] - behind[1]) / (2 * step)).abs().max() < 1e-2


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([None, "boolean", "additive", "causal"]),
    st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_tangents_are_pytorchs(seed, dtype, mask, which):
    """Of any of the inputs, under any mask; `PyTorch's` in float64 is the truth."""
    options = {"is_causal": mask == "causal", "enable_gqa": True}
    primal = tensors(seed, dtype, mask, gradient=False)
    tangent = tensors(seed + 1, dtype, mask, gradient=False)
    found = []
    for function, wide in ((sdpa, dtype), (theirs, dtype), (theirs, torch.float64)):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(x.to(wide), t.to(wide))
                if i > 2 or which[i]
                else x.to(wide)
                for i, (x, t) in enumerate(zip(primal[:3], tangent[:3], strict=True))
            ]
            if mask == "boolean":
                duals.append(primal[3])
            elif mask == "additive":
                duals.append(forward_ad.make_dual(primal[3].to(wide), tangent[3].to(wide)))
            out = forward_ad.unpack_dual(function(*duals, **options)).tangent
        found.append(torch.zeros(()) if out is None else out.double())
    ours, known, truth = found
    unit = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]
    floor = 16 * unit * max(1.0, float(truth.abs().max()))
    assert ours.shape == truth.shape
    assert (ours - truth).abs().max() <= 2 * (known - truth).abs().max() + floor


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_jacobians_and_hessians(strategy):
    q, k, v = (x.detach() for x in tensors())
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    jacobian = torch.autograd.functional.jacobian
    ours, known = (
        jacobian(lambda x, f=f: f(x, k, v).sum(1), q, vectorize=True, strategy=strategy)
        for f in (sdpa, theirs)
    )
    assert known.abs().max() > 0.01
    torch.testing.assert_close(ours, known)
    ours, known = (
        torch.autograd.functional.hessian(
            lambda x, f=f: f(x, k, v).square().sum(), q[:, :, :2],
            vectorize=True, outer_jacobian_strategy=strategy,
        )
        for f in (sdpa, theirs)
    )  # fmt: skip
    torch.testing.assert_close(ours, known)


def test_tangents_under_the_mode_and_in_other_signatures():
    q, k, v, t = (x.detach() for x in (*tensors(), tensors(1)[0]))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    found = []
    for function in ("theirs", "mode", "compat"):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q, t)
            if function == "theirs":
                out = theirs(dual, k, v)
            elif function == "compat":
                out = compat.sageattn(dual, k, v)
            else:
                with enable():
                    out = F.scaled_dot_product_attention(dual, k, v)
            found.append(forward_ad.unpack_dual(out).tangent)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_the_operator_keeps_tangents_compiled_or_not():
    q, k, v, t = (x.detach() for x in (*tensors(), tensors(1)[0]))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: sdpa(x, k, v, enable_gqa=True), fullgraph=True, backend="aot_eager"
    )
    found = []
    for function in (
        lambda x: theirs(x, k, v, enable_gqa=True),
        compiled,
        lambda x: torch.ops.adaattn.attention(
            x, k, v, None, None, q.shape[-1] ** -0.5, *encode(Mask.none(), Asked())
        )[0],
    ):
        with forward_ad.dual_level():
            out = function(forward_ad.make_dual(q, t))
            found.append(forward_ad.unpack_dual(out).tangent)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    torch._dynamo.reset()


def transformed(kind, function, q):
    if kind == "vmap":
        return torch.vmap(function)(q[None])
    if kind == "jvp":
        return torch.func.jvp(function, (q,), (torch.ones_like(q),))[1]
    if kind == "jacrev":
        return torch.func.jacrev(function)(q)
    return torch.func.grad(lambda x: function(x).square().sum())(q)


TRANSFORMS = ["grad", "vmap", "jvp", "jacrev"]


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_signatures_without_a_fallback_refuse_transforms(kind):
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        transformed(kind, lambda x: compat.sageattn(x, x, x), q)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["grad", "vmap", "jacrev"])
def test_compiled_transforms_go_to_pytorch_visibly(kind):
    torch._dynamo.reset()
    q = torch.randn(1, 2, 5, 8)
    function = torch.compile(
        lambda x: transformed(kind, lambda y: sdpa(y, y, y), x),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    with pytest.warns(FallbackWarning, match=r"torch\.func"):
        ours = function(q)
    known = transformed(kind, lambda y: F.scaled_dot_product_attention(y, y, y), q)
    torch.testing.assert_close(ours, known)
    torch._dynamo.reset()
