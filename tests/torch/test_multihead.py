"""nn.MultiheadAttention's own rules, for our module, for converted ones and under a mode."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from adaattn_core.errors import UnsupportedError
from adaattn_torch import AdaptiveAttention, FallbackWarning, Rule, convert, enable
from adaattn_torch.info import forget_warnings

# PyTorch's own remarks: masks of two types, and its fast path's nested tensors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def outcome(function):
    """What a call returns, or what it raises."""
    try:
        return function()
    except (AssertionError, IndexError, RuntimeError, UnsupportedError) as error:
        return error


@contextmanager
def python_path():
    """Keep PyTorch's modules from their fast path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def assert_same(ours, theirs, unit=2.0**-24):
    if isinstance(theirs, Exception):
        assert type(ours) is type(theirs), ours
        assert str(ours) == str(theirs)
        return
    assert not isinstance(ours, Exception), ours
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours.isnan(), theirs.isnan())
    error = (ours - theirs).nan_to_num().abs().max() if ours.numel() else 0
    assert error <= 64 * unit * max(1.0, float(theirs.nan_to_num().abs().max()))


def draw_mask(data, shape, generator):
    dtype = data.draw(st.sampled_from([torch.bool, torch.float32, torch.int64]))
    hidden = torch.rand(shape, generator=generator) < 0.3
    if dtype == torch.float32:
        noise = torch.randn(shape, generator=generator)
        return noise.masked_fill(hidden, -torch.inf)
    return hidden.to(dtype)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_module_and_mode_do_what_multihead_attention_does(data):
    """Values and refusals, over shapes that fit and shapes that do not.

    PyTorch has two paths, and they disagree where it is told wrong things: the fast one, for
    inference on one tensor, leaves ``is_causal`` out where no mask comes with it, and refuses
    masks of other shapes in words of its own. Ours does what one of them does.
    """
    forget_warnings()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    torch.manual_seed(0)
    heads = 2
    sizes = {} if data.draw(st.booleans()) else {"kdim": 5, "vdim": 3}
    theirs = nn.MultiheadAttention(
        8, heads, bias=data.draw(st.booleans()), batch_first=data.draw(st.booleans()),
        add_bias_kv=data.draw(st.booleans()), add_zero_attn=data.draw(st.booleans()), **sizes,
    )  # fmt: skip
    theirs.train(data.draw(st.booleans()))
    batch = data.draw(st.sampled_from([None, 1, 2]))
    len_q, len_kv = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    itself = not sizes and data.draw(st.booleans())
    len_kv = len_q if itself else len_kv

    def tensor(length, width, batch=batch):
        if batch is None:
            return torch.randn(length, width, generator=generator)
        x = torch.randn(batch, length, width, generator=generator)
        return x if theirs.batch_first else x.transpose(0, 1)

    query = tensor(len_q, 8)
    if itself:
        tensors = (query, query, query)
    else:
        wrong = data.draw(st.sampled_from([None] * 6 + ["batch", "length", "dim"]))
        of_keys = 4 if wrong == "batch" and batch == 1 else batch
        key = tensor(len_kv, sizes.get("kdim", 8), of_keys)
        value = tensor(len_kv + (wrong == "length"), sizes.get("vdim", 8), of_keys)
        if wrong == "dim":
            key = key[0]
        tensors = (query, key, value)
    options = {"need_weights": False}
    n = batch or 1
    shapes = [
        (len_q, len_kv), (n * heads, len_q, len_kv), (n, len_q, len_kv), (1, len_q, len_kv),
        (len_kv, len_q), (len_kv,),
    ]  # fmt: skip
    if data.draw(st.booleans()):
        options["attn_mask"] = draw_mask(data, data.draw(st.sampled_from(shapes)), generator)
    shapes = [(n, len_kv), (n, len_kv), (len_kv,), (n, len_q), (1, len_kv)]
    if batch is None:
        shapes.insert(0, (len_kv,))
    if data.draw(st.booleans()):
        options["key_padding_mask"] = draw_mask(
            data, data.draw(st.sampled_from(shapes)), generator
        )
    if data.draw(st.integers(0, 5)) == 0:
        options["is_causal"] = True
    with torch.set_grad_enabled(data.draw(st.booleans())):
        fast = outcome(lambda: theirs(*tensors, **options)[0])
        with python_path():
            expected = outcome(lambda: theirs(*tensors, **options)[0])

        def under_mode():
            with enable():
                return theirs(*tensors, **options)[0]

        ours = convert(copy.deepcopy(theirs))
        for function in (under_mode, lambda: ours(*tensors, **options)[0]):
            refused = isinstance(expected, Exception) or isinstance(fast, Exception)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if refused else "error", FallbackWarning)
                got = outcome(function)
            as_fast = refused and type(got) is type(fast) is not type(expected)
            assert_same(got, fast if as_fast else expected)
            if not refused:
                assert_same(got, fast)


