"""Masks filled with very low finite numbers, as models make them, under every budget."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from adaattn_core import ErrorBudget, FixedPolicy
from adaattn_core.errors import BudgetInfeasibleError
from adaattn_torch import budgets, enable, listening, register_transformers
from adaattn_torch import scaled_dot_product_attention as sdpa

GUARANTEES = ["sampled", "probabilistic", "worst_case"]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.sampled_from(["lowest", "half of it", "-1e4"]),
    st.sampled_from(GUARANTEES),
    st.sampled_from([None, FixedPolicy(qk="i8", pv="e4m3"), FixedPolicy(qk="e4m3", pv="e4m3")]),
    st.booleans(),
)
def test_they_hide_as_a_boolean_mask_does(seed, dtype, fill, guarantee, policy, blind):
    """The same output and as good a certificate; a row of nothing else sees all its keys."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, 2, 48, 16, generator=generator).to(dtype)
    allowed = torch.rand(48, 48, generator=generator) < 0.6
    allowed[:, 0] = True
    hidden = allowed.logical_not()
    # What is hidden may be as large as it likes: it enters no bound.
    key[..., 40:, :] *= 1e3
    value[..., 40:, :] *= 1e3
    hidden[:, 40:], allowed[:, 40:] = True, False
    lowest = torch.finfo(dtype).min
    low = {"lowest": lowest, "half of it": lowest / 2, "-1e4": -1e4}[fill]
    if fill == "-1e4":  # beside such keys that is no hiding any more
        key[..., 40:, :], value[..., 40:, :] = 0, 0
    mask = torch.zeros(48, 48, dtype=dtype).masked_fill(hidden, low)
    if blind and fill == "lowest":
        value[..., 40:, :] = 0
        key[..., 40:, :] = 0
        mask[3] = lowest
    budget = ErrorBudget(rel=0.3, rows=0.9, confidence=1 - 1e-6, guarantee=guarantee)
    options = {"budget": budget, "policy": policy, "return_info": True}
    out, info = sdpa(query, key, value, mask, **options)
    same, plain = sdpa(query, key, value, allowed, **options)
    assert info.fell_back is None
    assert (info.certificate.upper <= 0.3).all()
    if not blind:
        assert (info.certificate.upper <= 2 * plain.certificate.upper).all()
    wide = [x.double() for x in (query, key, value)]
    truth = F.scaled_dot_product_attention(*wide, mask.double() if blind else allowed)
    for x, certificate in ((out, info.certificate), (same, plain.certificate)):
        error = (x.double() - truth).norm(dim=-1)
        rms = x.double().square().sum(-1).mean(-1, keepdim=True).sqrt()
        bound = torch.from_numpy(certificate.upper)[..., None] * rms
        if blind and x is same:
            continue  # in a boolean mask row 3 sees others
        assert ((error <= bound).double().mean(-1) >= 0.9).all()


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_under_the_mode(guarantee):
    query, key, value = torch.randn(3, 2, 2, 48, 16)
    causal = torch.ones(48, 48).triu(1) * torch.finfo(torch.float32).min
    with enable(ErrorBudget(rel=0.05, guarantee=guarantee), strict=True) as mode:
        out = F.scaled_dot_product_attention(query, key, value, causal)
    assert (mode.infos[0].certificate.upper <= 0.05).all()
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert (out - expected).norm() <= 0.05 * expected.norm()


def under_mode(query, key, value, mask, budget):
    with enable(budget):
        return F.scaled_dot_product_attention(query, key, value, mask)


