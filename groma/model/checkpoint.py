"""Released (original) checkpoints, read as they are and written back.

Three kinds exist: the whole model after alignment or instruction training, which ``from_pretrained`` takes like one of
ours, and encoder and proposer alone after detection pre-training, which ``load_perceiver`` puts into a Groma::

    model = GromaForConditionalGeneration.from_pretrained("path/to/groma-7b")

    config = GromaConfig(**perceiver_settings(original), llm=AutoConfig.from_pretrained("path/to/vicuna-7b"))
    model = GromaForConditionalGeneration(config)
    model.llm = AutoModelForCausalLM.from_pretrained("path/to/vicuna-7b")
    load_perceiver(model, "path/to/detection-pretrain")  # now stage 2 can start
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from groma.model import checkpoint_config
from groma.model.checkpoint_config import ALONE, foreign_sizes, is_original, is_perceiver, perceiver_settings
from groma.model.checkpoint_files import OPTIONS, SHARD, Source, read, size, write
from groma.model.checkpoint_keys import is_derived, owner, to_original, to_ours
from groma.model.configuration import GromaConfig, ProposerConfig

if TYPE_CHECKING:
    from groma.model.groma import GromaForConditionalGeneration

_PERCEIVER, _OURS = "perceiver.", ("encoder.", "proposer.")
_SHOWN = 3  # names told of each kind of mistake
# Settings that no shape shows, but that change what weights mean.
_ENCODER_MEANING = ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "patch_size")
_PROPOSER_MEANING = ("encoder_heads", "decoder_heads", "encoder_points", "decoder_points", "activation", "heads")


def convert_config(original: dict[str, Any], image_size: int | None = None, keep_nms: bool = False) -> GromaConfig:
    """Our configuration of a model whose original config.json is ``original``, with the quirks of its weights on.

    image_size: pixels, default 448. keep_nms: take a stored NMS threshold of 0.0 as it is instead of as 0.6 (see
    checkpoint_config.NMS_THRESHOLD). Raises ValueError for a design our model does not have.
    """
    return GromaConfig.from_dict(checkpoint_config.settings(original, image_size, keep_nms))


@dataclass(frozen=True)
class Original:
    """An original checkpoint that was found."""

    source: Source

    def prepare(self, model_class: type[PreTrainedModel], config: Any, options: dict[str, Any]
                ) -> tuple[GromaConfig, dict[str, Tensor], dict[str, Any]]:  # fmt: skip
        """What from_pretrained was given → configuration, weights, and the options that are left for transformers.

        config: a configuration, the directory or id of one, or None for the checkpoint's own, which settings of
        GromaConfig among the options override. Weights: the tensors under the names our model stores them by, as
        views of the files. Those the original has no place for (a words head that an override asked for) are not
        among them. Raises ValueError, in one line, for tensors that are missing, unknown or of wrong shape.
        """
        rest = {k: v for k, v in options.items() if k not in OPTIONS}
        if not isinstance(config, PreTrainedConfig):
            overrides = {name: rest.pop(name) for name in list(rest) if name in GromaConfig.__annotations__}
            where = self.source if config is None else Source(str(config), _of_hub(options))
            config = GromaConfig.from_pretrained(where.name, **where.options, **overrides)
        names = _places(stored_shapes(model_class, config), config)
        found = _collect(self.source.weights(rest.pop("use_safetensors", None)))
        _check(self.source.name, found, {theirs: shape for theirs, (_, shape) in names.items()},
               any_shape=bool(rest.get("ignore_mismatched_sizes")))  # fmt: skip
        return config, {ours: found[theirs] for theirs, (ours, _) in names.items()}, rest


def find(name: Any, options: Mapping[str, Any]) -> Original | None:
    """The original checkpoint in directory or hub repository ``name``; None for anything else.

    options: those of OPTIONS that were given. Raises ValueError for a checkpoint of detection pre-training.
    """
    if name is None or Path(name).is_file():
        return None
    source = Source(str(name), _of_hub(options))
    config = source.config() or {}
    if is_perceiver(config):
        raise ValueError(f"{name} {ALONE}")
    return Original(source.pinned()) if is_original(config) else None


def _of_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in OPTIONS if name in options}


def load_perceiver(model: GromaForConditionalGeneration, name: str | Path, **options: Any) -> None:
    """Put the encoder and the proposer of a checkpoint into ``model``, in place; all else in it stays as it is.

    name: directory or hub id of an original checkpoint, of detection pre-training or whole, or of one of ours;
    options: those of OPTIONS. The weights take the model's dtype and device. This is where stage 2 starts from: a
    Groma with a language model of its own and a proposer that was trained before.
    Raises ValueError, in one line, when the model's encoder or proposer is another than the checkpoint's.
    """
    source = Source(str(name), options)
    stored = source.config()
    if stored is None:
        raise ValueError(f"{name}: no config.json to be read there")
    source = source.pinned()
    if is_original(stored) or is_perceiver(stored):
        given = checkpoint_config.perceiver_settings(stored.get("perceiver_cfg", stored))
        names = _places(stored_shapes(type(model), model.config), model.config)
        names = {theirs: place for theirs, place in names.items() if theirs.startswith(_PERCEIVER)}
        found = _collect(source.weights(), "" if is_original(stored) else _PERCEIVER)
    elif stored.get("model_type") == GromaConfig.model_type:
        given = stored
        names = {n: (n, shape) for n, shape in stored_shapes(type(model), model.config).items() if n.startswith(_OURS)}
        found = _collect(source.weights())
    else:
        raise ValueError(f"{name}: its config.json is of type {stored.get('model_type')!r}, expected a Groma or a part")
    _check_meaning(str(name), given, model.config)
    found = {n: t for n, t in found.items() if n.startswith((_PERCEIVER, *_OURS))}
    _check(str(name), found, {theirs: shape for theirs, (_, shape) in names.items()})
    _put(model, {ours: found[theirs] for theirs, (ours, _) in names.items()})


def save_original(model: GromaForConditionalGeneration, folder: Path, pickled: bool = False, shard: int | str = SHARD
                  ) -> Iterator[int]:  # fmt: skip
    """Write ``model`` as the original would: config.json, and weights under its names; yields the bytes of each file.

    It writes as it is iterated over. Both names of a tensor that has two are written, as the original did.
    ``pickled``: .bin instead of safetensors.
    Raises ValueError for a model the original has no form for.
    """
    config = checkpoint_config.original(model.config) | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    layers = model.config.proposer.decoder_layers
    stored = revert_weight_conversion(model, model.state_dict())
    tensors = {theirs: tensor for ours, tensor in stored.items() for theirs in to_original(ours, layers)}
    del stored
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    yield from write(tensors, folder, pickled, shard)


def stored_shapes(model_class: type[PreTrainedModel], config: GromaConfig) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of a model as save_pretrained writes them."""
    with torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    return {name: tensor.shape for name, tensor in revert_weight_conversion(model, model.state_dict()).items()}


