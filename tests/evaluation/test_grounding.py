"""The REC protocol on a model that answers what it is told to: every figure is computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from groma.evaluation.grounding import ask, by_picture, evaluate_rec, judge, read_rec, report
from groma.structures import Answer, Proposals, Span, View

CUP, BALL, BOOK = (0.0, 0.0, 10.0, 10.0), (20.0, 0.0, 30.0, 10.0), (40.0, 0.0, 50.0, 10.0)


def answer(*boxes: tuple[float, float, float, float], found: bool | None = None) -> Answer:
    span = Span("", 0, 0, tuple(range(len(boxes))), boxes, (0.9,) * len(boxes))
    return Answer("", (span,) if boxes else (), bool(boxes) if found is None else found)


class Told:
    """Answers by expression, and keeps count of its looks and of the questions it got at once."""

    def __init__(self, answers: dict[str, Answer], width: int = 100, height: int = 50) -> None:
        self.answers, self.size = answers, (width, height)
        self.looks: list[str] = []
        self.batches: list[int] = []

    def look(self, image: Path) -> View:
        self.looks.append(image.name)
        nothing = Proposals(torch.zeros(0, 4), torch.zeros(0))
        return View(torch.zeros(1, 1), nothing, torch.zeros(0, 1), nothing, *self.size, name=str(image))

    def refer_many(self, view: View, texts: list[str]) -> list[Answer]:
        self.batches.append(len(texts))
        return [self.answers[text] for text in texts]


def write(path: Path, rows: list[tuple[str, str, list, dict[str, Any]]]) -> Path:
    """A REC file of (file_name, caption, xyxy referents, more fields)."""
    images = [
        {"id": i, "file_name": name, "caption": caption, "width": 100, "height": 50, **more}
        for i, (name, caption, _, more) in enumerate(rows)
    ]
    annotations = [
        {"id": 10 * i + j, "image_id": i, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for i, (_, _, referents, _) in enumerate(rows)
        for j, (x1, y1, x2, y2) in enumerate(referents)
    ]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_every_figure_by_hand(tmp_path: Path) -> None:
    kind, size = {"expression_type": "kind"}, {"expression_type": "size"}
    ann = write(
        tmp_path / "rec.json",
        [
            ("a.jpg", "right", [CUP], kind),
            ("b.jpg", "wrong box", [CUP], {**kind, "unseen_pair": True}),
            ("a.jpg", "refused", [CUP], size),
            ("a.jpg", "second box right", [CUP], size),
            ("b.jpg", "right and unseen", [BALL], {**size, "unseen_pair": True}),
            ("a.jpg", "absent, refused", [], {}),
            ("a.jpg", "absent, answered", [], {"unseen_pair": True}),
            ("a.jpg", "both", [CUP, BALL], {}),
            ("a.jpg", "one of two, and one more", [CUP, BALL], {}),
            ("b.jpg", "plural refused", [CUP, BALL], {}),
        ],
    )
    told = Told(
        {
            "right": answer(CUP),
            "wrong box": answer(BALL),
            "refused": answer(),
            "second box right": answer(BALL, CUP),
            "right and unseen": answer(BALL, BOOK),
            "absent, refused": answer(),
            "absent, answered": answer(CUP),
            "both": answer(BALL, CUP),
            "one of two, and one more": answer(BALL, BOOK),
            "plural refused": answer(),
        }
    )
    figures = evaluate_rec(told, ann, tmp_path, batch=3)
    assert figures.accuracy == 2 / 5
    assert figures.accuracy_unseen == 1 / 2
    assert figures.accuracy_by_type == {"kind": 1 / 2, "size": 1 / 3}
    assert figures.absent_refused == 1 / 2
    assert figures.present_refused == 2 / 8
    assert figures.plural_f1 == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    counts = {"pictures": 2, "expressions": 10, "single": 5, "unseen": 2, "absent": 2, "plural": 3}
    assert figures.counts == counts
    assert figures.counts_by_type == {"kind": 2, "size": 3}
    assert told.looks == ["a.jpg", "b.jpg"], "one look per picture"
    assert told.batches == [3, 3, 1, 3]
    flat = figures.to_dict()
    assert flat["accuracy_by_type/size"] == 1 / 3
    assert flat["count/absent"] == 2
    assert all(type(value) in (int, float) for value in flat.values())
    json.dumps(flat)


def test_limit_counts_pictures(tmp_path: Path) -> None:
    ann = write(tmp_path / "rec.json", [("a.jpg", "x", [CUP], {}), ("b.jpg", "x", [CUP], {}), ("a.jpg", "x", [], {})])
    told = Told({"x": answer(CUP)})
    figures = evaluate_rec(told, ann, tmp_path, limit=1)
    assert figures.counts["expressions"] == 2
    assert told.looks == ["a.jpg"]
    assert "accuracy_unseen" not in figures.to_dict(), "nothing to count is left out, not 0"


def test_right_is_strictly_above_one_half(tmp_path: Path) -> None:
    (expression,) = read_rec(write(tmp_path / "rec.json", [("a.jpg", "x", [(0, 0, 10, 10)], {})]))
    assert judge(expression, answer((0.0, 0.0, 10.0, 5.0))).score == 0.0  # IoU is exactly 0.5
    assert judge(expression, answer((0.0, 0.0, 10.0, 5.1))).score == 1.0
    assert judge(expression, answer((0.0, 0.0, 10.0, 10.0), found=False)).score == 0.0, "a refusal is wrong"


def test_one_answered_box_covers_one_referent(tmp_path: Path) -> None:
    twins = [(0, 0, 10, 10), (0, 0, 10, 9)]
    (expression,) = read_rec(write(tmp_path / "rec.json", [("a.jpg", "x", twins, {})]))
    assert judge(expression, answer((0.0, 0.0, 10.0, 10.0))).score == pytest.approx(2 / 3)
    assert judge(expression, answer((0.0, 0.0, 10.0, 10.0), (0.0, 0.0, 10.0, 9.0))).score == 1.0


def test_a_verdict_is_one_json_line(tmp_path: Path) -> None:
    (expression,) = read_rec(write(tmp_path / "rec.json", [("a.jpg", "x", [CUP], {"expression_type": "kind"})]))
    row = json.loads(json.dumps(judge(expression, answer(CUP)).to_dict()))
    assert row["referents"] == [list(CUP)]
    assert row["boxes"][0]["xyxy"] == list(CUP)
    assert (row["verdict"], row["expression_type"], row["found"]) == (1.0, "kind", True)


def test_order_of_pictures_and_size_mismatch(tmp_path: Path) -> None:
    ann = write(tmp_path / "rec.json", [("b.jpg", "x", [CUP], {}), ("a.jpg", "x", [], {}), ("b.jpg", "y", [], {})])
    assert [(k, len(v)) for k, v in by_picture(read_rec(ann)).items()] == [("b.jpg", 2), ("a.jpg", 1)]
    turned = Told({"x": answer()}, width=50, height=100)
    with pytest.raises(ValueError, match="expression 0 is for 100 x 50 pixels, the picture has 50 x 100"):
        list(ask(turned, read_rec(ann), tmp_path))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[]", "expected a COCO-like file"),
        ('{"images": [], "annotations": []}', "expected a COCO-like file"),
        ('{"images": [{"id": 1}], "annotations": []}', r"images\[0\].*'file_name'"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": [1, 2, 3]}]}', r"annotations\[0\].*bbox"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": [1, 2, 0, 3]}]}', "an empty box"),
    ],
)
def test_broken_files_are_told(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rec.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rec(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_boxes_of_no_expression_are_told(tmp_path: Path) -> None:
    row = {"id": 1, "file_name": "a.jpg", "width": 9, "height": 9, "caption": "x"}
    path = tmp_path / "rec.json"
    path.write_text(json.dumps({"images": [row], "annotations": [{"image_id": 2, "bbox": [1, 2, 3, 4]}]}))
    with pytest.raises(ValueError, match="image_id 2: no entry"):
        read_rec(path)
    path.write_text(json.dumps({"images": [row, row], "annotations": []}))
    with pytest.raises(ValueError, match=r"images\[1\]: id 1 is taken"):
        read_rec(path)
    path.write_text(json.dumps({"images": [{**row, "caption": " "}], "annotations": []}))
    with pytest.raises(ValueError, match=r"images\[0\]: empty caption"):
        read_rec(path)


def test_nothing_asked_is_an_empty_report() -> None:
    assert report([]).to_dict() == {
        f"count/{name}": 0 for name in ("pictures", "expressions", "single", "unseen", "absent", "plural")
    }
