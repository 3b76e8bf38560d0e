"""Regions: which proposals are kept, and the multi-scale ROIAlign encoder that turns each into one token.

Legend: B images, D encoder width, C region width, R regions of the whole batch, h w patch grid, E language-model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from groma import boxes as box_ops
from groma.model.configuration import GromaConfig
from groma.model.encoder import TokenNorm
from groma.structures import ImageFeatures, Proposals

REFER_SCORE = 1.0  # objectness given to a user's box
SAMPLES = 2  # ROIAlign sampling ratio


def select(candidates: Proposals, refer: Tensor, ground: Tensor, config: GromaConfig,
           generator: torch.Generator | None = None) -> Proposals:  # fmt: skip
    """The regions of one view: at most ``config.max_regions``, by score; shuffled only when a generator is given.

    Proposals strictly above the score threshold, after NMS, best first; if none is left, the single best one.
    refer (K, 4), ground (G, 4): every user box is a region of its own with score 1, before all others; a ground-truth
    box joins (training only) when no kept region overlaps it by the NMS threshold, so that it is never lost.
    """
    keep = box_ops.nms(candidates.boxes, candidates.scores, config.nms_threshold)
    if config.score_threshold > 0:
        above = keep[candidates.scores[keep] > config.score_threshold]
        keep = above if len(above) else keep[:1]
    keep = keep[: max(0, config.max_regions - len(refer))]
    extra = _unmatched(ground, torch.cat((refer, candidates.boxes[keep])), config.nms_threshold)
    # true boxes take room from the last proposals, which may have covered others
    while len(keep) > (room := max(0, config.max_regions - len(refer) - len(extra))):
        keep = keep[:room]
        extra = _unmatched(ground, torch.cat((refer, candidates.boxes[keep])), config.nms_threshold)
    boxes = torch.cat((refer, candidates.boxes[keep], extra))[: config.max_regions]
    scores = torch.cat((refer.new_full((len(refer),), REFER_SCORE), candidates.scores[keep],
                        extra.new_full((len(extra),), config.score_threshold)))[: config.max_regions]  # fmt: skip
    if generator is not None:
        order = torch.randperm(len(boxes), generator=generator).to(boxes.device)
        boxes, scores = boxes[order], scores[order]
    return Proposals(boxes, scores)


def _unmatched(ground: Tensor, kept: Tensor, threshold: float) -> Tensor:
    """Ground-truth boxes (G', 4) no kept box overlaps by at least ``threshold``."""
    if not len(ground) or not len(kept):
        return ground
    return ground[box_ops.iou(ground, kept).amax(1) < threshold]


def match_regions(boxes: Tensor, regions: Tensor) -> list[int]:
    """For each of boxes (K, 4), the index of the region (N, 4) with the highest IoU (the first among equals)."""
    return box_ops.iou(boxes, regions).argmax(1).tolist() if len(boxes) else []


class FuseLevels(nn.Module):
    """Maps of several depths at several sizes exchange channels with their neighbours for a few rounds.

    Each level keeps its first half of channels, takes the last quarter of the next coarser level and the third
    quarter of the next finer one (its own at the ends); one 3x3 convolution per round is shared by all levels.
    """

    def __init__(self, width: int, channels: int, levels: int, rounds: int, groups: int) -> None:
        super().__init__()
        self.channels = channels
        self.inputs = nn.ModuleList(nn.Conv2d(width + 2, channels, 1) for _ in range(levels))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(rounds))
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(rounds))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """maps (B, D, h_l, w_l), fine to coarse → as many maps (B, C, h_l, w_l)."""
        levels = [layer(_with_coordinates(m)) for layer, m in zip(self.inputs, maps, strict=True)]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            levels = [F.relu(norm(conv(x))) for x in self._exchange(levels)]
        return levels

    def _exchange(self, levels: list[Tensor]) -> list[Tensor]:
        half, quarter, last = self.channels // 2, self.channels // 4, len(levels) - 1
        mixed = []
        for i, level in enumerate(levels):
            size = (level.shape[-2], level.shape[-1])
            coarser = _resize(levels[min(i + 1, last)][:, half + quarter :], size)
            finer = _resize(levels[max(i - 1, 0)][:, half : half + quarter], size)
            mixed.append(torch.cat((level[:, :half], coarser, finer), 1))
        return mixed


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def _with_coordinates(x: Tensor) -> Tensor:
    """Two more channels: x and y from -1 to 1."""
    h, w = x.shape[-2:]
    xs = torch.linspace(-1, 1, w, device=x.device, dtype=x.dtype).expand(len(x), 1, h, w)
    ys = torch.linspace(-1, 1, h, device=x.device, dtype=x.dtype)[:, None].expand(len(x), 1, h, w)
    # The encoder's maps have their channels last already; kept so, resizing, norms and ROIAlign read whole rows.
    return torch.cat((x, xs, ys), 1).contiguous(memory_format=torch.channels_last)


