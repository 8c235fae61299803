"""`AdaptiveCache` in transformers' generate: exact where asked for, near it in 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adaattn_torch
from adaattn_core import Mask, PagedKV, Pages, attention
from adaattn_core.decoding import DevicePages
from adaattn_core.errors import AdaAttnError, ArgumentError, ShapeError, UnsupportedError
from adaattn_core.pages import dequantise as dequantise_core
from adaattn_core.pages import quantise_pages

transformers = pytest.importorskip("transformers")

from adaattn_torch import AdaptiveCache  # noqa: E402
from adaattn_torch.cache import attending  # noqa: E402
from adaattn_torch.cache.layer import PagedLayer  # noqa: E402
from adaattn_torch.cache.rounding import dequantise, quantise  # noqa: E402

# Newer versions of transformers call the argument `cache`, and take both names.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

PAGE = 64


def tiny(kind: str = "llama", **more: Any) -> Any:
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **more,
    }  # fmt: skip
    torch.manual_seed(3)
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    else:
        config = transformers.Qwen2Config(
            **sizes, use_sliding_window=True, sliding_window=48, max_window_layers=1
        )
        model = transformers.Qwen2ForCausalLM(config)
    # Small random weights make every logit alike: scores and logits that differ.
    for name, x in model.named_parameters():
        if "proj" in name or "lm_head" in name:
            x.data.mul_(6.0)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 97, (batch, length), generator=generator)


def run(model: Any, ids: torch.Tensor, cache: Any, **more: Any) -> Any:
    options: dict[str, Any] = {"max_new_tokens": 66, "do_sample": False, "output_logits": True,
                               "return_dict_in_generate": True}  # fmt: skip
    mask = more.pop("attention_mask", torch.ones_like(ids))
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, **{**options, **more}
        )


def logits(out: Any) -> torch.Tensor:
    return torch.stack(out.logits)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("length", [5, 150])
def test_exact_is_the_models_own_cache_bit_for_bit(kind: str, length: int) -> None:
    model, ids = tiny(kind), tokens(2, length)
    own = run(model, ids, transformers.DynamicCache(config=model.config))
    cache = AdaptiveCache(model.config, format="exact", page_len=PAGE)
    mine = run(model, ids, cache)
    assert torch.equal(logits(own), logits(mine))
    assert torch.equal(own.sequences, mine.sequences)
    for i, layer in enumerate(cache.layers):
        held = layer.pages.dense() if hasattr(layer, "pages") else (layer.keys, layer.values)
        theirs = own.past_key_values.layers[i]
        assert torch.equal(held[0], theirs.keys)
        assert torch.equal(held[1], theirs.values)


@pytest.mark.parametrize("format", ["i8", "e4m3"])
def test_eight_bits_stay_near(format: str) -> None:
    model, ids = tiny(), tokens(2, 150)
    own = run(model, ids, None, max_new_tokens=1)
    cache = AdaptiveCache(model.config, format=format, page_len=PAGE, budget=0.1)
    mine = run(model, ids, cache, max_new_tokens=1)
    assert torch.equal(own.logits[0], mine.logits[0]), "a prompt is attended to before rounding"
    ids = tokens(2, 20, seed=1)
    reference = transformers.DynamicCache()
    with torch.no_grad():
        model(tokens(2, 150), past_key_values=reference)
        exact = model(ids, past_key_values=reference).logits
        again = AdaptiveCache(model.config, format=format, page_len=PAGE, budget=0.1)
        model(tokens(2, 150), past_key_values=again)
        near = model(ids, past_key_values=again).logits
    error = float((near - exact).norm() / exact.norm())
    assert 0 < error < {"i8": 0.02, "e4m3": 0.1}[format]
    report = again.report()
    assert {head.format for head in report.heads} == {format}
    assert 0 < report.worst().key_error_estimate < 0.1
    assert str(report).count("\n") == len(report.heads) == 4


def test_heads_above_the_budget_stay_wide() -> None:
    model = tiny()
    cache = AdaptiveCache(model.config, budget=0.0, page_len=PAGE)
    own = run(model, tokens(1, 150), transformers.DynamicCache(config=model.config))
    mine = run(model, tokens(1, 150), cache)
    assert {head.format for head in cache.report().heads} == {"16-bit"}
    assert torch.equal(logits(own), logits(mine)), "nothing was rounded"


@pytest.mark.parametrize("format", ["exact", "i8"])
def test_left_padding(format: str) -> None:
    """Padded batches give the exact cache's bits, and what a padded batch gives without one."""
    model, ids = tiny(), tokens(2, 140)
    mask = torch.ones_like(ids)
    mask[0, :75] = 0
    cache = AdaptiveCache(model.config, format=format, page_len=PAGE)
    own = run(model, ids, transformers.DynamicCache(config=model.config), attention_mask=mask)
    mine = run(model, ids, cache, attention_mask=mask, max_new_tokens=8)
    first = logits(own)[:8]
    if format == "exact":
        assert torch.equal(first, logits(mine))
    else:
        assert torch.equal(first[0], logits(mine)[0])


