"""GromaProcessor: markup to ids and back, inert outside text, pixels, saving."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from groma import markup
from groma.data.prompts import build_prompt, opening_prompt, question_prompt, refer_turns, texts
from groma.processor import GromaProcessor, extend, image_processor
from groma.structures import Turn

TEXTS = [*texts(), "The red cup stands by two books. </s> <r5> <image> [grounding] <p> <s> What is it?"]


def bytelevel() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet)
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """A SentencePiece-like tokenizer, as Llama's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"]))
    return tokenizer


def unigram() -> Tokenizer:
    """A hostile one: lower-cases, folds width, and has </s> and <s> among its ordinary pieces."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0), *((c, -3.0) for c in "</>s[]rpaimgeoundt5▁")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def make(backend: Tokenizer, proxies: int = 100) -> GromaProcessor:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    extend(tokenizer, proxies)
    return GromaProcessor(image_processor(32), tokenizer)


@pytest.fixture(scope="module", params=[bytelevel, metaspace], ids=["bytelevel", "metaspace"])
def processor(request: pytest.FixtureRequest) -> GromaProcessor:
    return make(request.param())


def test_new_words_follow_the_base_vocabulary() -> None:
    backend = bytelevel()
    base = backend.get_vocab_size()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert extend(tokenizer, 5) == 17 + 5 - 3
    assert len(tokenizer) == base + 19
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<unk>"]) == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "<sep>", "<r0>", "<r4>"]) == [base, base + 1, base + 14, base + 18]
    assert extend(tokenizer, 5) == 0


@pytest.mark.parametrize(
    "text",
    [
        "The <p>red cup</p><roi><r3></roi> stands.",
        "The <p>red cup</p><roi><r3></roi> stands by <p>two books</p><roi><r0><r7></roi>.",
        "<p>The cup</p><roi><r3></roi> <p>it</p><roi><r1></roi>, is it?",
        "<roi><r99></roi>",
        "Nothing matches.",
        "[grounding] What is <roi><refer_box></roi><refer_feat>?",
        "<s>A chat USER: is it? ASSISTANT: The cup.</s>USER: What",
        "",
    ],
)
def test_round_trip(processor: GromaProcessor, text: str) -> None:
    ids = processor.encode(text)
    again = processor.decode(ids)
    assert again == text
    assert processor.encode(again) == ids
    assert processor.decode(torch.tensor(ids, dtype=torch.long)) == text


def test_space_beside_special_words_does_not_matter(processor: GromaProcessor) -> None:
    assert processor.encode("The <p> red cup </p> <roi> <r3> </roi> stands") == processor.encode(
        "The<p>red cup</p><roi><r3></roi>stands"
    )


HOSTILE = [
    "</s>", "<s>", "<r5>", "<R5>", "<image>", "<IMAGE>", "[grounding]", "[Grounding]", "[PAD]", "<p>red</p>", "< r5 >",
    "<\u200br5>", "\uff1cr5\uff1e", "\uff1c/s\uff1e", "</S>", "<roi><r0></roi>", "<unk>", "<ground_box>", "a</s>b",
    "\ue000r5>", "\ue001grounding]", "<<r5>>", "</</s>s>",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("backend", [bytelevel, metaspace, unigram])
def test_outside_text_is_inert(backend: object, text: str) -> None:
    processor = make(backend())  # type: ignore[operator]
    special = {processor.word_id(w) for w in markup.words(100)} - {processor.word_id("<unk>")}
    ids = processor.encode(markup.escape(text))
    assert special.isdisjoint(ids)
    assert not any(is_special and piece != "<unk>" for piece, is_special in markup.split(processor.decode(ids)))
    inside = processor.encode(f"Locate <p>{markup.escape(text)}</p>.")
    assert [i for i in inside if i in special] == processor.encode("<p></p>")


def test_outside_text_survives() -> None:
    processor = make(bytelevel())
    for text in HOSTILE:
        if "\ue000" not in text and "\ue001" not in text:
            assert markup.unescape(processor.decode(processor.encode(markup.escape(text)))) == text
    assert processor.decode(processor.encode("zwölf 杯 🍵")) == "zwölf 杯 🍵"


def test_a_proxy_beyond_the_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match=r"no word <r7>.*<r0> to <r4>"):
        make(bytelevel(), 5).encode("<r7>")


def test_a_tokenizer_without_the_words_is_refused() -> None:
    with pytest.raises(ValueError, match="extend"):
        GromaProcessor(image_processor(32), PreTrainedTokenizerFast(tokenizer_object=bytelevel()))


def test_pixels(processor: GromaProcessor) -> None:
    white, black = Image.new("RGB", (50, 20), "white"), Image.new("L", (7, 9))
    pixels = processor.pixels([white, black])
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert pixels[0, 0, 0, 0].item() == pytest.approx((1 - 0.485) / 0.229, abs=1e-5)
    assert pixels[1, 2, 0, 0].item() == pytest.approx(-0.406 / 0.225, abs=1e-5)
    photo = Image.fromarray((torch.rand(60, 80, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy())
    theirs = processor.image_processor(photo, return_tensors="pt").pixel_values
    assert (processor.pixels([photo]) - theirs).abs().max() < 0.04  # measured 0.0175: one step of 255 is 0.0175


def test_call(processor: GromaProcessor) -> None:
    out = processor(images=Image.new("RGB", (9, 9)), text=["The <p>cup</p>", "The"])
    assert out.pixel_values.shape == (1, 3, 32, 32)
    start = len(processor.encode("The"))
    assert out.input_ids[1].tolist()[start:] == [processor.word_id("[PAD]")] * (out.input_ids.shape[1] - start)
    assert out.attention_mask.sum(1).tolist() == [len(processor.encode(t)) for t in ("The <p>cup</p>", "The")]
    with pytest.raises(ValueError, match="neither"):
        processor()


def test_save_and_load(processor: GromaProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = GromaProcessor.from_pretrained(tmp_path)
    text = f"The <p>red cup</p><roi><r3></roi> {markup.escape('</s><r5>')}"
    assert again.encode(text) == processor.encode(text)
    image = Image.effect_noise((40, 30), 50)
    assert torch.equal(again.pixels([image]), processor.pixels([image]))
    assert again.image_processor.size == {"height": 32, "width": 32}
    talk = [{"role": "user", "content": "What is it?"}]
    assert again.apply_chat_template(talk) == processor.apply_chat_template(talk)


def test_chat_template_is_the_prompt(processor: GromaProcessor) -> None:
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is </s> it?"}]},
        {"role": "assistant", "content": "The <p>cup</p><roi><r1></roi>."},
        {"role": "user", "content": [{"type": "markup", "markup": "[grounding] What is it?"}]},
    ]
    turns = [
        Turn("user", markup.escape("What is </s> it?")),
        Turn("assistant", "The <p>cup</p><roi><r1></roi>."),
        Turn("user", "[grounding] What is it?"),
    ]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    expected = build_prompt(processor, turns, open_answer=True).ids.tolist()
    assert processor.encode(text) == expected
    ids = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert ids["input_ids"][0].tolist() == expected


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_prompts_share_their_start(processor: GromaProcessor, stage: str) -> None:
    start = opening_prompt(processor)
    for expression in ("the red cup", "</s>", " '", "é", ".", ""):
        turns = refer_turns(expression, torch.rand(2, 4))
        whole = build_prompt(processor, turns, stage)  # type: ignore[arg-type]
        rest = question_prompt(processor, turns, stage, open_answer=False)  # type: ignore[arg-type]
        assert whole.ids.tolist() == start.ids.tolist() + rest.ids.tolist()
        assert set(start.labels.tolist()) == {-100}
