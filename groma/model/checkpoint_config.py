"""Configurations of the released checkpoints against ours.

An original ``config.json`` holds ``llm_cfg``, ``perceiver_cfg`` (with ``vis_encoder_cfg`` and ``ddetr_cfg``) and the
numbers that select regions. It names only what differs from its libraries' defaults of the time, and what its region
encoder and its image size are stands in its code; all that is written out here.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from transformers import PreTrainedConfig

from groma import markup
from groma.model.checkpoint_keys import HEADS

NMS_THRESHOLD = 0.6
"""What a stored ``nms_thres`` of 0.0 is read as.

At 0 every proposal that touches a better one is lost. The released configuration says 0.0, but 0.6 is what its authors
train and evaluate with. To keep a stored 0.0, say so: ``convert_config(original, keep_nms=True)``, or
``from_pretrained(directory, nms_threshold=0.0)``.
"""
IMAGE_SIZE = 448
"""Pixels of the square input; it is in the original's code, not in its configuration."""
STRIDE_ERROR, POSITION_SCALE_OFFSET = 2.0, 0.1
"""Quirks of the released weights, see GromaConfig; the first at IMAGE_SIZE."""
FUSION = (0.4, 0.6)
"""Exponents of HEADS in the fused score (Groma, section 3.2)."""

ALONE = "holds an encoder and a proposer alone: put them into a Groma with groma.model.checkpoint.load_perceiver"
"""Told of a checkpoint of detection pre-training where a whole one is expected."""
_KNOWN = {markup.UNK: 0, markup.BOS: 1, markup.EOS: 2}
"""The words a Llama vocabulary has already."""

# What an original configuration leaves out: the defaults of Dinov2Config, LlamaConfig and DeformableDetrConfig then.
_ENCODER: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02, "layer_norm_eps": 1e-6,
    "image_size": 224, "patch_size": 16, "num_channels": 3, "qkv_bias": True, "layerscale_value": 1.0,
    "drop_path_rate": 0.0, "use_swiglu_ffn": False,
}  # fmt: skip
_LLM: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
    "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
# ours, the original's, its default
_PROPOSER: tuple[tuple[str, str, Any], ...] = (
    ("width", "d_model", 256),
    ("encoder_layers", "encoder_layers", 6),
    ("decoder_layers", "decoder_layers", 6),
    ("encoder_heads", "encoder_attention_heads", 8),
    ("decoder_heads", "decoder_attention_heads", 8),
    ("encoder_points", "encoder_n_points", 4),
    ("decoder_points", "decoder_n_points", 4),
    ("encoder_ffn", "encoder_ffn_dim", 1024),
    ("decoder_ffn", "decoder_ffn_dim", 1024),
    ("activation", "activation_function", "relu"),
    ("dropout", "dropout", 0.1),
    ("levels", "num_feature_levels", 4),
    ("queries", "num_queries", 300),
    ("focal_alpha", "focal_alpha", 0.25),
)
_COSTS = (("class_cost", 1.0), ("bbox_cost", 5.0), ("giou_cost", 2.0))
_WEIGHTS = (("cls_loss_coefficient", 2.0), ("bbox_loss_coefficient", 5.0), ("giou_loss_coefficient", 2.0))
# What the original has no place for: written beside its own entries, under our names, where not as published.
_SIZES: dict[str, Any] = {
    "region_width": None, "region_scales": [4, 2, 1], "region_rounds": 5, "region_groups": 64, "region_size": 14,
    "region_hidden": 1024, "region_box_hidden": 256,
}  # fmt: skip
_CARRIED: dict[str, Any] = _SIZES | {
    "image_size": IMAGE_SIZE, "new_token_ids": None, "found_threshold": 0.5, "score_temperature": 1.0,
    "presence_temperature": None,
}  # fmt: skip


def is_original(config: dict[str, Any]) -> bool:
    """Is this the config.json of a whole original checkpoint?"""
    return isinstance(config.get("llm_cfg"), dict) and isinstance(config.get("perceiver_cfg"), dict)


