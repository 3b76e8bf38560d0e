"""8-bit and 4-bit weights by the ecosystem's quantiser, for the language model's matrices and nothing else.

The encoder, the proposer, the region encoder, the token MLP and the vocabulary keep their number format: together they
are a tenth of the released model, and boxes and proxies depend on them directly.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from groma.loading import pick_dtype
from groma.model.configuration import GromaConfig
from groma.model.groma import GromaForConditionalGeneration
from groma.predictor import Groma
from groma.processor import GromaProcessor

KEPT = ("encoder", "proposer", "regions", "bridge", "vocabulary", "words_head", "llm.lm_head")
"""Modules that are never quantised, by their names in GromaForConditionalGeneration."""
QUANTISER = "bitsandbytes"
"""LLM.int8 (arXiv 2208.07339) and NF4 (arXiv 2305.14314), on GPUs and CPUs. torchao has no 4-bit products for CPUs."""
BITS = {"8bit": 8, "4bit": 4}


def quantisation(bits: int, dtype: torch.dtype) -> Any:
    """A ``quantization_config`` of transformers for 8 or 4 bits; products are computed in ``dtype``.

    Raises ValueError, with what to install, where the quantiser is missing.
    """
    if find_spec(QUANTISER) is None:
        raise ValueError(f"quantise: {bits}-bit weights need {QUANTISER}: pip install 'groma[quantise]'")
    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT))
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(KEPT),
    )  # fmt: skip


def load_quantised(name: str | Path, bits: int, device: torch.device, dtype: str = "auto") -> Groma:
    """A directory or a hub id → predictor whose language model has weights of ``bits`` bits, the rest in ``dtype``.

    Raises ValueError in one line where the quantiser is missing or ``name`` is no Groma.
    """
    family = GromaConfig.get_config_dict(str(name))[0].get("model_type")
    if family != GromaConfig.model_type:
        raise ValueError(f"quantise: {name} is of type {family!r}, expected {GromaConfig.model_type!r}")
    kind = pick_dtype(dtype, device, GromaConfig.from_pretrained(str(name)).llm.hidden_size)
    model = GromaForConditionalGeneration.from_pretrained(
        str(name), dtype=kind, quantization_config=quantisation(bits, kind), device_map={"": device}
    )
    return Groma(model, GromaProcessor.from_pretrained(str(name)), Path(name).name)
