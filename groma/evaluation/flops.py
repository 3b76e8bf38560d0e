"""Floating-point operations counted while something runs, and what a machine reaches on plain matrix products.

A multiply-add counts as two operations. Counted are matrix products, convolutions, attention (the whole square, also
where a causal mask leaves half of it out) and the bilinear reads of deformable attention and ROIAlign; sums,
activations, norms and resizing are not.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torchvision  # noqa: F401  # registers the operator counted below
from torch.utils.flop_counter import FlopCounterMode

BILINEAR = 8  # four neighbours, a multiply-add each
SIDES: dict[str, tuple[int, ...]] = {"cpu": (1024, 2048)}
LARGE_SIDES: tuple[int, ...] = (2048, 4096, 8192)
"""Square matrix products tried for the peak, by kind of device; the large ones on any but a CPU."""

Shape = tuple[int, ...]


def counter() -> FlopCounterMode:
    """A context that counts: torch's own formulas, and those it has none for; read ``get_total_flops()``."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Attention of queries (B, H, Q, d) over keys (B, H', T, d) and values (B, H', T, dv), as one operator."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _grid_sample(_map: Shape, _grid: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """One bilinear read per number of the result."""
    return BILINEAR * math.prod(out_shape)


def _roi_align(_map: Shape, _rois: Shape, _scale: float, _height: int, _width: int, samples: int, *_: Any,
               out_shape: Any = None, **__: Any) -> int:  # fmt: skip
    """samples x samples bilinear reads per number of the result (R, C, h, w)."""
    return BILINEAR * max(1, samples) ** 2 * math.prod(out_shape)


FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable: _attention,
    torch.ops.aten.grid_sampler_2d: _grid_sample,
    torch.ops.torchvision.roi_align: _roi_align,
}


@torch.inference_mode()
def gemm_peak(dtype: torch.dtype, device: torch.device, sides: tuple[int, ...] | None = None, tries: int = 5) -> float:
    """The best rate, in operations a second, of square matrix products of the given sides, over ``tries`` runs each."""
    best = 0.0
    for side in sides or SIDES.get(device.type, LARGE_SIDES):
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        for _ in range(tries + 1):  # the first is a warm-up, unless it is the best
            start = now(device)
            a @ b
            best = max(best, 2 * side**3 / (now(device) - start))
    return best


def now(device: torch.device) -> float:
    """Seconds of a clock that is read once the device has done all it was asked."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
