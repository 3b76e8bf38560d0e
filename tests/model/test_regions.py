"""Regions: which are kept and in what order, where ROIAlign reads, how levels mix, and what a token is made of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from groma.model.configuration import GromaConfig
from groma.model.regions import FuseLevels, RegionEncoder, match_regions, read_bilinear, select
from groma.structures import ImageFeatures, Proposals

T = torch.tensor
NONE = torch.zeros(0, 4)


def config(**changes: Any) -> GromaConfig:
    settings: dict[str, Any] = {
        "encoder": {"model_type": "dinov2", "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
                    "image_size": 64, "patch_size": 8},
        "image_size": 64, "proxies": 20, "max_regions": 20, "score_threshold": 0.15, "nms_threshold": 0.6,
        "region_width": 8, "region_rounds": 2, "region_groups": 2, "region_size": 4, "region_hidden": 12,
        "region_box_hidden": 6,
    }  # fmt: skip
    return GromaConfig(**settings | changes)


def spread(count: int) -> Tensor:
    """Boxes that do not touch."""
    left = torch.arange(count) / count
    return torch.stack((left, torch.zeros(count), left + 0.8 / count, torch.ones(count)), 1)


# -- which regions ----------------------------------------------------------------------------------------------------


def test_only_scores_strictly_above_the_threshold_are_kept_best_first() -> None:
    candidates = Proposals(spread(5), T([0.2, 0.5, 0.9, 0.25, 0.05]))
    kept = select(candidates, NONE, NONE, config(score_threshold=0.25))
    assert kept.scores.tolist() == pytest.approx([0.9, 0.5])
    assert torch.equal(kept.boxes, candidates.boxes[[2, 1]])
    assert len(select(candidates, NONE, NONE, config(score_threshold=0.249))) == 3
    assert len(select(candidates, NONE, NONE, config(score_threshold=0.0))) == 5


def test_nothing_above_the_threshold_leaves_the_single_best() -> None:
    candidates = Proposals(spread(4), T([0.01, 0.02, 0.1, 0.03]))
    kept = select(candidates, NONE, NONE, config())
    assert kept.scores.tolist() == pytest.approx([0.1])
    assert torch.equal(kept.boxes, candidates.boxes[2:3])


def test_overlapping_candidates_are_suppressed_then_capped() -> None:
    boxes = torch.cat((spread(6), spread(6) + 0.001))
    scores = torch.linspace(0.9, 0.3, 12)
    kept = select(Proposals(boxes, scores), NONE, NONE, config())
    assert torch.equal(kept.boxes, boxes[:6])
    capped = select(Proposals(boxes, scores), NONE, NONE, config(max_regions=4))
    assert torch.equal(capped.boxes, boxes[:4])
    loose = select(Proposals(boxes, scores), NONE, NONE, config(nms_threshold=0.999))
    assert len(loose) == 12


def test_user_boxes_come_first_each_a_region_of_its_own() -> None:
    candidates = Proposals(spread(5), T([0.9, 0.8, 0.7, 0.6, 0.5]))
    mine = T([[0.1, 0.1, 0.6, 0.6], [0.1, 0.1, 0.6, 0.6], [0.1, 0.1, 0.6, 0.601]])
    kept = select(candidates, mine, NONE, config())
    assert torch.equal(kept.boxes[:3], mine)
    assert kept.scores[:3].tolist() == [1, 1, 1]
    assert torch.equal(kept.boxes[3:], candidates.boxes)
    full = select(candidates, mine, NONE, config(max_regions=4))  # room is taken from the proposals
    assert torch.equal(full.boxes, torch.cat((mine, candidates.boxes[:1])))
    assert match_regions(mine, kept.boxes) == [0, 0, 2]  # two equal boxes are one place, a third is its own


def test_ground_boxes_join_only_when_nothing_covers_them() -> None:
    candidates = Proposals(spread(4), T([0.9, 0.8, 0.7, 0.01]))
    ground = torch.cat((candidates.boxes[1:2], candidates.boxes[3:4]))  # one proposed, one below the threshold
    kept = select(candidates, NONE, ground, config())
    assert torch.equal(kept.boxes, candidates.boxes)
    assert kept.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.15])
    covered_by_user = select(candidates, ground, ground, config())
    assert len(covered_by_user) == 2 + 3


@pytest.mark.parametrize("room", [3, 4, 6])
def test_ground_boxes_are_never_lost_to_the_cap(room: int) -> None:
    candidates = Proposals(spread(8), torch.linspace(0.9, 0.3, 8))
    ground = T([[0.0, 0.2, 0.9, 0.4], [0.1, 0.5, 0.8, 0.9], [0.3, 0.0, 1.0, 0.1]])
    kept = select(candidates, NONE, ground, config(max_regions=room))
    assert len(kept) == room
    for box in ground:
        assert (kept.boxes == box).all(1).any()


def test_a_ground_box_whose_proposal_is_beyond_the_cap_is_not_lost() -> None:
    candidates = Proposals(spread(8), torch.linspace(0.9, 0.3, 8))
    ground = torch.cat((candidates.boxes[7:], candidates.boxes[2:3], T([[0.0, 0.2, 0.9, 0.4]])))
    kept = select(candidates, NONE, ground, config(max_regions=4))
    assert len(kept) <= 4
    assert match_regions(ground, kept.boxes) == [(kept.boxes == box).all(1).nonzero()[0, 0].item() for box in ground]


def test_order_is_drawn_only_from_a_generator() -> None:
    candidates = Proposals(spread(12), torch.linspace(0.9, 0.3, 12))
    assert torch.equal(select(candidates, NONE, NONE, config()).boxes, candidates.boxes)

    def shuffled(seed: int) -> Proposals:
        return select(candidates, NONE, NONE, config(), torch.Generator().manual_seed(seed))

    one, again, other = shuffled(1), shuffled(1), shuffled(2)
    assert torch.equal(one.boxes, again.boxes)
    assert not torch.equal(one.boxes, other.boxes)
    assert not torch.equal(one.boxes, candidates.boxes)
    order = one.boxes[:, 0].argsort()  # the same pairs of box and score
    assert torch.equal(one.boxes[order], candidates.boxes)
    assert torch.equal(one.scores[order], candidates.scores)


def test_match_regions_takes_the_highest_overlap_and_the_first_of_equals() -> None:
    regions = T([[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.5, 0.5, 1, 1], [0, 0, 0.5, 0.4]])
    boxes = T([[0.5, 0.5, 0.9, 1], [0, 0, 0.5, 0.41], [0, 0, 0.5, 0.49]])
    assert match_regions(boxes, regions) == [1, 3, 0]
    assert match_regions(NONE, regions) == []


# -- what a region's token is -----------------------------------------------------------------------------------------


def encoder(**changes: Any) -> RegionEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RegionEncoder(config(**changes), 16).eval()


def features(batch: int = 2, h: int = 8, w: int = 8) -> ImageFeatures:
    generator = torch.Generator().manual_seed(0)
    return ImageFeatures(tuple(torch.randn(batch, 8, h, w, generator=generator) for _ in range(4)))


BOXES = T([[0.1, 0.2, 0.55, 0.7], [0.3, 0.3, 0.8, 0.5], [0.05, 0.6, 0.3, 0.95]])


def coordinate_map(h: int, w: int) -> Tensor:
    """(1, 2, h, w): x and y in [0, 1] of every cell's centre."""
    x = ((torch.arange(w) + 0.5) / w).expand(h, w)
    y = ((torch.arange(h) + 0.5) / h)[:, None].expand(h, w)
    return torch.stack((x, y))[None]


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_every_scale_reads_where_the_box_is(scale: int) -> None:
    part, size = encoder(), 4
    h, w = 8 * scale, 12 * scale
    boxes = T([[0.2, 0.25, 0.6, 0.75], [0.5, 0.3, 0.9, 0.4]])
    pooled = part._align(coordinate_map(h, w), T([0, 0]), boxes)  # (2, 2, size, size)
    for box, cells in zip(boxes.tolist(), pooled, strict=True):
        for i in range(size):
            share = (i + 0.5) / size
            assert cells[0, :, i].tolist() == pytest.approx([box[0] + share * (box[2] - box[0])] * size, abs=1e-5)
            assert cells[1, i, :].tolist() == pytest.approx([box[1] + share * (box[3] - box[1])] * size, abs=1e-5)