def test_a_mode_takes_over_modules_and_says_what_it_does_not():
    module = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(1, 5, 16)
    with torch.no_grad(), enable(budget=0.1, model=module, strict=True) as mode:
        module(x, x, x, need_weights=False)
        with pytest.raises(UnsupportedError, match="need_weights"):
            module(x, x, x)
    assert [info.plan.policy for info in mode.infos] == ["budget"]
    with (
        enable() as outer,
        pytest.warns(FallbackWarning, match="need_weights"),
        enable() as mode,
    ):
        _, weights = module(x, x, x)
    assert weights.shape == (1, 5, 5)
    assert [info.plan for info in mode.infos] == [None]
    assert outer.infos == []


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kind", ["encoder layer", "encoder", "decoder layer", "transformer"])
def test_modules_around_it_are_taken_over(kind, gradient):
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0}
    if kind == "encoder layer":
        model = nn.TransformerEncoderLayer(16, 2, 32, **options)
    elif kind == "encoder":
        layer = nn.TransformerEncoderLayer(16, 2, 32, **options)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
    elif kind == "decoder layer":
        model = nn.TransformerDecoderLayer(16, 2, 32, **options)
    else:
        model = nn.Transformer(16, 2, 1, 1, 32, **options)
    model.eval()
    x = torch.randn(2, 7, 16)
    given = (x,) if kind.startswith("encoder") else (x, x)
    expected_layers = {
        "encoder layer": ["self_attn"],
        "encoder": ["layers.0.self_attn", "layers.1.self_attn"],
        "decoder layer": ["self_attn", "multihead_attn"],
        "transformer": [
            "encoder.layers.0.self_attn", "decoder.layers.0.self_attn",
            "decoder.layers.0.multihead_attn",
        ],
    }  # fmt: skip
    with torch.set_grad_enabled(gradient):
        expected = model(*given)
        with enable(rules=[Rule("*self_attn", budget=1e-5)], model=model, strict=True) as mode:
            out = model(*given)
    assert [info.layer for info in mode.infos] == expected_layers[kind]
    assert mode.infos[0].plan.policy == "budget"
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_strict_notices_that_nothing_was_taken_over():
    with pytest.raises(UnsupportedError, match="no attention was seen"), enable(strict=True):
        torch.randn(2, 2) @ torch.randn(2, 2)
    with pytest.raises(ZeroDivisionError), enable(strict=True):  # the first error is the cause
        _ = 1 / 0
    x = torch.randn(2, 5, 16)
    module = nn.MultiheadAttention(16, 2, batch_first=True).requires_grad_(False)
    arguments = (
        x, x, x, 16, 2, module.in_proj_weight, module.in_proj_bias, module.out_proj.weight,
        module.out_proj.bias, None, False,
    )  # fmt: skip
    with enable(strict=True), pytest.raises(UnsupportedError, match="native_multi_head"):
        torch._native_multi_head_attention(*arguments)
    with enable() as mode, pytest.warns(FallbackWarning, match="native_multi_head"):
        torch._native_multi_head_attention(*arguments)
    assert len(mode.infos) == 1


# -- converting -------------------------------------------------------------------------------
def pruned(module):
    prune.l1_unstructured(module, "in_proj_weight", 0.4)
    prune.random_unstructured(module.out_proj, "weight", 0.4)


def spectrally_normalised(module):
    parametrizations.spectral_norm(module, "in_proj_weight")


