"""transformers: tiny random models give the logits of "sdpa", whatever mask or cache."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch._dynamo.testing

import adaattn_torch
from adaattn_core.errors import UnsupportedError
from adaattn_torch.entries.transformers import (
    KEY,
    attention_forward,
    budgets,
    register_transformers,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen2 window": lambda: transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=0
    ),
    "gemma": lambda: transformers.GemmaConfig(**SMALL),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=128
    ),
}


@pytest.fixture(autouse=True)
def _registered():
    register_transformers()


@pytest.fixture(params=list(CONFIGS))
def model(request):
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    return made.eval()


def logits(model, implementation: str, dtype: torch.dtype = torch.float32, **inputs):
    model = model.to(dtype)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs).logits.double()


def tokens(batch: int = 2, length: int = 33) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_as_good_as_sdpa(model, **inputs) -> None:
    """Our error against float64 is no more than twice that of "sdpa"."""
    seen: list[adaattn_torch.AttentionInfo] = []
    with adaattn_torch.listening(seen):
        ours = logits(model, KEY, **inputs)
    theirs = logits(model, "sdpa", **inputs)
    truth = logits(model, "sdpa", torch.float64, **inputs)
    model.to(torch.float32)
    assert len(seen) == 2  # one per layer: it really ran
    assert all(info.fell_back is None for info in seen)
    error, reference = (float((x - truth).norm()) for x in (ours, theirs))
    # Where torch happens to be nearly exact, the roundings of the other layers still differ.
    assert error <= 2 * reference + 1e-6 * float(truth.norm())


def test_logits_match_sdpa(model) -> None:
    assert_as_good_as_sdpa(model, input_ids=tokens())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_matches_sdpa(model, side: str) -> None:
    ids, mask = tokens(), torch.ones(2, 33, dtype=torch.long)
    hidden = slice(0, 7) if side == "left" else slice(26, 33)
    mask[1, hidden] = 0
    # Only rows of real tokens are compared: what a padding row holds is nobody's business.
    kept = mask.bool()
    ours = logits(model, KEY, input_ids=ids, attention_mask=mask)[kept]
    theirs = logits(model, "sdpa", input_ids=ids, attention_mask=mask)[kept]
    truth = logits(model, "sdpa", torch.float64, input_ids=ids, attention_mask=mask)[kept]
    model.to(torch.float32)
    error, reference = (float((x - truth).norm()) for x in (ours, theirs))
    assert error <= 2 * reference + 1e-6 * float(truth.norm())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_match_sdpa(model, cache: str) -> None:
    made = {}
    for implementation in ("sdpa", KEY):
        model.set_attn_implementation(implementation)
        made[implementation] = model.generate(
            tokens(1, 17), max_new_tokens=12, do_sample=False, cache_implementation=cache
        )
    assert torch.equal(made["sdpa"], made[KEY])


def test_padded_batches_generate_what_sdpa_does(model) -> None:
    """Padding on the left, as generation needs it, with the cache growing."""
    ids, mask = tokens(2, 17), torch.ones(2, 17, dtype=torch.long)
    ids[1, :6], mask[1, :6] = 0, 0
    made = {}
    for implementation in ("sdpa", KEY):
        model.set_attn_implementation(implementation)
        made[implementation] = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False
        )
    assert torch.equal(made["sdpa"], made[KEY])


@pytest.mark.slow
def test_compiles_whole_and_no_more_often_than_sdpa() -> None:
    torch.manual_seed(0)
    config = CONFIGS["qwen2 window"]()
    config.num_hidden_layers = 1  # compiling takes its time
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    compiled: dict[str, int] = {}
    for implementation in ("sdpa", KEY):
        model.set_attn_implementation(implementation)
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        function = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
        for length in (33, 25):
            mask = torch.ones(2, length, dtype=torch.long)
            mask[1, 20:] = 0
            inputs = {"input_ids": tokens(2, length), "attention_mask": mask}
            with torch.no_grad():
                torch.testing.assert_close(function(**inputs).logits, model(**inputs).logits)
        compiled[implementation] = counter.frame_count
    torch._dynamo.reset()
    assert compiled[KEY] <= compiled["sdpa"]


def test_layers_compiled_on_their_own_take_masks_as_patterns() -> None:
    """The mask is made outside of what is compiled, and padding on the right is a pattern."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    model.set_attn_implementation(KEY)
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[1, 20:] = 0
    torch._dynamo.reset()
    with torch.no_grad():
        eager = model(tokens(), attention_mask=mask).logits
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(model(tokens(), attention_mask=mask).logits, eager)
    torch._dynamo.reset()


