"""Activation checkpointing under a mode: the right gradient, or a loud error."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils import checkpoint as checkpointing

from adaattn_core import FixedPolicy
from adaattn_torch import Rule, budgets, enable, register_transformers
from adaattn_torch.entries import mode
from adaattn_torch.entries.recomputation import checkpoints

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

COARSE = {"budget": 0.1, "policy": FixedPolicy(qk="e4m3", pv="e4m3")}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        # As many tensors are saved as PyTorch's own saves, and of like shapes.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Blocks, each of them and all of them repeated in the backward pass if so asked."""

    def __init__(self, count=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.each = self.whole = False
        self.options = {"use_reentrant": False}

    def forward(self, x):
        if self.whole:
            return checkpointing.checkpoint(self.through, x, **self.options)
        return self.through(x)

    def through(self, x):
        for block in self.blocks:
            run = partial(checkpointing.checkpoint, block, **self.options)
            x = run(x) if self.each else block(x)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def gradient(model, inside=False, **settings):
    """The gradient of a loss under a mode, as one vector, and the layers heard of."""
    model.zero_grad()
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with enable(model=model, **(COARSE | settings)) as mode:
        loss = model(x).square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert len(mode.infos) >= len(model.blocks)
    assert all(info.fell_back is None for info in mode.infos)
    parameters = [p.grad.flatten() for p in model.parameters()]
    return torch.cat([x.grad.flatten(), *parameters]), [i.layer for i in mode.infos]


# Said of the inner of two, where it runs without gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("which", ["each", "whole", "both"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_repeated_runs_are_what_ran(model, which, inside, reentrant):
    expected, layers = gradient(model)
    model.options = {"use_reentrant": reentrant}
    model.each, model.whole = which != "whole", which != "each"
    found, heard = gradient(model, inside)
    assert torch.equal(found, expected)
    assert heard == layers == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize("early_stop", [False, True])
def test_layers_keep_their_rules_when_repeated(model, early_stop):
    rules = [
        Rule("blocks.0", policy=FixedPolicy(qk="bf16", pv="bf16"), budget=0.1),
        Rule("blocks.1", heads=(1,), budget=None),
    ]
    expected, _ = gradient(model, rules=rules)
    assert not torch.equal(expected, gradient(model)[0])
    for which in ("each", "whole"):
        model.each, model.whole = which == "each", which == "whole"
        with checkpointing.set_checkpoint_early_stop(early_stop):
            assert torch.equal(gradient(model, rules=rules)[0], expected)


def test_modes_nest_in_checkpoints(model):
    def inner(x):
        with enable(**COARSE):
            return model(x)

    x = torch.randn(1, 9, 16).requires_grad_()
    (expected,) = torch.autograd.grad(inner(x).sum(), x)
    out = checkpointing.checkpoint(inner, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)
    with enable(budget=1e-4):
        out = checkpointing.checkpoint(inner, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)


def test_repeated_backward_passes(model):
    model.each = True
    x = torch.randn(1, 9, 16).requires_grad_()
    with enable(**COARSE):
        out = model(x).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, x)[0], first)


def test_hooks_of_others_stay_where_they_were(model):
    expected, _ = gradient(model)
    seen = []

    def pack(x):
        seen.append(x.shape)
        return x

    model.each = True
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        before = torch._C._autograd._top_saved_tensors_default_hooks(False)
        assert checkpoints() == []
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) == before
        assert torch.equal(gradient(model)[0], expected)
    assert seen


def test_where_the_mode_cannot_reach_the_checkpoint_fails(model, monkeypatch):
    """As with a PyTorch that keeps elsewhere what a checkpoint repeats."""
    monkeypatch.setattr(mode, "checkpoints", lambda: [])
    model.each = True
    with enable(**COARSE):
        loss = model(torch.randn(2, 20, 16).requires_grad_()).sum()
    with pytest.raises(checkpointing.CheckpointError, match="different metadata"):
        loss.backward()


def tiny(implementation):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    model.set_attn_implementation(implementation)
    return model


def model_gradient(model, context):
    ids = torch.randint(1, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    with context:
        loss = model(ids, labels=ids).loss
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("way", ["mode", "registered", "budgets"])
def test_transformers_train_right(way):
    key = register_transformers()
    rule = Rule("layers.1", budget=None)
    context = {
        "mode": lambda: enable(**COARSE),
        "registered": lambda: budgets(),
        "budgets": lambda: budgets(**COARSE, rules=[rule]),
    }[way]
    model = tiny("sdpa" if way == "mode" else key)
    expected = model_gradient(model, context())
    exact = model_gradient(model, budgets())
    assert torch.equal(expected, exact) == (way == "registered")
    for reentrant in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the name in transformers 5.0
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert torch.equal(model_gradient(model, context()), expected)
