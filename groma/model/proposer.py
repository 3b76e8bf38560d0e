"""The class-agnostic proposer: a two-stage Deformable DETR with one object class (Groma, section 3.2).

Legend: B images, Q queries, S map positions, d width, h w grid; boxes inside are (cx, cy, w, h) in [0, 1], because
that is what a DETR refines; they leave this file as xyxy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from groma import boxes as box_ops
from groma.model.configuration import ProposerConfig
from groma.model.deformable import DecoderLayer, DeformableAttention, EncoderLayer, Grid
from groma.structures import ImageFeatures, Proposals

RARE = -math.log((1 - 0.01) / 0.01)  # bias of an objectness head at first: one query in a hundred is an object
ANCHOR = 0.05  # side of a grid proposal at the finest level; doubles with every coarser one


@dataclass(frozen=True)
class Detections:
    """All the proposer computes, for the loss and for inspection.

    encoder_logits (B, S), encoder_boxes (B, S, 4): the first stage on every grid position;
    logits: head name → (layers, B, Q); boxes (layers, B, Q, 4) cxcywh; reference (B, Q, 4).
    """

    encoder_logits: Tensor
    encoder_boxes: Tensor
    logits: dict[str, Tensor]
    boxes: Tensor
    reference: Tensor


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, h, w) map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → the same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class BoxHead(nn.Sequential):
    """Three linear layers, 256 wide as published whatever the proposer's width; the last starts at zero."""

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 4)
        )

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the four numbers."""
        return self[-1]  # type: ignore[return-value]


class Proposer(nn.Module):
    """Encoder features → Q boxes with objectness, best first after ``propose``."""

    def __init__(self, config: ProposerConfig, feature_width: int) -> None:
        super().__init__()
        self.config = config
        d = config.width
        activation = ACT2FN[config.activation]
        self.input_proj = nn.ModuleList(_projections(feature_width, d, config.levels))
        self.level_embed = nn.Parameter(torch.randn(config.levels, d))
        common = (config.levels,)
        self.encoder = nn.ModuleList(
            EncoderLayer(d, config.encoder_heads, config.encoder_points, *common, config.encoder_ffn, activation,
                         config.dropout) for _ in range(config.encoder_layers)
        )  # fmt: skip
        self.decoder = nn.ModuleList(
            DecoderLayer(d, config.decoder_heads, config.decoder_points, *common, config.decoder_ffn, activation,
                         config.dropout) for _ in range(config.decoder_layers)
        )  # fmt: skip
        self.enc_output, self.enc_output_norm = nn.Linear(d, d), nn.LayerNorm(d)
        self.enc_class, self.enc_box = nn.Linear(d, 1), BoxHead(d)
        self.pos_trans, self.pos_trans_norm = nn.Linear(2 * d, 2 * d), nn.LayerNorm(2 * d)
        self.content = nn.Embedding(config.queries, d)
        self.box_heads = nn.ModuleList(BoxHead(d) for _ in range(config.decoder_layers))
        self.class_heads = nn.ModuleDict(
            {name: nn.ModuleList(nn.Linear(d, 1) for _ in range(config.decoder_layers)) for name in config.heads}
        )

    def reset(self) -> None:
        """Initial values as published for Deformable DETR: rare objects, boxes that start at their references."""
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset()
        nn.init.normal_(self.level_embed)
        for module in self.modules():
            if self.is_objectness(module):
                nn.init.constant_(module.bias, RARE)  # type: ignore[arg-type]
            elif isinstance(module, BoxHead):
                nn.init.zeros_(module.last.weight)
                nn.init.zeros_(module.last.bias)

    def is_objectness(self, module: nn.Module) -> bool:
        """Is this one of the objectness heads, of the first stage or of a decoder layer?"""
        layers = (layer for head in self.class_heads.values() for layer in head.children())
        return module is self.enc_class or any(module is layer for layer in layers)

    def forward(self, features: ImageFeatures) -> Detections:
        """One pass over B images: mean of the levels → maps → grid proposals → Q refined boxes."""
        maps = self._maps(torch.stack(features.levels).mean(0))
        grid = [(m.shape[-2], m.shape[-1]) for m in maps]
        memory = self._encode(maps, grid)  # (B, S, d)
        logits, coords = self._first_stage(memory, grid)  # (B, S), (B, S, 4) before the sigmoid
        best = logits.topk(min(self.config.queries, logits.shape[1]), dim=1).indices  # (B, Q)
        reference = coords.gather(1, best[..., None].expand(-1, -1, 4)).detach().sigmoid()  # (B, Q, 4)
        return self._decode(memory, grid, reference, logits, coords.sigmoid())

    def _maps(self, features: Tensor) -> list[Tensor]:
        return [layer(features) for layer in self.input_proj]

    def _encode(self, maps: list[Tensor], grid: Grid) -> Tensor:
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)  # (B, S, d)
        positions = torch.cat(
            [sine_map(h, w, x.shape[-1], x) + self.level_embed[i] for i, (h, w) in enumerate(grid)]
        )  # (S, d)
        references = torch.cat([grid_centres(h, w, x) for h, w in grid]).expand(len(x), -1, -1)  # (B, S, 2)
        for layer in self.encoder:
            x = layer(x, positions, references, grid)
        return x

    def _first_stage(self, memory: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Every grid position proposes an anchor-sized box; positions outside (0.01, 0.99) are void."""
        anchors = torch.cat(
            [
                torch.cat((grid_centres(h, w, memory), memory.new_full((h * w, 2), ANCHOR * 2.0**level)), -1)
                for level, (h, w) in enumerate(grid)
            ]
        )  # (S, 4)
        valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)  # (S, 1)
        anchors = torch.logit(anchors.float()).masked_fill(~valid, float("inf"))
        objects = self.enc_output_norm(self.enc_output(memory.masked_fill(~valid, 0.0)))
        return self.enc_class(objects)[..., 0].float(), self.enc_box(objects).float() + anchors

    def _decode(self, memory: Tensor, grid: Grid, reference: Tensor, enc_logits: Tensor, enc_boxes: Tensor
                ) -> Detections:  # fmt: skip
        embedded = sine_boxes(reference, self.config.width).to(memory.dtype)
        positions = self.pos_trans_norm(self.pos_trans(embedded))[..., : self.config.width]  # the first half only
        x = self.content.weight[: reference.shape[1]].expand(len(memory), -1, -1)
        start, refined, boxes = inverse_sigmoid(reference), reference, []
        logits: dict[str, list[Tensor]] = {name: [] for name in self.class_heads}
        for i, layer in enumerate(self.decoder):
            # cross-attention keeps the first stage's references in every layer, as published
            x = layer(x, positions, reference, memory, grid)
            delta = self.box_heads[i](x).float()
            boxes.append((delta + inverse_sigmoid(refined)).sigmoid())
            refined = (delta + start).sigmoid()  # one step from the first stage, not a running sum; as published
            for name, heads in self.class_heads.items():
                logits[name].append(heads.get_submodule(str(i))(x)[..., 0].float())
        return Detections(enc_logits, enc_boxes, {k: torch.stack(v) for k, v in logits.items()}, torch.stack(boxes),
                          reference)  # fmt: skip

    def objectness(self, detections: Detections) -> Tensor:
        """Fused score (B, Q) in [0, 1] of the last layer: product of sigmoid(head)^exponent over the heads."""
        fused = torch.ones_like(detections.boxes[-1][..., 0])
        for name, exponent in zip(self.config.heads, self.config.fusion, strict=True):
            fused = fused * detections.logits[name][-1].sigmoid() ** exponent
        return fused

    def propose(self, detections: Detections) -> list[Proposals]:
        """Per image all Q candidates as xyxy boxes (Q, 4) with their fused scores (Q), best first."""
        scores, order = self.objectness(detections).sort(dim=1, descending=True, stable=True)
        corners = box_ops.cxcywh_to_xyxy(detections.boxes[-1])
        return [Proposals(b[o], s) for b, o, s in zip(corners, order, scores, strict=True)]