def is_perceiver(config: dict[str, Any]) -> bool:
    """Is this the config.json of the original's detection pre-training, which has encoder and proposer alone?"""
    return isinstance(config.get("vis_encoder_cfg"), dict) and isinstance(config.get("ddetr_cfg"), dict)


def settings(original: dict[str, Any], image_size: int | None = None, keep_nms: bool = False) -> dict[str, Any]:
    """What GromaConfig takes to mean what ``original``, the config.json of a whole checkpoint, means.

    The quirks of the released weights are on. ``image_size`` (default IMAGE_SIZE): the original multiplies boxes by
    448 whatever the size of its input, so that the error of its strides grows as the input shrinks.
    ``keep_nms``: see NMS_THRESHOLD. Raises ValueError for what neither the released models nor ours can be.
    """
    if is_perceiver(original):
        raise ValueError(f"the configuration {ALONE}")
    if not is_original(original):
        raise ValueError("not an original configuration, expected one with llm_cfg and perceiver_cfg")
    llm = _LLM | {"model_type": "llama"} | _without_version(original["llm_cfg"])
    carried = {name: original[name] for name in _CARRIED if name in original}
    size = image_size or carried.get("image_size", IMAGE_SIZE)
    rows = original.get("num_new_token", _rows(markup.MAX_PROXIES))
    ids = carried.get("new_token_ids")
    proxies = len(ids) - len(markup.SPECIAL_WORDS) if ids else rows - _rows(0)
    most = original.get("max_region_num", markup.MAX_PROXIES)
    if proxies < most:
        raise ValueError(f"num_new_token {rows} leaves {proxies} proxy words for max_region_num {most}")
    nms = original.get("nms_thres", 0.0)
    dtype = original.get("torch_dtype") or original.get("dtype")
    converted = perceiver_settings(original["perceiver_cfg"]) | {
        "llm": llm,
        "base_vocab": llm["vocab_size"],
        "proxies": proxies,
        "max_regions": most,
        "score_threshold": original.get("box_score_thres", 0.0),
        "nms_threshold": nms if nms > 0 or keep_nms else NMS_THRESHOLD,
        "region_boxes": "centre",
        "region_stride_error": _stride_error(size),
    }
    return converted | carried | {"image_size": size} | ({"dtype": dtype} if dtype else {})


def perceiver_settings(perceiver: dict[str, Any]) -> dict[str, Any]:
    """``encoder``, ``proposer`` and their quirk as GromaConfig takes them, from an original perceiver's config.

    Raises ValueError for another design than the published one.
    """
    if not is_perceiver(perceiver):
        raise ValueError("not an original perceiver, expected one with vis_encoder_cfg and ddetr_cfg")
    detr = perceiver["ddetr_cfg"]
    for name in ("two_stage", "with_box_refine"):
        if not detr.get(name):
            raise ValueError(f"ddetr_cfg.{name}: got {detr.get(name)}, expected true")
    if (first := detr.get("two_stage_num_proposals", 300)) != (queries := detr.get("num_queries", 300)):
        raise ValueError(f"ddetr_cfg: two_stage_num_proposals {first} and num_queries {queries} must be one number")
    if (layer := perceiver.get("vis_output_layer", -1)) != -1:
        raise ValueError(f"vis_output_layer: got {layer}, expected -1")
    proposer = {ours: detr.get(theirs, default) for ours, theirs, default in _PROPOSER}
    proposer["costs"] = [float(detr.get(name, default)) for name, default in _COSTS]
    proposer["loss_weights"] = [float(detr.get(name, default)) for name, default in _WEIGHTS]
    proposer |= {"heads": list(HEADS), "fusion": list(FUSION)}
    return {
        "encoder": _ENCODER | {"model_type": "dinov2"} | _without_version(perceiver["vis_encoder_cfg"]),
        "proposer": proposer,
        "position_scale_offset": POSITION_SCALE_OFFSET,
    }


