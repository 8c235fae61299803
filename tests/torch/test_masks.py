"""Masks of transformers as patterns: what they say is what the boolean tensor says."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core.mask import Mask
from adaattn_torch import listening
from adaattn_torch import scaled_dot_product_attention as sdpa
from adaattn_torch.entries.transformers import KEY, attention_forward, register_transformers
from adaattn_torch.masks.compact import CompactMask

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import masking_utils  # noqa: E402

from adaattn_torch.masks.transformers import adaattn_mask, window_of  # noqa: E402

FUNCTIONS = {
    "causal": (masking_utils.causal_mask_function, None),
    "window": (masking_utils.sliding_window_causal_mask_function(3), 3),
    "bidirectional": (masking_utils.bidirectional_mask_function, None),
    "chunked": (masking_utils.chunked_causal_mask_function(3, torch.zeros(3, dtype=int)), 3),
}


def written_out(**asked):
    asked |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(**asked)


def meant(mask, name, batch, len_q, len_kv):
    """The boolean tensor that attention computes with, None understood as attention does."""
    if isinstance(mask, CompactMask):
        return mask.dense()
    if mask is not None:
        return mask
    out = torch.ones(batch, 1, len_q, len_kv, dtype=torch.bool)
    return out.tril() if name != "bidirectional" and len_q > 1 else out


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_never_other_than_what_transformers_writes_out(data):
    """Over functions, lengths, caches and paddings; values, not patterns, are compared."""
    name = data.draw(st.sampled_from(list(FUNCTIONS)))
    function, local_size = FUNCTIONS[name]
    batch, len_q = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    # A cache holds keys before these rows, dropped the oldest, or has empty slots after them.
    before, slots = data.draw(st.integers(0, 5)), data.draw(st.sampled_from([0, 0, 1, 4]))
    dropped = data.draw(st.integers(0, before))
    if name == "bidirectional":
        before = dropped = 0
    total = before + len_q + slots
    padding = None
    kind = data.draw(st.sampled_from(["none", "full", "left", "right", "any", "short"]))
    if kind == "short":  # only the tokens so far are named
        padding = torch.ones(batch, before + len_q, dtype=torch.bool)
    elif kind != "none":
        edges = data.draw(st.lists(st.integers(0, total), min_size=batch, max_size=batch))
        edge, column = torch.tensor(edges)[:, None], torch.arange(total)
        padding = {
            "full": column >= 0 * edge,
            "left": column >= edge,
            "right": column < edge,
            "any": (column * 7 + edge) % 3 > 0,
        }[kind]
    asked = {
        "batch_size": batch, "q_length": len_q, "kv_length": total - dropped,
        "q_offset": before, "kv_offset": dropped, "mask_function": function,
        "attention_mask": padding, "local_size": local_size,
    }  # fmt: skip
    skip = {
        "allow_is_causal_skip": name != "bidirectional",
        "allow_is_bidirectional_skip": name == "bidirectional",
    }
    ours = adaattn_mask(**asked, **skip)
    theirs = written_out(**asked)
    if name == "chunked":  # not stated as a pattern: transformers' own function decides
        assert (ours is None) == (masking_utils.sdpa_mask(**asked, **skip) is None)
        assert ours is None or torch.equal(ours, theirs)
        return
    assert torch.equal(meant(ours, name, batch, len_q, total - dropped), theirs)
    if len_q == 1 and slots:
        pass  # there transformers' own leaves out what hides empty slots
    elif masking_utils.sdpa_mask(**asked, **skip) is None:
        assert ours is None
    elif kind in ("none", "full", "right") and before == dropped:
        assert ours is None or isinstance(ours, CompactMask)


def test_compact_where_it_matters():
    """What generation and training ask for most is not written out."""
    window = FUNCTIONS["window"][0]
    right = torch.arange(6) < torch.tensor([[6], [4]])
    common = {"batch_size": 2, "allow_is_causal_skip": True}
    for asked in (
        {"q_length": 6, "kv_length": 6, "attention_mask": right},
        {"q_length": 6, "kv_length": 6, "mask_function": window, "local_size": 3},
        {"q_length": 6, "kv_length": 6, "mask_function": window, "attention_mask": right},
        {"q_length": 2, "kv_length": 6, "q_offset": 4},  # a prompt in parts
        {"q_length": 2, "kv_length": 6, "q_offset": 4, "mask_function": window},
    ):
        assert isinstance(adaattn_mask(**common, **asked), CompactMask), asked
    assert adaattn_mask(**common, q_length=6, kv_length=6) is None
    one = {"q_length": 1, "kv_length": 3, "q_offset": 9, "kv_offset": 7}
    assert adaattn_mask(**common, **one, mask_function=window, local_size=3) is None


def test_callers_who_need_a_tensor_get_one():
    asked = {"batch_size": 1, "q_length": 4, "kv_length": 4}
    mask = adaattn_mask(**asked, allow_is_causal_skip=False)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, written_out(**asked))


def test_only_the_very_functions_are_recognised():
    assert window_of(masking_utils.causal_mask_function) == (None, 0)
    assert window_of(masking_utils.bidirectional_mask_function) == (None, None)
    assert window_of(masking_utils.sliding_window_causal_mask_function(5)) == (4, 0)
    causal, overlay = masking_utils.causal_mask_function, masking_utils.sliding_window_overlay
    for other in (
        lambda b, h, q, k: k <= q,
        masking_utils.and_masks(causal, overlay(5)),
        masking_utils.and_masks(overlay(5), causal, overlay(2)),
        masking_utils.and_masks(masking_utils.chunked_overlay(5, torch.zeros(1)), causal),
        masking_utils.or_masks(overlay(5), causal),
        masking_utils.sliding_window_overlay(5),
        masking_utils.sliding_window_bidirectional_mask_function(5),
        FUNCTIONS["chunked"][0],
    ):
        assert window_of(other) is None


def compact(lengths=(3, 5)):
    pattern = Mask.causal("top_left") & Mask.key_lengths(lengths)
    return CompactMask(pattern, (2, 1, 5, 5), torch.device("cpu"))


TOUCHES = {
    "index": lambda m: m[:, :, 1:, :3],
    "invert": lambda m: ~m,
    "cast": lambda m: m.to(torch.float32),
    "where": lambda m: torch.where(m, 0.0, -1.0),
    "and": lambda m: m & m.mT,
    "concatenate": lambda m: torch.cat([m, m], -1),
    "reduce": lambda m: m.sum(-1),
    "expand": lambda m: m.expand(2, 4, 5, 5),
    "list": lambda m: torch.tensor(m.tolist()),
    "numpy": lambda m: torch.from_numpy(m.numpy(force=True).copy()),
    "copy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("name", TOUCHES)
def test_whoever_touches_it_gets_the_boolean_tensor(name):
    dense = compact().dense()
    assert type(dense) is torch.Tensor
    assert torch.equal(TOUCHES[name](compact()), TOUCHES[name](dense.clone()))


def test_writes_are_not_lost():
    mask = compact((5, 5))
    mask &= torch.eye(5, dtype=torch.bool)  # what it was expanded from cannot be written to
    assert torch.equal(mask & True, torch.eye(5, dtype=torch.bool).expand(2, 1, 5, 5))
    mask = compact()
    mask[0, 0, 4, 0] = False
    query = torch.randn(2, 3, 5, 8)
    expected = compact().dense().clone()
    expected[0, 0, 4, 0] = False
    assert torch.equal(sdpa(query, query, query, mask), sdpa(query, query, query, expected))
    mask = compact()
    view = mask[0]
    view[0, 4, 0] = False
    assert torch.equal(sdpa(query, query, query, mask), sdpa(query, query, query, expected))


def test_attention_reads_the_pattern_and_computes_the_same():
    query, key, value = torch.randn(3, 2, 3, 5, 8)
    with listening([]) as infos:
        out = sdpa(query, key, value, compact())
        same = sdpa(query, key, value, compact().dense())
    torch.testing.assert_close(out, same)
    shares = [facts.share for facts in infos[0].facts.values()]
    assert shares  # the pattern is a structure: facts count what it leaves
    mask = compact()
    assert mask.pattern is not None
    sdpa(query, key, value, mask)
    assert mask.pattern is not None  # and it is not written out on the way


def test_a_mask_for_other_tensors_is_read_as_a_tensor():
    query = torch.randn(4, 3, 5, 8)
    mask = CompactMask(Mask.causal("top_left"), (1, 1, 5, 5), torch.device("cpu"))
    torch.testing.assert_close(
        sdpa(query, query, query, mask), sdpa(query, query, query, is_causal=True)
    )
    with pytest.raises(RuntimeError):
        sdpa(query, query[:, :, :4], query[:, :, :4], mask)


def test_fallbacks_and_compiled_graphs_get_the_tensor():
    torch._dynamo.reset()
    query = torch.randn(2, 3, 5, 8)
    expected = sdpa(query, query, query, compact().dense())
    function = torch.compile(lambda q, m: sdpa(q, q, q, m), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(query, compact()), expected)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="dropout"):
        out = sdpa(query, query, query, compact(), dropout_p=1e-9)
    torch.testing.assert_close(out, expected)


class Layer(torch.nn.Module):
    is_causal = True
    layer_idx = 0


@pytest.mark.filterwarnings("ignore::adaattn_torch.FallbackWarning")
@pytest.mark.parametrize(
    "extra",
    [{"softcap": 3.0}, {"s_aux": torch.ones(3)}, {"position_bias": torch.randn(1, 3, 5, 5)}],
    ids=["softcap", "sinks", "position bias"],
)
def test_variants_of_attention_get_the_tensor(extra):
    query = torch.randn(2, 3, 5, 8)
    out, _ = attention_forward(Layer(), query, query, query, compact(), **extra)
    same, _ = attention_forward(Layer(), query, query, query, compact().dense(), **extra)
    assert torch.equal(out, same)


@pytest.mark.parametrize("side", ["right", "left"])
def test_no_model_loses_its_padding(side):
    """Hidden tokens may be anything: what is seen does not change. Right is a pattern."""
    register_transformers()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen2Config(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True,
            sliding_window=6, max_window_layers=1, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    model.set_attn_implementation(KEY)
    masks = []
    forward = model.model.layers[1].self_attn.forward

    def spy(*args, attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return forward(*args, attention_mask=attention_mask, **kwargs)

    model.model.layers[1].self_attn.forward = spy
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, slice(8, 12) if side == "right" else slice(0, 4)] = 0
    first = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    second = torch.where(mask.bool(), first, 96 - first)
    with torch.no_grad():
        a, b = (model(x, attention_mask=mask).logits[mask.bool()] for x in (first, second))
        unmasked = model(second).logits[mask.bool()]
    assert torch.equal(a, b)
    if side == "left":
        assert not torch.allclose(unmasked, b)
    assert isinstance(masks[0], CompactMask) == (side == "right")


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder"])
def test_other_kinds_of_models_keep_their_padding(kind):
    register_transformers()
    torch.manual_seed(0)
    small = {"vocab_size": 97, "d_model": 32, "pad_token_id": 0}
    if kind == "encoder":
        config = transformers.BertConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48,
        )  # fmt: skip
        model = transformers.BertModel(config).eval()
    else:
        config = transformers.BartConfig(
            **small, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        )  # fmt: skip
        model = transformers.BartModel(config).eval()
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([[9], [5]])).long()
    outputs = {}
    for implementation in ("sdpa", KEY):
        model.set_attn_implementation(implementation)
        with torch.no_grad(), listening([]) as infos:
            out = model(ids, attention_mask=mask).last_hidden_state
        outputs[implementation] = out if kind != "encoder" else out[mask.bool()]
    assert infos
    torch.testing.assert_close(outputs[KEY], outputs["sdpa"])
