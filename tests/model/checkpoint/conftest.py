"""What tests of released checkpoints share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groma.model import checkpoint
from groma.model.groma import GromaForConditionalGeneration

Make = Callable[..., GromaForConditionalGeneration]
QUIRKS = {
    "words": 0,
    "region_width": None,
    "region_boxes": "centre",
    "region_stride_error": 2 * 448 / 64,
    "position_scale_offset": 0.1,
}


@pytest.fixture(scope="module")
def quirky(make: Make) -> Callable[..., GromaForConditionalGeneration]:
    """quirky(seed, **changes): a tiny random model that the original could be."""

    def build(seed: int = 0, **changes: Any) -> GromaForConditionalGeneration:
        return make(seed, **(QUIRKS | changes))

    return build


@pytest.fixture(scope="module")
def model(quirky: Make) -> GromaForConditionalGeneration:
    return quirky(3)


@pytest.fixture
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """write(model, pickled, shard): a new directory in the original layout."""

    def save(model: GromaForConditionalGeneration, pickled: bool = False, shard: str = "5GB") -> Path:
        folder = tmp_path_factory.mktemp("original")
        assert sum(checkpoint.save_original(model, folder, pickled, shard)) > 0
        return folder

    return save


@pytest.fixture
def same() -> Callable[[GromaForConditionalGeneration, GromaForConditionalGeneration], None]:
    """same(a, b): two models have the same tensors, bit by bit."""

    def compare(a: GromaForConditionalGeneration, b: GromaForConditionalGeneration) -> None:
        mine, theirs = a.state_dict(), b.state_dict()
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []

    return compare
