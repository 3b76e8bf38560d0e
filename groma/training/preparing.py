"""From a loaded model to one that a run can train, and back to one that can be saved: pre-trained parts, adapters,
frozen weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from groma.settings import RunConfig
from groma.training.adapters import add_adapters, finished
from groma.training.frozen import store_frozen
from groma.training.parts_loading import load_parts

if TYPE_CHECKING:
    from groma.model.groma import GromaForConditionalGeneration


def prepare(model: GromaForConditionalGeneration, run: RunConfig) -> None:
    """Make of the model a run starts from the one it trains, the same on every process and in a resumed run.

    Raises TrainingError, one line, for settings that do not go together and for parts that do not fit.
    """
    torch.manual_seed(run.seed)
    load_parts(model, run)
    add_adapters(model, run)
    store_frozen(model, run)


def finish(model: GromaForConditionalGeneration, run: RunConfig, folder: Path, state: dict[str, Tensor] | None = None
           ) -> dict[str, Tensor] | None:  # fmt: skip
    """The weights to give to ``save_pretrained(folder, state_dict=…)``; see groma.training.adapters.finished.

    state: the whole weights, where ``model`` holds a share of them only (ZeRO-3).
    """
    return finished(model, run, state, folder)
