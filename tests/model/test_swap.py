"""Encoder and language model are a configuration: every kind builds, trains, is saved and loaded, and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from groma import markup
from groma.data.prompts import build_prompt, refer_question, refer_turns
from groma.model.groma import GromaForConditionalGeneration
from groma.predictor import Groma
from groma.processor import GromaProcessor
from groma.settings import ModelConfig, RunConfig
from groma.structures import Turn
from groma.training.parts import TrainingError, freeze_all_but
from groma.training.parts_loading import assemble, load_parts

Make = Callable[..., GromaForConditionalGeneration]
BOX = torch.tensor([[0.1, 0.1, 0.45, 0.5]])
LLMS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "num_key_value_heads": 2},
    "qwen3, tied": {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "dinov2": {"model_type": "dinov2"},
    "registers": {"model_type": "dinov2_with_registers", "num_register_tokens": 4},
    "dinov3": {"model_type": "dinov3_vit", "patch_size": 16, "intermediate_size": 64, "num_register_tokens": 4},
}
PAIRS = [("llama", "registers"), ("llama", "dinov3"), ("qwen3", "dinov2"), ("qwen3, tied", "dinov3")]


def given(processor: GromaProcessor, pixels: Tensor) -> dict[str, Any]:
    prompt = build_prompt(processor, refer_turns("the red ball", BOX))
    return {"pixel_values": pixels[:1], "input_ids": prompt.ids[None], "labels": prompt.labels[None],
            "ground_boxes": (prompt.ground_boxes,)}  # fmt: skip


@pytest.mark.parametrize(("llm", "encoder"), PAIRS)
def test_a_pair_trains_is_saved_and_answers(
    make: Make, pixels: Tensor, tiny_processor: GromaProcessor, tmp_path: Path, llm: str, encoder: str
) -> None:
    model = make(llm=LLMS[llm], encoder=ENCODERS[encoder], score_threshold=0.0)
    step = given(tiny_processor, pixels)
    boxes = {"targets": (BOX,), "target_words": (((1,),),)}
    for train in (["proposer", "words_head"], ["bridge", "regions", "vocabulary"], ["bridge", "encoder", "llm"]):
        model.requires_grad_(True).zero_grad()
        freeze_all_but(model, train)
        stage = step | boxes if "proposer" in train else step
        out = model(**stage, pack=2048)
        assert all(bool(loss.isfinite()) for loss in out.losses.values())
        out.loss.backward()
        reached = {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == set(train)
    model.save_pretrained(tmp_path)
    loaded = GromaForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.llm) is type(model.llm)
    assert type(loaded.encoder.vit) is type(model.encoder.vit)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    tied = loaded.llm.get_input_embeddings().weight is loaded.llm.get_output_embeddings().weight
    assert tied == ("tied" in llm)
    answer = Groma(loaded, tiny_processor).refer(Groma(loaded, tiny_processor).look(picture()), "the red ball")
    assert answer.width == 64
    open_question = build_prompt(tiny_processor, [Turn("user", refer_question("the ball"))], open_answer=True)
    with torch.no_grad():
        logits = [m(pixel_values=pixels[:1], input_ids=open_question.ids[None]).logits for m in (model, loaded)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64), (200, 40, 40))


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_levels_are_layer_outputs_before_the_final_norm(make: Make, pixels: Tensor, kind: str) -> None:
    model = make(encoder=ENCODERS[kind])
    states: list[Tensor] = []
    layers = [m for name, m in model.encoder.named_modules() if name.rpartition(".layer.")[2].isdigit()]
    assert len(layers) == 4
    for layer in layers:
        layer.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
    levels = model.encoder(pixels[:1]).levels
    registers = ENCODERS[kind].get("num_register_tokens", 0)
    for level, state in zip(levels, states, strict=True):
        torch.testing.assert_close(level.flatten(2).transpose(1, 2), state[:, 1 + registers :])


def test_an_odd_number_of_patches_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="image_size 64 must be an even number of patches of 14 pixels"):
        make(encoder=ENCODERS["dinov3"] | {"patch_size": 14})
    assert make(encoder=ENCODERS["dinov3"]).config.patch_size == 16


# -- pre-trained parts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved on their own: a llama with its tokenizer, a tied qwen3 with more rows than words, a dinov2, a dinov3."""
    folder = tmp_path_factory.mktemp("parts")
    backend = json.loads((tiny / "tokenizer.json").read_text())
    backend["added_tokens"] = [
        token for token in backend["added_tokens"] if token["content"] in ("<s>", "</s>", "<unk>")
    ]
    (folder / "words.json").write_text(json.dumps(backend))
    words = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "words.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    settings = json.loads((tiny / "config.json").read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for name, changes in (("llama", {}), ("qwen3", LLMS["qwen3, tied"] | {"vocab_size": len(words) + 60})):
            kind = {k: v for k, v in settings["llm"].items() if k != "model_type"} | changes
            config = AutoConfig.for_model(kind.pop("model_type", name), **kind)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
            words.save_pretrained(folder / name)
        for name in ("dinov2", "dinov3"):
            kind = settings["encoder"] | ENCODERS[name]
            AutoModel.from_config(AutoConfig.for_model(kind.pop("model_type"), **kind)).save_pretrained(folder / name)
    (folder / "dinov3" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.4, 0.4], "image_std": [1, 1, 1]}'
    )
    return folder


