"""Referring expression comprehension (REC): read the expressions, ask about them, count the answers.

The file is COCO-like: every ``images`` entry is one expression, and its annotations are the referents::

    {"images": [{"id": 7, "file_name": "a.jpg", "width": 640, "height": 480, "caption": "the red cup",
                 "expression_type": "color_kind", "unseen_pair": false}, ...],
     "annotations": [{"image_id": 7, "bbox": [x, y, w, h]}, ...]}

One referent is the classical task; none means that nothing in the picture matches; several a plural. The last two
fields are optional. Expressions of one picture are asked on one view of it, in the order of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from groma import boxes as box
from groma.structures import Answer, View

Box = tuple[float, float, float, float]
IOU = 0.5
"""A box is right if its IoU with the referent is strictly above this (facts of the published protocol)."""


class Grounder(Protocol):
    """What is evaluated: anything that looks at a picture once and answers expressions about it."""

    def look(self, image: Path) -> View:
        """The view of the picture at ``image``."""
        ...

    def refer_many(self, view: View, texts: list[str]) -> list[Answer]:
        """One answer per expression, in order."""
        ...


@dataclass(frozen=True)
class Expression:
    """One expression: its ``referents`` are xyxy pixels of the upright picture of ``width`` x ``height``."""

    id: int
    file_name: str
    width: int
    height: int
    caption: str
    referents: tuple[Box, ...]
    kind: str = ""
    unseen_pair: bool = False


@dataclass(frozen=True)
class Verdict:
    """One answer judged. ``score`` in [0, 1]: right or wrong for none or one referent, the set's F1 for several."""

    expression: Expression
    answer: Answer
    score: float

    def to_dict(self) -> dict[str, Any]:
        """One line of predictions.jsonl: the answer, what was asked, what is true, and the score."""
        asked = self.expression
        truth = {"id": asked.id, "expression_type": asked.kind, "unseen_pair": asked.unseen_pair}
        return {
            **self.answer.to_dict(),
            **truth,
            "referents": [[round(v, 2) for v in referent] for referent in asked.referents],
            "verdict": round(self.score, 4),
        }


@dataclass(frozen=True)
class RecReport:
    """The figures of one run; a share of which there is nothing to count is None.

    accuracy: right answers among expressions with one referent (a refusal is wrong); ``accuracy_unseen``: among those
    of pairs unseen in training; ``accuracy_by_type``: by expression type. absent_refused: expressions without a
    referent answered found=False; present_refused: those with referents answered so. plural_f1: mean F1 of the set
    of boxes over expressions with several referents. ``counts``: how many expressions each figure is over.
    """

    accuracy: float | None
    accuracy_unseen: float | None
    accuracy_by_type: dict[str, float]
    absent_refused: float | None
    present_refused: float | None
    plural_f1: float | None
    counts: dict[str, int]
    counts_by_type: dict[str, int]

    def to_dict(self) -> dict[str, float | int]:
        """Plain numbers by flat names ("accuracy", "accuracy_by_type/size", "count/absent"); None is left out."""
        names = ("accuracy", "accuracy_unseen", "absent_refused", "present_refused", "plural_f1")
        figures = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        by_type = {f"accuracy_by_type/{kind}": value for kind, value in self.accuracy_by_type.items()}
        counts = {f"count/{name}": value for name, value in self.counts.items()}
        return {**figures, **by_type, **counts, **{f"count_by_type/{k}": v for k, v in self.counts_by_type.items()}}


def evaluate_rec(groma: Grounder, ann: Path, images: Path, limit: int | None = None, batch: int = 32) -> RecReport:
    """Ask every expression of the REC file ``ann`` about its picture in ``images`` and count the answers.

    ``limit``: only the first so many pictures, with all their expressions. ``batch``: questions asked at once.
    ValueError names the file and record of what is wrong in them.
    """
    verdicts: list[Verdict] = []
    for _, judged in ask(groma, read_rec(ann), images, limit, batch):
        verdicts.extend(judged)
    return report(verdicts)


