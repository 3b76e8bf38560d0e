"""One scene from its number to its picture and its record: all that the annotation files say of it."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from projects.tabletop.captions import conversation, grounded_caption, region_caption
from projects.tabletop.expressions import sample_expressions
from projects.tabletop.observed import observe
from projects.tabletop.render import Renderer
from projects.tabletop.vocabulary import pairs
from projects.tabletop.world import generator, sample_scene


@dataclass(frozen=True)
class Settings:
    """What decides every byte of a data set: scenes per split, seed, picture size, JPEG quality."""

    train: int
    val: int
    test: int
    seed: int
    width: int = 640
    height: int = 480
    quality: int = 90


def file_name(split: str, index: int) -> str:
    """A scene's picture, in the split's ``images`` folder."""
    return f"{split}_{index:06d}.jpg"


def make_scene(renderer: Renderer, settings: Settings, split: str, index: int) -> tuple[bytes, dict]:
    """Draw and describe scene ``index`` of a split; returns the JPEG's bytes and the record.

    The record is JSON: index, file_name, width, height, scene (camera, light, surfaces, placed
    objects), things (what is seen, see ``observed.Thing``, plus visibility and caption),
    expressions, caption (text and mentions) and conversation (questions and answers).
    """
    scene = sample_scene(settings.seed, split, index, settings.width, settings.height)
    rendered = renderer.render(scene)
    things = observe(scene, rendered)
    allowed = pairs(split)
    rng = generator(settings.seed, split, index, 1)
    seen = [
        plain(thing) | {"visibility": round(thing.visibility, 4), "caption": region_caption(things, i)}
        for i, thing in enumerate(things)
    ]
    record = {
        "index": index,
        "file_name": file_name(split, index),
        "width": settings.width,
        "height": settings.height,
        "scene": plain(scene),
        "things": seen,
        "expressions": [plain(e) for e in sample_expressions(things, settings.width, rng, allowed)],
        "caption": plain(grounded_caption(things, settings.width, rng)),
        "conversation": conversation(things, rng, allowed),
    }
    return _jpeg(rendered.image, settings.quality), record


def plain(value: Any) -> Any:
    """What dataclasses.asdict makes of a value of numbers, texts and tuples, without its deep copies."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return type(value)(plain(one) for one in value)
    return value


def _jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