def test_released_quirks_move_the_reading() -> None:
    doubled = encoder(region_stride_error=2.0)
    box = T([[0.1, 0.1, 0.2, 0.3]])
    centre = doubled._align(coordinate_map(16, 16), T([0]), box).mean((2, 3))
    assert centre[0].tolist() == pytest.approx([0.3, 0.4], abs=1e-5)  # twice as far
    plain, quirk = encoder(), encoder(region_boxes="centre")
    # (cx, cy, w, h) of the second are the corners of the first
    read_as = T([[0.3, 0.35, 0.5, 0.6]])
    given = T([[0.05, 0.05, 0.55, 0.65]])
    torch.testing.assert_close(quirk(features(1), [given]), plain(features(1), [read_as]))


def test_outside_the_picture_is_zero() -> None:
    part = encoder()
    pooled = part._align(torch.ones(1, 1, 8, 8), T([0]), T([[1.5, 1.5, 2.0, 2.0]]))
    assert not pooled.any()


@torch.no_grad()
def test_a_constant_picture_differs_by_the_box_embedding_only() -> None:
    part = encoder(region_rounds=0)  # convolutions see the rim, so none here
    for layer in part.fuse.inputs:
        layer.weight[:, -2:] = 0  # nor coordinates
    flat = ImageFeatures(tuple(torch.full((1, 8, 8, 8), 0.1 * (i + 1)) for i in range(4)))
    [tokens] = part(flat, [BOXES])
    [plain] = [part.output(part.box_embedding(BOXES))]
    difference = tokens - plain
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tokens[0], tokens[1])


