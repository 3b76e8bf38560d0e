"""The one box convention inside: (x1, y1, x2, y2), each in [0, 1] of the upright image.

Everything that comes from or goes to the outside (COCO's xywh pixels, the proposer's centre form,
xyxy pixels of an answer) passes through this file, at the border and nowhere else.

Legend: N, M boxes. All functions take float tensors of shape (..., 4) and never change their input.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms as _nms


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) → (x1, y1, x2, y2); shape (..., 4), same unit."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) → (cx, cy, w, h); shape (..., 4), same unit."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), -1)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """COCO's (x, y, w, h) with a top-left corner → (x1, y1, x2, y2); shape (..., 4), same unit."""
    x, y, w, h = boxes.unbind(-1)
    return torch.stack((x, y, x + w, y + h), -1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) → COCO's (x, y, w, h); shape (..., 4), same unit."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1, y1, x2 - x1, y2 - y1), -1)


def to_unit(boxes: Tensor, width: int, height: int) -> Tensor:
    """Pixels xyxy → [0, 1] xyxy, for an image of ``width`` x ``height`` pixels."""
    return boxes / boxes.new_tensor([width, height, width, height])


def to_pixels(boxes: Tensor, width: int, height: int) -> Tensor:
    """[0, 1] xyxy → pixels xyxy, for an image of ``width`` x ``height`` pixels."""
    return boxes * boxes.new_tensor([width, height, width, height])


def clip(boxes: Tensor) -> Tensor:
    """Cut xyxy boxes (..., 4) to the unit square."""
    return boxes.clamp(0, 1)


def area(boxes: Tensor) -> Tensor:
    """Areas (...) of xyxy boxes (..., 4); a reversed box has area 0."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union (N, M) of xyxy ``a`` (N, 4) and ``b`` (M, 4)."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])  # (N, M, 2)
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])  # (N, M, 2)
    intersection = (high - low).clamp(min=0).prod(-1)  # (N, M)
    return intersection, area(a)[:, None] + area(b)[None] - intersection


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise intersection over union (N, M) of xyxy ``a`` (N, 4) and ``b`` (M, 4); 0 where both are empty.

    >>> iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]])).item()  # 2 / 6
    0.3333333432674408
    """
    intersection, union = _overlap(a, b)
    return torch.where(union > 0, intersection / union.clamp(min=1e-12), torch.zeros_like(union))


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise GIoU (N, M) in [-1, 1] of xyxy boxes (Rezatofighi et al. 2019, eq. 3 of algorithm 1)."""
    intersection, union = _overlap(a, b)
    low = torch.minimum(a[:, None, :2], b[None, :, :2])
    high = torch.maximum(a[:, None, 2:], b[None, :, 2:])
    hull = (high - low).clamp(min=0).prod(-1).clamp(min=1e-12)  # (N, M)
    return intersection / union.clamp(min=1e-12) - (hull - union) / hull


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices kept by non-maximum suppression, in descending order of score; ties keep their order.

    A box is dropped when its IoU with a kept one is strictly above ``threshold``.
    boxes (N, 4) xyxy, scores (N) → (K) long.
    """
    order = scores.argsort(descending=True, stable=True)
    # torchvision sorts by score itself, not stably: feed it ranks so that ties stay in order.
    ranks = torch.arange(len(order), 0, -1, dtype=torch.float32, device=boxes.device)
    return order[_nms(boxes[order].float(), ranks, threshold)]
