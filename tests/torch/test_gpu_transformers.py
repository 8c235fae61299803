"""Gemma-2 and gpt-oss on a CUDA device: logits and gradients beside those of "eager"."""

from __future__ import annotations

import pytest
import torch

import adaattn_torch
from adaattn_cuda.backend import CudaBackend
from adaattn_torch.entries.transformers import KEY, budgets, register_transformers

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]

SMALL = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "sliding_window": 40,
}
LENGTH, KEPT = 201, 150


def model_of(kind: str) -> torch.nn.Module:
    """Random weights; heads' sinks differ."""
    torch.manual_seed(0)
    if kind == "gemma2":
        config = transformers.Gemma2Config(**SMALL, attn_logit_softcapping=2.0)
        return transformers.AutoModelForCausalLM.from_config(config).cuda().eval()
    config = transformers.GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=2)
    model = transformers.AutoModelForCausalLM.from_config(config).cuda().eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


def results(
    model: torch.nn.Module, implementation: str, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of real tokens, and the gradient of every parameter."""
    model = model.to(dtype)
    model.set_attn_implementation(implementation)
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (2, LENGTH), generator=generator).cuda()
    mask = torch.ones(2, LENGTH, dtype=torch.long, device="cuda")
    mask[1, KEPT:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    found = model(input_ids=ids, attention_mask=mask, labels=labels)
    found.loss.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    return found.logits[mask.bool()].detach().double(), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_logits_and_gradients_err_like_eager(kind, dtype, monkeypatch) -> None:
    """Natively: no call falls back, and every backward pass is a fused one."""
    register_transformers()
    passes = []
    plain = CudaBackend.backward

    def backward(self, *arrays, **given):
        found = plain(self, *arrays, **given)
        passes.append(given.get("softcap"))
        return found

    monkeypatch.setattr(CudaBackend, "backward", backward)
    model = model_of(kind).to(dtype)  # weights that every dtype holds
    seen: list[adaattn_torch.AttentionInfo] = []
    with budgets(strict=True), adaattn_torch.listening(seen):
        ours, our_gradients = results(model, KEY, dtype)
    assert [info.fell_back for info in seen] == [None] * 2
    assert len(passes) == 2
    # In float64 "eager" makes NaN of padded rows, and gpt-oss's experts refuse it.
    truth, true_gradients = results(model, "eager", torch.float32)
    theirs, their_gradients = (
        results(model, "eager", dtype) if dtype != torch.float32 else (truth, true_gradients)
    )
    slack = 1e-4 if dtype == torch.float32 else 2.0**-8  # the other layers' roundings differ
    error, known = (float((x - truth).norm()) for x in (ours, theirs))
    assert error <= 2 * known + slack * float(truth.norm())
    for name, exact in true_gradients.items():
        error = float((our_gradients[name] - exact).norm())
        known = float((their_gradients[name] - exact).norm())
        assert error <= 2 * known + slack * float(exact.norm()) + 1e-9, name
