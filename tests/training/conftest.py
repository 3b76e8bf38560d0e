"""What tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from groma.data.prompts import build_prompt, refer_turns


@pytest.fixture(autouse=True, scope="module")
def _quiet(quiet_torch: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture(scope="module")
def step(pictures: Path, tiny_processor: Any) -> dict[str, Any]:
    """Keyword arguments of a training step: three pictures, a question and an answer with a box about each."""
    boxes = [torch.tensor([[0.1, 0.1, 0.45, 0.5]]), torch.tensor([[0.5, 0.2, 0.9, 0.6]]), torch.zeros(0, 4)]
    texts = ("the red ball", "the green box on the left", "the ring")
    rows = [build_prompt(tiny_processor, refer_turns(t, b)) for t, b in zip(texts, boxes, strict=True)]
    ids, mask = tiny_processor.pad([row.ids for row in rows])
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        labels[i, : len(row.labels)] = row.labels
    pixels = tiny_processor.pixels([Image.open(pictures / "images" / f"{i}.png") for i in range(3)])
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "labels": labels,
            "refer_boxes": tuple(row.refer_boxes for row in rows),
            "ground_boxes": tuple(row.ground_boxes for row in rows)}  # fmt: skip
