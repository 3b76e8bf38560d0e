"""Text against recorded numbers: the released checkpoints' tokenizer and template, and the embedded model's prompts."""

from __future__ import annotations

import itertools
import json
import random
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from groma.data import prompts
from groma.processor import GromaProcessor
from groma.sentencepiece import MARK, original_tokenizer, read_model
from groma.structures import Turn
from tests.golden.text_tokenizers import FOLDER, store_original

TURNS = re.compile(r"USER: (.*?) ASSISTANT: <sep>(.*?)<sep>")
STAGES: dict[str, prompts.Stage] = {"llava": "instruct", "default": "align"}  # the original's names of its templates


def recorded(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module", params=["legacy", "nonlegacy"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, GromaProcessor]:
    folder = store_original(tmp_path_factory.mktemp(request.param), request.param == "legacy")
    return recorded(request.param), GromaProcessor.from_pretrained(folder)


def turns_of(prompt: str) -> list[Turn]:
    """The turns of a recorded prompt, with boxes of no size in their places."""
    turns: list[Turn] = []
    for question, answer in TURNS.findall(prompt.split("with it?", 1)[1]):
        turns.append(Turn("user", question, torch.zeros(question.count("<refer_box>"), 4)))
        turns.append(Turn("assistant", answer, torch.zeros(answer.count("<ground_box>"), 4)))
    return turns


def test_words_have_the_original_ids(case: tuple[Any, GromaProcessor]) -> None:
    golden, processor = case
    assert len(processor.tokenizer) == 814
    assert {word: processor.word_id(word) for word in golden["added"]} == golden["added"]
    assert processor.end_ids == (2,)
    assert processor.tokenizer.pad_token_id == golden["added"]["[PAD]"] == 700


def test_texts_have_the_original_ids(case: tuple[Any, GromaProcessor]) -> None:
    golden, processor = case
    assert len(golden["texts"]) == 9
    for text in golden["texts"]:
        assert processor.encode("<s>" + text["text"]) == text["ids"], text["text"]


def test_samples_have_the_original_ids(case: tuple[Any, GromaProcessor]) -> None:
    golden, processor = case
    assert len(golden["samples"]) == 20
    for sample in golden["samples"]:
        assert processor.encode("<s>" + sample["prompt_with_sep"]) == sample["input_ids"], sample["dataset"]


def test_the_tokenizer_alone_has_the_original_ids(case: tuple[Any, GromaProcessor]) -> None:
    golden, processor = case
    sep = processor.word_id("<sep>")
    for sample in golden["samples"]:
        ids = processor.tokenizer(sample["prompt_with_sep"]).input_ids
        assert [i for i in ids if i != sep] == sample["input_ids"]
    for text in golden["texts"]:
        if text["text"] not in (" hello", "[grounding] a"):  # see TextCodec: the word mark
            assert processor.tokenizer(text["text"]).input_ids == text["ids"]


def test_prompts_have_the_original_ids_and_labels(case: tuple[Any, GromaProcessor]) -> None:
    golden, processor = case
    seen = set()
    for sample in golden["samples"]:
        stage, text = STAGES[sample["template"]], sample["prompt_with_sep"]
        turns = turns_of(text)
        prompt = prompts.build_prompt(processor, turns, stage)
        ids, labels = prompt.ids.tolist(), prompt.labels.tolist()
        if stage == "align":  # ours have an end; the original's do not
            ends = [i for i, label in enumerate(labels) if label == 2]
            assert len(ends) == len(turns) // 2
            ids = [token for i, token in enumerate(ids) if i not in ends]
            labels = [token for i, token in enumerate(labels) if i not in ends]
        expected = sample["input_ids"]
        if sample["dataset"] == "llava":  # white space around a turn, which we drop
            tidy = re.sub(" +ASSISTANT", " ASSISTANT", re.sub("USER: +", "USER: ", text))
            assert tidy != text
            expected = processor.encode("<s>" + tidy)
        else:
            assert labels == sample["labels"], sample["dataset"]
        assert ids == expected, sample["dataset"]
        assert [token for token in labels if token != -100] == [token for token in sample["labels"] if token != -100]
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        seen.add(sample["dataset"])
    assert len(seen) == 10


def test_our_questions_are_the_original_ones(case: tuple[Any, GromaProcessor]) -> None:
    golden, processor = case
    ours = {
        "grit": prompts.refer_question("brown dog"),
        "refcoco_rec": prompts.refer_question("brown dog on the left"),
        "coco": prompts.detect_question("traffic light"),
        "lvis": prompts.detect_question("aerosol can"),
        "flickr30k": prompts.caption_question(),
        "single_vg": prompts.describe_question(0),
        "refcoco_cap": prompts.describe_question(1),
    }
    for sample in golden["samples"]:
        if sample["dataset"] in ours:
            question = turns_of(sample["prompt_with_sep"])[0].text
            assert processor.encode(f"USER: {ours[sample['dataset']]}") == processor.encode(f"USER: {question}")
    answers = {"refcoco_rec": prompts.boxes_answer(1), "coco": prompts.boxes_answer(2)}
    for sample in golden["samples"]:
        if sample["dataset"] in answers:
            assert turns_of(sample["prompt_with_sep"])[1].text == answers[sample["dataset"]]


def test_inference_has_the_original_ids(case: tuple[Any, GromaProcessor]) -> None:
    golden, processor = case
    turn = Turn("user", "[grounding]Describe the image in detail.")
    assert prompts.build_prompt(processor, [turn], open_answer=True).ids.tolist() == golden["texts"][0]["ids"]
    talk = [{"role": "user", "content": [{"type": "markup", "markup": turn.text}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert processor.encode(text) == golden["texts"][0]["ids"]


def test_chat_template_is_the_prompt(case: tuple[Any, GromaProcessor]) -> None:
    _, processor = case
    talk = [{"role": r, "content": c} for r, c in (("user", "Why?"), ("assistant", "A dog."), ("user", "A hat?"))]
    turns = [Turn("user", "Why?"), Turn("assistant", "A dog."), Turn("user", "A hat?")]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert processor.encode(text) == prompts.build_prompt(processor, turns, open_answer=True).ids.tolist()


def test_saved_it_is_ours_and_the_same(case: tuple[Any, GromaProcessor], tmp_path: Path) -> None:
    golden, processor = case
    processor.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"tokenizer.json", "processor_config.json", "chat_template.jinja"}
    assert not (tmp_path / "tokenizer.model").exists()
    again = GromaProcessor.from_pretrained(tmp_path)
    for sample in golden["samples"]:
        assert again.encode("<s>" + sample["prompt_with_sep"]) == sample["input_ids"]
        assert again.tokenizer(sample["prompt_with_sep"]) == processor.tokenizer(sample["prompt_with_sep"])
    assert (again.end_ids, again.image_processor.resample) == ((2,), Image.Resampling.BICUBIC)


def test_round_trip(case: tuple[Any, GromaProcessor]) -> None:
    _, processor = case
    for text in (
        "The <p>brown dog</p><roi><r3></roi> is near.",
        "<p>a man</p><roi><r0><r1></roi> in a hat",
        "zwölf 杯",
    ):
        assert processor.decode(processor.encode(text)) == text


# -- files ------------------------------------------------------------------------------------------------------------


def test_image_settings_of_the_original(tmp_path: Path) -> None:
    store_original(tmp_path, True)
    first = GromaProcessor.from_pretrained(tmp_path)
    assert first.image_processor.size == {"height": 448, "width": 448}
    photo = Image.effect_noise((60, 40), 80)
    byte = torch.from_numpy(np.asarray(photo.convert("RGB").resize((448, 448)))[0, 0].copy()) / 255  # Pillow's default
    expected = (byte - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(first.pixels([photo])[0, :, 0, 0], expected, atol=1e-5)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "groma", "llm_cfg": {}, "image_size": 112}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "size": 256}))
    second = GromaProcessor.from_pretrained(tmp_path).image_processor
    assert (second.size["height"], list(second.image_mean)) == (112, [0.5] * 3)


