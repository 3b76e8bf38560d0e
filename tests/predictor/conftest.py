"""What tests of the predictor share: a tiny random model that refuses nothing, and a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groma.model.groma import GromaForConditionalGeneration
from groma.predictor import Groma
from groma.processor import GromaProcessor
from groma.structures import View


@pytest.fixture(scope="module")
def build(make: Callable[..., GromaForConditionalGeneration], tiny_processor: GromaProcessor) -> Callable[..., Groma]:
    """build(seed, **configuration): a predictor that refuses nothing."""

    def of(seed: int = 0, **changes: Any) -> Groma:
        return Groma(make(seed, **{"nms_threshold": 0.1, "found_threshold": 0.0} | changes), tiny_processor, "tiny")

    return of


@pytest.fixture(scope="module")
def groma(build: Callable[..., Groma]) -> Groma:
    return build()


@pytest.fixture(scope="module")
def picture(pictures: Path) -> Path:
    return pictures / "images" / "1.png"


@pytest.fixture(scope="module")
def view(groma: Groma, picture: Path) -> View:
    return groma.look(picture)
