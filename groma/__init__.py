"""Groma: a grounded multimodal language model. It answers in text and points at regions of the image.

    from groma import Groma
    groma = Groma.from_pretrained()            # the embedded default; or a directory, or a hub id
    view = groma.look("table.jpg")             # encoder → proposer → regions, once
    answer = groma.refer(view, "the red cup")  # as many questions as you like on one view

The names below load when first touched, so ``import groma`` itself imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groma.config import load_config
    from groma.model.configuration import GromaConfig
    from groma.model.groma import GromaForConditionalGeneration
    from groma.predictor import Groma
    from groma.processor import GromaProcessor
    from groma.structures import Answer, Conversation

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Conversation",
    "Groma",
    "GromaConfig",
    "GromaForConditionalGeneration",
    "GromaProcessor",
    "__version__",
    "load_config",
]

_HOMES = {
    "Answer": "groma.structures",
    "Conversation": "groma.structures",
    "Groma": "groma.predictor",
    "GromaConfig": "groma.model.configuration",
    "GromaForConditionalGeneration": "groma.model.groma",
    "GromaProcessor": "groma.processor",
    "load_config": "groma.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'groma' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access is a plain lookup
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