def test_a_language_model_without_the_words_gets_them(tmp_path: Path) -> None:
    store_original(tmp_path, True)
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    processor = GromaProcessor.from_pretrained(tmp_path)
    golden = recorded("legacy")
    assert {word: processor.word_id(word) for word in golden["added"]} == golden["added"]
    assert processor.encode("<s>" + golden["samples"][1]["prompt_with_sep"]) == golden["samples"][1]["input_ids"]


def test_fewer_proxies_stay_fewer(tmp_path: Path) -> None:
    store_original(tmp_path, True)
    words = json.loads((tmp_path / "added_tokens.json").read_text())
    few = {word: i for word, i in words.items() if i < 719}
    (tmp_path / "added_tokens.json").write_text(json.dumps(few))
    processor = GromaProcessor.from_pretrained(tmp_path)
    assert len(processor.tokenizer) == 719
    with pytest.raises(ValueError, match="which has the proxies <r0> to <r4>"):
        processor.encode("<r5>")


def field(number: int, value: bytes) -> bytes:
    """One field of a protocol buffer; short values only."""
    return bytes([number << 3 | 2, len(value)]) + value


PIECE = field(1, field(1, b"<unk>") + b"\x18\x02")
TRAINER, KEEP = b"\x18\x02\x98\x02\x01", b"\x20\x00"  # BPE with byte fallback; no white space is removed
BROKEN = {
    "no SentencePiece model": b"version https://git-lfs",
    "0 pieces, expected": b"",
    "1 pieces, expected a SentencePiece model of kind BPE": PIECE + field(2, b"\x18\x01\x98\x02\x01"),
    "rewrites its text": PIECE + field(2, TRAINER) + field(3, field(2, b"abc") + KEEP),
    "defined by a user": PIECE + field(1, field(1, b"x") + b"\x18\x04") + field(2, TRAINER) + field(3, KEEP),
    "cut off": PIECE[:-2] + b"\x7f",
}


