"""The values that flow: each refuses shapes that do not fit, with one line of what was got and expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from groma.structures import Answer, Batch, ImageFeatures, Prompt, Proposals, Sample, Span, Spliced, Turn, View

Z = torch.zeros
NONE = Z(0, 4)
IDS = torch.tensor([1, 2, 3])


def proposals(count: int) -> Proposals:
    return Proposals(Z(count, 4), Z(count))


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Turn("user", "Locate it", Z(1, 4)), "user turn 'Locate it' has 0 box places but 1 boxes"),
    (lambda: Turn("user", "<refer_box> and <refer_box>", Z(1, 4)), "has 2 box places but 1 boxes"),
    (lambda: Turn("assistant", "<refer_box>", Z(1, 4)), "assistant turn '<refer_box>' has 0 box places"),
    (lambda: Turn("assistant", "<ground_box>", Z(4)), r"expected boxes of shape \(N, 4\), got \(4,\)"),
    (lambda: Sample("a.png", "rec.json#17", boxes=Z(2, 5)), r"rec.json#17: expected boxes .* got \(2, 5\)"),
    (lambda: Sample("a.png", "rec.json#17", boxes=Z(2, 4), phrases=("one",)), "rec.json#17: 1 phrases for 2 boxes"),
    (lambda: Prompt(IDS, IDS[:2], NONE, NONE), r"ids \(3,\) and labels \(2,\)"),
    (lambda: Prompt(IDS[None], IDS[None], NONE, NONE), r"ids \(1, 3\)"),
    (lambda: Prompt(IDS, IDS, Z(4), NONE), "refer_boxes: expected"),
    (lambda: Prompt(IDS, IDS, NONE, Z(1, 3)), "ground_boxes: expected"),
    (lambda: Batch(Z(3, 8, 8)), r"pixels: expected \(B, 3, H, W\), got \(3, 8, 8\)"),
    (lambda: Batch(Z(1, 1, 8, 8)), "pixels: expected"),
    (lambda: Batch(Z(2, 3, 8, 8), targets=(NONE,)), "targets: 1 entries for 2 images"),
    (lambda: Batch(Z(2, 3, 8, 8), refer_boxes=(NONE,) * 3), "refer_boxes: 3 entries for 2 images"),
    (lambda: ImageFeatures((Z(1, 2, 4, 4), Z(1, 2, 8, 8))), "levels: expected maps of one shape"),
    (lambda: ImageFeatures((Z(1, 2, 4),)), "levels: expected maps of one shape"),
    (lambda: Proposals(Z(3, 4), Z(2)), r"scores: expected \(3,\), got \(2,\)"),
    (lambda: Proposals(Z(3, 5), Z(3)), "proposals: expected boxes"),
    (lambda: View(Z(4, 8), proposals(2), Z(3, 8), proposals(5)), "3 region tokens for 2 regions"),
    (lambda: Spliced(Z(2, 5, 8), Z(2, 5), Z(2, 4), None, (1, 1)), "embeds, ids, mask: got shapes"),
    (lambda: Spliced(Z(2, 5, 8), Z(2, 4), Z(2, 5), None, (1, 1)), "embeds, ids, mask: got shapes"),
]  # fmt: skip


@pytest.mark.parametrize("make, message", BAD)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_turns_count_the_places_of_their_role() -> None:
    Turn("user", "What is <roi><refer_box></roi><refer_feat>?", Z(1, 4))
    Turn("assistant", "<roi><ground_box><ground_box></roi>", Z(2, 4))
    assert len(Turn("user", "Hello").boxes) == 0
    assert Sample("a.png", "x#0").source == "coco"


def test_values_are_frozen() -> None:
    with pytest.raises(AttributeError):
        proposals(1).scores = Z(2)  # type: ignore[misc]


def test_a_batch_moves_whole() -> None:
    words = (((1,), (), (2, 3)),)
    batch = Batch(Z(1, 3, 8, 8), Z(1, 4), None, Z(1, 4), (Z(2, 4),), (), (Z(3, 4),), words, "sa1b", ("r",))
    moved = batch.to("meta")
    tensors = (moved.pixels, moved.ids, moved.mask, moved.refer_boxes[0], moved.targets[0])
    assert {t.device.type for t in tensors} == {"meta"}
    kept = (moved.labels, moved.ground_boxes, moved.target_words, moved.source, moved.records)
    assert kept == (None, (), words, "sa1b", ("r",))
    assert batch.pixels.device.type == "cpu"


def test_an_answer_lists_its_spans_and_becomes_json() -> None:
    first = Span("two cups", 0, 8, (3, 1), ((1.234, 2, 3, 4), (5, 6, 7, 8)), (0.98765, 0.5))
    second = Span("a book", 13, 19, (0,), ((0, 0, 9, 9),), (0.25,))
    answer = Answer("two cups and a book", (first, second), True, "what?", "raw <r3>", "a.jpg", 640, 480, "m",
                    {"look": 0.123456})  # fmt: skip
    assert answer.boxes == [(1.234, 2, 3, 4), (5, 6, 7, 8), (0, 0, 9, 9)]
    assert answer.scores == [0.98765, 0.5, 0.25]
    assert answer.regions == [3, 1, 0]
    row = json.loads(json.dumps(answer.to_dict()))
    assert list(row)[:9] == ["image", "width", "height", "query", "text", "found", "boxes", "model", "seconds"]
    assert row["text"] == "raw <r3>"
    assert row["seconds"] == {"look": 0.1235}
    assert row["boxes"] == [
        {"xyxy": [1.23, 2, 3, 4], "score": 0.9877, "region": 3, "phrase": "two cups"},
        {"xyxy": [5, 6, 7, 8], "score": 0.5, "region": 1, "phrase": "two cups"},
        {"xyxy": [0, 0, 9, 9], "score": 0.25, "region": 0, "phrase": "a book"},
    ]
    assert Answer("Nothing matches.", (), False).to_dict()["boxes"] == []
