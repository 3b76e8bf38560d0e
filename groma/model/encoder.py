"""The image encoder: any DINO-type vision transformer of transformers, read out at several depths.

Legend: B images, D encoder width, h w patch grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings

from groma.structures import ImageFeatures

TOKEN_GAIN = 0.1
LEVELS = 4
"""The proposer reads the mean of the last four hidden states, the region encoder the last three (Groma, 3.2, 3.3)."""


class ImageEncoder(nn.Module):
    """DINOv2 (or DINOv2 with registers, DINOv3): the last four hidden states, before the final LayerNorm.

    position_scale_offset: see GromaConfig; for DINOv2 only.
    """

    def __init__(self, config: PreTrainedConfig, position_scale_offset: float = 0.0) -> None:
        super().__init__()
        self.vit = AutoModel.from_config(config)
        if position_scale_offset:
            self.vit.embeddings = OffsetEmbeddings(config, position_scale_offset)
        self.skipped = 1 + getattr(config, "num_register_tokens", 0)  # cls and registers come before the patches
        # Read out before it and never masked: these two get no gradient, and some wrappers insist that all do.
        for name in ("layernorm", "norm"):
            if isinstance(module := getattr(self.vit, name, None), nn.Module):
                module.requires_grad_(False)
        embeddings = getattr(self.vit, "embeddings", None)
        if isinstance(mask := getattr(embeddings, "mask_token", None), nn.Parameter):
            mask.requires_grad_(False)

    def forward(self, pixels: Tensor) -> ImageFeatures:
        """pixels (B, 3, H, W) normalised → four maps (B, D, h, w), shallow to deep."""
        pixels = pixels.to(next(self.parameters()).dtype)  # frozen, it may have another than the rest
        hidden = self.vit(pixels, output_hidden_states=True).hidden_states[-LEVELS:]
        h, w = (side // int(self.vit.config.patch_size) for side in pixels.shape[-2:])
        return ImageFeatures(tuple(_to_map(state[:, self.skipped :], h, w) for state in hidden))


class OffsetEmbeddings(Dinov2Embeddings):
    """DINOv2's embeddings with a position table resized by the factor (h + offset) / s instead of to the size h.

    The factor also says where between the table's s rows each new one is read, so that the two ways drift apart, by
    offset · s / h rows at the far end. DINOv2's authors read it so, with 0.1.
    """

    def __init__(self, config: PreTrainedConfig, offset: float) -> None:
        super().__init__(config)
        self.offset = offset

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """The table (1, 1 + h·w, D), cls first, for an image of ``height`` x ``width`` pixels."""
        down, right = (int(side) for side in self.patch_embeddings.patch_size)
        h, w = height // down, width // right
        side = int((self.position_embeddings.shape[1] - 1) ** 0.5)
        if (h, w) == (side, side):
            return self.position_embeddings
        cls, table = self.position_embeddings[:, :1], _to_map(self.position_embeddings[:, 1:], side, side)
        factor = ((h + self.offset) / side, (w + self.offset) / side)
        placed = F.interpolate(table.float(), scale_factor=factor, mode="bicubic", align_corners=False)
        return torch.cat((cls, placed.to(cls.dtype).flatten(2).transpose(1, 2)), 1)


def _to_map(tokens: Tensor, h: int, w: int) -> Tensor:
    """(B, h·w, D) → (B, D, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, (h, w))


class TokenNorm(nn.LayerNorm):
    """Makes tokens about as large as word embeddings; see GromaConfig.token_norm."""

    def reset_parameters(self) -> None:
        """Gain TOKEN_GAIN, no shift."""
        nn.init.constant_(self.weight, TOKEN_GAIN)
        nn.init.zeros_(self.bias)


class TokenMerge(nn.Module):
    """2x2 neighbouring patches become one image token: channels joined, then a two-layer MLP (Groma, 3.4)."""

    def __init__(self, width: int, llm_width: int, norm: bool = False) -> None:
        super().__init__()
        self.norm = TokenNorm(llm_width) if norm else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(4 * width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))

    def forward(self, features: ImageFeatures) -> Tensor:
        """The deepest map (B, D, h, w) → image tokens (B, h/2·w/2, E); neighbours in column-major order."""
        x = features.levels[-1]
        # (row, column) offsets (0,0), (1,0), (0,1), (1,1): down first, then right
        quads = torch.cat([x[..., r::2, c::2] for c in (0, 1) for r in (0, 1)], 1)  # (B, 4D, h/2, w/2)
        return self.norm(self.mlp(quads.flatten(2).transpose(1, 2)))
