"""A transformers model under a budget: prefill with certificates, then generation.

    pip install transformers torch
    python docs/examples/transformers_model.py

The model is tiny and random, so that nothing is downloaded; one from `from_pretrained` is used
the same way.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adaattn_torch

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
).eval()
prompt = torch.randint(0, 128, (1, 384))

with torch.no_grad():
    expected = model(prompt).logits
    reference = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)

adaattn_torch.register_transformers()
model.set_attn_implementation("adaattn")

# Prefill: every call leaves an info with its plan and certificate.
with torch.no_grad(), adaattn_torch.budgets(0.05), adaattn_torch.listening([]) as infos:
    logits = model(prompt).logits
uppers = torch.stack([torch.as_tensor(info.certificate.upper) for info in infos])
print(f"prefill: {len(infos)} layers, largest certified row error {uppers.max():.4f}")
print(f"         logits differ by at most {(logits - expected).abs().max():.1e}")
assert (uppers <= 0.05).all()

# Generation: one query row a step.
with torch.no_grad(), adaattn_torch.budgets(0.05):
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
same = int((tokens == reference)[0, prompt.shape[1] :].sum())
print(f"generate: {same} of 8 tokens as with PyTorch's attention")