def test_beams_share_pages_and_agree() -> None:
    model, ids = tiny(), tokens(2, 130)
    options = {"num_beams": 3, "max_new_tokens": 70, "output_logits": False,
               "output_scores": True}  # fmt: skip
    own = run(model, ids, transformers.DynamicCache(config=model.config), **options)
    cache = AdaptiveCache(model.config, format="exact", page_len=PAGE)
    mine = run(model, ids, cache, **options)
    assert torch.equal(own.sequences, mine.sequences)
    assert torch.equal(own.sequences_scores, mine.sequences_scores)
    table = cache.layers[0].pages.table
    assert len(np.unique(table[:3, :, 0])) == table.shape[1], "a prompt's page is there once"


def test_crop_goes_back() -> None:
    """Cropping and going on is as if the cropped tokens had not been."""
    model, ids = tiny(), tokens(1, 200)
    for length in (190, 128, 100, 0):
        cache = AdaptiveCache(model.config, format="exact", page_len=PAGE)
        own = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            for x in (cache, own):
                model(ids, past_key_values=x)
                x.crop(length - 200)
            assert cache.get_seq_length() == length
            more = tokens(1, 9, seed=2)
            got, needed = (model(more, past_key_values=x).logits for x in (cache, own))
        assert torch.equal(got, needed)


def test_crop_into_a_rounded_page_keeps_what_was_read() -> None:
    model = tiny()
    cache = AdaptiveCache(model.config, page_len=PAGE)
    with torch.no_grad():
        model(tokens(1, 200), past_key_values=cache)
    pages = cache.layers[0].pages
    before = pages.dense()
    cache.crop(-100)
    after = pages.dense()
    assert all(torch.equal(x[:, :, :100], y) for x, y in zip(before, after, strict=True))


def test_assisted_decoding_agrees() -> None:
    model, ids = tiny(), tokens(1, 70)
    own = run(model, ids, transformers.DynamicCache(config=model.config))
    cache = AdaptiveCache(model.config, format="exact", page_len=PAGE)
    mine = run(model, ids, cache, prompt_lookup_num_tokens=3, output_logits=False)
    assert torch.equal(own.sequences, mine.sequences)


def test_footprint() -> None:
    model = tiny(head_dim=64, num_hidden_layers=1)
    ratios = {}
    for format in ("exact", "i8"):
        cache = AdaptiveCache(model.config, format=format)
        with torch.no_grad():
            model(tokens(1, 400), past_key_values=cache)
        ratios[format] = cache.footprint()["ratio"]
    # Float32 weights: wide pages are twice 16 bits, and the open page is one of them.
    assert 2.0 <= ratios["exact"] < 2.7
    assert ratios["i8"] < 1.3
    layer = PagedLayer(128, "i8", 1.0, 16384)
    layer.append(*torch.randn(2, 1, 2, 16390, 128).bfloat16())
    used, plain = layer.footprint()
    assert used / plain <= 0.53


