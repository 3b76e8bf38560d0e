"""Configurations: every size of the model is a number here, with the released 7B as the default."""

from __future__ import annotations

import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from groma import markup
from groma.model.checkpoint_config import is_original, is_perceiver, settings


class ProposerConfig(PreTrainedConfig):
    """The class-agnostic Deformable-DETR proposer (two-stage, with box refinement; Zhu et al. 2021, A.4).

    heads: objectness heads per decoder layer; one head, or two whose sigmoids are fused as
    ``sigmoid(first)^fusion[0] * sigmoid(second)^fusion[1]`` (Groma, section 3.2; 0.4 and 0.6 as released).
    levels: feature levels, 1 (the encoder's grid), 2 (and a coarser one) or 3 (and a finer one).
    loss_weights, costs: of class, L1 and GIoU in training and in the Hungarian matching.
    """

    model_type = "groma_proposer"

    width: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_heads: int = 8
    decoder_heads: int = 8
    encoder_points: int = 4
    decoder_points: int = 4
    encoder_ffn: int = 1024
    decoder_ffn: int = 1024
    activation: str = "relu"
    dropout: float = 0.1
    levels: int = 1
    queries: int = 300
    heads: list[str] | tuple[str, ...] = ("coco", "sa1b")
    fusion: list[float] | tuple[float, ...] = (0.4, 0.6)
    costs: list[float] | tuple[float, ...] = (2.0, 5.0, 2.0)
    loss_weights: list[float] | tuple[float, ...] = (2.0, 5.0, 2.0)
    focal_alpha: float = 0.25

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 1 <= self.levels <= 3:
            raise ValueError(f"proposer.levels: got {self.levels}, expected 1, 2 or 3")
        if len(self.heads) != len(self.fusion):
            raise ValueError(f"proposer.fusion: got {len(self.fusion)} exponents for {len(self.heads)} heads")
        for heads, name in ((self.encoder_heads, "encoder_heads"), (self.decoder_heads, "decoder_heads")):
            if self.width % heads:
                raise ValueError(f"proposer.{name}: width {self.width} does not divide by {heads}")


