"""Which parts of the model learn, and how fast: freezing, and parameter groups of the optimiser.

A part is a direct submodule of the model: encoder, proposer, regions, bridge, vocabulary, llm, words_head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

SLOW = ("reference_points", "sampling_offsets")
"""The proposer's weights that learn at a tenth of its rate (Deformable DETR, section 5; kept by the paper)."""
SLOW_FACTOR = 0.1


class TrainingError(ValueError):
    """A run that cannot start or go on; the message is one line."""


class Interrupted(Exception):
    """A run that was asked to end (SIGTERM) and has saved itself; the message, one line, tells how to go on."""


def freeze_all_but(model: nn.Module, parts: Collection[str]) -> list[nn.Module]:
    """Let only the named parts learn; returns the frozen parts, to be kept in eval mode.

    Raises TrainingError for a part the model does not have.
    """
    children = dict(model.named_children())
    for part in parts:
        if part not in children:
            raise TrainingError(f"model.train names the part {part!r}; this model has {', '.join(children)}")
    for name, child in children.items():
        if name not in parts:  # and in the others, what the model froze itself stays frozen
            child.requires_grad_(False)
    for parameter in model.parameters(recurse=False):
        parameter.requires_grad_(False)
    return [child for name, child in children.items() if name not in parts]


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, lr_scale: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Optimiser groups of the parameters that learn, in the order of the model; one group per (rate, decay).

    The rate is ``lr`` times the part's ``lr_scale``, times 0.1 for the proposer's reference points and sampling
    offsets. Biases, norms and other vectors take no weight decay.
    """
    scales = lr_scale or {}
    for part in scales:
        if part not in dict(model.named_children()):
            raise TrainingError(f"model.lr_scale names the part {part!r}, which this model does not have")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.partition(".")[0]
        slow = part == "proposer" and any(word in name for word in SLOW)
        rate = lr * scales.get(part, 1.0) * (SLOW_FACTOR if slow else 1.0)
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty vector where a weight was
        decay = 0.0 if len(shape) <= 1 else weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise TrainingError("no parameter learns: every named part is empty")
    return list(groups.values())
