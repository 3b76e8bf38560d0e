"""From a name to a model with its processor, on a device: the embedded default, a directory, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError

from groma.model.configuration import GromaConfig
from groma.model.groma import GromaForConditionalGeneration
from groma.processor import GromaProcessor

EMBEDDED = Path(__file__).parent / "assets" / "tabletop"
EMBEDDED_NAME = "groma-tabletop"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(model: str | Path, device: str = "auto", dtype: str = "auto"
         ) -> tuple[GromaForConditionalGeneration, GromaProcessor]:  # fmt: skip
    """A directory or a hub id → model and processor. Raises ValueError with one line for the user."""
    source, where = Path(model), pick_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected auto or one of {', '.join(DTYPES)}")
    kind = DTYPES[dtype] if dtype != "auto" else torch.bfloat16 if where.type == "cuda" else torch.float32
    if source.exists() and not (source / "config.json").is_file():
        raise ValueError(f"model: {source} holds no config.json, so it is not a model directory")
    name = str(source) if source.exists() else str(model)
    try:
        loaded, processor = _load(name, kind)
    except (OSError, ValueError, SafetensorError) as error:
        why = str(error).strip().splitlines()[0]
        what = "cannot be loaded" if source.exists() else "is neither a model directory nor a reachable hub id"
        raise ValueError(f"model: {name!r} {what} ({why})") from error
    return loaded.to(where), processor


def _load(name: str, dtype: torch.dtype) -> tuple[GromaForConditionalGeneration, GromaProcessor]:
    """Model and processor. Refuses another family's model, which would be taken for a Groma of the default sizes."""
    family = GromaConfig.get_config_dict(name)[0].get("model_type")
    if family != GromaConfig.model_type:
        raise ValueError(f"its config.json is of type {family!r}, expected {GromaConfig.model_type!r}")
    return GromaForConditionalGeneration.from_pretrained(name, dtype=dtype), GromaProcessor.from_pretrained(name)


def pick_device(name: str) -> torch.device:
    """ "auto" → CUDA, then MPS, then CPU. Raises ValueError for a device this machine or torch does not have."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(k for k in ("cuda", "mps", "cpu") if available[k]))
    if not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", name):
        raise ValueError(f"device: got {name!r}, expected auto, cpu, cuda or mps")
    if not available[name.split(":")[0]]:
        raise ValueError(f"device: {name!r} is not available here; available: {[k for k, v in available.items() if v]}")
    return torch.device(name)
