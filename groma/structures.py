"""Every value that flows between the parts, as frozen dataclasses checked once when made.

Legend: B images in a batch, N regions of an image, K boxes mentioned in a prompt, T tokens, D encoder width,
E language-model width, h w the patch grid, L layers. Boxes are xyxy in [0, 1] unless a docstring says pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from groma import markup

Role = Literal["user", "assistant"]


def _boxes(boxes: Tensor, what: str) -> None:
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise ValueError(f"{what}: expected boxes of shape (N, 4), got {tuple(boxes.shape)}")


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue. ``text`` is grounded markup (see groma.markup): outside text in it is escaped already.

    ``boxes`` (K, 4) belong to the placeholders of this turn in reading order: a user turn's ``<refer_box>`` (each may
    be followed by ``<refer_feat>`` of the same box), an assistant turn's ``<ground_box>``.
    """

    role: Role
    text: str
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4))

    def __post_init__(self) -> None:
        _boxes(self.boxes, f"{self.role} turn {self.text!r}")
        places = self.text.count("<refer_box>" if self.role == "user" else "<ground_box>")
        if places != len(self.boxes):
            raise ValueError(f"{self.role} turn {self.text!r} has {places} box places but {len(self.boxes)} boxes")


@dataclass(frozen=True)
class Sample:
    """One training or evaluation record: an image path, its dialogue, and where it came from ("rec.json#17").

    ``boxes`` (M, 4) and ``phrases`` (M) are detection targets and their descriptions (stage 1); dialogue sets leave
    them empty. ``source`` names the detection head the boxes train ("coco" or "sa1b").
    """

    image: str
    record: str
    turns: tuple[Turn, ...] = ()
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4))
    phrases: tuple[str, ...] = ()
    source: str = "coco"

    def __post_init__(self) -> None:
        _boxes(self.boxes, self.record)
        if self.phrases and len(self.phrases) != len(self.boxes):
            raise ValueError(f"{self.record}: {len(self.phrases)} phrases for {len(self.boxes)} boxes")


@dataclass(frozen=True)
class Prompt:
    """A tokenised dialogue: ids (T), labels (T) with -100 where no loss is taken, and the boxes its places stand for.

    ``refer_boxes`` (K, 4) follow the ``<refer_box>`` ids in order, ``ground_boxes`` (G, 4) the ``<ground_box>`` ids.
    """

    ids: Tensor
    labels: Tensor
    refer_boxes: Tensor
    ground_boxes: Tensor

    def __post_init__(self) -> None:
        if self.ids.shape != self.labels.shape or self.ids.ndim != 1:
            raise ValueError(f"ids {tuple(self.ids.shape)} and labels {tuple(self.labels.shape)} must be one (T) each")
        _boxes(self.refer_boxes, "refer_boxes")
        _boxes(self.ground_boxes, "ground_boxes")


@dataclass(frozen=True)
class Batch:
    """What the loader hands to the model.

    pixels (B, 3, S, S) normalised; ids, labels, mask (B, T) right-padded (None in detection pre-training);
    refer_boxes, ground_boxes: B tensors (K, 4); targets: B tensors (M, 4), detection ground truth;
    target_words: B tuples of M word-id tuples, the description of every target; source: the detection head to train;
    records, images: what each entry was made of, and the path of its picture.
    """

    pixels: Tensor
    ids: Tensor | None = None
    labels: Tensor | None = None
    mask: Tensor | None = None
    refer_boxes: tuple[Tensor, ...] = ()
    ground_boxes: tuple[Tensor, ...] = ()
    targets: tuple[Tensor, ...] = ()
    target_words: tuple[tuple[tuple[int, ...], ...], ...] = ()
    source: str = "coco"
    records: tuple[str, ...] = ()
    images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 3:
            raise ValueError(f"pixels: expected (B, 3, H, W), got {tuple(self.pixels.shape)}")
        for name in ("refer_boxes", "ground_boxes", "targets", "target_words"):
            value = getattr(self, name)
            if value and len(value) != len(self.pixels):
                raise ValueError(f"{name}: {len(value)} entries for {len(self.pixels)} images")

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device)
            if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
                return tuple(v.to(device) for v in value)
            return value

        return replace(self, **{name: move(value) for name, value in vars(self).items()})


