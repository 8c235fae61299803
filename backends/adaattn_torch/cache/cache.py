"""`AdaptiveCache`: what ``generate(past_key_values=...)`` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adaattn_core.checks import real, shown, truth, whole, word
from adaattn_core.errors import ArgumentError, BackendUnavailableError, ShapeError
from adaattn_torch.cache.attending import PagedSteps
from adaattn_torch.cache.layer import PagedLayer

try:
    from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
except ImportError as error:
    raise BackendUnavailableError(
        got=f"transformers: {error}",
        needed="transformers 5.0 or later",
        do="pip install 'transformers>=5'",
    ) from error

FORMATS = ("i8", "e4m3", "exact")
_WINDOWS = ("sliding_attention", "chunked_attention")
_FULL = ("full_attention",)


@dataclass(frozen=True, slots=True)
class HeadReport:
    """What became of one KV head's cache.

    Attributes
    ----------
    layer, head : int
    format : str
        Of its full pages: ``i8``, ``e4m3`` or ``16-bit``.
    key_error_estimate, value_error_estimate : float
        Relative error that the format was chosen by, measured at prefill; 0 where nothing was
        rounded, NaN before a page is full.
    key_residual_upper, value_residual_upper : float
        Largest norm that rounding took from a key, and from a value, of any sequence.
    steps : int
        Steps that attended over the pages.
    upper : float
        With ``certify``: largest bound (theorem 11) of what rounding and unread values can have
        moved a step's rows by, relative to their rms, over the head's group and all steps; the
        attention's own arithmetic is not in it. NaN where no step was certified.
    """

    layer: int
    head: int
    format: str
    key_error_estimate: float
    value_error_estimate: float
    key_residual_upper: float
    value_residual_upper: float
    steps: int = 0
    upper: float = float("nan")


@dataclass(frozen=True, slots=True)
class CacheReport:
    """One `HeadReport` for each layer on pages and KV head; ``str`` makes a table."""

    heads: tuple[HeadReport, ...]

    def worst(self) -> HeadReport | None:
        """Head whose keys and values lost most, relatively; None for an empty cache."""
        known = [h for h in self.heads if h.key_error_estimate == h.key_error_estimate]
        return max(
            known,
            key=lambda h: max(h.key_error_estimate, h.value_error_estimate),
            default=None,
        )

    def __str__(self) -> str:
        lines = [f"{'layer':>5} {'head':>4} {'format':<7} {'key':>8} {'value':>8} {'upper':>8}"]
        lines += [
            f"{h.layer:>5} {h.head:>4} {h.format:<7} {h.key_error_estimate:>8.5f}"
            f" {h.value_error_estimate:>8.5f} {h.upper:>8.3g}"
            for h in self.heads
        ]
        return "\n".join(lines)


class AdaptiveCache(Cache):
    """Keys and values on pages: full ones in 8 bits, the newest in the model's format.

    Every attention implementation can read it: it hands out keys and values as tensors in the
    model's format. A page is rounded once, when it is full; a prompt is attended to before its
    pages are rounded. Sliding-window layers keep transformers' own cache, which is small.

    Parameters
    ----------
    config : PretrainedConfig
        Of the model; tells layers with a window.
    format : {"i8", "e4m3", "exact"}
        Of full pages. ``"exact"`` hands back, bit for bit, what transformers' own cache does.
    budget : float
        Relative error of keys or values (Frobenius, keys about their mean) above which a head
        stays in 16 bits. Measured when a layer's first pages are full, and frozen.
    page_len : int
        Keys of a page, a multiple of 64.
    max_length : int, optional
        Make room for so many tokens at once, and refuse more; default: grow as needed.
    lam : float
        Attention over the pages: mean weight below which 64 values need not be read; 0
        reads all.
    certify : bool
        Attention over the pages: work out every step's bound, for `report`. Costs some small
        kernels a step and layer.

    Notes
    -----
    With ``model.set_attn_implementation("adaattn")`` (`register_transformers`) on a GPU, in
    bf16 or f16, steps of up to 64 rows attend over the pages themselves: nothing is copied.

    Examples
    --------
    >>> cache = AdaptiveCache(model.config)  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: Any,
        *,
        format: str = "i8",
        budget: float = 0.05,
        page_len: int = 128,
        max_length: int | None = None,
        lam: float = 0.0,
        certify: bool = False,
    ) -> None:
        word("format", format, FORMATS)
        real("budget", budget, 0.0)
        real("lam", lam, 0.0, 0.5)
        truth("certify", certify)
        whole("page_len", page_len, 64)
        if page_len % 64:
            raise ArgumentError(
                got=f"page_len={page_len}", needed="a multiple of 64", do="e.g. page_len=128"
            )
        if max_length is not None:
            whole("max_length", max_length, 1)
        text = config.get_text_config(decoder=True)
        types = _layer_types(text)
        room = page_len if max_length is None else max_length
        stored = "wide" if format == "exact" else format
        layers: list[Any] = []
        for kind in types:
            if kind in _WINDOWS:
                window: Any = getattr(text, "sliding_window", None)
                window = window or getattr(text, "attention_chunk_size", None)
                layers.append(DynamicSlidingWindowLayer(sliding_window=window))
            else:
                pages = PagedLayer(page_len, stored, budget, room)
                pages.watch_norms = certify
                layers.append(AdaptiveLayer(pages, max_length, text, lam, certify))
        super().__init__(layers=layers)
        self.format, self.budget, self.page_len = format, budget, page_len

    def footprint(self) -> dict[str, float]:
        """Bytes of pages and tables in use, of the same keys in 16 bits, and their ratio.

        Layers with a window count on both sides as they are.
        """
        used = plain = 0.0
        for layer in self.layers:
            if isinstance(layer, AdaptiveLayer):
                mine, theirs = layer.pages.footprint()
            else:
                held = (getattr(layer, "keys", None), getattr(layer, "values", None))
                mine = theirs = float(sum(x.nbytes for x in held if x is not None))
            used, plain = used + mine, plain + theirs
        return {"bytes": used, "bytes_16bit": plain, "ratio": used / plain if plain else 1.0}

    def report(self) -> CacheReport:
        """Tell what was chosen for every head, and what rounding took away."""
        heads = []
        for number, layer in enumerate(self.layers):
            if not isinstance(layer, AdaptiveLayer):
                continue
            pages, steps = layer.pages, layer.steps
            uppers = steps.uppers()
            residuals = pages.residuals().max(axis=0, initial=0.0)
            for head in range(pages.table.shape[1]):
                narrow = pages.narrow is not None and bool(pages.narrow[head])
                errors = (0.0, 0.0) if pages.format == "wide" else (np.nan, np.nan)
                if pages.errors is not None:
                    errors = tuple(pages.errors[head].tolist())
                kind = pages.format if narrow else "16-bit"
                lost = residuals[head].tolist()
                upper = uppers[head] if uppers else float("nan")
                heads.append(
                    HeadReport(
                        number, head, kind, errors[0], errors[1], lost[0], lost[1], steps.steps,
                        upper,
                    )
                )  # fmt: skip
        return CacheReport(tuple(heads))


class AdaptiveLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """transformers' view of a `PagedLayer`."""

    def __init__(
        self, pages: PagedLayer, max_length: int | None, config: Any, lam: float, certify: bool
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pages, self.max_length = pages, max_length
        self.steps = PagedSteps(pages, lam, certify)
        self._config = config

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Make room for a batch like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.pages.begin(key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values; return all of them, those just given as they came."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pages, more = self.pages, int(key_states.shape[2])
        self._check(key_states, value_states, more)
        if pages.length == 0:
            pages.append(key_states, value_states)
            return key_states, value_states
        ours = getattr(self._config, "_attn_implementation", None) == "adaattn"
        if ours and self.steps.serves(key_states):
            pages.append(key_states, value_states)
            states = (key_states, value_states)
            key, value = (self.steps.stand_in(x, int(x.shape[3])) for x in states)
            return key, value
        # What was there is read before a page that these fill is rounded.
        key, value = pages.dense()
        pages.append(key_states, value_states)
        return torch.cat([key, key_states], dim=2), torch.cat([value, value_states], dim=2)

    def _check(self, key: torch.Tensor, value: torch.Tensor, more: int) -> None:
        pages = self.pages
        for name, x, dim in zip(("key", "value"), (key, value), pages._dims, strict=True):
            needed = (*pages.table.shape[:2], dim)
            if (*x.shape[:2], x.shape[3]) != needed or x.dtype != self.dtype:
                raise ShapeError(
                    got=f"{name} states of shape {tuple(x.shape)}, {x.dtype}",
                    needed=f"batch, heads and dim {needed}, {self.dtype}",
                    do="use a cache for one model and one batch: make a new AdaptiveCache",
                )
            if x.device != self.device:
                raise ShapeError(
                    got=f"{name} states on {x.device}, pages on {self.device}",
                    needed="one device",
                    do="use a cache for one model on one device: make a new AdaptiveCache",
                )
        if self.max_length is not None and pages.length + more > self.max_length:
            raise ShapeError(
                got=f"{pages.length + more} tokens for max_length={self.max_length}",
                needed="no more tokens than there was room asked for",
                do="raise max_length, or leave it out: the cache then grows",
            )

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.pages.length

    def get_max_length(self) -> int:
        """Tokens that it holds at most; -1: no limit."""
        return -1 if self.max_length is None else self.max_length

    def reset(self) -> None:
        """Forget everything, formats included."""
        old = self.pages
        self.pages = PagedLayer(old.page_len, old.format, old.budget, old.room)
        self.pages.watch_norms = old.watch_norms
        self.steps = PagedSteps(self.pages, self.steps.lam, self.steps.certify)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: as many as the negative number says, or all but so many.

        Keys of a page that was rounded stay as rounded when the page is cut.
        """
        length = self.pages.length
        if not isinstance(tokens_to_remove, int):
            raise ArgumentError(
                got=f"crop({shown(tokens_to_remove)})",
                needed="a whole number",
                do="pass minus the number of tokens to forget",
            )
        wanted = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self.pages.crop(max(wanted, 0))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence i continue sequence ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.pages.select(np.repeat(np.arange(self.pages.table.shape[0]), repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences, in this order."""
        rows = torch.arange(self.pages.table.shape[0])[indices.cpu()]
        self.pages.select(rows.numpy())

    def offload(self) -> None:
        """Refuse: pages are small already."""
        raise ArgumentError(
            got="offloading of an AdaptiveCache",
            needed="pages on the model's device",
            do="leave offloading out, or use transformers' own cache",
        )

    prefetch = offload


def _layer_types(config: Any) -> list[str]:
    """Kind of every layer that has a cache of its own."""
    types = getattr(config, "layer_types", None)
    if types is None:
        windowed = getattr(config, "sliding_window", None) is not None
        types = [_WINDOWS[0] if windowed else _FULL[0]] * config.num_hidden_layers
    odd = sorted(set(types) - set(_WINDOWS) - set(_FULL))
    if odd:
        raise ArgumentError(
            got=f"a model with layers of kind {', '.join(odd)}",
            needed="full and sliding-window attention",
            do="use transformers' own cache for this model",
        )
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    return list(types[: len(types) - shared])