def _places(stored: dict[str, torch.Size], config: GromaConfig) -> dict[str, tuple[str, torch.Size]]:
    """Original name → our stored name and shape, without the tensors the original has no place for."""
    places = {}
    for name, shape in stored.items():
        try:
            places[to_original(name, config.proposer.decoder_layers)[0]] = (name, shape)
        except ValueError:
            continue
    return places


def _collect(files: list[Path], prefix: str = "") -> dict[str, Tensor]:
    """All tensors of the files by the name of their owner; ValueError if a tensor differs from its alias."""
    found: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read(file).items():
            if is_derived(name):
                continue
            key = owner(prefix + name)
            if key in found and not torch.equal(found[key], tensor):
                raise ValueError(f"{file}: {name} differs from {key}, expected one tensor under two names")
            found[key] = tensor
    return found


def _check(source: str, found: Mapping[str, Tensor], expected: Mapping[str, torch.Size], any_shape: bool = False
           ) -> None:  # fmt: skip
    """ValueError, in one line, unless ``found`` has exactly the tensors expected."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name])}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name] and not any_shape
    ]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
    if told := "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names):
        raise ValueError(f"{source}: tensors do not fit the configuration: {told}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _check_meaning(source: str, given: dict[str, Any], config: GromaConfig) -> None:
    """ValueError, in one line, where settings that no shape shows differ."""
    encoder, proposer = AutoConfig.for_model(**given["encoder"]), ProposerConfig(**given["proposer"])
    for part, theirs, names in (("encoder", encoder, _ENCODER_MEANING), ("proposer", proposer, _PROPOSER_MEANING)):
        for name in names:
            had, has = (getattr(c, name, None) for c in (theirs, getattr(config, part)))
            if (list(had) if isinstance(had, tuple) else had) != (list(has) if isinstance(has, tuple) else has):
                raise ValueError(f"{source}: {part}.{name} is {had!r}, but the model's is {has!r}")


def _put(model: GromaForConditionalGeneration, tensors: dict[str, Tensor]) -> None:
    """Copy stored encoder and proposer tensors into ``model``; transformers knows how the encoder's are stored."""
    inside = "encoder.vit."
    vit = model.encoder.vit
    state = {name.removeprefix(inside): tensor for name, tensor in tensors.items() if name.startswith(inside)}
    loaded = type(vit).from_pretrained(None, config=vit.config, state_dict=state, dtype=model.dtype)
    vit.load_state_dict(loaded.state_dict())
    proposer = "proposer."
    state = {n.removeprefix(proposer): tensor for n, tensor in tensors.items() if n.startswith(proposer)}
    model.proposer.load_state_dict(state)


__all__ = [
    "Original",
    "convert_config",
    "find",
    "foreign_sizes",
    "is_original",
    "is_perceiver",
    "load_perceiver",
    "perceiver_settings",
    "save_original",
    "size",
    "stored_shapes",
    "to_original",
    "to_ours",
]
