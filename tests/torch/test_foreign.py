"""Tensors of other kinds: what works with PyTorch's function works with ours, any way in."""

from __future__ import annotations

import pytest
import torch
import torch.distributed
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaattn_core.errors import UnsupportedError
from adaattn_torch import FallbackWarning, Rule, enable
from adaattn_torch import scaled_dot_product_attention as sdpa

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]


def under_mode(*given, **options):
    with enable(rules=[Rule(heads=(0,), budget=0.1)]):
        return F.scaled_dot_product_attention(*given, **options)


WAYS = pytest.mark.parametrize("function", [sdpa, under_mode])


@WAYS
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(function, layout):
    parts = [torch.randn(2, n, 8) for n in (3, 5)]
    if layout == torch.strided:
        nested = torch.nested.nested_tensor(parts, layout=layout)
    else:
        nested = torch.nested.nested_tensor([x.transpose(0, 1) for x in parts], layout=layout)
        nested = nested.transpose(1, 2)
    with pytest.warns(FallbackWarning, match="nested"):
        out = function(nested, nested, nested)
    if layout == torch.jagged:
        out = out.transpose(1, 2)
    for part, ours in zip(parts, out.unbind(), strict=True):
        ours = ours.transpose(0, 1) if layout == torch.jagged else ours
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(part, part, part))
    with pytest.raises(UnsupportedError, match="nested"), enable(strict=True):
        F.scaled_dot_product_attention(nested, nested, nested)


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@WAYS
@pytest.mark.parametrize("axis", [0, 1])
def test_distributed_tensors(function, axis, mesh):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor  # noqa: PLC0415

    given = torch.randn(3, 2, 4, 5, 8)
    shared = [distribute_tensor(x, mesh, [Shard(axis)]).requires_grad_() for x in given]
    # The one of PyTorch's kernels on CPU that knows how to be distributed.
    with sdpa_kernel(SDPBackend.MATH), pytest.warns(FallbackWarning, match="DTensor"):
        out = function(*shared)
    assert isinstance(out, DTensor)
    expected = F.scaled_dot_product_attention(*given)
    torch.testing.assert_close(out.full_tensor(), expected)
    out.sum().backward()
    assert isinstance(shared[0].grad, DTensor)


@WAYS
@pytest.mark.parametrize("shape", [(5, 5), (4, 5, 5), (1, 1, 5, 5), (2, 4, 5, 5), (2, 1, 1, 5)])
def test_learned_masks(function, shape):
    given = [torch.randn(2, 4, 5, 8).requires_grad_() for _ in range(3)]
    mask = torch.nn.Parameter(torch.randn(shape))
    expected = F.scaled_dot_product_attention(*given, mask)
    out = function(*given, mask) if function is sdpa else exactly(*given, mask)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.sum(), [*given, mask])
    for a, b in zip(ours, torch.autograd.grad(expected.sum(), [*given, mask]), strict=True):
        torch.testing.assert_close(a, b)


def exactly(*given, **options):
    """Two groups of heads, both exact."""
    with enable(rules=[Rule(heads=(0, 2))]) as mode:
        out = F.scaled_dot_product_attention(*given, **options)
    assert [info.heads for info in mode.infos] == [(0, 2), (1, 3)]
    return out


@pytest.mark.parametrize("heads", [(1, 4, 4), (4, 1, 1), (4, 1, 4), (1, 4, 1)])
def test_rules_by_head_where_heads_broadcast(heads):
    given = [torch.randn(2, n, 5, 8) for n in heads]
    torch.testing.assert_close(exactly(*given), F.scaled_dot_product_attention(*given))


def test_batches_of_gradients():
    q, k, v = (torch.randn(1, 2, 5, 8).requires_grad_() for _ in range(3))
    vectors = torch.randn(3, 1, 2, 5, 8)
    for function in (sdpa, under_mode):
        out = function(q, k, v, is_causal=True)
        together = torch.autograd.grad(
            out, (q, k, v), vectors, is_grads_batched=True, retain_graph=True
        )
        for i, vector in enumerate(vectors):
            alone = torch.autograd.grad(out, (q, k, v), vector, retain_graph=True)
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[i], b)