def read_rec(ann: Path) -> list[Expression]:
    """Expressions of a REC file, in its order; ValueError says which record of it cannot be read, and why."""
    try:
        content = json.loads(Path(ann).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{ann}: not JSON ({error})") from error
    if not isinstance(content, dict) or not content.get("images") or "annotations" not in content:
        raise ValueError(f"{ann}: expected a COCO-like file with 'images' (one per expression) and 'annotations'")
    referents: dict[int, list[Box]] = {}
    for index, row in enumerate(content["annotations"]):
        try:
            x, y, width, height = (float(v) for v in row["bbox"])
            referents.setdefault(row["image_id"], []).append((x, y, x + width, y + height))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{ann}: annotations[{index}]: expected image_id, bbox [x, y, w, h]: {error}") from error
        if not (width > 0 and height > 0):
            raise ValueError(f"{ann}: annotations[{index}]: an empty box: {row['bbox']}")
    expressions: dict[int, Expression] = {}
    for index, row in enumerate(content["images"]):
        try:
            expression = Expression(
                id=row["id"],
                file_name=row["file_name"],
                width=int(row["width"]),
                height=int(row["height"]),
                caption=row["caption"],
                referents=tuple(referents.get(row["id"], ())),
                kind=row.get("expression_type", ""),
                unseen_pair=bool(row.get("unseen_pair", False)),
            )
        except (KeyError, TypeError, AttributeError) as error:
            wanted = "id, file_name, width, height, caption"
            raise ValueError(f"{ann}: images[{index}]: expected {wanted}; failed on {error}") from error
        if not str(expression.caption).strip():
            raise ValueError(f"{ann}: images[{index}]: empty caption")
        if expression.id in expressions:
            raise ValueError(f"{ann}: images[{index}]: id {expression.id} is taken by another expression")
        expressions[expression.id] = expression
    if strangers := referents.keys() - expressions.keys():
        raise ValueError(f"{ann}: annotations with image_id {min(strangers)}: no entry of 'images' has that id")
    return list(expressions.values())


def ask(
    groma: Grounder, expressions: Sequence[Expression], images: Path, limit: int | None = None, batch: int = 32
) -> Iterator[tuple[View, list[Verdict]]]:
    """Picture by picture: its view, made once, and the judged answers to all its expressions.

    Pictures come in the order of their first expression; ``limit`` stops after so many of them.
    """
    for index, (file_name, group) in enumerate(by_picture(expressions).items()):
        if limit is not None and index >= limit:
            return
        view = groma.look(Path(images) / file_name)
        for expression in group:
            if (view.width, view.height) != (expression.width, expression.height):
                size = f"{expression.width} x {expression.height}"
                got = f"{view.width} x {view.height}"
                raise ValueError(f"{file_name}: expression {expression.id} is for {size} pixels, the picture has {got}")
        answers: list[Answer] = []
        for start in range(0, len(group), batch):
            answers.extend(groma.refer_many(view, [expression.caption for expression in group[start : start + batch]]))
        yield view, [judge(expression, answer) for expression, answer in zip(group, answers, strict=True)]


def by_picture(expressions: Sequence[Expression]) -> dict[str, list[Expression]]:
    """Expressions grouped by file name, both in the order of the file."""
    groups: dict[str, list[Expression]] = {}
    for expression in expressions:
        groups.setdefault(expression.file_name, []).append(expression)
    return groups


def judge(expression: Expression, answer: Answer) -> Verdict:
    """Score one answer: refusal for no referent, the first box for one, F1 of all boxes for several."""
    if not expression.referents:
        return Verdict(expression, answer, float(not answer.found))
    if not answer.found or not answer.boxes:
        return Verdict(expression, answer, 0.0)
    truth = torch.tensor(expression.referents, dtype=torch.double)
    ious = box.iou(torch.tensor(answer.boxes, dtype=torch.double), truth)  # (answered, referents)
    if len(expression.referents) == 1:
        return Verdict(expression, answer, float(ious[0, 0] > IOU))
    return Verdict(expression, answer, 2 * _matches(ious) / (len(answer.boxes) + len(expression.referents)))


def _matches(ious: torch.Tensor) -> int:
    """Pairs of a one-to-one matching of answered boxes and referents, the highest IoU first, all above ``IOU``."""
    free, pairs = ious.clone(), 0
    while free.max() > IOU:
        answered, referent = divmod(int(free.argmax()), free.shape[1])
        free[answered], free[:, referent] = 0, 0
        pairs += 1
    return pairs


def report(verdicts: Sequence[Verdict]) -> RecReport:
    """All figures over ``verdicts``."""
    absent = [v for v in verdicts if not v.expression.referents]
    single = [v for v in verdicts if len(v.expression.referents) == 1]
    plural = [v for v in verdicts if len(v.expression.referents) > 1]
    unseen = [v for v in single if v.expression.unseen_pair]
    kinds: dict[str, list[Verdict]] = {}
    for verdict in sorted(single, key=lambda v: v.expression.kind):
        if verdict.expression.kind:
            kinds.setdefault(verdict.expression.kind, []).append(verdict)
    return RecReport(
        accuracy=_mean([v.score for v in single]),
        accuracy_unseen=_mean([v.score for v in unseen]),
        accuracy_by_type={kind: sum(v.score for v in group) / len(group) for kind, group in kinds.items()},
        absent_refused=_mean([v.score for v in absent]),
        present_refused=_mean([float(not v.answer.found) for v in single + plural]),
        plural_f1=_mean([v.score for v in plural]),
        counts={
            "pictures": len({v.expression.file_name for v in verdicts}),
            "expressions": len(verdicts),
            "single": len(single),
            "unseen": len(unseen),
            "absent": len(absent),
            "plural": len(plural),
        },
        counts_by_type={kind: len(group) for kind, group in kinds.items()},
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