@dataclass(frozen=True)
class ImageFeatures:
    """One encoder pass: ``levels`` (L maps of (B, D, h, w), shallow to deep, the last L hidden states without cls)."""

    levels: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        shapes = {tuple(level.shape) for level in self.levels}
        if len(shapes) != 1 or len(next(iter(shapes))) != 4:
            raise ValueError(f"levels: expected maps of one shape (B, D, h, w), got {sorted(shapes)}")

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the patch grid."""
        return self.levels[-1].shape[-2], self.levels[-1].shape[-1]


@dataclass(frozen=True)
class Proposals:
    """Candidate regions of one image: boxes (N, 4) and objectness scores (N) in [0, 1]."""

    boxes: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        _boxes(self.boxes, "proposals")
        if self.scores.shape != self.boxes.shape[:1]:
            raise ValueError(f"scores: expected ({len(self.boxes)},), got {tuple(self.scores.shape)}")

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class View:
    """One look at one image: everything later questions need.

    image_tokens (P, E), proposals (N regions kept, best first), region_tokens (N, E), ``candidates`` all proposals
    before selection, and ``prefix``: the KV cache of the shared prompt start and its length (None until made).
    ``width``, ``height``: pixels of the upright image; ``name``: where it came from.
    """

    image_tokens: Tensor
    proposals: Proposals
    region_tokens: Tensor
    candidates: Proposals
    width: int = 0
    height: int = 0
    name: str = ""
    prefix: Any = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if len(self.region_tokens) != len(self.proposals):
            raise ValueError(f"{len(self.region_tokens)} region tokens for {len(self.proposals)} regions")


@dataclass(frozen=True)
class Conversation:
    """A dialogue about one view: ``turns`` said so far, ``prefix``, the KV cache of the view and all of them, so that a
    new turn costs its own tokens only, and ``answer``, the last one (None where the turns were read, not written).

    A value: going on gives another Conversation, and this one can be gone on with again. The turns point at boxes, not
    at region numbers, so they can be read again on another view of the same picture.
    """

    view: View
    turns: tuple[Turn, ...] = ()
    prefix: Any = None
    answer: Answer | None = None


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer's clean text, as it is written. The last piece has the ``conversation`` it led to."""

    text: str
    conversation: Conversation | None = None


@dataclass(frozen=True)
class Spliced:
    """Language-model input after splicing: embeds (B, T, E), ids (B, T) with proxies in place of boxes and -1 in
    feature slots, mask (B, T), labels (B, T) or None, ``regions`` (B) counts of proxies that exist, and ``pointers``
    (B, N, E) their tokens, zero beyond a row's count (None for a model without a pointer head)."""

    embeds: Tensor
    ids: Tensor
    mask: Tensor
    labels: Tensor | None
    regions: tuple[int, ...]
    pointers: Tensor | None = None

    def __post_init__(self) -> None:
        if self.embeds.shape[:2] != self.mask.shape or self.ids.shape != self.mask.shape:
            shapes = [tuple(t.shape) for t in (self.embeds, self.ids, self.mask)]
            raise ValueError(f"embeds, ids, mask: got shapes {shapes}, expected (B, T, E), (B, T), (B, T)")


@dataclass(frozen=True)
class Span:
    """A grounded phrase of an answer: text offsets [start, end) in ``Answer.text``, and its boxes in pixels xyxy."""

    phrase: str
    start: int
    end: int
    regions: tuple[int, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """What the model said about one image: clean ``text``, grounded ``spans``, and ``found``.

    Boxes are xyxy pixels of the upright image, scores in [0, 1], best first for a referring answer.
    ``raw`` is the text as grounded markup (see groma.markup); ``seconds`` the time of each step; ``presence`` the
    probability in [0, 1] that anything matches (1 or 0 where nothing was referred to), and ``certainty`` that something
    does and that it is what was written. ``found`` says whether the certainty reaches the model's threshold.
    """

    text: str
    spans: tuple[Span, ...]
    found: bool
    query: str = ""
    raw: str = ""
    image: str = ""
    width: int = 0
    height: int = 0
    model: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    presence: float = 1.0
    certainty: float = 1.0

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """All boxes in pixels xyxy, in the order of the spans."""
        return [box for span in self.spans for box in span.boxes]

    @property
    def scores(self) -> list[float]:
        """One score in [0, 1] per box of ``boxes``."""
        return [score for span in self.spans for score in span.scores]

    @property
    def regions(self) -> list[int]:
        """The proxy index K of ``<rK>`` per box of ``boxes``."""
        return [region for span in self.spans for region in span.regions]

    def to_dict(self) -> dict[str, Any]:
        """The one result format of every tool, as plain JSON values."""
        rows = [
            {"xyxy": [round(v, 2) for v in box], "score": round(score, 4), "region": region, "phrase": span.phrase}
            for span in self.spans
            for box, score, region in zip(span.boxes, span.scores, span.regions, strict=True)
        ]
        return {
            "image": self.image, "width": self.width, "height": self.height, "query": self.query,
            "text": markup.unescape(self.raw), "found": self.found, "boxes": rows, "model": self.model,
            "seconds": {k: round(v, 4) for k, v in self.seconds.items()},
        }  # fmt: skip
