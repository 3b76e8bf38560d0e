"""The published prompt template: fixed texts, questions by task, and dialogues to token ids.

A prompt is tokenised in segments, so that it always starts with the ids of ``opening_prompt``, whatever follows::

    <s>SYSTEM USER: Here is an image … ASSISTANT: Thank you … with it?          opening_prompt
    </s>USER: Locate <p>the red cup</p> in the image. ASSISTANT:                question_prompt, stage "instruct"
    <roi><ground_box></roi></s>                                                 labels: the answer and its end

Stage "align" puts a space where "instruct" has ``</s>`` after the opening. Its answers end with ``</s>`` all the same
(the published alignment targets have no end, and such a model never stops).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from groma import markup
from groma.structures import Prompt, Turn
from groma.template import ASSISTANT, OPENING_ANSWER, OPENING_QUESTION, SYSTEM, USER

if TYPE_CHECKING:
    from groma.processor import GromaProcessor

Stage = Literal["align", "instruct"]
IGNORE = -100
"""The label of a position without loss."""

REFER = (
    "Locate {} in the image.",
    "Can you spot {} in the photograph?",
    "Identify where {} is located in the picture.",
    "Please detect {} in the picture.",
    "Which region matches the description {}?",
    "Please identify the object that corresponds to {}.",
)
DETECT = (
    "Locate all {} in this image.",
    "Identify all instances of {} in the photo.",
    "Find all instances of {} in the image.",
    "Point out all the {} visible in this picture.",
    "Detect and list each {} that appears in this photo.",
    "What is the position of each {} in the image?",
)
# The wording of the next two lists is ours, but for the first two of each: the paper does not print them.
CAPTION = (
    "Give me a concise description of the image.",
    "Describe the image in detail.",
    "Describe the image briefly.",
    "What does this picture show, in short?",
    "Sum up the photo in one sentence.",
    "Provide a brief caption for this image.",
    "Tell me shortly what can be seen here.",
)
DESCRIBE = (
    "What is {}?",
    "Can you provide me with a detailed description of {}?",
    "Describe {}.",
    "What can you see in {}?",
    "Tell me about {}.",
    "How would you describe {} in the image?",
)


def opening_turns() -> tuple[Turn, Turn]:
    """The pair of turns every dialogue starts with; it places the image and its regions."""
    return Turn("user", OPENING_QUESTION), Turn("assistant", OPENING_ANSWER)


def texts() -> tuple[str, ...]:
    """Every fixed text of this file, without places for arguments: what a tokenizer should know."""
    questions = [t.format("") for t in (*REFER, *DETECT, *CAPTION, *DESCRIBE)]
    return (SYSTEM, f"{USER} {OPENING_QUESTION} {ASSISTANT} {OPENING_ANSWER}", markup.NOTHING, *questions)


def phrase(text: str) -> str:
    """Outside text as a phrase: escaped, in <p></p>."""
    return f"{markup.PHRASE_OPEN}{markup.escape(text.strip())}{markup.PHRASE_CLOSE}"


def refer_question(expression: str, template: int = 0) -> str:
    """Where is the thing ``expression`` (outside text) names? Template numbers wrap around."""
    return REFER[template % len(REFER)].format(phrase(expression))


def detect_question(words: str, template: int = 0) -> str:
    """Where are all the things ``words`` (outside text) name?"""
    return DETECT[template % len(DETECT)].format(phrase(words))


def caption_question(template: int = 0) -> str:
    """Describe the image with grounded phrases."""
    return f"{markup.GROUNDING} {CAPTION[template % len(CAPTION)]}"


def describe_question(template: int = 0) -> str:
    """What is in the user's box? The turn carries one box."""
    place = f"{markup.ROI_OPEN}{markup.REFER_BOX}{markup.ROI_CLOSE}{markup.REFER_FEAT}"
    return DESCRIBE[template % len(DESCRIBE)].format(place)


def boxes_answer(count: int) -> str:
    """The answer that points at ``count`` boxes; at none, an empty group and the sentence that nothing matches.

    The group is opened either way: where the model chooses a region it can also close the group, so "nothing" competes
    with the regions themselves.
    """
    nothing = "" if count else markup.NOTHING
    return f"{markup.ROI_OPEN}{markup.GROUND_BOX * count}{markup.ROI_CLOSE}{nothing}"


def refer_turns(expression: str, boxes: Tensor, template: int = 0) -> tuple[Turn, Turn]:
    """Question and answer for a referring expression whose referents are ``boxes`` (K, 4), K = 0 for absent."""
    return Turn("user", refer_question(expression, template)), Turn("assistant", boxes_answer(len(boxes)), boxes)


def opening_prompt(processor: GromaProcessor) -> Prompt:
    """<s>, system text and opening pair: the start that all prompts of a processor share, without labels."""
    ids = processor.encode(f"{markup.BOS}{SYSTEM} {USER} {OPENING_QUESTION} {ASSISTANT} {OPENING_ANSWER}")
    return _prompt(ids, [IGNORE] * len(ids), [], [])


def question_prompt(
    processor: GromaProcessor, turns: Sequence[Turn], stage: Stage = "instruct", open_answer: bool = True
) -> Prompt:
    """What follows ``opening_prompt``: the given turns; ends in "ASSISTANT:" if ``open_answer``.

    Labels stand on the answers of ``turns`` and their ``</s>``. Raises ValueError for turns out of order.
    """
    _check(turns, open_answer)
    end = processor.word_id(markup.EOS)
    ids = [end] if stage == "instruct" else []
    labels = [IGNORE] * len(ids)
    for turn in turns:
        if turn.role == "user":
            new = processor.encode(f"{USER} {turn.text.strip()} {ASSISTANT}")
            labels += [IGNORE] * len(new)
        else:
            new = [*processor.encode(turn.text.strip()), end]
            labels += new
        ids += new
    boxes = {role: [turn.boxes for turn in turns if turn.role == role] for role in ("user", "assistant")}
    return _prompt(ids, labels, boxes["user"], boxes["assistant"])


def build_prompt(
    processor: GromaProcessor, turns: Sequence[Turn], stage: Stage = "instruct", open_answer: bool = False
) -> Prompt:
    """A whole dialogue: opening, then ``turns`` (user, assistant, …), with labels on the answers of ``turns``.

    ``open_answer``: the last turn is a question, left open for the model. Raises ValueError for turns out of order.
    """
    return join(opening_prompt(processor), question_prompt(processor, turns, stage, open_answer))


def join(start: Prompt, rest: Prompt) -> Prompt:
    """``opening_prompt`` and what follows it, as one prompt."""
    return Prompt(
        torch.cat((start.ids, rest.ids)), torch.cat((start.labels, rest.labels)), rest.refer_boxes, rest.ground_boxes
    )


def _prompt(ids: list[int], labels: list[int], refer: list[Tensor], ground: list[Tensor]) -> Prompt:
    none = torch.zeros(0, 4)
    return Prompt(torch.tensor(ids), torch.tensor(labels), torch.cat([none, *refer]), torch.cat([none, *ground]))


def _check(turns: Sequence[Turn], open_answer: bool) -> None:
    roles = [turn.role for turn in turns]
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    if not turns or roles != expected or (len(turns) % 2 == 1) != open_answer:
        ending = "ending with a user turn left open" if open_answer else "ending with an assistant turn"
        raise ValueError(f"got turns {roles}, expected user and assistant in turn, {ending}")
    for turn in turns:
        for word in (markup.IMAGE, markup.REGION, markup.EOS):
            if word in turn.text:
                raise ValueError(f"{turn.role} turn {turn.text!r} holds {word}, which only the template may write")
