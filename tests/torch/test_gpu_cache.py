"""A growing cache on a GPU: steps over its pages against float64; transformers' generate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import adaattn_torch
from adaattn_torch.cache.attending import PagedSteps
from adaattn_torch.cache.layer import PagedLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BATCH, HEADS, GROUP, PROMPT = 2, 2, 4, 700
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Story:
    """Keys, values and queries that a model might write, and exact attention of them."""

    def __init__(self, dim: int, dtype: torch.dtype, length: int = 1100) -> None:
        generator = torch.Generator("cuda").manual_seed(dim)

        def draw(heads: int) -> torch.Tensor:
            shape = (BATCH, heads, length, dim)
            return torch.randn(shape, generator=generator, device="cuda").to(dtype)

        self.query, self.key, self.value = draw(HEADS * GROUP), draw(HEADS), draw(HEADS)
        self.scale = dim**-0.5

    def exact(self, rows: slice, key: Any, value: Any, first: Any = None) -> torch.Tensor:
        """Causal attention of the rows at their own positions, over the keys so far."""
        query = self.query[:, :, rows].double()
        key, value = (
            x[:, :, : rows.stop].double().repeat_interleave(GROUP, 1) for x in (key, value)
        )
        scores = query @ key.mT * self.scale
        keys = torch.arange(rows.stop, device="cuda")
        positions = torch.arange(rows.start, rows.stop, device="cuda")
        hidden = keys > positions[:, None]
        if first is not None:
            hidden = hidden | (keys < first[:, None, None, None])
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("format", ["wide", "i8", "e4m3"])
def test_steps_are_attention_of_what_the_pages_hold(
    format: str, dim: int, dtype: torch.dtype
) -> None:
    story = Story(dim, dtype)
    layer = PagedLayer(128, format, 0.1, 256)  # grows on the way
    steps = PagedSteps(layer, 0.0, False)
    layer.append(story.key[:, :, :PROMPT], story.value[:, :, :PROMPT])
    now = PROMPT
    while now < 1060:
        more = (1, 1, 1, 5, 64)[now % 5]
        rows = slice(now, now + more)
        assert steps.serves(story.key[:, :, rows])
        layer.append(story.key[:, :, rows], story.value[:, :, rows])
        found = steps.attend(story.query[:, :, rows], None, story.scale)
        now += more
        assert error(found, story.exact(rows, *layer.dense())) <= 2 * UNIT[dtype]
    assert bool((layer.table >= 0).any()) == (format != "wide")
    limit = {"wide": 2 * UNIT[dtype], "i8": 0.02, "e4m3": 0.08}[format]
    assert error(found, story.exact(rows, story.key, story.value)) <= limit


@pytest.mark.parametrize("lam", [0.0, 1e-4])
@pytest.mark.parametrize("format", ["wide", "i8"])
def test_bounds_cover_every_step(format: str, lam: float) -> None:
    story = Story(64, torch.bfloat16)
    # Rows lean to their own key: what is not near the newest weighs too little to be read.
    story.query += 3 * story.key.repeat_interleave(GROUP, 1)
    layer = PagedLayer(128, format, 0.1, 2048)
    layer.watch_norms = True
    steps = PagedSteps(layer, lam, True)
    layer.append(story.key[:, :, :PROMPT], story.value[:, :, :PROMPT])
    worst = torch.zeros(HEADS, dtype=torch.float64)
    for now in range(PROMPT, PROMPT + 40):
        rows = slice(now, now + 1)
        layer.append(story.key[:, :, rows], story.value[:, :, rows])
        found = steps.attend(story.query[:, :, rows], None, story.scale).double()
        moved = (found - story.exact(rows, story.key, story.value)).norm(dim=-1)
        size = found.norm(dim=-1)
        # The attention's own arithmetic is not in the bound.
        share = (moved / size - 2 * UNIT[torch.bfloat16]).clamp_min(0).amax((0, 2))
        worst = torch.maximum(worst, share.reshape(HEADS, GROUP).amax(1).cpu())
    uppers = steps.uppers()
    assert uppers is not None
    assert steps.steps == 40
    assert all(u >= w for u, w in zip(uppers, worst.tolist(), strict=True))
    assert (max(uppers) > 0) == (format == "i8" or lam > 0)


def test_padding_cropping_and_reordering() -> None:
    story = Story(64, torch.bfloat16)
    layer = PagedLayer(128, "i8", 0.1, 256)
    steps = PagedSteps(layer, 0.0, False)
    layer.append(story.key[:, :, :PROMPT], story.value[:, :, :PROMPT])
    first = torch.tensor([0, 130], device="cuda")

    def step(now: int) -> None:
        rows = slice(now, now + 1)
        layer.append(story.key[:, :, rows], story.value[:, :, rows])
        mask = (torch.arange(now + 1, device="cuda") >= first[:, None])[:, None, None]
        found = steps.attend(story.query[:, :, rows], mask, story.scale)
        exact = story.exact(rows, *layer.dense(), first)
        assert error(found, exact) <= 2 * UNIT[torch.bfloat16]

    step(PROMPT)
    layer.crop(500)  # into a page that was rounded
    for now in range(500, 520):
        step(now)
    layer.select(np.array([1, 1]))
    first = first[[1, 1]]
    for x in ("query", "key", "value"):
        setattr(story, x, getattr(story, x)[[1, 1]])
    for now in range(520, 650):
        step(now)


class Told:
    """A story that is told, whatever a model would say: logits stay comparable at every step.

    A model's own choice between two tokens that are a rounding apart would end that.
    """

    def __init__(self, story: torch.Tensor, prompt: int) -> None:
        self.story, self.prompt = story, prompt

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        following = self.story[:, ids.shape[1] - self.prompt, None]
        return torch.full_like(scores, -torch.inf).scatter(1, following, 0.0)


def test_generate_reads_the_pages() -> None:
    """Beside PyTorch's attention over the tensors of the same cache."""
    transformers = pytest.importorskip("transformers")
    adaattn_torch.register_transformers()
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config).cuda().bfloat16().eval()
    ids, story = (torch.randint(2, 97, (2, n), device="cuda") for n in (300, 200))
    options: dict[str, Any] = {"max_new_tokens": 200, "do_sample": False, "output_logits": True,
                               "return_dict_in_generate": True}  # fmt: skip
    options["logits_processor"] = transformers.LogitsProcessorList([Told(story, 300)])
    found = {}
    for kind in ("sdpa", "adaattn"):
        model.set_attn_implementation(kind)
        for format in ("exact", "i8"):
            cache = adaattn_torch.AdaptiveCache(model.config, format=format)
            with torch.no_grad():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options
                )
            assert torch.equal(out.sequences[:, 300:], story)
            found[kind, format] = torch.stack(out.logits).float()
            steps = cache.report().heads[0].steps
            assert (steps == 199) == (kind == "adaattn")
    for format in ("exact", "i8"):
        ours, theirs = found["adaattn", format], found["sdpa", format].double()
        worst = max(error(a, b) for a, b in zip(ours, theirs, strict=True))
        assert worst <= 0.05, format