@pytest.mark.parametrize("function", [sdpa, under_mode])
def test_errors_name_the_mask_where_it_is_to_blame(function):
    """Not low enough to hide a key, and so large that adding it loses what the budget asks."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 64, 16, generator=generator)
    mask = torch.rand(64, 64, generator=generator)
    for size, rel, blamed in ((-600.0, 3e-4, True), (0.0, 1e-7, False)):
        budget = ErrorBudget(rel=rel, guarantee="worst_case")
        with pytest.raises(BudgetInfeasibleError) as error:
            function(query, key, value, size * mask, budget=budget)
        assert ("mask is to blame" in error.value.got) == blamed
        assert ("Mask.boolean" in error.value.do) == blamed


# -- models that make such masks --------------------------------------------------------------
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
IDS = torch.randint(3, 95, (2, 11), generator=torch.Generator().manual_seed(1))
PADDING = (torch.arange(11) < torch.tensor([[11], [7]])).long()
TEXT = {"input_ids": IDS, "attention_mask": PADDING}


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def layoutlm():
    config = transformers.LayoutLMConfig(vocab_size=97, **SMALL)
    boxes = (IDS % 90)[..., None].expand(-1, -1, 4).contiguous()
    return transformers.LayoutLMModel(config), TEXT | {"bbox": boxes}


def idefics():
    vision = {
        "embed_dim": 32, "image_size": 8, "patch_size": 4, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 48,
    }  # fmt: skip
    config = transformers.IdeficsConfig(
        vocab_size=97, additional_vocab_size=0, vision_config=vision, use_resampler=False,
        cross_layer_interval=1, **SMALL,
    )  # fmt: skip
    sees = torch.zeros(2, 11, 2, dtype=torch.long)  # the first tokens see no image
    sees[0, 3:, 0] = sees[1, 2:, 1] = 1
    inputs = {"pixel_values": images(2, 2, 3, 8, 8), "image_attention_mask": sees}
    return transformers.IdeficsForVisionText2Text(config), TEXT | inputs


def mllama():
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 4, "intermediate_size": 48, "vision_output_dim": 64,
        "image_size": 8, "patch_size": 4, "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    text = {
        "vocab_size": 97, "num_key_value_heads": 2, "cross_attention_layers": [1],
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    config = transformers.MllamaConfig(
        vision_config=vision, text_config=text | SMALL, image_token_index=96
    )
    sees = torch.zeros(2, 11, 1, 2, dtype=torch.long)
    sees[0, 3:, 0, 0] = 1
    sees[1, 2:, 0] = 1
    inputs = {
        "pixel_values": images(2, 1, 2, 3, 8, 8), "cross_attention_mask": sees,
        "aspect_ratio_ids": torch.tensor([[1], [2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0]], [[1, 1]]]),
    }  # fmt: skip
    return transformers.MllamaForConditionalGeneration(config), TEXT | inputs


def siglip2():
    config = transformers.Siglip2VisionConfig(num_patches=16, patch_size=4, **SMALL)
    inputs = {
        "pixel_values": images(2, 16, 48),
        "pixel_attention_mask": (torch.arange(16) < torch.tensor([[16], [12]])).long(),
        "spatial_shapes": torch.tensor([[4, 4], [3, 4]]),
    }
    return transformers.Siglip2VisionModel(config), inputs


def pixtral():
    config = transformers.PixtralVisionConfig(image_size=16, patch_size=4, **SMALL)
    sizes = torch.tensor([[16, 16], [8, 16]])
    inputs = {"pixel_values": images(2, 3, 16, 16), "image_sizes": sizes}
    return transformers.PixtralVisionModel(config), inputs


def output(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    return (found.logits if "logits" in found else found.last_hidden_state).double()


@pytest.mark.parametrize(
    ("make", "mask"),
    [
        (layoutlm, "attention_mask"), (idefics, "image_attention_mask"),
        (mllama, "cross_attention_mask"), (siglip2, "pixel_attention_mask"), (pixtral, None),
    ],
)  # fmt: skip
def test_models(make, mask):
    key = register_transformers()
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name or "alpha" in name:
                parameter.fill_(0.5)  # what is seen of the images is let in
    model.set_attn_implementation("sdpa")
    expected = output(model, inputs)
    if mask is not None:  # it does hide something
        without = inputs | {mask: torch.ones_like(inputs[mask])}
        assert (output(model, without) - expected).norm() > 1e-5 * expected.norm()
    model.set_attn_implementation(key)
    with listening([]) as infos:
        exact = output(model, inputs)
    assert infos
    assert all(info.fell_back is None for info in infos)
    # Float32 throughout, and a few layers: as "sdpa" but for roundings.
    assert (exact - expected).norm() <= 1e-6 * expected.norm()
    coarse = FixedPolicy(qk="i8", pv="e4m3")
    for guarantee in GUARANTEES:
        for policy in (None, coarse):
            budget = ErrorBudget(rel=0.1, rows=0.9, confidence=0.9, guarantee=guarantee)
            with listening([]) as infos, budgets(budget, policy=policy):
                out = output(model, inputs)
            assert all((info.certificate.upper <= 0.1).all() for info in infos)
            assert (out - expected).norm() <= 0.2 * expected.norm()
