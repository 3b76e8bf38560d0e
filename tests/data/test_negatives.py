"""Absent referents: never a word in common, the share asked for, the same draws each time, none where none fits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groma import markup
from groma.data.detection import Detection
from groma.data.grounding import DetectionByWords, GroundedCaptions, Referring, RegionCaptions
from groma.data.negatives import Negatives, content, fold, phrases
from groma.data.prompts import build_prompt, opening_turns
from groma.data.refer import Refer
from groma.data.vg import VisualGenome
from groma.processor import GromaProcessor
from groma.structures import Sample, Turn

Write = Callable[[str, Any], Path]
Coco = Callable[..., dict[str, Any]]
THINGS = ("cup", "bowl", "vase", "horse", "zebra", "kite", "piano", "laptop", "carrot", "bridge", "tractor", "anchor")
BOX = {"bbox": [10, 5, 20, 10]}


@pytest.fixture
def rec(write: Write, coco: Coco) -> Any:
    """rec(count, turns): Referring over ``count`` pictures, with three expressions each for one thing of THINGS."""

    def make(count: int = 12, turns: int = 8) -> Referring:
        images = [
            {"file_name": f"{i}.png", "caption": words.format(THINGS[i % len(THINGS)])}
            for i in range(count)
            for words in ("the {} on the left", "{}s", "red {}")
        ]
        annotations = [{"image_id": i, **BOX} for i in range(len(images))]
        return Referring(write("rec.json", coco(images, annotations)), "/im", turns=turns)

    return make


def asked(sample: Sample) -> list[str]:
    """The expressions that are answered by nothing."""
    pairs = zip(sample.turns[::2], sample.turns[1::2], strict=True)
    return [
        markup.unescape(q.text).split("<p>")[1].split("</p>")[0]
        for q, a in pairs
        if a.text == f"<roi></roi>{markup.NOTHING}" and not len(a.boxes)
    ]


def test_one_more_turn(rec: Any) -> None:
    plain, data = rec(), Negatives(rec(), 1.0)
    for i in range(len(data)):
        assert len(data[i].turns) == len(plain[i].turns) + 2
        (expression,) = asked(data[i])
        assert THINGS[i] not in expression
        assert [t.text for t in data[i].turns if t.text in {u.text for u in plain[i].turns}]
    places = {next(k for k, t in enumerate(data[i].turns) if markup.NOTHING in t.text) for i in range(len(data))}
    assert len(places) > 1  # at a place drawn


def test_at_the_limit_of_turns_one_is_replaced(rec: Any) -> None:
    for turns in (1, 3):
        data = Negatives(rec(turns=turns), 1.0)
        assert {(len(s.turns), len(asked(s))) for s in data} == {(2 * turns, 1)}


def test_never_a_word_in_common(shared_data: Path) -> None:
    """Over real region descriptions, whose images share most of their words."""
    real = shared_data / "vg_region_sample/region_descriptions.json"
    plain = VisualGenome(real, "/im", turns=3)
    data = Negatives(VisualGenome(real, "/im", turns=2), 1.0)
    known = [{word for phrase, _ in regions for word in content(phrase)} for _, _, regions in plain.entries]
    count = 0
    for epoch in range(15):
        data.set_epoch(epoch)
        for i, sample in enumerate(data):
            for expression in asked(sample):
                count += 1
                assert content(expression) and not content(expression) & known[i], expression
    assert count > 10


def test_of_an_image_all_is_known_not_what_was_drawn(write: Write, coco: Coco) -> None:
    """One turn is drawn of two, and the other one's thing is in the picture all the same."""
    images = [{"file_name": f"{i % 2}.png", "caption": c} for i, c in enumerate(("cup", "vase", "vase", "kite"))]
    data = Negatives(
        Referring(write("r.json", coco(images, [{"image_id": i, **BOX} for i in range(4)])), "/im", 1), 1.0
    )
    found = set()
    for epoch in range(20):
        data.set_epoch(epoch)
        found |= {(i, expression) for i in range(2) for expression in asked(data[i])}
    assert found == {(0, "kite"), (1, "cup")}


def test_the_sentences_beside_are_known(write: Write, coco: Coco) -> None:
    """Two captions of one picture are two records; what one says is in the picture of the other."""
    images = [{"file_name": name, "caption": c} for name, c in (("a", "a cup"), ("a", "a vase"), ("b", "a kite"))]
    marks = [{"image_id": i, **BOX, "tokens_positive": [[0, len(im["caption"])]]} for i, im in enumerate(images)]
    data = Negatives(GroundedCaptions(write("g.json", coco(images, marks)), "/im"), 1.0)
    found: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    for epoch in range(20):
        data.set_epoch(epoch)
        for i in found:
            assert len(data[i].turns) == 4
            found[i] |= set(asked(data[i]))
    assert found == {0: {"a kite"}, 1: {"a kite"}, 2: {"a cup", "a vase"}}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
def test_share(rec: Any, share: float) -> None:
    """Of 1,200 draws; five standard deviations of a binomial are at most 0.07."""
    data = Negatives(rec(), share)
    got = 0
    for epoch in range(100):
        data.set_epoch(epoch)
        got += sum(bool(asked(sample)) for sample in data)
    assert abs(got / 1200 - share) <= 5 * (share * (1 - share) / 1200) ** 0.5


