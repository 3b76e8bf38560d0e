"""A small data set of every format on disk, and a processor trained on its texts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from groma.data.prompts import texts
from groma.processor import GromaProcessor, extend, image_processor

Write = Callable[[str, Any], Path]


@pytest.fixture(scope="session")
def processor() -> GromaProcessor:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*texts(), "the red cup a green bowl"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    extend(tokenizer)
    return GromaProcessor(image_processor(32), tokenizer)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return to


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "green"), ("c.png", "blue")):
        Image.new("RGB", (100, 50), colour).save(folder / name)
    return folder


def coco(images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: Any = ()) -> dict[str, Any]:
    """A COCO object in which every image is 100 x 50 pixels and ids are filled in."""
    return {
        "images": [{"id": i, "width": 100, "height": 50, **image} for i, image in enumerate(images)],
        "annotations": [{"id": i, "category_id": 1, **a} for i, a in enumerate(annotations)],
        "categories": list(categories),
    }


@pytest.fixture(name="coco")
def _coco() -> Callable[..., dict[str, Any]]:
    return coco