def original(config: PreTrainedConfig) -> dict[str, Any]:
    """The config.json the original has for a model of ours; ``settings`` reads the same model back from it.

    Sizes that the original keeps in its code are added under our names where they differ (see ``foreign_sizes``).
    Raises ValueError, naming the settings, for a model that would mean something else there.
    """
    _check(config)
    detr: dict[str, Any] = {"model_type": "deformable_detr", "two_stage": True, "with_box_refine": True}
    detr |= {"auxiliary_loss": True, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # one class: object
    detr |= {theirs: getattr(config.proposer, ours) for ours, theirs, _ in _PROPOSER}
    detr |= {name: value for (name, _), value in zip(_COSTS, config.proposer.costs, strict=True)}
    detr |= {name: value for (name, _), value in zip(_WEIGHTS, config.proposer.loss_weights, strict=True)}
    detr["two_stage_num_proposals"] = config.proposer.queries
    encoder = {name: getattr(config.encoder, name) for name in _ENCODER}
    llm = {name: getattr(config.llm, name) for name in _LLM} | _rope(config.llm)
    perceiver = {
        "model_type": "ddetr",
        "vis_encoder_cfg": {"model_type": "dinov2"} | encoder,
        "ddetr_cfg": detr,
        "vis_output_layer": -1,
        "zs_weight_path": None,
    }
    return {
        "model_type": "groma",
        "architectures": ["GromaModel"],
        "llm_cfg": {"model_type": "llama"} | llm,
        "perceiver_cfg": perceiver,
        "num_new_token": config.new_words,
        "vocab_size": config.vocab_size,
        "max_region_num": config.max_regions,
        "box_score_thres": config.score_threshold,
        "nms_thres": config.nms_threshold,
        **{name: value for name in _CARRIED if (value := _differs(config, name)) is not None},
    }


def foreign_sizes(config: PreTrainedConfig) -> list[str]:
    """Settings with sizes that the original's code does not have: it cannot run a model with any of them."""
    return [name for name in (*_SIZES, "image_size") if _differs(config, name) is not None]


def _check(config: PreTrainedConfig) -> None:
    """ValueError naming all that the original cannot mean."""
    proposer, stride = config.proposer, _stride_error(config.image_size)
    wanted: list[tuple[str, Any, Any]] = [
        ("region_boxes", config.region_boxes, "centre"),
        ("region_stride_error", round(config.region_stride_error, 6), round(stride, 6)),
        ("position_scale_offset", config.position_scale_offset, POSITION_SCALE_OFFSET),
        *((name, getattr(config, name), False) for name in ("token_norm", "named_slots", "pointer_head")),
        ("words", config.words, 0),
        ("encoder.model_type", config.encoder.model_type, "dinov2"),
        ("llm.model_type", config.llm.model_type, "llama"),
        ("llm.vocab_size", config.llm.vocab_size, config.base_vocab),
        ("proposer.heads", list(proposer.heads), list(HEADS)),
        ("proposer.fusion", list(proposer.fusion), list(FUSION)),
    ]
    wrong = [f"{name} {got!r}" for name, got, expected in wanted if got != expected]
    if wrong:
        raise ValueError(f"the original has no model with {', '.join(wrong)}")


def _differs(config: PreTrainedConfig, name: str) -> Any:
    """The value of a carried setting, None where it is as published."""
    value, published = getattr(config, name), _CARRIED[name]
    if name == "new_token_ids":
        following = count(config.base_vocab)
        published = {w: _KNOWN[w] if w in _KNOWN else next(following) for w in markup.words(config.proxies)}
    elif name == "region_width":
        published = config.encoder.hidden_size if value is not None else None
    elif name == "region_scales":
        value = list(value)
    return None if value == published else value


def _rope(llm: PreTrainedConfig) -> dict[str, Any]:
    """Rotary settings as they were written then. ValueError for a scaling that was not known."""
    rope = dict(llm.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "dynamic"):
        raise ValueError(f"llm.rope_parameters: the original has no rotary scaling {kind!r}")
    scaling = {"type": kind, "factor": rope["factor"]} if kind != "default" else None
    return {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": scaling}


def _without_version(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "transformers_version"}


def _stride_error(image_size: int) -> float:
    return STRIDE_ERROR * IMAGE_SIZE / image_size


def _rows(proxies: int) -> int:
    """New words of a Llama vocabulary with so many proxies."""
    return len(markup.words(proxies)) - len(_KNOWN)
