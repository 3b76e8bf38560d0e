"""Low-rank adapters on the language model (LoRA, arXiv 2106.09685), also over 8- or 4-bit weights (QLoRA, 2305.14314).

peft puts a pair of small matrices beside every linear layer of ``model.llm``; the model keeps its class and its parts.
A run's part "llm" then means these matrices. ``finished`` says what the final model is: the adapters folded in, a
Groma like any other, or left beside it::

    model = GromaForConditionalGeneration.from_pretrained("out/final")
    model.llm.load_adapter("out/final/adapter")
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from groma.settings import LoraConfig, RunConfig
from groma.training.parts import TrainingError

if TYPE_CHECKING:
    from groma.model.groma import GromaForConditionalGeneration

NAME = "default"
"""peft's name of the one adapter."""
FOLDER = "adapter"
"""Where, in the folder of the final model, adapters that are not folded in lie."""


def check(run: RunConfig) -> None:
    """Raises TrainingError where a run's adapters, quantised weights and parts do not go together."""
    lora, quantise = run.model.lora, run.model.quantise
    if quantise and not lora.rank:
        raise TrainingError(
            f"model.quantise: {quantise} weights cannot learn, so they need adapters: set model.lora.rank"
        )
    if not lora.rank:
        return
    if "llm" not in run.model.train:
        raise TrainingError(f"model.lora.rank is {lora.rank}, but model.train does not name the part llm")
    if find_spec("peft") is None:
        raise TrainingError("model.lora needs peft: pip install 'groma[train]'")
    if quantise and lora.merge:
        raise TrainingError(f"model.lora.merge: {quantise} weights would round the adapters away: set it to false")
    if quantise and not run.model.init:
        raise TrainingError("model.quantise reads the weights of a saved model: give model.init")
    if quantise and find_spec("bitsandbytes") is None:
        raise TrainingError(f"model.quantise: {quantise} needs bitsandbytes: pip install 'groma[quantise]'")


def load_options(run: RunConfig, device: torch.device | str) -> dict[str, Any]:
    """What ``from_pretrained`` is told so that the language model's matrices are quantised while they load: nothing
    but for model.quantise. Products are computed in optim.dtype. Raises TrainingError as ``check``."""
    check(run)
    if not run.model.quantise:
        return {}
    from groma.evaluation.quantise import BITS, quantisation

    config = quantisation(BITS[run.model.quantise], getattr(torch, run.optim.dtype))
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}


def add_adapters(model: GromaForConditionalGeneration, run: RunConfig) -> None:
    """Put adapters on ``model.llm`` and freeze its own weights; nothing where model.lora.rank is 0.

    Adapters learn in float32 whatever the format of the weights. Raises TrainingError as ``check``, and for targets
    that no linear layer is named.
    """
    check(run)
    lora = run.model.lora
    if not lora.rank:
        return
    from peft import inject_adapter_in_model

    inject_adapter_in_model(peft_config(lora, model.llm), model.llm, NAME)
    for parameter in model.llm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if run.model.quantise:  # the Trainer takes quantised weights only beneath adapters, which it looks for here
        model._hf_peft_config_loaded = True


def peft_config(lora: LoraConfig, llm: nn.Module) -> Any:
    """peft's own settings: every linear layer of ``llm`` but its head, or those named in ``targets``."""
    from peft import LoraConfig as PeftConfig

    linear = {name.rpartition(".")[2] for name, m in llm.named_modules() if isinstance(m, nn.Linear)}
    unknown = sorted(set(lora.targets) - linear)
    if unknown:
        raise TrainingError(
            f"model.lora.targets names {', '.join(unknown)}; linear layers are {', '.join(sorted(linear))}"
        )
    return PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, task_type="CAUSAL_LM",  # type: ignore[arg-type]
        target_modules=list(lora.targets) or "all-linear",
    )  # fmt: skip


def finished(model: GromaForConditionalGeneration, run: RunConfig, state: dict[str, Tensor] | None, folder: Path
             ) -> dict[str, Tensor] | None:  # fmt: skip
    """The weights to save as the final model: those of a Groma without adapters, all in one number format.

    state: the whole weights of ``model``, where it holds a share of them only. Adapters are folded in, or written to
    ``folder``/adapter as peft does. None where the model's weights are to be saved as they are; quantised ones come out
    of their adapters for that, so that the model has none afterwards.
    """
    weights = model.state_dict() if state is None else state
    if not run.model.lora.rank:
        return _one_format(weights) if run.model.frozen_dtype != "float32" else state
    from peft.tuners.lora import LoraLayer

    if run.model.quantise:  # such weights the library writes from the modules alone: the adapters must be out of them
        _write(model.llm, weights, folder / FOLDER)
        for name, layer in list(model.llm.named_modules()):
            if isinstance(layer, LoraLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.llm.get_submodule(parent), child, layer.base_layer)
        model._hf_peft_config_loaded = False
        return None
    plain = {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}
    plain = _one_format(plain)
    if not run.model.lora.merge:
        _write(model.llm, weights, folder / FOLDER)
        return plain
    for name, layer in model.llm.named_modules():
        if isinstance(layer, LoraLayer):
            down, up = (weights[f"llm.{name}.lora_{side}.{NAME}.weight"].float() for side in "AB")
            base = plain[f"llm.{name}.weight"]
            plain[f"llm.{name}.weight"] = (base.float() + layer.scaling[NAME] * (up @ down).to(base.device)).to(
                base.dtype
            )
    return plain


def _one_format(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """float32, where formats mix: a saved model is loaded in one."""
    formats = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(formats) < 2:
        return state
    return {name: value.cpu().float() if value.is_floating_point() else value for name, value in state.items()}


def _write(llm: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """The adapters as peft keeps them: adapter_config.json and adapter_model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    replace(llm.peft_config[NAME], inference_mode=True).save_pretrained(str(folder))
    adapters = {
        f"base_model.model.{name.removeprefix('llm.').replace(f'.{NAME}.', '.')}": value.detach().cpu().contiguous()
        for name, value in weights.items()
        if ".lora_" in name
    }
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