def test_budget_is_kept_and_certified_per_layer() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    model.set_attn_implementation(KEY)
    seen: list[adaattn_torch.AttentionInfo] = []
    rule = adaattn_torch.Rule(layer="layers.0")
    with torch.no_grad(), adaattn_torch.listening(seen), budgets(0.1, rules=[rule]):
        model(tokens())
    assert [info.layer for info in seen] == ["layers.0", "layers.1"]
    assert seen[0].plan.policy == "exact"
    assert seen[1].plan.policy == "budget"
    assert (seen[1].certificate.upper <= 0.1).all()


def test_gradient_flows() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    gradients = {}
    for implementation in ("sdpa", KEY):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        weight = model.model.layers[0].self_attn.q_proj.weight
        gradients[implementation] = weight.grad.clone()
    assert torch.linalg.norm(gradients[KEY]) > 0
    torch.testing.assert_close(gradients[KEY], gradients["sdpa"])


class Attention(torch.nn.Module):
    is_causal = True
    layer_idx = 3


def test_softcap_and_sinks_are_computed_by_the_backend() -> None:
    q, k, v = (torch.randn(1, h, 9, 8, dtype=torch.float64) for h in (4, 2, 2))
    sinks = torch.randn(4, dtype=torch.float64)
    seen: list[adaattn_torch.AttentionInfo] = []
    with adaattn_torch.listening(seen):
        out, _ = attention_forward(Attention(), q, k, v, None, softcap=2.0, s_aux=sinks)
    assert not seen[0].fell_back
    assert seen[0].layer == "layers.3"
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = 2 * torch.tanh(q @ keys.mT * 8**-0.5 / 2)
    scores = scores.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    logit = sinks.reshape(1, 4, 1, 1).expand(1, 4, 9, 1)
    weights = torch.softmax(torch.cat([scores, logit], -1), -1)[..., :-1]
    torch.testing.assert_close(out, (weights @ values).transpose(1, 2))


def test_what_cannot_be_done_is_said() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(UnsupportedError, match="paged cache"):
        attention_forward(Attention(), q, k, v, None, cache=object())
    with pytest.raises(UnsupportedError, match="output_attentions"):
        attention_forward(Attention(), q, k, v, None, output_attentions=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_forward(Attention(), q, k, v, None)


def test_a_window_without_a_mask_is_not_ignored() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=torch.float64)
    near = torch.ones(9, 9, dtype=torch.bool).tril() & torch.ones(9, 9, dtype=torch.bool).triu(
        -3
    )
    for rows in (9, 1):
        out, _ = attention_forward(Attention(), q[:, :, -rows:], k, v, None, sliding_window=4)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
        torch.testing.assert_close(out, expected.transpose(1, 2)[:, -rows:])
    wide, _ = attention_forward(Attention(), q, k, v, None, sliding_window=9)
    assert torch.equal(wide, attention_forward(Attention(), q, k, v, None)[0])
    with pytest.raises(UnsupportedError, match="both sides"):
        attention_forward(Attention(), q, k, v, None, is_causal=False, sliding_window=4)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_models_with_softcap_or_sinks_match_eager(kind: str) -> None:
    """With padding and windows, natively: strict, no call falls back."""
    if kind == "gemma2":
        config = transformers.Gemma2Config(
            **SMALL, sliding_window=8, attn_logit_softcapping=2.0
        )
    else:
        config = transformers.GptOssConfig(
            **SMALL, sliding_window=8, num_local_experts=2, num_experts_per_tok=1,
        )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[1, 26:] = 0
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    if kind == "gpt_oss":  # heads' sinks begin alike
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    seen: list[adaattn_torch.AttentionInfo] = []
    with budgets(strict=True), adaattn_torch.listening(seen):
        ours = logits(model, KEY, **inputs)[mask.bool()]
    theirs = logits(model, "eager", **inputs)[mask.bool()]
    assert [info.fell_back for info in seen] == [None] * 2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    grads = []
    for implementation in (KEY, "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(**inputs, labels=tokens()).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, theirs in grads[1].items():
        error = (grads[0][name] - theirs).norm()
        assert error <= 1e-4 * theirs.norm() + 1e-9, name


def test_position_bias_is_added() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8, dtype=torch.float64)
    bias = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    out, _ = attention_forward(Attention(), q, k, v, None, position_bias=bias)
    mask = bias.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected.transpose(1, 2))
