"""The prompt template: fixed texts, questions by task, and dialogues to token ids.

A prompt is tokenised in parts, so that it always starts with the ids of ``opening_prompt``, whatever follows, and so
that what a user wrote changes no token of the template::

    <s>SYSTEM USER: Here is an image … ASSISTANT: Thank you … with it?          opening_prompt
    </s>USER: Locate <p>the red cup</p> in the image. ASSISTANT:                question_prompt, stage "instruct"
    <roi><ground_box></roi></s>                                                 labels: the answer and its end

This is the published template, for tokenizers that bring none. It differs from the original's in two points: white
space around a turn is dropped (the original keeps a user's, and one at the end changes the tokens of "ASSISTANT:"), and
in stage "align", which puts a space where "instruct" has ``</s>`` after the opening, answers end with ``</s>`` all the
same (the published alignment targets have no end, and such a model never stops).

A language model with a chat template of its own is spoken to in that one, with the same turns and the same opening pair
in both stages; labels are the answers and the word that ends them::

    <|im_start|>system … with it?<|im_end|> <|im_start|>user                    opening_prompt
    Locate <p>the red cup</p> in the image.<|im_end|> <|im_start|>assistant     question_prompt
    <roi><ground_box></roi><|im_end|>                                           labels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from groma import markup
from groma.structures import Prompt, Turn
from groma.template import ASSISTANT, OPENING_ANSWER, OPENING_QUESTION, SYSTEM, USER
from groma.tokenization import Part

if TYPE_CHECKING:
    from groma.processor import GromaProcessor

Stage = Literal["align", "instruct"]
IGNORE = -100
"""The label of a position without loss."""

USER_BOX = f"{markup.ROI_OPEN}{markup.REFER_BOX}{markup.ROI_CLOSE}{markup.REFER_FEAT}"
"""The place of a user's box in a question: its proxy word and its feature."""

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
    return DESCRIBE[template % len(DESCRIBE)].format(USER_BOX)


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
    """System text and opening pair: the start that all prompts of a processor share, without labels."""
    if processor.own_template:
        ids = processor.encode(_head(processor.frames(1, True)[0]))
    else:
        ids = processor.encode(f"{markup.BOS}{SYSTEM} {USER} {OPENING_QUESTION} {ASSISTANT} {OPENING_ANSWER}")
    return _prompt(ids, [IGNORE] * len(ids), [], [])


def question_prompt(
    processor: GromaProcessor, turns: Sequence[Turn], stage: Stage = "instruct", open_answer: bool = True
) -> Prompt:
    """What follows ``opening_prompt``: the given turns; ends in the head of an answer if ``open_answer``.

    Labels stand on the answers of ``turns`` and what ends them. Raises ValueError for turns out of order, and for a
    chat template that changes the opening by what follows it.
    """
    _check(turns, open_answer)
    if processor.own_template:
        ids, labels = _by_template(processor, turns, open_answer)
    else:
        ids, labels = _as_published(processor, turns, stage)
    boxes = {role: [turn.boxes for turn in turns if turn.role == role] for role in ("user", "assistant")}
    return _prompt(ids, labels, boxes["user"], boxes["assistant"])


def answer_ids(processor: GromaProcessor, text: str) -> list[int]:
    """Ids of an answer (markup) as it stands in a dialogue, without its end."""
    if not processor.own_template:
        return processor.encode_parts([Part(text.strip())])[0]
    return _content(processor, processor.frames(2, False)[1], text)


def _as_published(processor: GromaProcessor, turns: Sequence[Turn], stage: Stage) -> tuple[list[int], list[int]]:
    end = processor.word_id(markup.EOS)
    inside = stage == "align"  # the opening goes on; every later turn follows a </s>
    ids = [] if inside else [end]
    labels = [IGNORE] * len(ids)
    for turn in turns:
        if turn.role == "user":
            head = Part(f" {USER}" if inside else USER, template=True)
            parts = [head, Part(f" {turn.text.strip()}"), Part(f" {ASSISTANT}", template=True)]
            new = [token for row in processor.encode_parts(parts, inside) for token in row]
            labels += [IGNORE] * len(new)
            inside = False
        else:
            new = [*answer_ids(processor, turn.text), end]
            labels += new
        ids += new
    return ids, labels


def _by_template(processor: GromaProcessor, turns: Sequence[Turn], open_answer: bool) -> tuple[list[int], list[int]]:
    frames = processor.frames(len(turns), open_answer)
    if frames[0] != processor.frames(1, True)[0]:
        raise ValueError("chat template: what it writes before the first question depends on what comes after it")
    ids: list[int] = []
    labels: list[int] = []
    for turn, before, after in zip(turns, frames[:-1], frames[1:], strict=True):
        new = _content(processor, before, turn.text)
        rest = processor.encode_parts([Part(_head(after), template=True)], inside=True)[0]
        learned = 0
        if turn.role == "assistant":
            ends = [i for i, token in enumerate(rest) if processor.is_special(token)]
            learned = len(new) + 1 + ends[0]
        ids += new + rest
        labels += (new + rest)[:learned] + [IGNORE] * (len(new) + len(rest) - learned)
    return ids, labels


def _head(frame: str) -> str:
    """A frame without the spaces at its end: those are tokens of the text that follows."""
    return frame.rstrip(" ")


def _content(processor: GromaProcessor, frame: str, text: str) -> list[int]:
    """Ids of a turn's text after ``frame``, to which it may owe the spaces it starts with."""
    head = _head(frame)
    parts = [Part(head, template=True), Part(" " * (len(frame) - len(head)) + text.strip())]
    return processor.encode_parts(parts, inside=True)[1]


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
