"""The encoder gives the last four hidden states, unnormalised and without cls; token merge joins 2 x 2 patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from groma.model.configuration import GromaConfig
from groma.model.encoder import ImageEncoder, TokenMerge
from groma.model.groma import GromaForConditionalGeneration
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


def cubic(values: list[float], place: float, a: float = -0.75) -> float:
    """The value between ``values`` at ``place`` by cubic convolution (Keys 1981, eq. 4, with torch's a)."""
    total = 0.0
    for k in range(int(place) - 1, int(place) + 3):
        d = abs(place - k)
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        total += values[min(max(k, 0), len(values) - 1)] * (near if d <= 1 else far)
    return total


@pytest.mark.parametrize("offset", [0.0, 0.1])
@torch.no_grad()
def test_position_table_is_read_at_the_grid_plus_the_offset(offset: float) -> None:
    config = AutoConfig.for_model("dinov2", **SMALL | {"image_size": 96}, mlp_ratio=2)  # a table of 12 x 12
    embeddings = ImageEncoder(config, offset).vit.embeddings
    line = torch.randn(12, generator=torch.Generator().manual_seed(0))
    table = embeddings.position_embeddings[0, 1:].unflatten(0, (12, 12))
    table[..., 0], table[..., 1] = line[:, None], line  # one channel varies down, one to the right
    placed = embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + 7 * 9, 16), 7 * 8, 9 * 8)
    assert placed.shape == (1, 64, 16)
    assert torch.equal(placed[:, 0], embeddings.position_embeddings[:, 0])
    grid = placed[0, 1:].unflatten(0, (7, 9))
    down = [cubic(line.tolist(), (i + 0.5) * 12 / (7 + offset) - 0.5) for i in range(7)]
    right = [cubic(line.tolist(), (j + 0.5) * 12 / (9 + offset) - 0.5) for j in range(9)]
    assert grid[:, 4, 0].tolist() == pytest.approx(down, abs=1e-5)
    assert grid[3, :, 1].tolist() == pytest.approx(right, abs=1e-5)


@torch.no_grad()
def test_position_table_of_the_grid_itself_is_taken_as_it_is() -> None:
    config = AutoConfig.for_model("dinov2", **SMALL, mlp_ratio=2)
    embeddings = ImageEncoder(config, 0.1).vit.embeddings
    placed = embeddings.interpolate_pos_encoding(torch.zeros(1, 17, 16), 32, 32)
    assert torch.equal(placed, embeddings.position_embeddings)
    wide = embeddings.interpolate_pos_encoding(torch.zeros(1, 17, 16), 16, 64)  # as many patches, another shape
    assert wide.shape == placed.shape
    assert not torch.equal(wide, placed)


def test_a_position_offset_changes_no_name_and_is_initialised() -> None:
    """The parameters keep their names, and a new model's table starts as DINOv2's does."""
    settings = {"encoder": {"model_type": "dinov2", **SMALL}, "proposer": {"width": 16}, "image_size": 32,
                "llm": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                        "num_attention_heads": 2, "vocab_size": 20}, "base_vocab": 20, "region_size": 2,
                "region_groups": 4, "region_hidden": 8, "region_box_hidden": 4}  # fmt: skip
    plain = GromaForConditionalGeneration(GromaConfig(**settings))
    moved = GromaForConditionalGeneration(GromaConfig(**settings, position_scale_offset=0.1))
    assert list(plain.state_dict()) == list(moved.state_dict())
    table = moved.encoder.vit.embeddings.position_embeddings
    assert table.std().item() < 3 * plain.encoder.vit.config.initializer_range
    assert not moved.encoder.vit.embeddings.mask_token.requires_grad


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
