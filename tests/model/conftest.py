"""What tests of the model share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from groma.data.prompts import build_prompt, describe_question, refer_question
from groma.model.groma import GromaForConditionalGeneration
from groma.processor import GromaProcessor
from groma.structures import Prompt, Turn

Make = Callable[..., GromaForConditionalGeneration]
BOX = torch.tensor([[0.1, 0.1, 0.45, 0.5]])


@pytest.fixture(autouse=True, scope="module")
def _quiet(quiet_torch: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture(scope="module")
def model(make: Make) -> GromaForConditionalGeneration:
    """Overlap is suppressed early, so that pictures differ in their number of regions."""
    return make(nms_threshold=0.1)


@pytest.fixture(scope="module")
def pixels(pictures: Path, tiny_processor: GromaProcessor) -> Tensor:
    return tiny_processor.pixels([Image.open(pictures / "images" / f"{i}.png") for i in range(3)])


@pytest.fixture(scope="module")
def prompts(tiny_processor: GromaProcessor) -> list[Prompt]:
    """Open questions of three lengths; the last has a user's box."""
    describe = Turn("user", describe_question(), BOX)
    turns = [Turn("user", refer_question("the red ball")), Turn("user", "What is this, and what is it for?"), describe]
    return [build_prompt(tiny_processor, [turn], open_answer=True) for turn in turns]