def test_draws_depend_on_seed_epoch_and_index_alone(rec: Any) -> None:
    def told(data: Negatives, order: Any) -> dict[int, list[str]]:
        return {i: [t.text for t in data[i].turns] for i in order}

    data, again, other = Negatives(rec(), 0.5), Negatives(rec(), 0.5), Negatives(rec(), 0.5, seed=1)
    first = told(data, range(12))
    assert first == told(again, reversed(range(12))) == told(data, range(12))
    assert first != told(other, range(12))
    data.set_epoch(1)
    assert first != told(data, range(12))
    data.set_epoch(0)
    assert first == told(data, range(12))


def test_where_nothing_fits_a_sample_stays(rec: Any, write: Write, coco: Coco) -> None:
    one = rec(count=1)
    assert Negatives(one, 1.0)[0] is not None
    assert asked(Negatives(one, 1.0)[0]) == []
    images = [{"file_name": f"{i}.png", "caption": c} for i, c in enumerate(("the left one", "red", "the boy", "men"))]
    path = write("r.json", coco(images, [{"image_id": i, **BOX} for i in range(4)]))
    data = Negatives(Referring(path, "/im"), 1.0)
    assert [asked(s) for s in list(data)[2:]] == [[], []]  # places and colours name nothing; a boy is one of the men
    empty = Negatives(Referring(write("e.json", coco([], [])), "/im"), 1.0)
    assert len(empty) == 0


def test_every_kind_of_set(write: Write, coco: Coco, processor: GromaProcessor) -> None:
    images = [{"file_name": f"{i}.png"} for i in range(4)]
    marks = [{"image_id": i, **BOX, "caption": f"A {THINGS[i]} on the left.", "category_id": i} for i in range(4)]
    names = [{"id": i, "name": THINGS[i]} for i in range(4)]
    path = write("c.json", coco(images, marks, names))
    for reader, form in ((RegionCaptions, "a {} on the left"), (DetectionByWords, "{}")):
        for i, sample in enumerate(Negatives(reader(path, "/im"), 1.0)):
            assert len(build_prompt(processor, sample.turns).ids) > 50
            assert asked(sample)[0] in {form.format(THINGS[k]) for k in range(4) if k != i}
    plain = Negatives(Detection(path, "/im"), 1.0)[0]  # no dialogue, no question
    assert (plain.turns, len(plain.boxes)) == ((), 1)


def test_special_words_stay_text(write: Write, coco: Coco) -> None:
    images = [{"file_name": "a", "caption": "<r3> cup </p>"}, {"file_name": "b", "caption": "[grounding] vase"}]
    data = Negatives(Referring(write("r.json", coco(images, [{"image_id": i, **BOX} for i in (0, 1)])), "/im"), 1.0)
    for sample in data:
        questions = [t.text for t in sample.turns if t.role == "user"]
        assert len(questions) == 2
        for question in questions:
            assert [piece for piece, special in markup.split(question) if special] == ["<p>", "</p>"]


def test_real_references(shared_data: Path) -> None:
    path = shared_data / "refcoco_excerpt/refer_layout/refcoco/refs(unc).p"
    data = Negatives(Refer(path, "/im", split="test"), 1.0)
    for epoch in range(20):
        data.set_epoch(epoch)
        women, food = asked(data[0]), asked(data[1])
        assert not content(" ".join(women)) & content("woman girl shirt scarf wii")
        assert len(food) == 1
    assert data[0].record.startswith("refs(unc).p#")


def test_as_records(rec: Any) -> None:
    plain = rec()
    data = Negatives(plain, 0.5)
    assert (len(data), data.problems, data.turns, data.path("a")) == (12, plain.problems, 8, plain.path("a"))
    data.set_epoch(3)
    assert (plain.epoch, data.epoch) == (3, 3)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share of negatives"):
            Negatives(plain, share)


@pytest.mark.parametrize(
    ("one", "other"),
    [("cup", "cups"), ("box", "boxes"), ("dish", "dishes"), ("shoe", "shoes"), ("potato", "potatoes"),
     ("cookie", "cookies"), ("puppy", "puppies"), ("knife", "knives"), ("leaf", "leaves"), ("glass", "glasses"),
     ("bus", "buses"), ("house", "houses"), ("tie", "ties"), ("foot", "feet"), ("lady", "men"), ("kid", "children"),
     ("guys", "woman"), ("toy", "toys"), ("tennis", "tennis")],
)  # fmt: skip
def test_plurals(one: str, other: str) -> None:
    assert fold(one) == fold(other)


def test_different_words_stay_apart() -> None:
    words = ("cup", "cap", "bus", "bush", "glass", "grass", "horse", "house", "knife", "kite", "boy", "toy", "box")
    assert len({fold(word) for word in words}) == len(words)


def test_phrases() -> None:
    turns = (*opening_turns(), Turn("user", "Where is <p>a \ue000r3> cup</p>?"), Turn("assistant", "A <p>vase</p>."))
    assert list(phrases(Sample("a", "r", turns))) == ["a <r3> cup", "vase"]