def read_bilinear(level: Tensor, image: Tensor, places: Tensor, size: int, samples: int) -> Tensor:
    """ROIAlign (aligned) of places (R, 4), in cells, on the maps (B, C, h, w) of image (R) → (R, C, size, size).

    The same numbers as torchvision's, which on a CPU runs on one thread and by single numbers: here every bin is a
    weighted sum of (2 · samples)² rows of channels.
    """
    _, c, h, w = level.shape
    y, of_y = _taps(places[:, 1], places[:, 3], size, samples, h)  # (R, size, 2 · samples)
    x, of_x = _taps(places[:, 0], places[:, 2], size, samples, w)
    cells = (image[:, None, None] * h + y)[:, :, None, :, None] * w + x[:, None, :, None, :]
    weights = of_y[:, :, None, :, None] * of_x[:, None, :, None, :]
    rows = level.permute(0, 2, 3, 1).reshape(-1, c)
    bins = F.embedding_bag(cells.flatten(3).flatten(0, 2), rows, mode="sum",
                           per_sample_weights=weights.flatten(3).flatten(0, 2))  # fmt: skip
    return bins.view(-1, size, size, c).permute(0, 3, 1, 2)


def _taps(low: Tensor, high: Tensor, bins: int, samples: int, length: int) -> tuple[Tensor, Tensor]:
    """Cells (R, bins, 2 · samples) read along one axis of ``length`` cells between low and high (R), and weights."""
    inner = (torch.arange(samples, device=low.device) + 0.5) / samples
    steps = torch.arange(bins, device=low.device)[:, None] + inner
    at = low[:, None, None] - 0.5 + (high - low)[:, None, None] / bins * steps  # (R, bins, samples)
    inside = ((at >= -1) & (at <= length)).to(at.dtype) / samples
    at = at.clamp(0, length - 1)
    first = at.floor()
    share = at - first
    cells = torch.stack((first, (first + 1).clamp(max=length - 1)), -1).long()
    return cells.flatten(2), torch.stack(((1 - share) * inside, share * inside), -1).flatten(2)


class RegionEncoder(nn.Module):
    """Boxes on an image → one token each: fused maps, ROIAlign, convolutions, and an embedding of the box itself."""

    def __init__(self, config: GromaConfig, llm_width: int) -> None:
        super().__init__()
        width = config.encoder.hidden_size
        channels, size, hidden = config.region_width or width, config.region_size, config.region_hidden
        self.scales = tuple(config.region_scales)
        self.size, self.box_format, self.stride_error = size, config.region_boxes, config.region_stride_error
        self.fuse = FuseLevels(width, channels, len(self.scales), config.region_rounds, config.region_groups)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in self.scales)
        self.flatten = nn.Linear(channels * size * size, hidden)
        small = config.region_box_hidden
        self.box_embedding = nn.Sequential(
            nn.Linear(4, small), nn.ReLU(), nn.LayerNorm(small), nn.Linear(small, hidden), nn.ReLU(),
            nn.LayerNorm(hidden),
        )  # fmt: skip
        self.output = nn.Linear(hidden, llm_width)
        self.norm = TokenNorm(llm_width) if config.token_norm else nn.Identity()

    def forward(self, features: ImageFeatures, boxes: list[Tensor]) -> list[Tensor]:
        """boxes: B tensors (N, 4) xyxy in [0, 1] → B tensors (N, E)."""
        counts = [len(b) for b in boxes]
        given = torch.cat(boxes)  # (R, 4)
        if self.box_format == "centre":  # released weights only: centre form read as corners
            given = box_ops.xyxy_to_cxcywh(given)
        maps = self._maps(features)
        image = torch.arange(len(boxes), device=given.device).repeat_interleave(
            torch.tensor(counts, device=given.device), output_size=len(given)
        )
        first, *others = (conv(self._align(m, image, given)) for conv, m in zip(self.convs, maps, strict=True))
        pooled = sum(others, first)  # (R, C, size, size)
        x = self.flatten(F.relu(pooled).flatten(1)) + self.box_embedding(given.to(pooled.dtype))  # (R, hidden)
        return list(self.norm(self.output(x)).split(counts))

    def _maps(self, features: ImageFeatures) -> list[Tensor]:
        h, w = features.grid
        used = features.levels[-len(self.scales) :]
        sizes = [(round(h * s), round(w * s)) for s in self.scales]
        return self.fuse([_resize(m, size) for m, size in zip(used, sizes, strict=True)])

    def _align(self, level: Tensor, image: Tensor, boxes: Tensor) -> Tensor:
        """ROIAlign of every box on its image's map (B, C, h, w) → (R, C, size, size); float32, as bf16 lacks one."""
        h, w = level.shape[-2:]
        places = boxes.float() * boxes.new_tensor([w, h, w, h]).float() * self.stride_error
        if level.is_cpu and not torch.is_grad_enabled():
            return read_bilinear(level.float(), image, places, self.size, SAMPLES).to(level.dtype)
        rois = torch.cat((image[:, None].float(), places), 1)
        with torch.autocast(level.device.type, enabled=False):
            pooled = roi_align(level.float(), rois, self.size, 1.0, SAMPLES, aligned=True)
        return pooled.to(level.dtype)