def test_room_asked_for_is_not_exceeded() -> None:
    model = tiny()
    cache = AdaptiveCache(model.config, max_length=100, page_len=PAGE)
    assert cache.get_max_length() == 100
    with pytest.raises(ShapeError, match="max_length=100"), torch.no_grad():
        model(tokens(1, 101), past_key_values=cache)


@pytest.mark.parametrize("other", ["batch", "heads", "dtype"])
def test_a_cache_of_another_model_or_batch_is_refused(other: str) -> None:
    model = tiny()
    cache = AdaptiveCache(model.config, page_len=PAGE)
    with torch.no_grad():
        model(tokens(2, 20), past_key_values=cache)
    second = tiny(num_key_value_heads=4) if other == "heads" else tiny()
    second = second.double() if other == "dtype" else second
    with pytest.raises(ShapeError, match="one model and one batch"), torch.no_grad():
        second(tokens(3 if other == "batch" else 2, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"format": "i4"}, "format="),
        ({"page_len": 100}, "multiple of 64"),
        ({"budget": -1.0}, "budget="),
        ({"max_length": 0}, "max_length="),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(AdaAttnError, match=says):
        AdaptiveCache(tiny().config, **arguments)


def test_models_with_other_layers_are_refused() -> None:
    config = tiny().config
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ArgumentError, match="linear_attention"):
        AdaptiveCache(config)


def test_pages_with_nan_stay_wide() -> None:
    layer = PagedLayer(64, "i8", 1.0, 64)
    key, value = torch.randn(2, 2, 1, 128, 16)
    value[1, 0, 70, 3] = torch.nan
    layer.append(key, value)
    assert (layer.table >= 0).tolist() == [[[True, True]], [[True, False]]]
    assert torch.isnan(layer.dense()[1]).sum() == 1


@pytest.mark.parametrize("format", ["i8", "e4m3"])
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 25))
@settings(max_examples=25, deadline=None)
def test_codes_are_those_of_the_core(format: str, seed: int, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 16, 8)) * 10.0**exponent * 10.0 ** rng.integers(-4, 4, 8)
    x = x.astype(np.float32)
    mine, core = quantise(torch.from_numpy(x), format), quantise_pages(x, format)
    for name in ("data", "unit", "centre", "reach"):
        assert (getattr(mine, name).numpy() == getattr(core, name)).all(), name
    read = dequantise(mine.data, format, mine.unit, mine.centre, mine.reach).numpy()
    parts = (core.data, format, core.unit, core.centre, core.reach)
    assert (read == dequantise_core(*parts)).all()
    lost = np.linalg.norm(x.astype(np.float64) - read, axis=2).max(axis=1)
    assert (lost <= mine.residual_upper.numpy()).all()


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_history_reads_as_a_plain_cache(data: st.DataObject) -> None:
    """Appending, choosing sequences and cropping in any order: wide pages bit for bit."""
    layer = PagedLayer(64, data.draw(st.sampled_from(("wide", "i8"))), 0.0, 1)
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    plain = [torch.empty(2, 2, 0, 4), torch.empty(2, 2, 0, 4)]
    for _ in range(data.draw(st.integers(1, 6))):
        what = data.draw(st.sampled_from(("append", "append", "select", "crop")))
        if what == "append" or layer.length == 0:
            more = data.draw(st.sampled_from((1, 3, 63, 64, 65, 200)))
            new = [torch.randn(*plain[0].shape[:2], more, 4, generator=generator) for _ in "kv"]
            layer.append(new[0], new[1])
            plain = [torch.cat([x, y], 2) for x, y in zip(plain, new, strict=True)]
        elif what == "select":
            batch = plain[0].shape[0]
            rows = np.array(
                data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3))
            )
            layer.select(rows)
            plain = [x[torch.from_numpy(rows)] for x in plain]
        else:
            length = data.draw(st.integers(0, layer.length))
            layer.crop(length)
            plain = [x[:, :, :length] for x in plain]
        assert layer.length == plain[0].shape[2]
        assert all(torch.equal(x, y) for x, y in zip(layer.dense(), plain, strict=True))


