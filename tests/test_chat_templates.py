"""Language models with a chat template of their own are spoken to in it: same turns, their words, labels on answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from groma import markup
from groma.data import prompts
from groma.processor import GromaProcessor, extend, image_processor
from groma.structures import Turn
from groma.template import CHAT_TEMPLATE, OPENING_ANSWER, OPENING_QUESTION, SYSTEM
from tests.golden.text_tokenizers import CHATML, brackets, chatml, headers, store_original

BOX = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
TALK = [
    *prompts.refer_turns("the red cup", BOX), Turn("user", "What's it?"), Turn("assistant", "It is a cup."),
    Turn("user", "12 chairs?"), Turn("assistant", "No."),
]  # fmt: skip
THINK = "<think>\n\n</think>\n\n"
OPENINGS = {
    "chatml": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{OPENING_QUESTION}<|im_end|>\n"
    f"<|im_start|>assistant\n{OPENING_ANSWER}<|im_end|>\n<|im_start|>user\n",
    "headers": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
    f"{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{OPENING_QUESTION}<|eot_id|>"
    f"<|start_header_id|>assistant<|end_header_id|>\n\n{OPENING_ANSWER}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n",
}  # fmt: skip
MAKERS = {"chatml": chatml, "headers": headers}


@pytest.fixture(scope="module")
def processors() -> dict[str, GromaProcessor]:
    return {name: maker() for name, maker in MAKERS.items()}


@pytest.fixture(params=list(MAKERS))
def processor(request: pytest.FixtureRequest, processors: dict[str, GromaProcessor]) -> GromaProcessor:
    return processors[request.param]


def text_of(processor: GromaProcessor, ids: torch.Tensor) -> str:
    """Ids as they stand, without the spaces decode would set."""
    return "".join(str(processor.tokenizer.decode([i], skip_special_tokens=False)) for i in ids.tolist())


@pytest.mark.parametrize("name", MAKERS)
def test_the_opening_is_written_in_the_template(processors: dict[str, GromaProcessor], name: str) -> None:
    processor = processors[name]
    opening = prompts.opening_prompt(processor)
    squeezed = OPENINGS[name].replace(" <image>", "<image>").replace(" <region>", "<region>")
    assert text_of(processor, opening.ids) == squeezed
    assert set(opening.labels.tolist()) == {-100}
    special = [token for token in opening.ids.tolist() if processor.is_special(token)]
    assert [i for i in special if i in (processor.word_id("<image>"), processor.word_id("<region>"))] == [
        processor.word_id("<image>"), processor.word_id("<region>")
    ]  # fmt: skip


def test_chatml_dialogue(processors: dict[str, GromaProcessor]) -> None:
    processor = processors["chatml"]
    rest = prompts.question_prompt(processor, TALK, open_answer=False)
    user, answer, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
    assert text_of(processor, rest.ids) == (
        f"Locate<p>the red cup</p>in the image.{answer}<roi><ground_box></roi>{end}"
        f"{user}What's it?{answer}It is a cup.{end}{user}12 chairs?{answer}{THINK}No.{end}"
    )
    labelled = rest.labels[rest.labels != -100]
    assert text_of(processor, labelled) == ("<roi><ground_box></roi><|im_end|>It is a cup.<|im_end|>No.<|im_end|>")
    assert torch.equal(rest.ids[rest.labels != -100], labelled)
    assert torch.equal(rest.ground_boxes, BOX)
    question = prompts.question_prompt(processor, TALK[:1])
    assert text_of(processor, question.ids) == f"Locate<p>the red cup</p>in the image.{answer}{THINK}"
    assert set(question.labels.tolist()) == {-100}


def test_header_dialogue(processors: dict[str, GromaProcessor]) -> None:
    processor = processors["headers"]
    rest = prompts.question_prompt(processor, TALK, open_answer=False)
    user, answer = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
    assert text_of(processor, rest.ids) == (
        f"Locate<p>the red cup</p>in the image.<|eot_id|>{answer}<roi><ground_box></roi><|eot_id|>"
        f"{user}What's it?<|eot_id|>{answer}It is a cup.<|eot_id|>{user}12 chairs?<|eot_id|>{answer}No.<|eot_id|>"
    )
    labelled = rest.labels[rest.labels != -100]
    assert text_of(processor, labelled) == "<roi><ground_box></roi><|eot_id|>It is a cup.<|eot_id|>No.<|eot_id|>"


def test_what_ends_an_answer(processors: dict[str, GromaProcessor]) -> None:
    ids = {name: processor.tokenizer.convert_tokens_to_ids for name, processor in processors.items()}
    assert processors["chatml"].end_ids == tuple(ids["chatml"](["<|im_end|>", "<|endoftext|>"]))
    assert set(ids["chatml"](["<|im_start|>", "<|im_end|>"])) <= set(processors["chatml"].control_ids)
    assert processors["headers"].end_ids == tuple(ids["headers"](["<|eot_id|>", "<|end_of_text|>"]))
    assert processors["headers"].tokenizer.bos_token == "<|begin_of_text|>"


def test_every_dialogue_starts_with_the_opening(processor: GromaProcessor) -> None:
    start = prompts.opening_prompt(processor)
    for count in (2, 4, 6):
        for stage in ("align", "instruct"):
            whole = prompts.build_prompt(processor, TALK[:count], stage)  # type: ignore[arg-type]
            assert whole.ids[: len(start.ids)].tolist() == start.ids.tolist()
    for text in ("\n\nhello", " ", "'s", "é", "\u0301", "<p>the cup</p>", "<roi><refer_box></roi><refer_feat>"):
        turn = Turn("user", text, torch.zeros(text.count("<refer_box>"), 4))
        whole = prompts.build_prompt(processor, [turn], open_answer=True)
        assert whole.ids[: len(start.ids)].tolist() == start.ids.tolist()


def test_parts_are_tokenised_as_the_whole(processor: GromaProcessor) -> None:
    """Ordinary text gets the tokens it would get from the tokenizer alone on the rendered text."""
    turns = [Turn("user", "What's it? 12 chairs"), Turn("assistant", "It's two books.\nRed cups."), TALK[4]]
    talk = [{"role": turn.role, "content": turn.text} for turn in turns]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    opening = OPENINGS["chatml" if "<|im_start|>" in text else "headers"]
    assert text.startswith(opening)
    alone = processor.tokenizer(text.removeprefix(opening), add_special_tokens=False).input_ids
    assert prompts.question_prompt(processor, turns).ids.tolist() == alone
    assert processor.encode(text) == prompts.build_prompt(processor, turns, open_answer=True).ids.tolist()


def test_markup_is_tokenised_as_in_the_whole(processor: GromaProcessor) -> None:
    talk = [{"role": turn.role, "content": [{"type": "markup", "markup": turn.text}]} for turn in TALK]
    talk += [{"role": "user", "content": [{"type": "markup", "markup": "[grounding] What is it?"}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    whole = prompts.build_prompt(processor, [*TALK, Turn("user", "[grounding] What is it?")], open_answer=True)
    assert processor.encode(text) == whole.ids.tolist()


def test_turns_cannot_write_the_templates_words(processor: GromaProcessor) -> None:
    """Not even in a turn that nobody escaped."""
    unescaped = "So <|im_end|> <|eot_id|> <think> it ends"
    for turns in ([Turn("user", unescaped)], [Turn("user", "q"), Turn("assistant", unescaped)]):
        clean = [Turn(turn.role, turn.text.replace(unescaped, "q")) for turn in turns]
        ids, expected = (
            [i for i in prompts.question_prompt(processor, t, open_answer=len(t) == 1).ids.tolist()
             if processor.is_special(i)]
            for t in (turns, clean)
        )  # fmt: skip
        assert ids == expected


def test_apply_chat_template(processor: GromaProcessor) -> None:
    typed = "Is <|im_end|> or <|eot_id|> or <r5> it?"
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": typed}]},
        {"role": "assistant", "content": "The <p>cup</p><roi><r1></roi>."},
        {"role": "user", "content": [{"type": "markup", "markup": "[grounding] What is it?"}]},
    ]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    assert "Be brief." in text
    assert SYSTEM not in text
    assert markup.escape(typed) in text
    ids = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert ids[0].tolist() == processor.encode(text)
    words = [processor.tokenizer.convert_ids_to_tokens(i) for i in ids[0].tolist() if processor.is_special(i)]
    grammar = [word for word in words if word in markup.words()]
    assert grammar == ["<image>", "<region>", "<p>", "</p>", "<roi>", "<r1>", "</roi>", "[grounding]"]
    assert sum(word in ("<|im_end|>", "<|eot_id|>") for word in words) == 6  # system, two pairs, the last question


def test_round_trip(processor: GromaProcessor) -> None:
    for text in (
        "The <p>red cup</p><roi><r3></roi> stands.",
        "[grounding] What is <roi><refer_box></roi><refer_feat>?",
    ):
        assert processor.decode(processor.encode(text)) == text
    whole = prompts.build_prompt(processor, TALK).ids
    text = processor.decode(whole)
    assert processor.encode(text) == whole.tolist()
    assert prompts.answer_ids(processor, " The cup. ") == processor.encode("The cup.")


def test_saved_and_loaded(processor: GromaProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = GromaProcessor.from_pretrained(tmp_path)
    assert again.own_template
    assert again.end_ids == processor.end_ids
    assert again.chat_template == again.tokenizer.chat_template == processor.chat_template
    assert prompts.build_prompt(again, TALK).ids.tolist() == prompts.build_prompt(processor, TALK).ids.tolist()
    assert extend(again.tokenizer) == 0
    assert again.tokenizer.chat_template == processor.chat_template


# -- plain brackets, as Llama 2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False])
def test_a_template_of_plain_words(tmp_path: Path, legacy: bool) -> None:
    processor = brackets(tmp_path, legacy)
    start = prompts.opening_prompt(processor)
    assert processor.decode(start.ids).startswith("<s>\ue001INST] A chat between a curious user")
    assert processor.decode(start.ids).endswith("with it?</s>\ue001INST]")
    assert processor.end_ids == (2,)
    rest = prompts.question_prompt(processor, [Turn("user", "Why?"), Turn("assistant", "A dog.")], open_answer=False)
    tokens = processor.tokenizer.convert_ids_to_tokens(rest.ids.tolist())
    assert "".join(tokens) == "▁Why?▁[/INST]▁A▁dog.</s>"
    assert processor.tokenizer.convert_ids_to_tokens(rest.labels[rest.labels != -100].tolist()) == [
        "▁A", "▁dog", ".", "</s>",
    ]  # fmt: skip
    assert prompts.answer_ids(processor, "A dog.") == rest.labels[rest.labels != -100][:-1].tolist()
    asked = prompts.question_prompt(processor, [Turn("user", "Why?")])
    assert asked.ids.tolist() == rest.ids[: len(asked.ids)].tolist()
    whole = processor.encode(processor.apply_chat_template([{"role": "user", "content": "Why?"}]))
    assert whole == start.ids.tolist() + asked.ids.tolist()


# -- templates that will not do ---------------------------------------------------------------------------------------


def with_template(template: str) -> GromaProcessor:
    tokenizer: PreTrainedTokenizerFast = chatml().tokenizer
    tokenizer.chat_template = template
    extend(tokenizer)
    return GromaProcessor(image_processor(32), tokenizer)


def test_a_template_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="no special word follows an answer"):
        with_template("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")


def test_a_template_that_loses_turns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of 2 turns it writes \['1'\], expected each once, in order"):
        with_template("{{ messages[-1].content }}<|im_end|>")


def test_an_opening_that_depends_on_what_follows_is_refused() -> None:
    processor = with_template("{{ messages | length }}" + CHATML)
    with pytest.raises(ValueError, match="before the first question depends on what comes after it"):
        prompts.build_prompt(processor, TALK)


def test_a_tokenizer_without_a_template_gets_the_published_one(tmp_path: Path) -> None:
    processor = GromaProcessor.from_pretrained(store_original(tmp_path, True))
    assert processor.chat_template == CHAT_TEMPLATE
    assert not processor.own_template


def test_words_that_take_white_space_along() -> None:
    tokenizer: PreTrainedTokenizerFast = chatml().tokenizer
    tokenizer.add_tokens([AddedToken("<|user|>", special=True, normalized=False, rstrip=True)])
    processor = GromaProcessor(image_processor(32), tokenizer)
    text = "Hi. <|user|>\n What is it?<|im_end|>\n"
    assert processor.encode(text) == tokenizer(text, add_special_tokens=False).input_ids
    assert processor.encode("<|user|>\nIt") == [processor.word_id("<|user|>"), *processor.encode("It")]


def test_words_that_escaping_leaves_whole_are_never_read() -> None:
    tokenizer: PreTrainedTokenizerFast = chatml().tokenizer
    tokenizer.add_tokens([AddedToken("STOP", special=True, normalized=False), AddedToken("    ", normalized=False)])
    processor = GromaProcessor(image_processor(32), tokenizer)
    stop = tokenizer.convert_tokens_to_ids("STOP")
    assert stop not in processor.encode("Do STOP    it")
    assert processor.decode(processor.encode("Do STOP    it")) == "Do STOP    it"
