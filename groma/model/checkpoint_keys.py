"""Names of the released checkpoints' tensors against ours: one table, read in both directions.

A rule pairs two prefixes that end on a whole part of a name; ``{}`` stands for a number both share; what follows the
prefix is the same on both sides. The first rule that fits decides, so special cases stand before general ones::

    perceiver.ddetr_transformer.decoder.layers.3.encoder_attn.value_proj.weight
    proposer.decoder.3.cross.value_proj.weight
"""

from __future__ import annotations

import re
from functools import cache

DETR = "perceiver.ddetr_transformer"
HEADS = ("coco", "sa1b")
"""The two objectness heads of the released proposer (Groma, section 3.2)."""

Rule = tuple[str, str]

# The decoder holds its heads a second time under its own name. Checkpoints carry either name, or both.
_ALIAS = re.compile(rf"^{re.escape(DETR)}\.decoder\.(?=(?:bbox_embed|class_embed_(?:enc|coco|sa1b))\.)")
# Tables that are computed, never learned; some library versions stored them.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")


def to_ours(name: str, decoder_layers: int = 6) -> str | None:
    """Our name of the tensor the original calls ``name``; None for an alias and for a table that is computed.

    decoder_layers: of the proposer. The box head after the last layer's is that of the first stage.
    Raises ValueError for a name that is in no part of the original.

    >>> to_ours("perceiver.ddetr_transformer.bbox_embed.5.layers.2.bias")
    'proposer.box_heads.5.4.bias'
    >>> to_ours("perceiver.ddetr_transformer.decoder.bbox_embed.5.layers.2.bias") is None
    True
    """
    if _ALIAS.match(name) or is_derived(name):
        return None
    ours = _rename(name, _compiled(decoder_layers)[0])
    if ours is None:
        raise ValueError(f"{name} is not the name of a tensor of the original")
    return ours


def to_original(name: str, decoder_layers: int = 6) -> list[str]:
    """All names the original has for our tensor ``name``: the owner's first, then the decoder's alias if it has one.

    Raises ValueError for a tensor the original has no place for.

    >>> to_original("proposer.enc_class.bias")
    ['perceiver.ddetr_transformer.class_embed_enc.bias', 'perceiver.ddetr_transformer.decoder.class_embed_enc.bias']
    """
    original = _rename(name, _compiled(decoder_layers)[1])
    if original is None:
        raise ValueError(f"{name}: the original has no such tensor")
    alias = original.replace(f"{DETR}.", f"{DETR}.decoder.", 1)
    return [original, alias] if _ALIAS.match(alias) else [original]


def owner(name: str) -> str:
    """The name an alias stands for; any other name as it is.

    >>> owner("perceiver.ddetr_transformer.decoder.class_embed_enc.bias")
    'perceiver.ddetr_transformer.class_embed_enc.bias'
    """
    return _ALIAS.sub(f"{DETR}.", name)


def is_derived(name: str) -> bool:
    """Is this a table that is computed, which a checkpoint may hold and a model does not?"""
    return _DERIVED.search(name) is not None


def rules(decoder_layers: int) -> list[Rule]:
    """(original, ours) for a proposer of so many decoder layers."""
    proposer: list[Rule] = [("perceiver.input_proj", "proposer.input_proj")]
    for side, kind in (("encoder", "attention"), ("decoder", "self")):
        layer, ours = f"{DETR}.{side}.layers.{{}}", f"proposer.{side}.{{}}"
        proposer += [(f"{layer}.self_attn_layer_norm", f"{ours}.{kind}_norm")]
        proposer += [(f"{layer}.{fc}", f"{ours}.ffn.{fc}") for fc in ("fc1", "fc2")]
        proposer += [(f"{layer}.final_layer_norm", f"{ours}.ffn.norm")]
    proposer += [(f"{DETR}.encoder.layers.{{}}.self_attn", "proposer.encoder.{}.attention")]
    layer = f"{DETR}.decoder.layers.{{}}"
    proposer += [(f"{layer}.self_attn.{p}_proj", f"proposer.decoder.{{}}.{p}_proj") for p in ("q", "k", "v", "out")]
    proposer += [(f"{layer}.encoder_attn_layer_norm", "proposer.decoder.{}.cross_norm")]
    proposer += [(f"{layer}.encoder_attn", "proposer.decoder.{}.cross")]
    for linear in range(3):  # ours counts the activations in between
        last = f"{DETR}.bbox_embed.{decoder_layers}.layers.{linear}"
        proposer += [(last, f"proposer.enc_box.{2 * linear}")]
        proposer += [(f"{DETR}.bbox_embed.{{}}.layers.{linear}", f"proposer.box_heads.{{}}.{2 * linear}")]
    proposer += [(f"{DETR}.class_embed_{head}.{{}}", f"proposer.class_heads.{head}.{{}}") for head in HEADS]
    proposer += [(f"{DETR}.class_embed_enc", "proposer.enc_class")]
    proposer += [(f"{DETR}.query_position_embeddings", "proposer.content")]
    same = ("level_embed", "enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")
    proposer += [(f"{DETR}.{name}", f"proposer.{name}") for name in same]
    regions = [
        ("region_encoder.mlvl_fuse.input_conv", "regions.fuse.inputs"),
        ("region_encoder.mlvl_fuse.fuse_convs.{}.conv", "regions.fuse.convs.{}"),
        ("region_encoder.mlvl_fuse.fuse_convs.{}.gn", "regions.fuse.norms.{}"),
        ("region_encoder.roi_align.pconvs", "regions.convs"),
        ("region_encoder.roi_align.flatten_linear", "regions.flatten"),
        ("region_encoder.roi_align.pos_embedd", "regions.box_embedding"),
        ("region_encoder.roi_align.updims", "regions.output"),
    ]
    rest = [
        ("perceiver.vis_encoder", "encoder.vit"),
        ("img_txt_bridge", "bridge.mlp"),
        ("new_input_embs", "vocabulary.embed"),
        ("extra_lm_head", "vocabulary.head"),
        ("llm", "llm"),
    ]
    return [*proposer, *regions, *rest]


def _rename(name: str, table: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in table:
        if match := pattern.match(name):
            return target.format(*match.groups()) + name[match.end() :]
    return None


@cache
def _compiled(decoder_layers: int) -> tuple[list[tuple[re.Pattern[str], str]], list[tuple[re.Pattern[str], str]]]:
    """The table from the original to ours, and back."""
    pairs = rules(decoder_layers)
    return [(_pattern(a), b) for a, b in pairs], [(_pattern(b), a) for a, b in pairs]


def _pattern(prefix: str) -> re.Pattern[str]:
    return re.compile("^" + re.escape(prefix).replace(r"\{\}", r"(\d+)") + r"(?=\.|$)")
