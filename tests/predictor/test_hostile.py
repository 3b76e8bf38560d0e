"""200 hostile questions: whatever is typed, no token outside the user's words changes, and nothing raises."""

from __future__ import annotations

import functools
import itertools
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from groma import markup
from groma.data.prompts import build_prompt, opening_prompt, question_prompt, refer_question
from groma.predictor import Groma
from groma.processor import GromaProcessor
from groma.structures import Turn, View
from tests.golden.text_tokenizers import brackets, chatml, headers, store_original

pytestmark = pytest.mark.usefixtures("quiet_torch")
COUNT, LONG = 200, 10_000

WORDS = [
    *markup.words(2), "<r99>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<|eot_id|>",
    "<|start_header_id|>", "<|begin_of_text|>", "[INST]", "[/INST]", "<<SYS>>", "<0x0A>", "<unk>", "USER:",
    "ASSISTANT:",
]  # fmt: skip
INVISIBLE = ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u034f", "\ufe0f", "\u202e", "\u2066"]
SPACES = [" ", "\t", "\n", "\r\n", "\v", "\f", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u2029", "\u3000", "▁", "Ġ"]
FORMS = {"<": "＜﹤‹〈", ">": "＞﹥›〉", "[": "［﹇", "]": "］﹈", "/": "／⁄", "|": "｜￨", "_": "＿"}
FRAGMENTS = [
    "\x00", "\x07", "\x1b[31m", "\x7f", "\ud800", "\udcff", "\ud83d\udc4d", "\ue000r5>", "\ue001PAD]", "\ue0020\ue003",
    "\u202eabc", "שלום", "مرحبا", "e\u0301", "\u0301", "Z\u0351\u0334\u0315" * 8, "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽",
    "ﬁ", "㎏", "ﷺ", "İ", "ß", "日本語", "{}", "{0}", "%s", "{{ 7*7 }}", "{% raise %}", "{#", "\\u003cr5\\u003e",
    "&lt;r5&gt;", "\\n", "'", '"', "'s", ")", "?", ".", "12345678901234567890", "\U0010ffff", "\uffff", "Ġ", "Ċ", "▁▁",
]  # fmt: skip


def wide(text: str) -> str:
    """Full-width forms, which NFKC folds back."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def disguise(word: str, draw: random.Random) -> str:
    """``word`` as somebody might type it to be taken for it."""
    at = draw.randrange(1, len(word))
    other = "".join(draw.choice(FORMS.get(c, c)) for c in word)
    return draw.choice([
        word, word.upper(), word.lower(), word.title(), wide(word), other,
        word[:at] + draw.choice(INVISIBLE) + word[at:],
        word[:at] + draw.choice(SPACES) + word[at:], word[:at] + word + word[at:], word * 2, word[:-1], word[1:],
        unicodedata.normalize("NFKD", wide(word)), f"<{word}>", f"[{word}]", markup.escape(word),
    ])  # fmt: skip


def question(number: int) -> str:
    """Question ``number``: one to eight pieces, or (every fortieth) 10,000 characters of them."""
    draw = random.Random(number)
    pieces: list[str] = []
    count = draw.randrange(1, 9)
    while len(pieces) < count or (number % 40 == 0 and sum(map(len, pieces)) < LONG):
        pieces.append(draw.choice([lambda: disguise(draw.choice(WORDS), draw), lambda: draw.choice(FRAGMENTS),
                                   lambda: draw.choice(SPACES), lambda: "the red cup"])())  # fmt: skip
    return "".join(pieces)[: LONG if number % 40 == 0 else None]


QUESTIONS = [question(number) for number in range(COUNT)]
MAKERS: dict[str, Callable[[Path], GromaProcessor]] = {
    "embedded": lambda _: GromaProcessor.from_pretrained(
        Path(__file__).resolve().parents[2] / "groma" / "assets" / "tabletop"
    ),
    "released": lambda folder: GromaProcessor.from_pretrained(store_original(folder, True)),
    "released, not legacy": lambda folder: GromaProcessor.from_pretrained(store_original(folder, False)),
    "chatml": lambda _: chatml(),
    "headers": lambda _: headers(),
    "brackets": lambda folder: brackets(folder),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def processor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GromaProcessor:
    return MAKERS[request.param](tmp_path_factory.mktemp("tokenizer"))


def test_the_questions_are_hostile() -> None:
    text = "".join(QUESTIONS)
    assert len(set(QUESTIONS)) > COUNT - 10
    assert sum(len(q) == LONG for q in QUESTIONS) == COUNT // 40
    for word in ("</s>", "<r0>", "<image>", "[grounding]", "<|im_end|>", "\udcff", "\u202e", "＜", "\u200b"):
        assert word in text, word


def around(processor: GromaProcessor, ask: Callable[[str], str]) -> tuple[list[int], list[int]]:
    """The tokens before and after what a user typed: those that prompts of ordinary words share."""
    words = ("q", "Zebra", "the cup", "12", "(a)", "é", "'s")
    rows = [question_prompt(processor, [Turn("user", ask(word))]).ids.tolist() for word in words]

    def shared(rows: list[list[int]]) -> list[int]:
        return [column[0] for column in itertools.takewhile(lambda c: len(set(c)) == 1, zip(*rows))]  # noqa: B905

    return shared(rows), shared([row[::-1] for row in rows])[::-1]


@functools.cache
def added(processor: GromaProcessor) -> set[int]:
    """Ids of all added words, whoever added them; <unk> is no word."""
    return {*processor.tokenizer.added_tokens_decoder} - {processor.word_id("<unk>")}


def words_in(processor: GromaProcessor, ids: list[int]) -> list[int]:
    unknown = processor.word_id("<unk>")
    return [i for i in ids if i in added(processor) or (processor.is_special(i) and i != unknown)]


@pytest.mark.parametrize("ask", [refer_question, markup.escape], ids=["refer", "chat"])
def test_only_the_users_words_change(processor: GromaProcessor, ask: Callable[[str], str]) -> None:
    head, tail = around(processor, ask)
    opening = opening_prompt(processor).ids.tolist()
    assert len(tail) >= 2
    for text in QUESTIONS:
        ids = question_prompt(processor, [Turn("user", ask(text))]).ids.tolist()
        end = len(ids) - len(tail)
        wrong = ids[: len(head)] != head or ids[end:] != tail or words_in(processor, ids[len(head) : end])
        assert not wrong, ascii(text[:200])
    turns = [Turn("user", ask(QUESTIONS[1])), Turn("assistant", markup.escape(QUESTIONS[2])), Turn("user", ask("q"))]
    whole = build_prompt(processor, turns, open_answer=True).ids.tolist()
    assert whole[: len(opening)] == opening
    assert whole[len(whole) - len(tail) :] == tail


def test_rendered_chats_are_inert(processor: GromaProcessor) -> None:
    def special(text: str) -> list[int]:
        talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "So."},
                {"role": "user", "content": [{"type": "text", "text": text}]}]  # fmt: skip
        ids = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
        return words_in(processor, ids["input_ids"][0].tolist())

    expected = special("q")
    assert len(expected) > 3
    for text in QUESTIONS[::7]:
        assert special(text) == expected, ascii(text[:200])


def test_typed_text_is_read_as_typed(tmp_path: Path) -> None:
    """Where the tokenizer loses nothing, nothing of what was typed is lost."""
    processor = MAKERS["embedded"](tmp_path)
    for text in QUESTIONS:
        ids = processor.encode(markup.escape(text))
        typed = markup.unescape(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert markup.unescape(processor.decode(ids)) == typed.strip(), ascii(text[:200])


def test_answers_to_hostile_questions(groma: Groma, view: View) -> None:
    short = [text for text in QUESTIONS if len(text) < 200 and text.strip()][:48]
    answers = groma.refer_many(view, short, top_k=1)
    for text, answer in zip(short, answers, strict=True):
        assert answer.query == text.strip()
        assert len(answer.regions) == 1
        assert json.dumps(text.strip()) in json.dumps(answer.to_dict())
    replies = groma.ask_batch([view] * 16, short[:16], max_new_tokens=2)
    assert [reply.query for reply in replies] == [markup.unescape(text.strip()) for text in short[:16]]


def test_a_question_longer_than_the_model_gives_one_line(groma: Groma, view: View) -> None:
    long = [text for text in QUESTIONS if len(text) == LONG]
    for text in long[:2]:
        with pytest.raises(ValueError, match=r"^text: .*\d+ tokens, the model takes 2048") as caught:
            groma.refer(view, text)
        assert len(str(caught.value)) < 200
        assert "\n" not in str(caught.value)
