"""Set prediction loss of the proposer: Hungarian matching, then focal, L1 and GIoU terms (Carion et al. 2020, 3.1).

Legend: B images, Q queries, M ground-truth boxes of an image; boxes (cx, cy, w, h) in [0, 1] unless named corners.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from groma import boxes as box_ops
from groma.model.configuration import ProposerConfig
from groma.model.proposer import Detections, sigmoid_focal


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Tensor, config: ProposerConfig) -> tuple[Tensor, Tensor]:
    """The cheapest one-to-one assignment of Q predictions (Q), (Q, 4) to M targets (M, 4): (query, target) indices."""
    p, gamma = logits.sigmoid(), 2.0
    positive = config.focal_alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    negative = (1 - config.focal_alpha) * p**gamma * -(1 - p + 1e-8).log()
    class_cost, l1_cost, giou_cost = config.costs
    giou = box_ops.generalised_iou(box_ops.cxcywh_to_xyxy(boxes), box_ops.cxcywh_to_xyxy(targets))
    cost = class_cost * (positive - negative)[:, None] + l1_cost * torch.cdist(boxes, targets, p=1) - giou_cost * giou
    # scipy refuses NaN; the loss will be NaN too, and the trainer names its step and records
    rows, columns = linear_sum_assignment(cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy())
    return torch.as_tensor(rows, device=boxes.device), torch.as_tensor(columns, device=boxes.device)


def stage_loss(logits: Tensor, boxes: Tensor, targets: list[Tensor], config: ProposerConfig) -> Tensor:
    """(class, l1, giou) losses (3), weighted, of one stage: logits (B, Q), boxes (B, Q, 4), targets B x (M, 4).

    Normalised by the number of target boxes in the batch, at least 1.
    """
    count = max(1, sum(len(t) for t in targets))
    labels = torch.zeros_like(logits)
    predicted, wanted = [], []
    for i, target in enumerate(targets):
        rows, columns = match(logits[i], boxes[i], target, config)
        labels[i, rows] = 1.0
        predicted.append(boxes[i, rows])
        wanted.append(target[columns])
    found, truth = torch.cat(predicted), torch.cat(wanted)  # (K, 4) each
    focal = sigmoid_focal(logits, labels, config.focal_alpha).sum() / count
    l1 = (found - truth).abs().sum() / count
    giou = _paired_giou(box_ops.cxcywh_to_xyxy(found), box_ops.cxcywh_to_xyxy(truth))
    weights = focal.new_tensor(list(config.loss_weights))
    return torch.stack((focal, l1, (1 - giou).sum() / count)) * weights


def _paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU (K) of boxes paired row by row, corners (K, 4)."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = (box_ops.area(a) + box_ops.area(b) - intersection).clamp(min=1e-12)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).clamp(min=0).prod(-1)
    hull = hull.clamp(min=1e-12)
    return intersection / union - (hull - union) / hull


def detection_losses(found: Detections, targets: tuple[Tensor, ...], source: str, config: ProposerConfig
                     ) -> dict[str, Tensor]:  # fmt: skip
    """Named losses of one batch whose boxes train the head ``source``.

    targets: B tensors (M, 4) xyxy in [0, 1]. Returns class, l1, giou (summed over the decoder layers) and
    encoder_class, encoder_l1, encoder_giou of the first stage. Heads other than ``source`` get no gradient.
    """
    if source not in found.logits:
        raise ValueError(f"source: got {source!r}, expected one of the proposer's heads {sorted(found.logits)}")
    centred = [box_ops.xyxy_to_cxcywh(t.float()) for t in targets]
    layers = zip(found.logits[source], found.boxes, strict=True)
    total = torch.stack([stage_loss(logits, boxes, centred, config) for logits, boxes in layers]).sum(0)
    first = stage_loss(found.encoder_logits, found.encoder_boxes, centred, config)
    names = ("class", "l1", "giou")
    return {**dict(zip(names, total, strict=True)),
            **{f"encoder_{name}": loss for name, loss in zip(names, first, strict=True)}}  # fmt: skip
