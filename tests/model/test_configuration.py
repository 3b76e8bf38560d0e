"""Configurations: the released sizes by default, vocabulary arithmetic, and one line for what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Dinov2Config, Qwen3Config

import groma.model  # noqa: F401  # registers the Auto classes
from groma import markup
from groma.model.configuration import GromaConfig, ProposerConfig


def test_defaults_are_the_released_model() -> None:
    config = GromaConfig()
    assert (config.encoder.model_type, config.encoder.hidden_size, config.encoder.num_hidden_layers) == (
        "dinov2", 1024, 24,
    )  # fmt: skip
    assert (config.image_size, config.patch_size) == (448, 14)
    proposer = config.proposer
    assert (proposer.width, proposer.encoder_layers, proposer.decoder_layers, proposer.queries) == (256, 6, 6, 300)
    assert (tuple(proposer.heads), tuple(proposer.fusion)) == (("coco", "sa1b"), (0.4, 0.6))
    assert (config.llm.model_type, config.llm.hidden_size, config.llm.vocab_size) == ("llama", 4096, 32000)
    assert (config.max_regions, config.nms_threshold, config.score_threshold) == (100, 0.6, 0.15)
    assert (config.region_boxes, config.region_stride_error, config.position_scale_offset) == ("corners", 1.0, 0.0)


def test_new_words_follow_the_base_vocabulary() -> None:
    config = GromaConfig()
    assert config.new_words == 114  # 117 words, of which Llama has <s>, </s> and <unk>
    assert config.vocab_size == 32114
    assert [config.token_id(w) for w in ("<unk>", "<s>", "</s>", "[PAD]", "<sep>")] == [0, 1, 2, 32000, 32001]
    assert config.token_id("[grounding]") == 32013
    assert config.proxy_ids == list(range(32014, 32114))
    few = GromaConfig(proxies=3, max_regions=2, base_vocab=50)
    assert few.proxy_ids == [64, 65, 66]
    assert few.vocab_size == 67
    with pytest.raises(KeyError):
        few.token_id("<r3>")


def test_ids_given_by_a_tokenizer_are_taken() -> None:
    ids = {word: 1000 + i for i, word in enumerate(markup.words(4))} | {"<s>": 7}
    config = GromaConfig(proxies=4, max_regions=4, base_vocab=1000, new_token_ids=ids)
    assert config.new_words == 20
    assert config.token_id("<s>") == 7
    assert config.proxy_ids == [1017, 1018, 1019, 1020]


def test_parts_are_swapped_by_configuration() -> None:
    encoder = Dinov2Config(patch_size=8, hidden_size=32)
    config = GromaConfig(llm={"model_type": "qwen3", "hidden_size": 64}, encoder=encoder)
    assert isinstance(config.llm, Qwen3Config)
    assert config.get_text_config() is config.llm
    assert config.patch_size == 8


@pytest.mark.parametrize("settings, message", [
    ({"region_boxes": "center"}, "region_boxes: got 'center', expected 'corners' or 'centre'"),
    ({"position_scale_offset": 0.1, "encoder": {"model_type": "dinov3_vit"}},
     "position_scale_offset: got 0.1, expected 0 for a dinov3_vit encoder"),
    ({"max_regions": 101}, "max_regions 101 is more than the 100 proxy words"),
    ({"image_size": 450}, "image_size 450 must be an even number of patches of 14 pixels"),
    ({"image_size": 448 + 14}, "image_size 462 must be an even number"),
    ({"proposer": {"levels": 4}}, "proposer.levels: got 4, expected 1, 2 or 3"),
    ({"proposer": {"heads": ["one"]}}, "proposer.fusion: got 2 exponents for 1 heads"),
    ({"proposer": {"width": 250}}, "proposer.encoder_heads: width 250 does not divide by 8"),
    ({"proposer": {"width": 256, "decoder_heads": 3}}, "proposer.decoder_heads: width 256 does not divide by 3"),
])  # fmt: skip
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GromaConfig(**settings)


def test_saved_and_loaded_configurations_are_equal(tmp_path: Path) -> None:
    config = GromaConfig(
        proposer={"levels": 2, "queries": 77}, score_temperature=1.5, found_threshold=0.25, words=3,
        position_scale_offset=0.1,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GromaConfig
    assert isinstance(loaded.proposer, ProposerConfig)
    assert loaded.proposer.queries == 77
    assert (loaded.score_temperature, loaded.found_threshold, loaded.words) == (1.5, 0.25, 3)
    assert loaded.position_scale_offset == 0.1
    assert loaded.new_token_ids == config.new_token_ids
    where = {"_name_or_path": "", "transformers_version": ""}
    assert loaded.to_dict() | where == config.to_dict() | where