class Reader:
    """A backend that `Decodes` on the CPU: what the pages say, through `PagedKV`."""

    def __init__(self) -> None:
        self.calls = 0

    def decode(
        self, query: torch.Tensor, pages: DevicePages, *, scale: float, causal: bool = True,
        left: int = -1, lam: float = 0.0,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        self.calls += 1
        arrays = [x.float().numpy() for x in (pages.key, pages.value)]
        narrow: list[Any] = [None, None]
        if pages.key_narrow is not None and pages.value_narrow is not None:
            for side, parts in enumerate((pages.key_narrow, pages.value_narrow)):
                data, unit, centre, reach = (x.numpy() for x in parts)
                narrow[side] = Pages(
                    data, pages.format, unit, centre, reach, np.zeros_like(unit)
                )
        kv = PagedKV.from_pages(
            *(Pages.wide(x) for x in arrays), table=pages.table.numpy(),
            lengths=pages.lengths.numpy(), starts=pages.starts.numpy(), key_narrow=narrow[0],
            value_narrow=narrow[1],
        )  # fmt: skip
        mask = Mask.causal("bottom_right")
        if left >= 0:
            mask = Mask.sliding_window(left, 0, "bottom_right")
        asked = query.float().numpy()
        result = attention(asked, kv, mask=mask, scale=scale, backend="numpy")
        out = torch.from_numpy(result.out).to(query.dtype)
        return out, torch.from_numpy(result.lse), torch.zeros(out.shape[:3])


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    adaattn_torch.register_transformers()
    made = Reader()
    monkeypatch.setattr(attending, "backend_for", lambda name, kind: made)
    monkeypatch.setattr(attending, "DIMS", (8,))
    return made


@pytest.mark.parametrize("padding", [0, 37])
@pytest.mark.parametrize("format", ["exact", "i8"])
def test_steps_over_pages_agree_with_steps_over_tensors(
    reader: Reader, format: str, padding: int
) -> None:
    model = tiny().bfloat16()
    ids = tokens(2, 130)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    found = {}
    for name in ("sdpa", "adaattn"):
        model.set_attn_implementation(name)
        cache = AdaptiveCache(
            model.config, format=format, page_len=PAGE, certify=True, budget=1.0
        )
        out = run(model, ids, cache, attention_mask=mask, max_new_tokens=4)
        found[name] = logits(out)[:, :, :], cache
    (near, _), (steps, cache) = found["sdpa"], found["adaattn"]
    assert reader.calls == 2 * 3, "every step of both layers"
    same = (near.argmax(-1) == steps.argmax(-1)).float().mean()
    assert same >= 0.75
    assert float((near[1] - steps[1]).norm() / near[1].norm()) < 0.05
    heads = cache.report().heads
    assert {head.steps for head in heads} == {3}
    uppers = [head.upper for head in heads]
    assert all(x == 0 for x in uppers) if format == "exact" else all(x > 0 for x in uppers)


def test_what_stands_for_the_keys_is_nan_to_anybody_else(reader: Reader) -> None:
    model = tiny().bfloat16()
    model.set_attn_implementation("adaattn")
    cache = AdaptiveCache(model.config, page_len=PAGE)
    key, value = torch.randn(2, 1, 2, 70, 8).bfloat16()
    cache.update(key, value, 0)
    key, value = cache.update(key[:, :, :1], value[:, :, :1], 0)
    assert key.shape == value.shape == (1, 2, 71, 8)
    query = torch.randn(1, 4, 1, 8).bfloat16()
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert out.isnan().all()


def test_masks_that_pages_cannot_have_are_refused(reader: Reader) -> None:
    model = tiny().bfloat16()
    model.set_attn_implementation("adaattn")
    cache = AdaptiveCache(model.config, page_len=PAGE)
    with torch.no_grad():
        model(tokens(1, 70), past_key_values=cache)
        mask = torch.ones(1, 1, 1, 71, dtype=torch.bool)
        mask[..., 30] = False
        with pytest.raises(UnsupportedError, match="more than padding"):
            model(tokens(1, 1), past_key_values=cache, attention_mask=mask)
