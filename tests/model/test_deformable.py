"""Deformable attention against a loop over points and against the implementation in transformers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

from groma.model.deformable import DecoderLayer, DeformableAttention, EncoderLayer, FeedForward, Grid, sample

GRIDS: list[Grid] = [[(3, 5)], [(4, 6), (2, 3)], [(5, 2), (3, 3), (1, 2)]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def bilinear(level: Tensor, x: float, y: float) -> Tensor:
    """One point of a map (h, w, dh): cell centres are at (i + 0.5) / size, what lies outside is zero."""
    h, w = level.shape[:2]
    column, row = x * w - 0.5, y * h - 0.5
    total = torch.zeros(level.shape[-1])
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            if 0 <= r < h and 0 <= c < w:
                total += level[r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return total


@pytest.mark.parametrize("grid", GRIDS)
def test_sample_equals_the_loop_over_points(grid: Grid) -> None:
    batch, count, heads, points, dh = 2, 3, 2, 3, 4
    cells = sum(h * w for h, w in grid)
    values = randn(batch, cells, heads, dh)
    places = rand(batch, count, heads, len(grid), points, 2, seed=1) * 1.6 - 0.3  # some outside the map
    weights = rand(batch, count, heads, len(grid), points, seed=2)
    expected = torch.zeros(batch, count, heads, dh)
    for b, q, head in ((b, q, k) for b in range(batch) for q in range(count) for k in range(heads)):
        start = 0
        for level, (h, w) in enumerate(grid):
            level_map = values[b, start : start + h * w, head].view(h, w, dh)
            start += h * w
            for p in range(points):
                x, y = places[b, q, head, level, p].tolist()
                expected[b, q, head] += weights[b, q, head, level, p] * bilinear(level_map, x, y)
    torch.testing.assert_close(sample(values, places, weights, grid), expected.flatten(2))


def test_sample_at_a_cell_centre_reads_that_cell_as_x_and_y() -> None:
    values = torch.arange(6.0).view(1, 6, 1, 1)  # rows (0 1 2), (3 4 5)
    places = torch.tensor([[2.5 / 3, 0.5 / 2], [0.5 / 3, 1.5 / 2]]).view(1, 2, 1, 1, 1, 2)
    assert sample(values, places, torch.ones(1, 2, 1, 1, 1), [(2, 3)]).flatten().tolist() == pytest.approx([2, 3])


def test_sample_keeps_the_kind_of_number() -> None:
    values, places = randn(1, 6, 2, 4), rand(1, 5, 2, 1, 3, 2)
    weights = rand(1, 5, 2, 1, 3)
    exact = sample(values, places, weights, [(2, 3)])
    rough = sample(values.bfloat16(), places, weights, [(2, 3)])
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_whole_attention_equals_transformers(grid: Grid, coordinates: int) -> None:
    width, heads, points, count = 16, 4, 3, 7
    config = DeformableDetrConfig(d_model=width, num_feature_levels=len(grid))
    theirs = DeformableDetrMultiscaleDeformableAttention(config, heads, points)
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.copy_(randn(*parameter.shape, seed=seed) * 0.5)
    ours = DeformableAttention(width, heads, points, len(grid))
    ours.load_state_dict(theirs.state_dict())
    queries, values = randn(2, count, width), randn(2, sum(h * w for h, w in grid), width, seed=1)
    references = rand(2, count, coordinates, seed=2)
    sizes = torch.tensor(grid)
    starts = torch.tensor([0, *(h * w for h, w in grid)]).cumsum(0)[:-1]
    expected, _ = theirs(queries, encoder_hidden_states=values, spatial_shapes=sizes, spatial_shapes_list=grid,
                         reference_points=references[:, :, None].expand(-1, -1, len(grid), -1),
                         level_start_index=starts)  # fmt: skip
    # measured worst case 4e-7
    torch.testing.assert_close(ours(queries, references, values, grid), expected, atol=2e-6, rtol=1e-5)


def test_initial_offsets_point_in_all_directions() -> None:
    attention = DeformableAttention(16, 4, 3, 2)
    attention.reset()
    offsets = attention.sampling_offsets.bias.view(4, 2, 3, 2)
    for head, direction in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        for level in range(2):
            for point in range(3):
                expected = [(point + 1) * d for d in direction]
                assert offsets[head, level, point].tolist() == pytest.approx(expected, abs=1e-6)
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()


@torch.no_grad()
def test_layers_are_post_norm_sums() -> None:
    grid: Grid = [(2, 3)]
    layer = EncoderLayer(8, 2, 2, 1, 16, torch.nn.ReLU(), 0.1).eval()
    x, positions, references = randn(1, 6, 8), randn(6, 8, seed=1), rand(1, 6, 2, seed=2)
    attended = layer.attention_norm(x + layer.attention(x + positions, references, x, grid))
    ffn = layer.ffn
    expected = ffn.norm(attended + ffn.fc2(torch.relu(ffn.fc1(attended))))
    torch.testing.assert_close(layer(x, positions, references, grid), expected)
    assert isinstance(ffn, FeedForward)


@torch.no_grad()
def test_decoder_layer_equals_its_parts() -> None:
    grid: Grid = [(2, 3), (1, 2)]
    layer = DecoderLayer(8, 2, 2, 2, 16, torch.nn.ReLU(), 0.1).eval()
    x, positions, memory = randn(2, 5, 8), randn(2, 5, 8, seed=1), randn(2, 8, 8, seed=2)
    references = rand(2, 5, 4, seed=3)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    parts = (layer.q_proj, layer.k_proj, layer.v_proj)
    theirs.in_proj_weight.copy_(torch.cat([p.weight for p in parts]))
    theirs.in_proj_bias.copy_(torch.cat([p.bias for p in parts]))
    theirs.out_proj.load_state_dict(layer.out_proj.state_dict())
    mixed, _ = theirs(x + positions, x + positions, x)
    hidden = layer.self_norm(x + mixed)
    hidden = layer.cross_norm(hidden + layer.cross(hidden + positions, references, memory, grid))
    torch.testing.assert_close(layer(x, positions, references, memory, grid), layer.ffn(hidden), atol=2e-6, rtol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    layer = DecoderLayer(8, 2, 2, 1, 16, torch.nn.ReLU(), 0.5)
    given = (randn(1, 5, 8), randn(1, 5, 8, seed=1), rand(1, 5, 4, seed=3), randn(1, 6, 8, seed=2), [(2, 3)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(layer(*given), layer(*given))
        layer.eval()
        assert torch.equal(layer(*given), layer(*given))
