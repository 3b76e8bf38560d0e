"""What does not learn: kept in a smaller number format, and, beneath adapters, left out of checkpoints.

Frozen weights take 2 bytes each instead of 4 in bfloat16, and compute in it. Nothing flows back through the encoder and
the proposer, so that nothing of them is kept for a backward pass; through a frozen language model it does, to the
tokens put into it. Places read by deformable attention and ROIAlign stay in float32, and so do buffers, such as rotary
angles. The parts that learn stay in float32: the model converts what passes between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from groma.settings import RunConfig
from groma.training.parts import TrainingError

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def store_frozen(model: nn.Module, run: RunConfig) -> None:
    """Convert the weights of the parts that are not in model.train, and those beneath adapters, to model.frozen_dtype.

    Quantised weights stay as they are. Raises TrainingError where DeepSpeed, which keeps one format, asks for another.
    """
    dtype = FORMATS[run.model.frozen_dtype]
    if dtype == torch.float32:
        return
    if run.optim.deepspeed:
        if run.optim.dtype != run.model.frozen_dtype:
            wanted = run.model.frozen_dtype
            raise TrainingError(f"model.frozen_dtype: {wanted} under DeepSpeed needs optim.dtype={wanted}")
        return  # it converts all weights itself
    for name, part in model.named_children():
        adapted = name == "llm" and run.model.lora.rank > 0
        if name in run.model.train and not adapted:
            continue
        for parameter in part.parameters():
            if parameter.is_floating_point() and not (adapted and parameter.requires_grad):
                parameter.data = parameter.data.to(dtype)


def learnt(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn, by name: all that a checkpoint of a run with a frozen base must hold."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def restore_learnt(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Put ``learnt`` weights back; raises TrainingError, naming ``source``, where names or shapes differ."""
    here = learnt(model)
    odd = sorted(here.keys() ^ state.keys()) or [n for n in here if here[n].shape != state[n].shape]
    if odd:
        raise TrainingError(f"{source} is of another model: it differs in {', '.join(odd[:3])}")
    with torch.no_grad():
        for name, value in here.items():
            value.copy_(state[name])


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """32 hex digits that name, format, shape and every byte of the weights decide (BLAKE2b)."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in weights:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
