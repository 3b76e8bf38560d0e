"""The weights and pictures of the golden sets, made by rule instead of stored. numpy alone.

Element i (row-major) of the tensor called NAME in the set with seed SEED depends on nothing else::

    key   = the first 8 bytes, little endian, of SHA-256("SEED|NAME")
    z     = mix(key + (i + 1) * 0x9E3779B97F4A7C15)      splitmix64 (Steele, Lea and Flood 2014), modulo 2^64
    unit  = (z >> 40) / 2^23 - 1                         24 bits, in [-1, 1), exact
    value = float32(offset + scale * unit)               in float64 up to the last step

so that every machine gets the same bits. NAME is the tensor's name in the original's checkpoints, and decides its
scale and offset: see ``spread``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STEP = np.uint64(0x9E3779B97F4A7C15)
BLOCK = 1 << 15  # elements at a time: their 64-bit buffers stay in the cache
OCTAVES = (2, 4, 8, 16, 32)  # cells a side of the grids a picture is made of

# Tensors that are not as large as their inputs suggest, by the end of their name: (scale, offset).
FIXED = {
    r"embeddings\.(cls_token|position_embeddings)": (0.8, 0.0),
    r"embeddings\.mask_token": (0.1, 0.0),
    r"layer_scale\d\.lambda1": (0.3, 0.5),
    r"level_embed": (0.5, 0.0),
    r"query_position_embeddings\.weight": (1.5, 0.0),
    r"sampling_offsets\.bias": (3.0, 0.0),
    r"class_embed_(enc|coco|sa1b)(\.\d+)?\.bias": (0.2, -2.2),
    r"bbox_embed\.\d+\.layers\.2\.bias": (0.6, 0.0),
    r"(embed_tokens|new_input_embs)\.weight": (1.0, 0.0),
}
# Matrices, by the end of their name: the gain, 1 for all others. Their scale is gain * sqrt(3 / inputs).
GAINS = {
    r"attention\.attention\.(query|key)\.weight": 1.3,
    r"sampling_offsets\.weight": 0.7,
    r"class_embed_enc\.weight": 1.5,
    r"class_embed_(coco|sa1b)\.\d+\.weight": 2.0,
    r"bbox_embed\.\d+\.layers\.[01]\.weight": 1.2,
    r"bbox_embed\.\d+\.layers\.2\.weight": 0.8,
    r"self_attn\.[qk]_proj\.weight": 2.0,
    r"self_attn\.[vo]_proj\.weight": 1.5,
    r"lm_head\.weight": 4.0,
}
NORM, BIAS = (0.2, 1.0), (0.1, 0.0)  # of all other vectors: gains of norms, and the rest
UP_CONVOLUTION = r"input_proj\.\d+\.[03]\.weight"  # stored as [inputs, outputs, 2, 2]


def spread(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """(scale, offset) of the tensor ``name`` of this shape."""
    for ending, both in FIXED.items():
        if re.search(ending + "$", name):
            return both
    if len(shape) == 1:
        return NORM if name.endswith(".weight") else BIAS
    turned = len(shape) == 4 and shape[2] == 2 and re.search(UP_CONVOLUTION + "$", name)
    inputs = shape[0] if turned else math.prod(shape[1:])
    gain = next((g for ending, g in GAINS.items() if re.search(ending + "$", name)), 1.0)
    return gain * math.sqrt(3.0 / inputs), 0.0


def tensor(seed: str, name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """The values of one tensor, of this shape."""
    scale, offset = spread(name, shape)
    return _draw(seed, name, math.prod(shape), scale, offset, np.float32).reshape(shape)


def unit(seed: str, name: str, count: int) -> NDArray[np.float64]:
    """``count`` numbers in [-1, 1)."""
    return _draw(seed, name, count, 1.0, 0.0, np.float64)


def picture(seed: str, name: str, side: int) -> NDArray[np.float32]:
    """A picture (3, side, side), already normalised: soft blotches of five sizes and some noise, at float16's steps."""
    image = np.zeros((3, side, side))
    for cells in OCTAVES:
        grid = unit(seed, f"{name}/octave{cells}", 3 * (cells + 1) ** 2).reshape(3, cells + 1, cells + 1)
        mix = _between(cells, side)
        image += mix @ grid @ mix.T * (1.6 / math.sqrt(len(OCTAVES)))
    image += 0.3 * unit(seed, f"{name}/noise", image.size).reshape(image.shape)
    return image.astype(np.float32).astype(np.float16).astype(np.float32)


def _between(cells: int, side: int) -> NDArray[np.float64]:
    """(side, cells + 1): what share each grid point has in each of ``side`` places from the first to the last."""
    places = np.linspace(0, cells, side)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(cells + 1)))


def _draw(seed: str, name: str, count: int, scale: float, offset: float, kind: type) -> NDArray:
    key = np.uint64(int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:8], "little"))
    ramp = np.arange(1, BLOCK + 1, dtype=np.uint64) * STEP  # wraps, as all below: arithmetic modulo 2^64
    z, shifted, number = np.empty_like(ramp), np.empty_like(ramp), np.empty(BLOCK)
    values = np.empty(count, kind)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        base = key + np.array([start], dtype=np.uint64) * STEP
        np.add(ramp, base, out=z)
        for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            np.bitwise_xor(z, np.right_shift(z, np.uint64(bits), out=shifted), out=z)
            if factor != 1:
                np.multiply(z, np.uint64(factor), out=z)
        np.copyto(number, np.right_shift(z, np.uint64(40), out=z))
        number *= 2.0**-23
        number -= 1.0
        number *= scale
        number += offset
        values[start : start + size] = number[:size]
    return values