def _projections(feature_width: int, d: int, levels: int) -> list[nn.Sequential]:
    """Fine to coarse: 2x up-convolution, the grid itself, stride 2; one level is the grid itself alone."""
    half = d // 2
    up = nn.Sequential(
        nn.ConvTranspose2d(feature_width, half, 2, stride=2), nn.Conv2d(half, d, 1), ChannelNorm(d, eps=1e-6),
        nn.Conv2d(d, d, 3, padding=1),
    )  # fmt: skip
    same = nn.Sequential(nn.Conv2d(feature_width, d, 1), ChannelNorm(d, eps=1e-6))
    down = nn.Sequential(nn.Conv2d(feature_width, d, 3, stride=2, padding=1), ChannelNorm(d, eps=1e-6))
    return {1: [same], 2: [same, down], 3: [up, same, down]}[levels]


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)), with both terms kept at least ``eps``."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def grid_centres(h: int, w: int, like: Tensor) -> Tensor:
    """Centres (h·w, 2) of the grid cells as (x, y) in [0, 1], row by row."""
    y, x = torch.meshgrid(
        (torch.arange(h, device=like.device) + 0.5) / h, (torch.arange(w, device=like.device) + 0.5) / w, indexing="ij"
    )
    return torch.stack((x, y), -1).flatten(0, 1).to(like.dtype)


def _sine(values: Tensor, channels: int) -> Tensor:
    """(...) → (..., channels): interleaved sines and cosines at falling frequencies (temperature 10,000)."""
    i = torch.arange(channels, dtype=torch.float32, device=values.device)
    angles = values.float()[..., None] * (2 * math.pi) / 10000 ** (2 * (i // 2) / channels)
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), -1).flatten(-2)


def sine_map(h: int, w: int, d: int, like: Tensor) -> Tensor:
    """Sine position embedding (h·w, d) of a map: normalised, shifted by half a cell, y before x."""
    eps = 1e-6
    y = (torch.arange(1, h + 1, device=like.device) - 0.5) / (h + eps)
    x = (torch.arange(1, w + 1, device=like.device) - 0.5) / (w + eps)
    rows = _sine(y, d // 2)[:, None].expand(-1, w, -1)
    columns = _sine(x, d // 2)[None].expand(h, -1, -1)
    return torch.cat((rows, columns), -1).flatten(0, 1).to(like.dtype)


def sine_boxes(boxes: Tensor, d: int) -> Tensor:
    """Sine embedding (B, Q, 2d) of boxes (B, Q, 4) in [0, 1]: d/2 channels for each of cx, cy, w, h."""
    return _sine(boxes, d // 2).flatten(-2)


def sigmoid_focal(logits: Tensor, targets: Tensor, alpha: float, gamma: float = 2.0) -> Tensor:
    """Focal loss per element (Lin et al. 2017, eq. 5) of logits against 0/1 targets of the same shape."""
    p = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_true = p * targets + (1 - p) * (1 - targets)
    return (alpha * targets + (1 - alpha) * (1 - targets)) * (1 - p_true) ** gamma * loss
