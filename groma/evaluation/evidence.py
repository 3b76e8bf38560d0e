"""What calibration needs to know of a model, read in one pass: logits, not the probabilities at one temperature.

A predictor answers with probabilities. The logarithm of a softmax is its logits up to a constant, so probabilities at
any one temperature give those at every other; they are read at a high one, where few of them round to 0 or 1.

Legend: E expressions, N regions (padded to the most any picture has).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from groma import boxes as box
from groma.evaluation.grounding import IOU, Expression, Verdict, ask
from groma.model.configuration import GromaConfig
from groma.predictor import Groma
from groma.structures import Answer, View

READING = 8.0
"""Temperature at which probabilities are read. In float32 at 1, two logits 17.4 apart already have a probability of
exactly 1; at 8 they must be 139 apart."""
SHARPEST = (1e-37, 1 - 2.0**-24)
"""The probabilities next to 0 and 1 in float32: what rounds to 0 or 1 even so is taken for these."""


@dataclass(frozen=True)
class Settings:
    """What calibration fits: fields of the configuration, with the two temperatures told apart."""

    score_temperature: float
    presence_temperature: float
    found_threshold: float
    objectness_power: float = 1.0

    @classmethod
    def of(cls, config: GromaConfig) -> Settings:
        """Those in use."""
        return cls(*config.temperatures, config.found_threshold, config.objectness_power)

    def apply(self, config: GromaConfig) -> None:
        """Put them to use in ``config``."""
        for name, value in asdict(self).items():
            setattr(config, name, value)


@dataclass(frozen=True)
class Evidence:
    """What one pass over the pictures read of E expressions; every score at any temperature follows from it.

    pictures: E file names. present (E) bool: has a referent. gap (E): log-odds that something matches, at
    temperature 1. logits (E, N) of the proxies, each row up to a constant, -inf where there is no region;
    objectness (E, N) in [0, 1]; iou (E, N) with the nearest referent, 0 where there is none; written (E, N) bool: the
    regions the answer points at. ValueError names the picture of what is not a number or does not fit.
    """

    pictures: tuple[str, ...]
    present: np.ndarray
    gap: np.ndarray
    logits: np.ndarray
    objectness: np.ndarray
    iou: np.ndarray
    written: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.pictures)
        wide = (count, self.logits.shape[-1])
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys(("present", "gap"), (count,))
        wanted |= dict.fromkeys(("logits", "objectness", "iou", "written"), wide)
        for name, shape in wanted.items():
            if (got := getattr(self, name).shape) != shape:
                raise ValueError(f"{name}: got shape {got}, expected {shape}")
        sound = np.isfinite(self.gap) & ~np.isnan(self.logits).any(1) & np.isfinite(self.logits).any(1)
        sound &= ~np.isposinf(self.logits).any(1) & (self.written & np.isfinite(self.logits)).any(1)
        sound &= ((self.objectness >= 0) & (self.objectness <= 1) & (self.iou >= 0) & (self.iou <= 1)).all(1)
        if not sound.all():
            name = self.pictures[int((~sound).argmax())]
            raise ValueError(f"{name}: the model's scores of an expression about it are not numbers that make sense")

    def __len__(self) -> int:
        return len(self.pictures)

    def take(self, rows: np.ndarray) -> Evidence:
        """The expressions ``rows`` (E) bool says."""
        names = tuple(name for name, kept in zip(self.pictures, rows, strict=True) if kept)
        return Evidence(names, *(getattr(self, field.name)[rows] for field in fields(self)[1:]))

    @property
    def hits(self) -> np.ndarray:
        """(E, N) bool: regions that would be a right answer."""
        return np.asarray((self.iou > IOU) & np.isfinite(self.logits))

    @property
    def first(self) -> np.ndarray:
        """(E) the region written first, which is the answer of the REC protocol: the likeliest of all."""
        return np.where(self.written, self.logits, -np.inf).argmax(1)

    def presence(self, settings: Settings) -> np.ndarray:
        """(E) the probability that something matches."""
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-self.gap / settings.presence_temperature)))

    def log_p(self, temperature: float) -> np.ndarray:
        """(E, N) logarithms of the probabilities of the proxies, -inf where there is no region."""
        scaled = (self.logits - self.logits.max(1, keepdims=True)) / temperature
        return np.asarray(scaled - np.log(np.exp(scaled).sum(1, keepdims=True)))

    def pointing(self, settings: Settings) -> np.ndarray:
        """(E) f times p of ``first``, p summed over what is written: the certainty, its score but for objectness."""
        p = np.exp(self.log_p(settings.score_temperature))
        share = np.minimum(np.where(self.written, p, 0).sum(1), 1)
        return np.asarray(self.presence(settings) * share)

    def top_scores(self, settings: Settings) -> np.ndarray:
        """(E) the score of ``first`` as the predictor gives it."""
        return np.asarray(self.pointing(settings) * self.first_objectness**settings.objectness_power)

    @property
    def first_objectness(self) -> np.ndarray:
        """(E) the objectness of ``first``."""
        return np.asarray(self.objectness[np.arange(len(self)), self.first])

    @property
    def right(self) -> np.ndarray:
        """(E) bool: is ``first`` right? Never so where nothing matches."""
        return np.asarray(self.hits[np.arange(len(self)), self.first])


# -- reading ----------------------------------------------------------------------------------------------------------


def read(groma: Groma, expressions: Sequence[Expression], images: Path, limit: int | None = None) -> Iterator[Evidence]:
    """Picture by picture what the model thinks of all its expressions, looked at once; ``join`` the lot.

    ``limit``: only the first so many pictures. Raises ValueError as ``ask`` and Evidence do.
    """
    asked = ask(groma, expressions, images, limit)
    while True:
        with _open(groma.model.config):
            if (step := next(asked, None)) is None:
                return
            view, verdicts = step
            captions = [verdict.expression.caption for verdict in verdicts]
            every = groma.refer_many(view, captions, top_k=len(view.proposals))
        yield _evidence(view, verdicts, every)


@contextmanager
def _open(config: GromaConfig) -> Iterator[None]:
    """Inside, nothing is refused, no probability is rounded to 0 or 1, and a score is f · p_k alone."""
    reading = {
        "score_temperature": READING,
        "presence_temperature": None,
        "found_threshold": 0.0,
        "objectness_power": 0,
    }
    before = {name: getattr(config, name) for name in reading}
    try:
        for name, value in reading.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _evidence(view: View, verdicts: list[Verdict], every: list[Answer]) -> Evidence:
    """verdicts: of the answers as they come; every: the same with all N regions, each scored f · p_k."""
    shape = (len(verdicts), len(view.proposals))
    objectness = np.broadcast_to(view.proposals.scores.double().cpu().numpy(), shape)
    logits, iou, written = np.full(shape, -np.inf), np.zeros(shape), np.zeros(shape, bool)
    gap = np.full(len(verdicts), np.nan)
    for row, (verdict, answer) in enumerate(zip(verdicts, every, strict=True)):
        if len(answer.regions) != shape[1]:  # not a number fails every comparison, so its regions are dropped
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            # f is the same for all, and a constant of a row drops out: log(f · p_k) serves as log p_k
            logits[row, answer.regions] = READING * np.log(np.array(answer.scores))
        f = float(np.clip(answer.presence, *SHARPEST))
        gap[row] = READING * (math.log(f) - math.log1p(-f))
        written[row, verdict.answer.regions] = True
        if verdict.expression.referents:
            truth = torch.tensor(verdict.expression.referents, dtype=torch.double)
            ious = box.iou(torch.tensor(answer.boxes, dtype=torch.double), truth)  # (N, referents)
            iou[row, answer.regions] = ious.max(1).values.numpy()
    present = np.array([bool(verdict.expression.referents) for verdict in verdicts])
    names = tuple(verdict.expression.file_name for verdict in verdicts)
    return Evidence(names, present, gap, logits, objectness, iou, written)


def join(parts: Sequence[Evidence]) -> Evidence:
    """One Evidence of several, in their order. ValueError for none."""
    if not parts:
        raise ValueError("no expressions: there is nothing to calibrate on")
    width = max(part.logits.shape[1] for part in parts)

    def stack(name: str, padding: float) -> np.ndarray:
        arrays = [getattr(part, name) for part in parts]
        return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=padding) for a in arrays])

    return Evidence(
        tuple(name for part in parts for name in part.pictures),
        np.concatenate([part.present for part in parts]),
        np.concatenate([part.gap for part in parts]),
        stack("logits", -np.inf), stack("objectness", 0), stack("iou", 0), stack("written", 0),
    )  # fmt: skip