def naive_align(level: Tensor, box: list[float], size: int) -> Tensor:
    """ROIAlign of one box inside a map (C, h, w): every cell of the result is the mean of 2 x 2 bilinear readings."""
    h, w = level.shape[-2:]
    x1, y1, x2, y2 = box[0] * w - 0.5, box[1] * h - 0.5, box[2] * w - 0.5, box[3] * h - 0.5
    out = torch.zeros(len(level), size, size)
    for i in range(size):
        for j in range(size):
            for a in range(2):
                for b in range(2):
                    y = y1 + (y2 - y1) * (i + (a + 0.5) / 2) / size
                    x = x1 + (x2 - x1) * (j + (b + 0.5) / 2) / size
                    r, c = math.floor(y), math.floor(x)
                    fy, fx = y - r, x - c
                    out[:, i, j] += 0.25 * (
                        level[:, r, c] * (1 - fy) * (1 - fx) + level[:, r, c + 1] * (1 - fy) * fx
                        + level[:, r + 1, c] * fy * (1 - fx) + level[:, r + 1, c + 1] * fy * fx
                    )  # fmt: skip
    return out


@torch.no_grad()
def test_tokens_by_hand() -> None:
    part, given = encoder(), features(1)
    [tokens] = part(given, [BOXES])
    assert tokens.shape == (3, 16)
    maps = [  # the last three hidden states, shallow to deep, on grids of 32, 16 and 8 cells
        F.interpolate(level, size=(side, side), mode="bilinear", align_corners=True)
        for level, side in zip(given.levels[1:], (32, 16, 8), strict=True)
    ]
    fused = part.fuse(maps)
    for box, token in zip(BOXES, tokens, strict=True):
        pooled = [conv(naive_align(m[0], box.tolist(), 4)[None]) for conv, m in zip(part.convs, fused, strict=True)]
        hidden = part.flatten(F.relu(sum(pooled)).flatten(1))
        torch.testing.assert_close(part.output(hidden + part.box_embedding(box))[0], token, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_batch_equals_its_images_alone_whatever_their_counts() -> None:
    part, given = encoder(), features(3)
    boxes = [BOXES, NONE, BOXES[1:2] * 0.9]
    together = part(given, boxes)
    assert [len(t) for t in together] == [3, 0, 1]
    for i in range(3):
        [alone] = part(ImageFeatures(tuple(level[i : i + 1] for level in given.levels)), boxes[i : i + 1])
        # measured worst case 1e-7
        torch.testing.assert_close(together[i], alone, atol=1e-6, rtol=1e-5)


def test_levels_exchange_channels_with_their_neighbours() -> None:
    fuse = FuseLevels(3, 8, 3, 1, 2)
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(1, 8, side, side, generator=generator) for side in (12, 6, 3)]

    def at(x: Tensor, row: int, column: int, side: int) -> Tensor:
        """``x`` (C, n, n) read at a cell of a grid of ``side`` cells whose corner cells coincide."""
        n = x.shape[-1]
        y, z = row * (n - 1) / (side - 1), column * (n - 1) / (side - 1)
        r, c = min(int(y), n - 2), min(int(z), n - 2)
        fy, fz = y - r, z - c
        top = x[:, r, c] * (1 - fz) + x[:, r, c + 1] * fz
        bottom = x[:, r + 1, c] * (1 - fz) + x[:, r + 1, c + 1] * fz
        return top * (1 - fy) + bottom * fy

    mixed = fuse._exchange(levels)
    for i, side in enumerate((12, 6, 3)):
        coarser, finer = levels[min(i + 1, 2)][0], levels[max(i - 1, 0)][0]
        for row in range(side):
            for column in range(side):
                own = levels[i][0, :4, row, column]
                expected = torch.cat((own, at(coarser[6:], row, column, side), at(finer[4:6], row, column, side)))
                torch.testing.assert_close(mixed[i][0, :, row, column], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fusing_adds_coordinates_and_shares_one_convolution_a_round() -> None:
    fuse = FuseLevels(3, 8, 2, 2, 2)
    maps = [torch.randn(1, 3, 4, 6), torch.randn(1, 3, 2, 3)]
    levels = []
    for layer, level in zip(fuse.inputs, maps, strict=True):
        h, w = level.shape[-2:]
        xs = T([2 * c / (w - 1) - 1 for c in range(w)]).expand(h, w)
        ys = T([2 * r / (h - 1) - 1 for r in range(h)])[:, None].expand(h, w)
        levels.append(layer(torch.cat((level, xs[None, None], ys[None, None]), 1)))
    for conv, norm in zip(fuse.convs, fuse.norms, strict=True):
        levels = [F.relu(norm(conv(x))) for x in fuse._exchange(levels)]
    for level, expected in zip(fuse(maps), levels, strict=True):
        torch.testing.assert_close(level, expected)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_bilinear_reading_is_roi_align(samples: int) -> None:
    """Inside, across and outside the map, turned round (as the released quirk does), and empty; worst 1e-5."""
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(2, 3, 9, 13, generator=generator)
    places = torch.rand(60, 4, generator=generator) * torch.tensor([26, 18, 26, 18]) - torch.tensor([6, 4, 6, 4])
    places = torch.cat((places, torch.tensor([[2, 3, 2, 3], [-1, -1, 13, 9], [-50, 0, -40, 9.0]])))
    image = torch.randint(2, (len(places),), generator=generator)
    expected = roi_align(level, torch.cat((image[:, None].float(), places), 1), 7, 1.0, samples, aligned=True)
    torch.testing.assert_close(read_bilinear(level, image, places, 7, samples), expected, rtol=1e-5, atol=2e-5)
    assert (places[:, 2] < places[:, 0]).sum() > 10
