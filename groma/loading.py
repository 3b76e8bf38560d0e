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
WIDE = 1024
"""Of a language model: from this hidden size on, bfloat16 is taken on a CPU that multiplies it."""


def load(model: str | Path, device: str = "auto", dtype: str = "auto"
         ) -> tuple[GromaForConditionalGeneration, GromaProcessor]:  # fmt: skip
    """A directory or a hub id → model and processor. Raises ValueError with one line for the user."""
    source, where = Path(model), pick_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected auto or one of {', '.join(DTYPES)}")
    if source.exists() and not (source / "config.json").is_file():
        raise ValueError(f"model: {source} holds no config.json, so it is not a model directory")
    name = str(source) if source.exists() else str(model)
    try:
        loaded, processor = _load(name, where, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        why = str(error).strip().splitlines()[0]
        what = "cannot be loaded" if source.exists() else "is neither a model directory nor a reachable hub id"
        raise ValueError(f"model: {name!r} {what} ({why})") from error
    return loaded.to(where), processor


def _load(name: str, device: torch.device, dtype: str) -> tuple[GromaForConditionalGeneration, GromaProcessor]:
    """Model and processor. Refuses another family's model, which would be taken for a Groma of the default sizes."""
    family = GromaConfig.get_config_dict(name)[0].get("model_type")
    if family != GromaConfig.model_type:
        raise ValueError(f"its config.json is of type {family!r}, expected {GromaConfig.model_type!r}")
    kind = pick_dtype(dtype, device, GromaConfig.from_pretrained(name).llm.hidden_size)
    model = GromaForConditionalGeneration.from_pretrained(name, dtype=kind)
    processor = GromaProcessor.from_pretrained(name)
    for word, token in (model.config.new_token_ids or {}).items():
        if processor.word_id(word) != token:
            raise ValueError(f"its tokenizer has {word} at {processor.word_id(word)}, its config.json at {token}")
    return model, processor


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


def pick_dtype(name: str, device: torch.device, llm_width: int) -> torch.dtype:
    """The number format of ``name``; "auto" is bfloat16 where that is faster, and float32 elsewhere.

    It is faster on a CUDA GPU, and for a language model at least WIDE on a CPU that multiplies it in hardware
    (AVX512-BF16, AMX). Other CPUs convert every number, and a narrow model waits for other things than products.
    Raises ValueError, with the names there are, for another.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ValueError(f"dtype: got {name!r}, expected auto or one of {', '.join(DTYPES)}")
    # Not in every torch this runs on; without it nothing is known of the CPU.
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    multiplies = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    fast = device.type == "cuda" or (device.type == "cpu" and multiplies and llm_width >= WIDE)
    return torch.bfloat16 if fast else torch.float32
