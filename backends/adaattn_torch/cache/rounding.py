"""Pages of vectors to 8-bit codes and back, bit for bit as `adaattn_core.pages` does."""

from __future__ import annotations

from typing import NamedTuple

import torch

from adaattn_core.formats import get_format
from adaattn_core.pages import CODE_UNIT

LARGEST = 2.0**100
LEAST_UNIT = 2.0**-100


class Codes(NamedTuple):
    """Narrow pages: codes (..., page_len, dim) and their scales.

    Attributes
    ----------
    data : Tensor of int8, or of uint8 for e4m3
    unit : Tensor of float32, shape (...)
    centre, reach : Tensor of float16, shape (..., dim)
    residual_upper : Tensor of float32, shape (...)
        Upper bound of ``|vector - what was stored|`` over the page's vectors.
    usable : Tensor of bool, shape (...)
        False for pages with NaN, Inf or huge numbers: codes cannot hold them.
    """

    data: torch.Tensor
    unit: torch.Tensor
    centre: torch.Tensor
    reach: torch.Tensor
    residual_upper: torch.Tensor
    usable: torch.Tensor


def quantise(vectors: torch.Tensor, format: str) -> Codes:
    """Round pages of vectors, shape (..., page_len, dim), in float32 or narrower."""
    x = vectors.float()
    amax = x.abs().amax(dim=(-2, -1))
    usable = amax < LARGEST
    x = torch.where(usable[..., None, None], x, 0.0)
    amax = torch.where(usable, amax, 0.0)
    _, exponent = torch.frexp(amax.clamp_min(LEAST_UNIT))
    unit = torch.ldexp(torch.ones_like(amax), exponent)
    scaled = x / unit[..., None, None]
    middle = 0.5 * (scaled.amin(dim=-2) + scaled.amax(dim=-2))
    centre = middle.half()
    moved = scaled - centre.float()[..., None, :]
    limit, code_unit = get_format(format).max_finite, CODE_UNIT[format]
    reach = _f16_up(moved.abs().amax(dim=-2) * torch.tensor(code_unit / limit).item())
    step = reach.float() / code_unit
    codes = (moved / step[..., None, :]).clamp(-limit, limit)
    if format == "i8":
        data = codes.round().to(torch.int8)
    else:
        data = codes.to(torch.float8_e4m3fn).view(torch.uint8)
    left = x.double() - dequantise(data, format, unit, centre, reach).double()
    norm = left.square().sum(dim=-1).amax(dim=-1).sqrt()
    slack = 2.0**-22 * x.shape[-1] ** 0.5 * unit.double()  # casts, and readers' rounding
    # Rounded up: the root's and the sum's own errors are far below 2^-40.
    upper = (norm * (1 + 2.0**-40) + slack * (1 + 2.0**-40)).float()
    upper = torch.nextafter(upper, torch.full_like(upper, torch.inf))
    return Codes(data, unit, centre, reach, upper, usable)


def dequantise(
    data: torch.Tensor,
    format: str,
    unit: torch.Tensor,
    centre: torch.Tensor,
    reach: torch.Tensor,
) -> torch.Tensor:
    """Vectors that codes stand for, float32, shape of `data`."""
    values = data if format == "i8" else data.view(torch.float8_e4m3fn)
    fraction = reach.float()[..., None, :] * (values.float() * (1 / CODE_UNIT[format]))
    return unit[..., None, None] * (centre.float()[..., None, :] + fraction)


def _f16_up(x: torch.Tensor) -> torch.Tensor:
    near = x.half().clamp_min(2.0**-24)
    low = near.float() < x
    return (near.view(torch.int16) + low.to(torch.int16)).view(torch.float16)
