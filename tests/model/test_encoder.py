"""The encoder gives the last four hidden states, unnormalised and without cls; token merge joins 2 x 2 patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from groma.model.encoder import ImageEncoder, TokenMerge
from groma.structures import ImageFeatures

SMALL = {"hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
KINDS: dict[str, dict[str, Any]] = {
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
    "dinov3_vit": {"intermediate_size": 32, "num_register_tokens": 2},
}


def encoder(kind: str) -> ImageEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageEncoder(AutoConfig.for_model(kind, **SMALL, **KINDS[kind])).eval()


@torch.no_grad()
def test_levels_are_the_outputs_of_the_last_four_layers() -> None:
    part, pixels = encoder("dinov2"), torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    levels = part(pixels).levels
    hidden, expected = part.vit.embeddings(pixels), []
    for layer in part.vit.encoder.layer:
        hidden = layer(hidden)
        expected.append(hidden)
    assert len(levels) == 4
    for level, state in zip(levels, expected[1:], strict=True):
        assert level.shape == (2, 16, 4, 6)  # 32 x 48 pixels are 4 rows of 6 patches
        for row in range(4):
            for column in range(6):
                torch.testing.assert_close(level[:, :, row, column], state[:, 1 + row * 6 + column])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cls_and_registers_are_dropped(kind: str) -> None:
    part = encoder(kind)
    assert part.skipped == 1 + KINDS[kind].get("num_register_tokens", 0)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    states = part.vit(pixels, output_hidden_states=True).hidden_states
    features = part(pixels)
    assert features.grid == (4, 4)
    for level, state in zip(features.levels, states[-4:], strict=True):
        torch.testing.assert_close(level[0, :, -1, -1], state[0, -1])
        torch.testing.assert_close(level[0, :, 0, 0], state[0, -16])


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_trainable_gets_gradient(kind: str) -> None:
    part = encoder(kind)
    part(torch.randn(1, 3, 32, 32)).levels[-1].square().sum().backward()
    without = [name for name, p in part.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    frozen = {name.split(".")[-2 if name.endswith(("weight", "bias")) else -1]
              for name, p in part.named_parameters() if not p.requires_grad}  # fmt: skip
    assert frozen <= {"layernorm", "norm", "mask_token"}
    assert "mask_token" in frozen


@torch.no_grad()
def test_token_merge_joins_neighbours_down_first() -> None:
    merge = TokenMerge(2, 8)
    deep = torch.arange(2 * 2 * 4 * 6, dtype=torch.float32).view(2, 2, 4, 6) / 100
    tokens = merge(ImageFeatures((torch.zeros_like(deep), deep)))
    assert tokens.shape == (2, 6, 8)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                offsets = [(0, 0), (1, 0), (0, 1), (1, 1)]  # (row, column)
                joined = torch.cat([deep[image, :, 2 * row + r, 2 * column + c] for r, c in offsets])
                torch.testing.assert_close(tokens[image, row * 3 + column], merge.mlp(joined))
