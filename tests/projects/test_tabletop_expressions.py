"""Expressions on scenes made by hand: unique, clear, and never wrong about what is hidden."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("vtkmodules")

from projects.tabletop.absent import absent_phrase
from projects.tabletop.captions import conversation, grounded_caption
from projects.tabletop.expressions import _WRITERS, sample_expressions
from projects.tabletop.observed import Thing
from projects.tabletop.phrases import matching, names_pair
from projects.tabletop.relations import behind, between, in_front_of, larger, left_of
from projects.tabletop.vocabulary import COLOURS, HELD_OUT, KINDS, pairs, plural

WIDTH = 640
EVERY = pairs("test")


def thing(words: str, x: int, distance: float = 8.0, side: int = 80, annotated: bool = True) -> Thing:
    """thing("small shiny red cup", x=100): a square of a thing whose centre is at x."""
    size, finish, colour, kind = words.split()
    box = (x - side // 2, 200, x + side // 2, 200 + side)
    return Thing(
        kind=kind,
        colour=colour,
        size=size,
        finish=finish,
        box=box if annotated else None,
        area=side * side if annotated else 0,
        whole_area=side * side,
        whole_box=tuple(map(float, box)),
        distance=distance,
        scale=1.04 if size == "large" else 0.64,
        annotated=annotated,
    )


def said(things: tuple[Thing, ...], *writers: str) -> dict[str, tuple[int, ...]]:
    """Everything that could be said of a scene, by these writers or by all."""
    return {e.text: e.referents for name in writers or _WRITERS for e in _WRITERS[name](things, WIDTH)}


RED_CUP = thing("large matte red cup", 100)
BLUE_CUP = thing("small shiny blue cup", 500, side=50)
BOOK = thing("small matte blue book", 300)
SCENE = (RED_CUP, BLUE_CUP, BOOK)


def test_plain_phrases_name_one_thing() -> None:
    assert said(SCENE, "kind") == {"the book": (2,)}
    assert said(SCENE, "colour_kind") == {"the red cup": (0,), "the blue cup": (1,), "the blue book": (2,)}
    finishes = said(SCENE, "finish")
    assert finishes["the shiny cup"] == (1,)
    assert finishes["the matte red cup"] == (0,)


def test_size_needs_to_be_seen_as_well_as_true() -> None:
    assert said(SCENE, "size")["the large cup"] == (0,)
    near_small = replace(BLUE_CUP, whole_area=RED_CUP.whole_area)
    assert "the large cup" not in said((RED_CUP, near_small, BOOK), "size")


def test_relations_pick_among_rivals() -> None:
    found = said(SCENE)
    assert found["the cup to the left of the book"] == (0,)
    assert found["the cup right of the blue book"] == (1,)
    assert found["the book between the red cup and the blue cup"] == (2,)


def test_a_margin_too_small_is_not_said() -> None:
    close = (replace(RED_CUP, box=(250, 200, 330, 280)), BLUE_CUP, BOOK)  # centre 290, the book's is 300
    assert left_of(close[0], BOOK, WIDTH) is None
    assert not [text for text in said(close, "side") if text.startswith("the red cup") and "book" in text]
    # An unclear rival spoils the phrase for the clear one too.
    assert "the cup right of the book" in said(SCENE, "side")
    assert "the cup left of the blue book" not in said(close, "side")


@pytest.mark.parametrize(
    ("near", "far", "apart", "expected"),
    [(6.0, 8.0, 0, True), (8.0, 6.0, 0, False), (7.8, 8.0, 0, None), (6.0, 8.0, 400, False)],
)
def test_in_front_of(near: float, far: float, apart: int, expected: bool | None) -> None:
    a, b = thing("large matte red cup", 100 + apart, near), thing("large matte blue book", 100, far)
    assert in_front_of(a, b, WIDTH) is expected
    assert behind(b, a, WIDTH) is expected


def test_between_wants_a_common_line() -> None:
    left, right = thing("large matte red cup", 100), thing("large matte red can", 500)
    assert between(thing("small matte red ball", 300), left, right, WIDTH) is True
    assert between(thing("small matte red ball", 300, distance=12.0), left, right, WIDTH) is False
    assert between(thing("small matte red ball", 300, distance=9.5), left, right, WIDTH) is None


def test_superlatives() -> None:
    found = said(SCENE, "superlative")
    assert found["the largest cup"] == (0,)
    assert found["the smallest cup"] == (1,)
    assert found["the leftmost object"] == (0,)
    assert found["the rightmost cup"] == (1,)
    assert "the nearest cup" not in found  # both stand at the same distance
    assert larger(RED_CUP, replace(RED_CUP, whole_area=RED_CUP.whole_area * 2)) is None


def test_plurals_name_all_of_them() -> None:
    twins = (*SCENE, thing("small matte red cup", 400))
    found = said(twins, "plural")
    assert found["all the cups"] == (0, 1, 3)
    assert found["all the red cups"] == (0, 3)
    assert "all the books" not in found


def test_a_hidden_thing_makes_phrases_ambiguous_but_is_never_named() -> None:
    hidden = (*SCENE, thing("small shiny blue book", 320, annotated=False))
    found = said(hidden)
    assert not [text for text in found if "the book" in text or "the blue book" in text]
    assert "all the books" not in found
    assert not [text for text in said(hidden, "superlative") if "object" in text]
    assert all(3 not in referents for referents in found.values())


def test_absent_phrases_fit_nothing_even_hidden() -> None:
    hidden = (*SCENE, thing("small shiny green vase", 320, annotated=False))
    rng = np.random.default_rng(0)
    phrases = {absent_phrase(hidden, WIDTH, rng, EVERY) for _ in range(1500)} - {""}
    assert len(phrases) > 60
    assert not phrases & {"the vase", "the green vase", "the shiny green vase", "the red cup", "the book"}
    assert {"the green cup", "the red book", "the shiny red cup", "the red cup to the right of the book"} <= phrases
    for colour in COLOURS:
        for kind in KINDS:
            if matching(hidden, kind, colour):
                assert not phrases & {f"the {colour} {kind}", f"all the {colour} {plural(kind)}"}


def test_held_out_pairs_are_not_named_in_training() -> None:
    rng = np.random.default_rng(1)
    for _ in range(150):
        for entry in sample_expressions(SCENE, WIDTH, rng, pairs("train")):
            assert not any(names_pair(entry.text, pair) for pair in HELD_OUT), entry.text
            assert not entry.unseen_pair
        for question, answer in conversation(SCENE, rng, pairs("train")):
            assert not any(names_pair(question + " " + answer, pair) for pair in HELD_OUT)


def test_unseen_pairs_are_flagged() -> None:
    scene = (thing("large matte purple cup", 100), BOOK)
    rng = np.random.default_rng(2)
    entries = [e for _ in range(20) for e in sample_expressions(scene, WIDTH, rng, EVERY)]
    flags = {e.text: e.unseen_pair for e in entries}
    assert flags["the purple cup"] is True
    assert flags["the cup"] is False


def test_held_out_pairs_cover_kinds_and_colours() -> None:
    assert len(HELD_OUT) == 12
    assert {kind for _, kind in HELD_OUT} == set(KINDS)
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert ("red", "cup") not in HELD_OUT


def test_caption_spans_are_the_phrases() -> None:
    rng = np.random.default_rng(3)
    scene = (*SCENE, thing("small matte red cup", 400), thing("large matte green can", 600, annotated=False))
    for _ in range(60):
        caption = grounded_caption(scene, WIDTH, rng)
        named = [slot for mention in caption.mentions for slot in mention.referents]
        assert len(named) == len(set(named))
        assert 4 not in named
        for mention in caption.mentions:
            words = caption.text[mention.start : mention.end].lower().split()
            for slot in mention.referents:
                assert scene[slot].colour in words
                assert words[-1] in (scene[slot].kind, plural(scene[slot].kind))


def test_answers_are_true() -> None:
    rng = np.random.default_rng(4)
    asked = dict(pair for _ in range(300) for pair in conversation(SCENE, rng, EVERY))
    assert asked["How many cups are there?"] == "There are two cups."
    assert asked["How many objects are on the table?"] == "There are three objects on the table."
    assert asked["What colour is the book?"] == "The book is blue."
    assert asked["Is there a red cup?"] == "Yes, there is a red cup."
    assert asked["Is there a green cup?"] == "No, there is no green cup."
    hidden = (*SCENE, thing("small shiny red cup", 320, annotated=False))
    asked = dict(pair for _ in range(300) for pair in conversation(hidden, rng, EVERY))
    assert "How many cups are there?" not in asked
    assert "How many objects are on the table?" not in asked
