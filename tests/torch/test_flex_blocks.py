"""FlexAttention's BlockMask as plans: the same output, nothing dense, nothing guessed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from adaattn_core import AttentionProblem, ErrorBudget, Mask, attention
from adaattn_core.errors import PlanError, ShapeError, UnsupportedError
from adaattn_torch.masks.flex_blocks import import_block_mask


def causal(b, h, q, kv):
    return q >= kv


def window(b, h, q, kv):
    return (q >= kv) & (q - kv <= 100)


def made(mask_mod, len_q=300, len_kv=300, batch=None, heads=None, size=64) -> BlockMask:
    return create_block_mask(
        mask_mod, batch, heads, len_q, len_kv, device="cpu", BLOCK_SIZE=size
    )


def arrays(len_q=300, len_kv=300, batch=2, heads=2):
    torch.manual_seed(0)
    return [torch.randn(batch, heads, n, 16) for n in (len_q, len_kv, len_kv)]


def of_dense_mask(blocks: BlockMask, q, k, v):
    """Attend to what the function shows inside the listed blocks."""
    batch, heads, len_q, len_kv = blocks.shape
    seen = create_mask(blocks.mask_mod, batch, heads, len_q, len_kv, device="cpu")
    rows, keys = blocks.BLOCK_SIZE
    listed = blocks.to_dense().bool()
    listed = listed.repeat_interleave(rows, dim=2).repeat_interleave(keys, dim=3)
    seen = seen & listed[:, :, :len_q, :len_kv]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def run(imported, q, k, v):
    problem = AttentionProblem.from_arrays(q, k, v, mask=imported.mask)
    return attention(
        q, k, v, mask=imported.mask, plan=imported.plan(problem), backend="numpy"
    ).out


def assert_as_exact(out, blocks: BlockMask, q, k, v) -> None:
    """Err by at most twice what PyTorch's function errs by in float32, and a rounding floor."""
    true = of_dense_mask(blocks, q.double(), k.double(), v.double())
    theirs = of_dense_mask(blocks, q, k, v)
    floor = 4 * 2.0**-24 * float(v.abs().max())
    limit = 2 * float((theirs - true).abs().max()) + floor
    assert limit <= 2e-5
    assert float((out - true).abs().max()) <= limit


@pytest.mark.parametrize(
    ("mask_mod", "mask"),
    [
        (causal, None),
        (window, Mask.sliding_window(100, 0, "top_left")),
        (lambda b, h, q, kv: q // 64 >= kv // 64, None),  # whole blocks only
        (lambda b, h, q, kv: (q >= kv) & ((q - kv < 128) | (kv < 64)), None),  # sink + near
    ],
)
def test_output_equals_flex_attention(mask_mod, mask) -> None:
    blocks = made(mask_mod)
    if mask_mod is not causal and mask is None:
        blocks = blocked(mask_mod)
    imported = import_block_mask(blocks, mask)
    q, k, v = arrays()
    assert_as_exact(run(imported, q, k, v), blocks, q, k, v)


def blocked(mask_mod, size=64, length=300) -> BlockMask:
    """Keep the blocks that a function touches; inside them the mask is causal or whole."""
    touched = made(mask_mod)
    whole = mask_mod(0, 0, torch.arange(length)[:, None], torch.arange(length)[None])
    inside = causal if not whole[0, 1] else (lambda b, h, q, kv: q >= -1)
    counts, indices = touched.kv_num_blocks.clone(), touched.kv_indices.clone()
    if touched.full_kv_num_blocks is not None:
        for tile in range(counts.shape[2]):
            some = indices[0, 0, tile, : counts[0, 0, tile]].tolist()
            full = touched.full_kv_indices[0, 0, tile, : touched.full_kv_num_blocks[0, 0, tile]]
            merged = sorted(some + full.tolist())
            counts[0, 0, tile] = len(merged)
            indices[0, 0, tile, : len(merged)] = torch.tensor(merged)
    return BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=size, mask_mod=inside, seq_lengths=(length, length)
    )


def test_heads_and_batch_entries_have_blocks_of_their_own() -> None:
    def by_head(b, h, q, kv):
        return (q // 64 + kv // 64 + h + b) % 2 == 0

    blocks = made(by_head, batch=2, heads=2)
    imported = import_block_mask(blocks)
    assert len({s for row in imported.structures for s in row}) == 2
    q, k, v = arrays()
    assert_as_exact(run(imported, q, k, v), blocks, q, k, v)
    other = AttentionProblem.from_arrays(*arrays(batch=3))
    with pytest.raises(PlanError, match="batch entries"):
        imported.plan(other)
    longer = AttentionProblem.from_arrays(*arrays(len_q=400))
    with pytest.raises(PlanError, match="query tiles"):
        imported.plan(longer)


def test_keys_outside_the_blocks_count_as_an_error() -> None:
    blocks = blocked(lambda b, h, q, kv: (q >= kv) & ((q - kv < 64) | (kv < 64)))
    imported = import_block_mask(blocks)
    q, k, v = arrays()
    problem = AttentionProblem.from_arrays(q, k, v, mask=imported.mask)
    result = attention(
        q,
        k,
        v,
        mask=imported.mask,
        plan=imported.plan(problem),
        budget=ErrorBudget(rel=0.1, on_violation="report"),
        backend="numpy",
    )
    assert result.certificate[0, 0].upper > 0.1


def test_functions_that_no_pattern_states_are_refused() -> None:
    odd = made(lambda b, h, q, kv: (q + kv) % 3 == 0)
    with pytest.raises(UnsupportedError, match="pattern") as caught:
        import_block_mask(odd)
    assert str(caught.value).count("\n") == 2
    with pytest.raises(UnsupportedError, match="seen whole"):
        import_block_mask(made(lambda b, h, q, kv: q >= -1), Mask.causal("top_left"))
    with pytest.raises(UnsupportedError):
        import_block_mask(made(window))  # neither causal nor whole
    with pytest.raises(UnsupportedError):
        import_block_mask(made(causal, len_kv=400), Mask.causal("bottom_right"))


def test_damaged_lists_are_refused() -> None:
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)

    def lists(*rows):
        indices = torch.tensor([[rows]], dtype=torch.int32)
        return BlockMask.from_kv_blocks(
            counts, indices, BLOCK_SIZE=64, seq_lengths=(128, 128), compute_q_blocks=False
        )

    ok = import_block_mask(lists([0, 0], [0, 1]))
    assert ok.structures[0][0].blocks == ((0,), (0, 1))
    for rows in (([0, 0], [1, 1]), ([5, 0], [0, 1]), ([-1, 0], [0, 1])):
        with pytest.raises(ShapeError):
            import_block_mask(lists(*rows))
    counts = torch.tensor([[[1, 3]]], dtype=torch.int32)
    with pytest.raises(ShapeError, match="lists of 2"):
        import_block_mask(lists([0, 0], [0, 1]))


def test_no_dense_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = made(causal, 4096, 4096, size=128)
    largest = 0
    original = torch.vmap

    def watched(*args, **kwargs):
        function = original(*args, **kwargs)

        def call(*inputs):
            nonlocal largest
            out = function(*inputs)
            largest = max(largest, out.numel())
            return out

        return call

    monkeypatch.setattr(torch, "vmap", watched)
    imported = import_block_mask(blocks)
    assert 0 < largest < 4096 * 4096 / 8
    kept = np.array([len(row) for row in imported.structures[0][0].blocks])
    assert kept.tolist() == list(range(1, 33))
