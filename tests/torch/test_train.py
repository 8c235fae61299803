"""Training under a budget follows the exact loss curve; with a wrong gradient it does not."""

from __future__ import annotations

import argparse
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import adaattn_torch
from adaattn_core import FixedPolicy
from adaattn_torch import backward

LENGTH, BATCH, WIDTH, HEADS, STEPS = 64, 2, 64, 4, 200


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(WIDTH) for _ in range(2)])
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 2 * WIDTH),
            torch.nn.GELU(),
            torch.nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        mixed = F.scaled_dot_product_attention(*parts.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(torch.nn.Module):
    """A two-layer byte model."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(128, WIDTH)
        self.positions = torch.nn.Embedding(LENGTH, WIDTH)
        self.blocks = torch.nn.Sequential(Block(), Block())
        self.head = torch.nn.Linear(WIDTH, 128)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight
        return self.head(self.blocks(x))


def train(budget: float | None, steps: int = STEPS) -> np.ndarray:
    """Loss of every step on the source of argparse, the same batches each time."""
    text = inspect.getsource(argparse).encode("ascii", "ignore")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = Model()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = torch.Generator().manual_seed(1)
    losses = []
    policy = FixedPolicy(qk="e4m3", pv="e4m3")  # left to itself, a CPU runs short heads exactly
    approximated = []
    for step in range(steps):
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=batches)
        window = data[starts[:, None] + torch.arange(LENGTH + 1)]
        if budget is None:
            logits = model(window[:, :-1])
        else:
            with adaattn_torch.enable(budget, policy=policy) as mode:
                logits = model(window[:, :-1])
            assert len(mode.infos) == 2
            assert all((info.certificate.upper <= budget).all() for info in mode.infos)
            formats = [head.qk for info in mode.infos for head in info.plan.heads.values()]
            approximated.append(np.mean([name in ("e4m3", "i8") for name in formats]))
            if step == 0:  # the same weights: what the budget changes, certified and true
                change = (logits - model(window[:, :-1])).norm() / logits.norm()
                assert 1e-3 < change < budget
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert budget is None or np.mean(approximated) > 0.8
    return np.array(losses)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest gap of the two curves, smoothed over 10 steps."""
    window = np.ones(10) / 10
    return float(np.abs(np.convolve(a - b, window, "valid")).max())


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    torch.set_num_threads(1)
    return train(None)


@pytest.mark.slow
def test_budget_follows_the_exact_curve(exact) -> None:
    losses = train(0.05)
    assert exact[-10:].mean() < 0.7 * exact[:10].mean()  # it learns at all
    assert distance(losses, exact) < 0.03 * exact[0]


def test_wrong_gradient_is_noticed(exact, monkeypatch) -> None:
    right = backward.attention_gradient

    def wrong(*args, **kwargs):
        d_query, d_key, d_value, d_bias, d_sinks = right(*args, **kwargs)
        return -d_query, d_key, -d_value, d_bias, d_sinks

    monkeypatch.setattr(backward, "attention_gradient", wrong)
    steps = STEPS // 4
    assert distance(train(0.05, steps), exact[:steps]) > 0.03 * exact[0]