def weight_normalised(module):
    parametrizations.weight_norm(module, "in_proj_weight")
    parametrizations.weight_norm(module.out_proj, "weight")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def old_weight_normalised(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(module, "in_proj_weight")


def hooked(module):
    module.register_forward_hook(lambda m, x, y: (y[0] * 2, y[1]))
    module.register_forward_pre_hook(lambda m, x: tuple(a + 1 for a in x))


def frozen(module):
    module.requires_grad_(False)
    module.in_proj_bias.requires_grad_()


def halved(module):
    module.double()


CHANGES = [
    pruned, spectrally_normalised, weight_normalised, old_weight_normalised, hooked, frozen,
    halved,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["convert", "from_multihead"])
def test_changed_modules_compute_the_same_after_conversion(change, how):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    change(module)
    module.eval()  # normalisations change with every call while training
    x = torch.randn(2, 5, 16, dtype=next(module.parameters()).dtype)
    expected = module(x, x, x, need_weights=False)[0].detach().clone()
    parameters = [name for name, _ in module.named_parameters()]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    ours = convert(module) if how == "convert" else AdaptiveAttention.from_multihead(module)
    assert isinstance(ours, AdaptiveAttention)
    assert (ours is module) == (how == "convert")
    assert_same(ours(x, x, x, need_weights=False)[0].detach(), expected)
    assert ours.last_info.fell_back is None
    assert [name for name, _ in ours.named_parameters()] == parameters
    after = ours.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_parametrisations_train_and_can_be_removed():
    torch.manual_seed(0)
    module = convert(
        nn.ModuleList([parametrizations.weight_norm(
            nn.MultiheadAttention(16, 2, batch_first=True), "in_proj_weight"
        )])
    )[0]  # fmt: skip
    x = torch.randn(2, 5, 16)
    module(x, x, x, need_weights=False)[0].sum().backward()
    original = module.parametrizations.in_proj_weight.original1
    assert original.grad.abs().max() > 0
    with torch.no_grad():
        original += 1  # what is computed from it changes too
    changed = module(x, x, x, need_weights=False)[0]
    parametrize.remove_parametrizations(module, "in_proj_weight")
    assert type(module) is AdaptiveAttention
    torch.testing.assert_close(module(x, x, x, need_weights=False)[0], changed)


def test_hooks_buffers_and_attributes_stay():
    module = nn.MultiheadAttention(16, 2)
    module.register_buffer("ring", torch.arange(3))
    module.note = "kept"
    calls = []
    handle = module.register_forward_hook(lambda m, x, y: calls.append(m))
    ours = convert(nn.ModuleDict({"a": module}))["a"]
    assert torch.equal(ours.ring, torch.arange(3))
    assert ours.note == "kept"
    x = torch.randn(5, 2, 16)
    ours(x, x, x, need_weights=False)
    assert calls == [ours]
    handle.remove()
    ours(x, x, x, need_weights=False)
    assert len(calls) == 1


def test_shared_modules_are_converted_wherever_they_are():
    class Parent(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.outside = [inner]  # not registered, and called all the same

    shared = nn.MultiheadAttention(16, 2)
    model = convert(nn.ModuleList([Parent(shared), Parent(shared)]), budget=0.1)
    for parent in model:
        assert type(parent.inner) is AdaptiveAttention
        assert parent.outside[0] is parent.inner
    assert model[0].inner is model[1].inner
    assert shared.layer == "0.inner"


def test_converting_again_changes_the_settings():
    model = convert(nn.ModuleDict({"a": nn.MultiheadAttention(16, 2)}), budget=0.1)
    convert(model, budget=0.2, strict=True)
    assert (model["a"].budget, model["a"].strict, model["a"].layer) == (0.2, True, "a")


class Own(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)[0] * 2, None


def wrapped():
    module = nn.MultiheadAttention(16, 2)
    module.forward = lambda *x, **y: (x[0], None)
    return module


def named():
    module = nn.MultiheadAttention(16, 2)
    module.layer = nn.Linear(2, 2)
    return module


@pytest.mark.parametrize(
    ("make", "why"), [(lambda: Own(16, 2), "Own"), (wrapped, "forward"), (named, "layer")]
)
def test_what_might_compute_something_else_is_refused_and_nothing_changed(make, why):
    model = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2), "b": make()})
    with pytest.raises(UnsupportedError, match=why):
        convert(model)
    assert type(model["a"]) is nn.MultiheadAttention
    with pytest.raises(UnsupportedError, match=why):
        AdaptiveAttention.from_multihead(model["b"])


@pytest.mark.parametrize("tied", [False, True])
def test_converted_modules_are_copied_and_stored(tied, tmp_path):
    ours = convert(nn.MultiheadAttention(16, 2), budget=0.1)
    x = torch.randn(5, 2, 16)
    expected = ours(x, x, x, need_weights=False)[0]
    for again in (copy.deepcopy(ours), _stored(ours, tmp_path)):
        assert type(again) is AdaptiveAttention
        assert again.budget == 0.1
        assert torch.equal(again(x, x, x, need_weights=False)[0], expected)


def _stored(module, folder):
    torch.save(module, folder / "module.pt")
    return torch.load(folder / "module.pt", weights_only=False)
