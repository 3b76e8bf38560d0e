"""Saved and loaded again the model is the same, whole, in bfloat16, through the Auto classes, or grown by a part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from groma.data.prompts import build_prompt, refer_question
from groma.model.groma import GromaForConditionalGeneration
from groma.processor import GromaProcessor
from groma.structures import Turn

Make = Callable[..., GromaForConditionalGeneration]


@pytest.fixture(scope="module")
def model(make: Make) -> GromaForConditionalGeneration:
    return make(seed=5)


@pytest.fixture(scope="module")
def saved(model: GromaForConditionalGeneration, tiny_processor: GromaProcessor,
          tmp_path_factory: pytest.TempPathFactory) -> Path:  # fmt: skip
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: GromaForConditionalGeneration, processor: GromaProcessor) -> Tensor:
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    prompt = build_prompt(processor, [Turn("user", refer_question("the red ball"))], open_answer=True)
    return model(pixel_values=pixels, input_ids=prompt.ids[None]).logits


def test_loaded_equals_saved(model: GromaForConditionalGeneration, saved: Path, tiny_processor: GromaProcessor) -> None:
    loaded, info = GromaForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not loaded.training
    # equal but for rounding, as a file's weights lie elsewhere in memory: measured worst case 0
    torch.testing.assert_close(logits(loaded, tiny_processor), logits(model, tiny_processor), atol=1e-5, rtol=1e-5)


def test_the_file_holds_every_parameter_once(model: GromaForConditionalGeneration, saved: Path) -> None:
    with safe_open(saved / "model.safetensors", "pt") as file:  # transformers may store a part under older names
        sizes = [file.get_tensor(name).numel() for name in file.keys()]  # noqa: SIM118  # not a dict
    assert sorted(sizes) == sorted(p.numel() for p in model.parameters())


def test_auto_classes(model: GromaForConditionalGeneration, saved: Path, tiny_processor: GromaProcessor) -> None:
    assert AutoConfig.from_pretrained(saved).model_type == "groma"
    loaded, processor = AutoModelForImageTextToText.from_pretrained(saved), AutoProcessor.from_pretrained(saved)
    assert type(loaded) is GromaForConditionalGeneration
    assert type(processor) is GromaProcessor
    torch.testing.assert_close(logits(loaded, processor), logits(model, tiny_processor), atol=1e-5, rtol=1e-5)


def test_shards(model: GromaForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = GromaForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_bfloat16(make: Make, saved: Path, tmp_path: Path, tiny_processor: GromaProcessor) -> None:
    rough = GromaForConditionalGeneration.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in rough.parameters()} == {torch.bfloat16}
    rough.save_pretrained(tmp_path)
    again = GromaForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    out = logits(again, tiny_processor)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, logits(rough, tiny_processor), atol=0.02, rtol=0.02)
    assert bool(out.isfinite().all())


def test_bfloat16_trains_and_generates(saved: Path, tiny_processor: GromaProcessor) -> None:
    model = GromaForConditionalGeneration.from_pretrained(saved, dtype=torch.bfloat16)
    pixels = torch.randn(1, 3, 64, 64).to(torch.bfloat16)
    box = torch.tensor([[0.1, 0.2, 0.6, 0.7]])
    prompt = build_prompt(tiny_processor, [Turn("user", "Hello"), Turn("assistant", "<roi><ground_box></roi>", box)])
    out = model(pixel_values=pixels, input_ids=prompt.ids[None], labels=prompt.labels[None], ground_boxes=(box,),
                targets=(box,), target_words=(((1, 2),),))  # fmt: skip
    out.loss.backward()
    assert all(bool(loss.isfinite()) for loss in out.losses.values())
    ids = model.generate(prompt.ids[None, :-5], pixels, max_new_tokens=4, pad_token_id=0)
    assert ids.shape == (1, 4)


@pytest.mark.filterwarnings("ignore")
def test_a_part_that_is_new_starts_fresh_and_leaves_the_others(
    model: GromaForConditionalGeneration, saved: Path
) -> None:
    config = AutoConfig.from_pretrained(saved)
    config.words = 9
    config.proposer.heads = ["coco", "sa1b", "other"]
    config.proposer.fusion = [0.4, 0.4, 0.2]
    grown, info = GromaForConditionalGeneration.from_pretrained(
        saved, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    new = {name for name in grown.state_dict() if name.startswith("proposer.class_heads.other")}
    assert set(info["missing_keys"]) == new
    assert grown.words_head.weight.shape[0] == 9
    for name, tensor in model.state_dict().items():
        if not name.startswith("words_head"):
            assert torch.equal(grown.state_dict()[name], tensor), name


# transformers asks a model of another package to initialise only those modules that own a parameter directly which was
# not loaded: neither NewWords nor a loaded Proposer is one.
def test_new_words_of_a_fresh_model_start_at_the_mean_of_the_base(make: Make) -> None:
    model = make(noise=0.0)
    base = model.llm.get_input_embeddings().weight[: model.config.base_vocab].mean(0)
    torch.testing.assert_close(model.vocabulary.head.weight, model.vocabulary.embed.weight - base)


@pytest.mark.filterwarnings("ignore")
def test_a_new_objectness_head_starts_rare(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    config.proposer.heads, config.proposer.fusion = ["coco", "sa1b", "other"], [0.4, 0.4, 0.2]
    grown = GromaForConditionalGeneration.from_pretrained(saved, config=config)
    fresh = [grown.state_dict()[f"proposer.class_heads.other.{i}.bias"].sigmoid().item() for i in range(2)]
    assert fresh == pytest.approx([0.01, 0.01], rel=1e-3)


def test_the_temperature_of_scores_is_not_that_of_sampling(make: Make) -> None:
    assert make(score_temperature=1.7).generation_config.temperature in (None, 1.0)


@pytest.mark.filterwarnings("ignore")
def test_a_token_norm_added_to_a_saved_model_starts_at_its_gain(
    model: GromaForConditionalGeneration, make: Make, saved: Path
) -> None:
    config = AutoConfig.from_pretrained(saved)
    config.token_norm = True
    for grown in (GromaForConditionalGeneration.from_pretrained(saved, config=config), make(noise=0, token_norm=True)):
        for norm in (grown.bridge.norm, grown.regions.norm):
            assert norm.weight.unique().tolist() == pytest.approx([0.1])
            assert not norm.bias.any()
        tokens = grown.look(torch.randn(1, 3, 64, 64))[0].region_tokens
        torch.testing.assert_close(tokens.std(1, correction=0), torch.full((len(tokens),), 0.1), atol=0.01, rtol=0)
