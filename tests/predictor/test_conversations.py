"""Conversations: turns that cost their own tokens only equal the whole dialogue read anew; answers in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groma import dialogue, markup, predictor
from groma.data.prompts import build_prompt
from groma.decoding import Group
from groma.predictor import Groma
from groma.structures import Answer, Conversation, Prompt, Turn, View
from tests.golden.text_tokenizers import chatml, headers

pytestmark = pytest.mark.usefixtures("quiet_torch")
SHORT = 24
FIRST, SECOND = "What is it?", "And where is the red ball?"


# -- conversations ----------------------------------------------------------------------------------------------------


def test_a_conversation_equals_the_flat_prompt(talker: Groma, seen: View, follows: Callable[..., list[int]]) -> None:
    """Three turns, of which the last two read their own tokens only; boxes and grounding in the middle."""
    asked = [(FIRST, (), True), ("Compare <box> and <box>.", (1, 0), True), (SECOND, (), False)]
    start = build_prompt(talker.processor, [Turn("user", "?")], open_answer=True)
    talk: View | Conversation = seen
    said: list[int] = []
    boxes: list[Tensor] = []
    length = seen.prefix.get_seq_length()
    for text, places, grounded in asked:
        turn = dialogue.question_turn(seen, text, places, grounded)
        boxes.append(turn.boxes)
        opening = start.ids[: len(start.ids) - len(talker.processor.encode("</s>USER: ? ASSISTANT:"))]
        said += talker.processor.encode(f"</s>USER: {turn.text} ASSISTANT:")
        ids = torch.cat((opening, torch.tensor(said)))
        flat = Prompt(ids, torch.full_like(ids, -100), torch.cat(boxes), torch.zeros(0, 4))
        talk = talker.chat(talk, text, places, grounded, SHORT)
        assert talk.answer is not None
        said += follows(talker, seen, flat, talk.answer, SHORT)
        assert talk.prefix.get_seq_length() == length + len(said)  # no slot twice, none left out
    assert [t.role for t in talk.turns] == ["user", "assistant"] * 3


def test_a_conversation_is_a_value(talker: Groma, seen: View) -> None:
    first = talker.chat(seen, FIRST, grounded=True, max_new_tokens=SHORT)
    keys, length = first.prefix.layers[0].keys.clone(), first.prefix.get_seq_length()
    one, other = (talker.chat(first, SECOND, max_new_tokens=SHORT) for _ in range(2))
    assert bytes_of(one.answer) == bytes_of(other.answer)
    assert first.prefix.get_seq_length() == length
    assert torch.equal(first.prefix.layers[0].keys, keys)
    assert bytes_of(talker.ask(first, SECOND, max_new_tokens=SHORT)) == bytes_of(one.answer)


def bytes_of(answer: Answer | None) -> str:
    """Everything but the time it took, to the last digit."""
    assert answer is not None
    return repr(replace(answer, seconds={}))


def test_the_same_question_twice_is_the_same_bytes(talker: Groma, seen: View, picture: Path) -> None:
    again = talker.look(picture, [(8, 16, 40, 32), (30, 4, 60, 44)])
    for grounded in (True, False):
        one, other = (talker.ask(view, FIRST, grounded=grounded, max_new_tokens=SHORT) for view in (seen, again))
        assert bytes_of(one) == bytes_of(other)
    assert bytes_of(talker.refer(seen, "the ball")) == bytes_of(talker.refer(again, "the ball"))


def test_history_equals_the_whole_dialogue_as_a_prompt(
    talker: Groma, seen: View, follows: Callable[..., list[int]]
) -> None:
    earlier = talker.ask(seen, FIRST, grounded=True, max_new_tokens=SHORT)
    said = "A <p>red cup</p><roi><r1></roi> and <not> [more]."
    turns = [
        Turn("user", f"[grounding] {FIRST}"), dialogue.answer_turn(seen, earlier.raw),
        Turn("user", "[grounding] Sure?"),
        Turn("assistant", "A <p>red cup</p><roi><ground_box></roi> and "
             + markup.escape("<not> [more]."), seen.proposals.boxes[1:2]),
        Turn("user", f"[grounding] {SECOND}"),
    ]  # fmt: skip
    prompt = build_prompt(talker.processor, turns, open_answer=True)
    answer = talker.ask(seen, SECOND, (), True, [(FIRST, earlier), ("Sure?", said)], SHORT)
    follows(talker, seen, prompt, answer, SHORT)
    talk = talker.resume(seen, turns[:-1])
    resumed = talker.ask(talk, SECOND, (), True, max_new_tokens=SHORT)  # read in two steps, not one
    assert (resumed.raw, resumed.spans[0].boxes) == (answer.raw, answer.spans[0].boxes)
    assert resumed.scores == pytest.approx(answer.scores, rel=1e-4)


@pytest.mark.parametrize("maker, end, user, assistant", [
    (chatml, "<|im_end|>", "\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    (headers, "<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\n",
     "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
])  # fmt: skip
def test_turns_follow_each_other_in_a_template_of_the_language_models_own(
    maker: Callable[[], Any], end: str, user: str, assistant: str, seen: View
) -> None:
    processor = maker()
    said = (Turn("user", "12 chairs?"), dialogue.answer_turn(seen, "No: <p>a cup</p><roi><r1></roi>."))
    asked = dialogue.question_turn(seen, "Is <box> red?", [0])
    following = dialogue.next_prompt(processor, said, [asked])
    text = "".join(str(processor.tokenizer.decode([i], skip_special_tokens=False)) for i in following.ids.tolist())
    assert text == f"{end}{user}Is<roi><refer_box></roi><refer_feat>red?{assistant}"
    assert torch.equal(following.refer_boxes, seen.proposals.boxes[:1])
    flat = build_prompt(processor, [*said, asked], open_answer=True).ids.tolist()
    assert flat[-len(following.ids) :] == following.ids.tolist()
    before = dialogue.said_prompt(processor, said)
    assert before.ids[-1] == processor.encode(".")[-1]  # without the end, which follows
    assert len(before.ground_boxes) == 1


def test_resume_finds_regions_again_on_another_view(talker: Groma, seen: View, picture: Path) -> None:
    said = "The <p>ball</p><roi><r1><r3></roi>."
    turns = (dialogue.question_turn(seen, "Where is it?", [0]), dialogue.answer_turn(seen, said))
    more = talker.look(picture, [(2, 2, 20, 20), (8, 16, 40, 32), (30, 4, 60, 44)])  # every region one further
    assert torch.equal(more.proposals.boxes[1:3], seen.proposals.boxes[:2])
    moved = int((more.proposals.boxes == seen.proposals.boxes[3]).all(1).nonzero()[0])
    talk = talker.resume(more, turns)
    ids = talker.model.splice([more], [dialogue.said_prompt(talker.processor, turns)]).ids[0].tolist()
    proxies = talker.model.config.proxy_ids
    assert [proxies.index(i) for i in ids if i in proxies] == [1, 2, moved]
    assert talk.prefix.get_seq_length() == more.prefix.get_seq_length() + len(ids)
    assert talker.resume(more, ()).prefix is more.prefix


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_pieces_are_the_answer(talkative: Callable[..., Groma], picture: Path, seed: int) -> None:
    groma = talkative(seed)
    view = groma.look(picture)
    whole = groma.ask(view, FIRST, grounded=True, max_new_tokens=40)
    pieces = list(groma.stream(view, FIRST, grounded=True, max_new_tokens=40))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert len(pieces) > 4, "it is a stream"
    assert all(piece.conversation is None for piece in pieces[:-1])
    last = pieces[-1].conversation
    assert last is not None and last.answer is not None
    assert replace(last.answer, seconds={}) == replace(whole, seconds={})
    shown = ""
    for piece in pieces:
        shown += piece.text
        assert whole.text.startswith(shown)
        assert not any(word in shown for word in ("<p", "</", "<roi", "<r1"))


def test_letters_of_several_bytes_are_shown_whole(talker: Groma, seen: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model wrote these words: a stream must put bytes of one letter together, and not show half a word."""
    words = ["Ein", " Männchen", "🍎", "<p>", "日本", "</p>", "<roi>", "<r1>", "</roi>", "’s", " <r5>", " end"]
    encode, special = talker.processor.encode, talker.model.config.new_token_ids
    tokens = [i for w in words for i in ([special[w]] if w in special else encode(markup.escape(w)))]
    assert len(tokens) > len(words) + 10  # letters come in bytes

    class Line:
        groups = [Group((1,), (1.0,), torch.ones(1))]
        ended = cut = False
        tokens: list[int] = []

    def writing(*_: Any) -> Any:
        for count in range(1, len(tokens) + 1):
            Line.tokens = tokens[:count]
            yield [Line], predictor.Context(seen.prefix, torch.ones(1, 1))

    monkeypatch.setattr(talker, "_writing", writing)
    pieces = [piece.text for piece in talker.stream(seen, FIRST)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == markup.parse(talker.processor.decode(tokens))[0]
    assert "🍎" in "".join(pieces) and "日本’s" in "".join(pieces) and "<r5>" in "".join(pieces)
