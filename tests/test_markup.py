"""The grounded-text grammar: our words are special, outside text is inert, broken markup grounds nothing."""

from __future__ import annotations

import time

import pytest

from groma import markup
from groma.markup import Mention, escape, parse, split, unescape

HOSTILE = [
    "<r5>", "</s>", "<image>", "[grounding]", "<p>x</p><roi><r1></roi>", "<<r1>>", "<r1", "r1>", "[PAD]", "[[PAD]]",
    "<ref<r3>er_box>", "<s><s>", "a < b > c", "<r0><r0>", "", " ", "\n<r1>\n", "日本<r2>語", "\x00<r1>",
]  # fmt: skip


def test_vocabulary_has_the_published_order() -> None:
    assert len(markup.SPECIAL_WORDS) == 17
    assert len(markup.words()) == 117 == len(set(markup.words()))
    assert markup.words(2)[-3:] == ("[grounding]", "<r0>", "<r1>")
    expected = (
        "[PAD] <s> </s> <unk> <sep> <img> </img> <roi> </roi> <p> </p> <image> <region> <refer_box> <ground_box> "
        "<refer_feat> [grounding]"
    )
    assert " ".join(markup.SPECIAL_WORDS) == expected
    assert markup.proxy(42) == "<r42>"


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_is_inert_and_comes_back(text: str) -> None:
    escaped = escape(text)
    assert unescape(escaped) == text
    assert split(escaped) == ([(text, False)] if text else [])
    assert parse(escaped) == (text, [])
    for word in markup.words():  # nor does it join with what stands beside it
        assert word not in escaped
    assert split(f"<p>{escaped}</p>") == [(p, s) for p, s in [("<p>", True), (text, False), ("</p>", True)] if p]


@pytest.mark.parametrize("text", ["\ue000r5>", "\ue001grounding]", "\ue000/s>"])
def test_typed_stand_ins_are_inert_too(text: str) -> None:
    assert all(not special for _, special in split(escape(text)))
    assert parse(f"<p>{escape(text)}</p><roi><r1></roi>")[1][0].regions == (1,)


SPLITS = [
    ("", []),
    ("plain", [("plain", False)]),
    ("<r0>", [("<r0>", True)]),
    ("a<r10>b", [("a", False), ("<r10>", True), ("b", False)]),
    ("<roi><r3><r17></roi>", [("<roi>", True), ("<r3>", True), ("<r17>", True), ("</roi>", True)]),
    ("<r007>", [("<r007>", False)]),  # no proxy is written like this
    ("<r-1><r1.5><R1><r 1>", [("<r-1><r1.5><R1><r 1>", False)]),
    ("<sep></s>", [("<sep>", True), ("</s>", True)]),  # <s> is no part of <sep>
    ("<p ><P>[grounding]", [("<p ><P>", False), ("[grounding]", True)]),
    (" <p> ", [(" ", False), ("<p>", True), (" ", False)]),
    ("a < b", [("a < b", False)]),
]


@pytest.mark.parametrize("text, pieces", SPLITS)
def test_split(text: str, pieces: list[tuple[str, bool]]) -> None:
    assert split(text) == pieces
    assert "".join(piece for piece, _ in pieces) == text


PARSES = [
    ("", "", []),
    ("Just words.", "Just words.", []),
    ("The <p>red cup</p><roi><r3></roi>.", "The red cup.", [Mention("red cup", 4, 11, (3,))]),
    ("<p>two books</p> <roi> <r0> <r7> </roi>", "two books", [Mention("two books", 0, 9, (0, 7))]),
    ("<p>a</p><roi><r1></roi> and <p>b</p><roi><r2></roi>", "a and b",
     [Mention("a", 0, 1, (1,)), Mention("b", 6, 7, (2,))]),
    ("<roi><r4></roi>", "", [Mention("", 0, 0, (4,))]),
    ("See <r2>!", "See !", [Mention("", 4, 4, (2,))]),  # a proxy outside any group
    ("<p>a\nb</p><roi><r1></roi>", "a\nb", [Mention("a\nb", 0, 3, (1,))]),
    ("<p></p><roi><r1></roi>", "", [Mention("", 0, 0, (1,))]),
    ("<roi><r1><r1></roi>", "", [Mention("", 0, 0, (1, 1))]),
    ("<p>\ue000r9></p><roi><r1></roi>", "<r9>", [Mention("<r9>", 0, 4, (1,))]),  # escaped words count when unescaped
    # malformed: nothing is grounded, no tag stays
    ("<p>a cup</p>", "a cup", []),
    ("<p>a cup", "a cup", []),
    ("a cup</p></roi>", "a cup", []),
    ("<p>a cup</p><roi></roi>", "a cup", []),
    ("<p>a cup</p><roi>there</roi>", "a cupthere", []),
    ("</p><p></roi><roi>", "", []),
    ("[grounding] Hi</s>", " Hi", []),
    # malformed with loose proxies: those are kept as mentions without a phrase
    ("<p>a</p><roi><r1>", "a", [Mention("", 1, 1, (1,))]),
    ("<p>a</p><r1></roi>", "a", [Mention("", 1, 1, (1,))]),
    ("<roi><r1> and <r2></roi>", " and ", [Mention("", 0, 0, (1,)), Mention("", 5, 5, (2,))]),
    # text between phrase and group: the group has no phrase
    ("<p>a</p> is <roi><r1></roi>", "a is ", [Mention("", 5, 5, (1,))]),
]  # fmt: skip


@pytest.mark.parametrize("text, clean, mentions", PARSES)
def test_parse(text: str, clean: str, mentions: list[Mention]) -> None:
    assert parse(text) == (clean, mentions)


def test_a_phrase_without_a_group_does_not_take_the_next_one() -> None:
    assert parse("<p>a</p> by <p>b</p><roi><r1></roi>") == ("a by b", [Mention("b", 5, 6, (1,))])


@pytest.mark.parametrize("text", [
    "<p>a <p>cup</p><roi><r1></roi></p>", "<roi><roi><r1></roi></roi>", "<p><p>x</p></p><roi><r0></roi><r3>",
    "<p>a</p> b <p>c</p><roi><r1></roi>", "<p><r1></p><roi><r2></roi>",
])  # fmt: skip
def test_nested_markup_leaves_no_tag_and_true_offsets(text: str) -> None:
    clean, mentions = parse(text)
    assert "<" not in clean
    assert ">" not in clean
    for mention in mentions:
        assert clean[mention.start : mention.end] == mention.phrase
    assert sorted(r for m in mentions for r in m.regions) == sorted(int(c) for c in text if c.isdigit())


@pytest.mark.parametrize("unit", ["<p>", "<roi>", "<p>a</p>", "<r1>", "<roi><r1>", "<", " ", "<p></p> "])
def test_long_broken_markup_is_quick(unit: str) -> None:
    start = time.process_time()
    parse(unit * 2000)
    assert time.process_time() - start < 2