def loads(model: str | None = None, encoder: str | None = None) -> RunConfig:
    return RunConfig(stage="alignment", output="out", model=ModelConfig(encoder=encoder, llm=model))


def test_weights_of_parts_replace_those_of_the_model(make: Make, parts: Path) -> None:
    model = make()
    kept = {n: v.clone() for n, v in model.state_dict().items() if n.partition(".")[0] in ("proposer", "regions")}
    load_parts(model, loads(str(parts / "llama"), str(parts / "dinov2")))
    for own, name, kind in ((model.llm, "llama", AutoModelForCausalLM), (model.encoder.vit, "dinov2", AutoModel)):
        for key, value in kind.from_pretrained(parts / name).state_dict().items():
            assert torch.equal(own.state_dict()[key], value), key
    for name, value in kept.items():
        assert torch.equal(model.state_dict()[name], value)
    mean = model.llm.get_input_embeddings().weight[: model.config.base_vocab].mean(0)
    torch.testing.assert_close(model.vocabulary.head.weight, model.vocabulary.embed.weight - mean)


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_told_in_a_line(make: Make, parts: Path, tmp_path: Path) -> None:
    wide, short = make(llm={"intermediate_size": 104, "num_hidden_layers": 3}), make(encoder={"image_size": 32})
    sizes = r"mlp\.down_proj\.weight is \(48, 96\), expected \(48, 104\).* and \d+ more"
    cases = [
        (make(), loads(str(parts / "qwen3")), "model.llm: .*qwen3 is of type 'qwen3', expected 'llama'"),
        (make(), loads(encoder=str(parts / "dinov3")), "is of type 'dinov3_vit', expected 'dinov2'"),
        (wide, loads(str(parts / "llama")), sizes),
        (make(), loads(str(tmp_path / "none")), "model.llm: .*none cannot be loaded"),
        (short, loads(encoder=str(parts / "dinov2")), r"position_embeddings is \(1, 65, 32\)"),
    ]
    for model, run, told in cases:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(TrainingError, match=told) as caught:
            load_parts(model, run)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


SMALL = {"proposer": {"width": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_heads": 4, "decoder_heads": 4,
                      "queries": 12}, "region_width": 32, "region_rounds": 1, "region_groups": 4, "region_size": 4,
         "region_hidden": 32, "region_box_hidden": 16}  # fmt: skip


@pytest.mark.parametrize(("llm", "encoder"), [("llama", "dinov2"), ("qwen3", "dinov3")])
def test_a_starting_model_is_made_of_two_parts(
    parts: Path, pixels: Tensor, tmp_path: Path, llm: str, encoder: str
) -> None:
    model, processor = assemble(str(parts / encoder), str(parts / llm), image_size=64, proxies=20, **SMALL)
    for key, value in AutoModelForCausalLM.from_pretrained(parts / llm).state_dict().items():
        assert torch.equal(model.llm.state_dict()[key], value), key
    for key, value in AutoModel.from_pretrained(parts / encoder).state_dict().items():
        assert torch.equal(model.encoder.vit.state_dict()[key], value), key
    assert processor.image_processor.image_mean[0] == (0.4 if encoder == "dinov3" else 0.485)
    for word in markup.words(20):
        assert processor.word_id(word) == model.config.token_id(word)
    assert model.config.base_vocab == min(i for i in model.config.new_token_ids.values() if i > 2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = Groma.from_pretrained(tmp_path)
    view = loaded.look(picture())
    assert len(view.proposals) > 0
    loaded.refer(view, "the red ball")
    out = loaded.model(**given(loaded.processor, pixels))
    out.loss.backward()
    assert bool(out.loss.isfinite())


def test_the_seed_decides_the_random_parts(parts: Path) -> None:
    one, same, other = (
        assemble(str(parts / "dinov2"), str(parts / "llama"), image_size=64, proxies=20, seed=seed, **SMALL)[0]
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.bridge.mlp[0].weight, same.bridge.mlp[0].weight)
    assert torch.equal(one.vocabulary.embed.weight, same.vocabulary.embed.weight)
    assert not torch.equal(one.bridge.mlp[0].weight, other.bridge.mlp[0].weight)


def test_an_image_size_that_does_not_fit_the_patches(parts: Path) -> None:
    with pytest.raises(ValueError, match="72 must be an even number of patches of 8 pixels"):
        assemble(str(parts / "dinov2"), str(parts / "llama"), image_size=72, proxies=20, **SMALL)


def test_the_tool_overwrites_nothing(root: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(root / "tools" / "make_model.py"), "--encoder", "a", "--llm", "b", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.strip() == f"make_model.py: --out: {tmp_path} exists already"