@pytest.mark.parametrize("message", BROKEN)
def test_another_model_gives_one_line(tmp_path: Path, message: str) -> None:
    store_original(tmp_path, True)
    (tmp_path / "tokenizer.model").write_bytes(BROKEN[message])
    with pytest.raises(ValueError, match=message) as caught:
        GromaProcessor.from_pretrained(tmp_path)
    assert "tokenizer.model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_that_disagree_are_named(tmp_path: Path) -> None:
    store_original(tmp_path, True)
    words = json.loads((tmp_path / "added_tokens.json").read_text())
    (tmp_path / "added_tokens.json").write_text(json.dumps(words | {"<r99>": 900}))
    with pytest.raises(ValueError, match=r"<r99> is 900, but 813 in .*tokenizer\.model"):
        GromaProcessor.from_pretrained(tmp_path)
    (tmp_path / "added_tokens.json").write_text("[]")
    with pytest.raises(ValueError, match=r"added_tokens\.json: got a JSON list, expected an object"):
        GromaProcessor.from_pretrained(tmp_path)


def test_merges_choose_as_sentencepiece_does(tmp_path: Path) -> None:
    """Against its algorithm, written out: join the neighbours whose piece scores best, the first of equals."""
    pieces = read_model(FOLDER / "tokenizer.model")
    scores = {piece.text: piece.score for piece in pieces if piece.kind == 1}
    ids = {piece.text: i for i, piece in enumerate(pieces)}

    def oracle(text: str) -> list[int]:
        parts = list(MARK + text.replace(" ", MARK))
        while True:
            joined = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
            if not joined:
                break
            i = min(joined)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        known = ([ids[p]] if p in scores else [ids[f"<0x{b:02X}>"] for b in p.encode()] for p in parts)
        return [i for part in known for i in part]

    store_original(tmp_path, True)
    tokenizer = original_tokenizer(lambda name: tmp_path / name)
    draw = random.Random(0)
    letters = [text for text in scores if len(text) == 1] + ["é", "杯", "\x00", " ", " "]
    words = [text.replace(MARK, " ") for text in scores]
    for i in range(600):
        text = " " * draw.randrange(20) * (i % 5 == 0)
        text += "".join(draw.choice(letters if i % 2 else words) for _ in range(draw.randrange(1, 25)))
        assert tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids == oracle(text), text


def test_scores_are_read(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    scored = field(1, field(1, "▁a".encode()) + b"\x15" + struct.pack("<f", -2.5))
    file.write_bytes(PIECE + scored + field(2, TRAINER) + field(3, KEEP))
    assert [tuple(piece) for piece in read_model(file)] == [("<unk>", 0.0, 2), ("▁a", -2.5, 1)]


# -- the embedded model -----------------------------------------------------------------------------------------------


def test_embedded_prompts_are_those_it_was_trained_with(root: Path) -> None:
    golden = recorded("tabletop")
    processor = GromaProcessor.from_pretrained(root / "groma" / "assets" / "tabletop")
    assert prompts.opening_prompt(processor).ids.tolist() == golden["opening"]
    assert len(golden["prompts"]) == 30
    for row in golden["prompts"]:
        turns = [
            Turn(role, text, torch.zeros(text.count("<refer_box>" if role == "user" else "<ground_box>"), 4))
            for role, text in row["turns"]
        ]
        prompt = prompts.question_prompt(processor, turns, row["stage"], row["open"])
        assert prompt.ids.tolist() == row["ids"], row["name"]
        assert prompt.labels.tolist() == row["labels"], row["name"]
    assert processor.end_ids == (1,)
    assert prompts.answer_ids(processor, "Nothing matches.") == processor.encode("Nothing matches.")
