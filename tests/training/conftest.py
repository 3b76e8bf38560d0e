"""A tiny random model and a handful of drawn pictures with every annotation file the three stages read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from groma import markup
from groma.data.prompts import texts
from groma.processor import GromaProcessor, extend, image_processor

COLOURS = {"red": (210, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 210), "yellow": (220, 200, 50)}
KINDS = ("ball", "box")
WORDS = [*COLOURS, *KINDS]
PICTURES, SIDE, PROXIES = 8, 64, 20


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/ and regions, instances, rec, grounded_captions and conversations .json."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    coco: dict[str, dict[str, list[Any]]] = {
        name: {"images": [], "annotations": []} for name in ("regions", "instances", "rec", "grounded_captions")
    }
    coco["instances"]["categories"] = [{"id": i, "name": kind} for i, kind in enumerate(KINDS)]
    conversations = []
    for number in range(PICTURES):
        name = f"{number}.png"
        things = _draw(folder / "images" / name, number)
        _annotate(coco, number, name, things)
        question = {"from": "human", "value": "<image>\nHow many things are there?"}
        conversations.append(
            {"id": number, "image": name, "conversations": [question, {"from": "gpt", "value": f"{len(things)}"}]}
        )
    for name, content in coco.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "conversations.json").write_text(json.dumps(conversations))
    return folder


def _draw(path: Path, number: int) -> list[tuple[str, str, list[int]]]:
    """Two things of different colour on a grey picture: (colour, kind, xywh in pixels) of each."""
    picture = Image.new("RGB", (SIDE, SIDE), (128, 128, 120))
    pen, things = ImageDraw.Draw(picture), []
    for i in range(2):
        colour, kind = list(COLOURS)[(number + 2 * i) % 4], KINDS[(number // 2 + i) % 2]
        x, y, side = 4 + 30 * i, 6 + 5 * (number % 5), 20 + 2 * (number % 3)
        shape = pen.ellipse if kind == "ball" else pen.rectangle
        shape((x, y, x + side - 1, y + side - 1), fill=COLOURS[colour])
        things.append((colour, kind, [x, y, side, side]))
    picture.save(path)
    return things


def _annotate(coco: dict[str, dict[str, list[Any]]], number: int, name: str, things: list[Any]) -> None:
    size = {"file_name": name, "width": SIDE, "height": SIDE}
    for file in ("regions", "instances"):
        coco[file]["images"].append({"id": number, **size})
    caption, spans = "", []
    for colour, kind, _ in things:
        start = len(caption)
        caption += f"A {colour} {kind}. "
        spans.append([start, start + len(f"A {colour} {kind}")])
    coco["grounded_captions"]["images"].append({"id": number, "caption": caption.strip(), **size})
    for i, (colour, kind, box) in enumerate(things):
        base = {"id": 2 * number + i, "image_id": number, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        coco["regions"]["annotations"].append({**base, "caption": f"{colour} {kind}"})
        coco["instances"]["annotations"].append({**base, "category_id": KINDS.index(kind)})
        coco["grounded_captions"]["annotations"].append({**base, "tokens_positive": [spans[i]]})
        coco["rec"]["images"].append({"id": 3 * number + i, "caption": f"the {colour} {kind}", **size})
        coco["rec"]["annotations"].append({**base, "image_id": 3 * number + i})
    coco["rec"]["images"].append({"id": 3 * number + 2, "caption": "the purple ring", **size})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration and processor of a model of some 0.2 M parameters for 64-pixel pictures."""
    from groma.model.configuration import GromaConfig

    folder = tmp_path_factory.mktemp("tiny")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<unk>"]
    backend.train_from_iterator(
        [*texts(), *WORDS * 3],
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    base = backend.get_vocab_size()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    extend(tokenizer, PROXIES)
    processor = GromaProcessor(image_processor(SIDE), tokenizer)
    processor.save_pretrained(folder)
    words = tokenizer.get_vocab()
    config = GromaConfig(
        encoder={"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
                 "image_size": SIDE, "patch_size": 8, "mlp_ratio": 2},
        proposer={"width": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_heads": 4, "decoder_heads": 4,
                  "encoder_ffn": 64, "decoder_ffn": 64, "queries": 12, "dropout": 0.1},
        llm={"model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": base, "max_position_embeddings": 2048},
        image_size=SIDE, proxies=PROXIES, max_regions=PROXIES, score_threshold=0.0, region_width=32, region_rounds=1,
        region_groups=4, region_size=4, region_hidden=32, region_box_hidden=16, words=len(WORDS), base_vocab=base,
        new_token_ids={word: words[word] for word in markup.words(PROXIES)},
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def quiet_torch() -> Any:
    """One thread; and a run sets torch's matrix precision for its process: put it back."""
    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_num_threads(1)  # so tiny a model only waits for a second thread
    yield
    torch.set_float32_matmul_precision(before)
    torch.set_num_threads(threads)
