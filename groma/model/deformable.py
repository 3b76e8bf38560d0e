"""Multi-scale deformable attention and its encoder and decoder layers, in plain PyTorch (Zhu et al. 2021, section 4.1).

Legend: B images, Q queries, S all map positions, d width, H heads, L levels, P points, dh = d / H.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = list[tuple[int, int]]
"""(h, w) of every level."""


class DeformableAttention(nn.Module):
    """Every query looks at P points per level and head around its reference, and mixes what it finds there."""

    def __init__(self, width: int, heads: int, points: int, levels: int) -> None:
        super().__init__()
        self.heads, self.points, self.levels = heads, points, levels
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)

    def reset(self) -> None:
        """Initial offsets point in H directions, p cells far for point p; uniform weights (the paper, A.1)."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.heads, dtype=torch.float32) * (2.0 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)  # (H, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        reach = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * reach[None, None, :, None]  # (H, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, queries: Tensor, references: Tensor, values: Tensor, grid: Grid) -> Tensor:
        """queries (B, Q, d), references (B, Q, 2 or 4) in [0, 1] as (cx, cy[, w, h]), values (B, S, d) → (B, Q, d)."""
        batch, count = queries.shape[:2]
        shape = (batch, count, self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(queries).view(*shape, 2)
        weights = self.attention_weights(queries).view(*shape[:3], -1).softmax(-1).view(shape)
        places = self._places(references.float(), offsets.float(), grid)  # (B, Q, H, L, P, 2)
        values = self.value_proj(values).unflatten(-1, (self.heads, -1))  # (B, S, H, dh)
        return self.output_proj(sample(values, places, weights, grid))

    def _places(self, references: Tensor, offsets: Tensor, grid: Grid) -> Tensor:
        centre = references[:, :, None, None, None, :2]
        if references.shape[-1] == 2:  # a map position: offsets count cells
            cells = offsets.new_tensor([(w, h) for h, w in grid])  # (L, 2)
            return centre + offsets / cells[:, None]
        return centre + offsets / self.points * references[:, :, None, None, None, 2:] * 0.5  # a box: offsets scale


def sample(values: Tensor, places: Tensor, weights: Tensor, grid: Grid) -> Tensor:
    """values (B, S, H, dh) read bilinearly at places (B, Q, H, L, P, 2), mixed by weights (B, Q, H, L, P) → (B, Q, d).

    Runs in float32, places too: on CPU bfloat16 sampling is slower, and its boxes are off by up to 0.4 %.
    """
    dtype, (batch, count, heads, levels, points) = values.dtype, weights.shape
    maps = values.float().permute(0, 2, 3, 1).flatten(0, 1)  # (B·H, dh, S)
    found, start = [], 0
    for level, (h, w) in enumerate(grid):
        level_map = maps[..., start : start + h * w].unflatten(-1, (h, w))
        where = 2 * places[:, :, :, level].float() - 1  # (B, Q, H, P, 2) in [-1, 1]
        where = where.transpose(1, 2).flatten(0, 1)  # (B·H, Q, P, 2)
        found.append(F.grid_sample(level_map, where, mode="bilinear", padding_mode="zeros", align_corners=False))
        start += h * w
    taken = torch.stack(found, -2).flatten(-2)  # (B·H, dh, Q, L·P)
    mix = weights.float().transpose(1, 2).reshape(batch * heads, 1, count, levels * points)
    return (taken * mix).sum(-1).view(batch, -1, count).transpose(1, 2).to(dtype)


class FeedForward(nn.Module):
    """Linear, activation, linear, with the residual sum and the norm that follow it."""

    def __init__(self, width: int, hidden: int, activation: nn.Module, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation, self.dropout = activation, nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Q, d) → (B, Q, d)."""
        return self.norm(x + self.dropout(self.fc2(self.dropout(self.activation(self.fc1(x))))))


class EncoderLayer(nn.Module):
    """Deformable self-attention on the maps, then a feed-forward part; both post-norm."""

    def __init__(self, width: int, heads: int, points: int, levels: int, ffn: int, activation: nn.Module,
                 dropout: float) -> None:  # fmt: skip
        super().__init__()
        self.attention = DeformableAttention(width, heads, points, levels)
        self.attention_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(width, ffn, activation, dropout)

    def forward(self, x: Tensor, positions: Tensor, references: Tensor, grid: Grid) -> Tensor:
        """x, positions (B, S, d), references (B, S, 2) → (B, S, d)."""
        x = self.attention_norm(x + self.dropout(self.attention(x + positions, references, x, grid)))
        return self.ffn(x)


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention into the maps, feed-forward; all post-norm."""

    def __init__(self, width: int, heads: int, points: int, levels: int, ffn: int, activation: nn.Module,
                 dropout: float) -> None:  # fmt: skip
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.self_norm = nn.LayerNorm(width)
        self.cross = DeformableAttention(width, heads, points, levels)
        self.cross_norm = nn.LayerNorm(width)
        self.attention_dropout = dropout
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(width, ffn, activation, dropout)

    def forward(self, x: Tensor, positions: Tensor, references: Tensor, memory: Tensor, grid: Grid) -> Tensor:
        """x, positions (B, Q, d), references (B, Q, 4), memory (B, S, d) → (B, Q, d)."""
        x = self.self_norm(x + self.dropout(self._self_attention(x, positions)))
        x = self.cross_norm(x + self.dropout(self.cross(x + positions, references, memory, grid)))
        return self.ffn(x)

    def _self_attention(self, x: Tensor, positions: Tensor) -> Tensor:
        placed = x + positions
        q, k, v = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.q_proj, placed), (self.k_proj, placed), (self.v_proj, x))
        )
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B, H, Q, dh)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))
