"""The prompt template: exact text, labels on the answers only, boxes in order."""

import pytest
import torch

from groma import markup
from groma.data import prompts
from groma.processor import GromaProcessor
from groma.structures import Turn

OPENING = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: Here is an image with region crops from it. Image: <image>. "
    "Regions: <region>. ASSISTANT: Thank you for the image! How can I assist you with it?"
)
BOX = torch.tensor([[0.1, 0.2, 0.3, 0.4]])


def test_instruct(processor: GromaProcessor) -> None:
    turns = [*prompts.refer_turns("the red cup", BOX, 0), Turn("user", "Why?"), Turn("assistant", "It is.")]
    prompt = prompts.build_prompt(processor, turns)
    assert processor.decode(prompt.ids) == (
        f"{OPENING}</s>USER: Locate <p>the red cup</p> in the image. ASSISTANT: <roi><ground_box></roi></s>"
        "USER: Why? ASSISTANT: It is.</s>"
    )
    answers = [*processor.encode("<roi><ground_box></roi></s>"), *processor.encode("It is.</s>")]
    assert prompt.labels[prompt.labels != -100].tolist() == answers
    assert torch.equal(prompt.ground_boxes, BOX)
    assert prompt.refer_boxes.shape == (0, 4)
    assert torch.equal(prompt.ids[prompt.labels != -100], prompt.labels[prompt.labels != -100])


def test_align_has_ends_of_answer_in_its_targets_alone(processor: GromaProcessor) -> None:
    turns = [Turn("user", "Why?"), Turn("assistant", "It is."), Turn("user", "How?"), Turn("assistant", "Red.")]
    prompt = prompts.build_prompt(processor, turns, stage="align")
    end = processor.word_id("</s>")
    assert processor.decode(prompt.ids) == f"{OPENING} USER: Why? ASSISTANT: It is.</s>USER: How? ASSISTANT: Red.</s>"
    assert (prompt.labels == end).sum() == (prompt.ids == end).sum() == 2


def test_open_answer(processor: GromaProcessor) -> None:
    question = Turn("user", prompts.describe_question(0), BOX)
    prompt = prompts.build_prompt(processor, [question], open_answer=True)
    assert processor.decode(prompt.ids).endswith("USER: What is <roi><refer_box></roi><refer_feat>? ASSISTANT:")
    assert set(prompt.labels.tolist()) == {-100}
    assert torch.equal(prompt.refer_boxes, BOX)


@pytest.mark.parametrize(
    "roles, open_answer", [("", False), ("u", False), ("ua", True), ("au", False), ("uau", False), ("uu", False)]
)
def test_turns_out_of_order(processor: GromaProcessor, roles: str, open_answer: bool) -> None:
    turns = [Turn("user" if r == "u" else "assistant", "x") for r in roles]
    with pytest.raises(ValueError, match="expected user and assistant in turn"):
        prompts.build_prompt(processor, turns, open_answer=open_answer)


def test_only_the_template_places_the_image(processor: GromaProcessor) -> None:
    with pytest.raises(ValueError, match="<image>"):
        prompts.build_prompt(processor, [Turn("user", "<image> x")], open_answer=True)


def test_absent_and_several() -> None:
    none, two = torch.zeros(0, 4), torch.rand(2, 4)
    assert prompts.refer_turns("the vase", none)[1].text == f"<roi></roi>{markup.NOTHING}"
    assert markup.parse(f"<roi></roi>{markup.NOTHING}") == (markup.NOTHING, [])
    assert prompts.refer_turns("the vases", two)[1].text == "<roi><ground_box><ground_box></roi>"
    assert "<r5>" not in prompts.refer_question("<r5>")
    assert len({prompts.refer_question("a", i) for i in range(12)}) == 6


def test_opening_turns_are_the_opening(processor: GromaProcessor) -> None:
    question, answer = prompts.opening_turns()
    assert OPENING.endswith(f"USER: {question.text} ASSISTANT: {answer.text}")
    assert processor.decode(prompts.opening_prompt(processor).ids) == OPENING