class GromaConfig(PreTrainedConfig):
    """A whole Groma: an encoder, a proposer and a causal language model, each with its own configuration.

    image_size: pixels of the square input. proxies: proxy words in the vocabulary; max_regions ≤ proxies.
    score_threshold (strictly above counts, 0 = off) and nms_threshold (IoU) select regions from the proposals.
    region_*: the region encoder; region_scales are map sizes relative to the patch grid, first to the shallowest of
    the encoder levels used. Three switches exist for the released weights only and are set by nobody else:
    region_boxes "centre" (cx, cy, w, h read as corners), region_stride_error 2.0 (ROIAlign strides off by two) and
    position_scale_offset 0.1 (DINOv2's position table is resized by the factor (grid + 0.1) / side, not to the grid).
    token_norm: image and region tokens pass a LayerNorm whose gain starts at 0.1, near the size of word embeddings (not
    in the released weights). Encoder features are large; where a token is hundreds of times a word, what attention
    writes beside it is lost, and the language model never learns which proxy belongs to which region.
    named_slots: a region's feature slot also carries the embedding of its proxy word (not in the released weights), so
    that the language model need not learn first which word came before the slot.
    pointer_head: a proxy's output row is its word's row plus its region's token through a learned matrix, so that what
    is said can match what is seen directly (not in the released weights: a pre-trained language model looks the proxy
    up by attention; a small one trained from scratch did not learn to from 60,000 questions).
    score_temperature divides the logits of the proxies before their softmax, presence_temperature the log-odds that
    something matches (None: score_temperature there too); an expression whose probability that something matches is
    below found_threshold is answered found=False. A region's objectness enters its score to the objectness_power.
    Calibration fits the four (docs/scores.md).
    words: how many description words the stage-1 region-words auxiliary predicts (0 = none).
    new_token_ids: id of every word of ``markup.words(proxies)`` in the tokenizer; base_vocab: size before extension.
    """

    model_type = "groma"
    sub_configs = {"encoder": AutoConfig, "proposer": ProposerConfig, "llm": AutoConfig}

    # each a configuration, or a dict of its settings, or None for the released sizes; a configuration once made
    encoder: Any = None
    proposer: Any = None
    llm: Any = None
    image_size: int = 448
    proxies: int = markup.MAX_PROXIES
    max_regions: int = 100
    score_threshold: float = 0.15
    nms_threshold: float = 0.6
    region_width: int | None = None
    region_scales: list[float] | tuple[float, ...] = (4, 2, 1)
    region_rounds: int = 5
    region_groups: int = 64
    region_size: int = 14
    region_hidden: int = 1024
    region_box_hidden: int = 256
    region_boxes: str = "corners"
    region_stride_error: float = 1.0
    position_scale_offset: float = 0.0
    token_norm: bool = False
    named_slots: bool = False
    pointer_head: bool = False
    words: int = 0
    base_vocab: int = 32000
    new_token_ids: dict[str, int] | None = None
    found_threshold: float = 0.5
    score_temperature: float = 1.0
    presence_temperature: float | None = None
    objectness_power: float = 1.0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.encoder = _sub(self.encoder, "dinov2", image_size=518, patch_size=14, hidden_size=1024,
                            num_hidden_layers=24, num_attention_heads=16)  # fmt: skip
        self.llm = _sub(self.llm, "llama")
        if not isinstance(self.proposer, PreTrainedConfig):
            self.proposer = ProposerConfig(**(self.proposer or {}))
        if self.new_token_ids is None:
            self.new_token_ids = _default_ids(self.base_vocab, self.proxies)
        super().__post_init__(**kwargs)
        if self.region_boxes not in ("corners", "centre"):
            raise ValueError(f"region_boxes: got {self.region_boxes!r}, expected 'corners' or 'centre'")
        if self.position_scale_offset and self.encoder.model_type != "dinov2":
            raise ValueError(
                f"position_scale_offset: got {self.position_scale_offset}, expected 0 for a {self.encoder.model_type}"
                " encoder; dinov2 alone has it"
            )
        if self.max_regions > self.proxies:
            raise ValueError(f"max_regions {self.max_regions} is more than the {self.proxies} proxy words")
        if self.image_size % self.patch_size or (self.image_size // self.patch_size) % 2:
            raise ValueError(
                f"image_size {self.image_size} must be an even number of patches of {self.patch_size} pixels"
            )
        for name, value in zip(("score_temperature", "presence_temperature"), self.temperatures, strict=True):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value}, expected a number above 0")
        if not 0 <= self.objectness_power < math.inf:
            raise ValueError(f"objectness_power: got {self.objectness_power}, expected a number of at least 0")
        if not 0 <= self.found_threshold <= 1:
            raise ValueError(f"found_threshold: got {self.found_threshold}, expected a number from 0 to 1")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', and from the config.json of a released checkpoint; see groma.model.checkpoint_config."""
        if is_original(config_dict) or is_perceiver(config_dict):
            config_dict = settings(config_dict, kwargs.get("image_size"))
        return super().from_dict(config_dict, **kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The language model's configuration, which sizes the KV cache."""
        return self.llm

    @property
    def patch_size(self) -> int:
        """Side of an encoder patch in pixels."""
        return int(self.encoder.patch_size)

    @property
    def temperatures(self) -> tuple[float, float]:
        """What divides the logits of the proxies, and what divides the log-odds that something matches."""
        presence = self.presence_temperature
        return self.score_temperature, self.score_temperature if presence is None else presence

    @property
    def new_words(self) -> int:
        """Rows beside the base vocabulary: new words the base tokenizer did not have."""
        return sum(i >= self.base_vocab for i in self.new_token_ids.values())  # type: ignore[union-attr]

    @property
    def vocab_size(self) -> int:
        """Base vocabulary and new words together: the width of the logits."""
        return self.base_vocab + self.new_words

    def token_id(self, word: str) -> int:
        """Id of a special or proxy word; KeyError for any other."""
        return self.new_token_ids[word]  # type: ignore[index]

    @property
    def proxy_ids(self) -> list[int]:
        """Token id of ``<rK>`` at position K."""
        return [self.token_id(markup.proxy(i)) for i in range(self.proxies)]


def _sub(value: Any, default: str, **defaults: Any) -> PreTrainedConfig:
    """A sub-configuration from what was given: a config, a dict with model_type, or nothing."""
    if isinstance(value, PreTrainedConfig):
        return value
    settings = dict(value) if value else dict(defaults)
    return AutoConfig.for_model(settings.pop("model_type", default), **settings)


def _default_ids(base: int, proxies: int) -> dict[str, int]:
    """Ids as a Llama tokenizer gets them: it has <s>, </s>, <unk>; every other word follows its vocabulary."""
    known = {markup.UNK: 0, markup.BOS: 1, markup.EOS: 2}
    ids, following = {}, base
    for word in markup.words(proxies):
        if word in known:
            ids[word] = known[word]
        else:
            ids[word] = following
            following += 1
    return ids
