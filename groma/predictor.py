"""Groma, the predictor: look at a picture once, then ask as many questions as you like.

    groma = Groma.from_pretrained()
    view = groma.look("table.jpg")
    groma.refer(view, "the red cup").boxes

How a region is scored. One forward pass reads, for an expression, the probability f that the answer points at
something: that it opens a group rather than saying that nothing matches, times that it does not close the group at
once; and the distribution p over the proxies that exist in this view, given that it points. Region k scores
``f · p_k · o_k`` with o its objectness: something matches, it is k, and k is an object. When several regions are
written ("all the cups"), p is shared between them, so each is given the sum over those written from its step on.
The certainty of the answer is f times the share of the first region written, that is of all of them; ``found`` is
certainty ≥ ``config.found_threshold``, fitted on a validation set. f alone would refuse more of what is there and new:
a pair of words never met lowers f, but not p, while what is absent lowers both.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from groma import boxes as box_ops
from groma import markup
from groma.data.images import read_image
from groma.data.prompts import opening_prompt, question_prompt, refer_question
from groma.model.configuration import GromaConfig
from groma.model.groma import GromaForConditionalGeneration
from groma.processor import GromaProcessor
from groma.structures import Answer, Span, Turn, View

EMBEDDED = Path(__file__).parent / "assets" / "tabletop"
QUESTIONS_AT_ONCE = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _Pointing:
    """What was read for Q expressions: found (Q), p over regions (Q, N), and the regions written (Q lists)."""

    found: Tensor
    p: Tensor
    written: list[list[int]]
    shares: list[list[float]]


class Groma:
    """A model with its processor, on one device. Holds no state between calls: a View is a value."""

    def __init__(self, model: GromaForConditionalGeneration, processor: GromaProcessor, name: str = "groma",
                 embedded: bool = False) -> None:  # fmt: skip
        self.model, self.processor, self.name, self.is_embedded = model.eval(), processor, name, embedded
        self._opening = opening_prompt(processor)
        self._point = processor.word_id(markup.ROI_OPEN)
        self._close = processor.word_id(markup.ROI_CLOSE)
        self._nothing = processor.encode(markup.NOTHING)[0]
        self._proxies = torch.tensor(model.config.proxy_ids)

    @classmethod
    def from_pretrained(cls, model: str | Path | None = None, device: str = "auto", dtype: str = "auto") -> Groma:
        """Load a directory or a hub id; None is the embedded default. Raises ValueError with one line for the user."""
        embedded = model is None
        source = EMBEDDED if model is None else Path(model)
        where = pick_device(device)
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, expected auto or one of {', '.join(DTYPES)}")
        kind = DTYPES[dtype] if dtype != "auto" else torch.bfloat16 if where.type == "cuda" else torch.float32
        if source.exists() and not (source / "config.json").is_file():
            raise ValueError(f"model: {source} holds no config.json, so it is not a model directory")
        name = str(source) if source.exists() else str(model)
        try:
            loaded, processor = _load(name, kind)
        except (OSError, ValueError, SafetensorError) as error:
            why = str(error).strip().splitlines()[0]
            what = "cannot be loaded" if source.exists() else "is neither a model directory nor a reachable hub id"
            raise ValueError(f"model: {name!r} {what} ({why})") from error
        loaded = loaded.to(where)
        return cls(loaded, processor, "groma-tabletop" if embedded else source.name, embedded)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    # -- look ---------------------------------------------------------------------------------------------------------

    def look(self, image: str | Path | Image.Image, boxes: Sequence[Sequence[float]] = ()) -> View:
        """One picture → its View. A file is turned upright by its EXIF; a PIL image is taken as it is.

        boxes: a user's own regions, xyxy pixels of the upright picture.
        Raises ImageError for a file that is no picture, ValueError for a box outside it.
        """
        return self.look_many([image], [boxes])[0]

    @torch.inference_mode()
    def look_many(self, images: Sequence[str | Path | Image.Image], boxes: Sequence[Sequence[Sequence[float]]] = ()
                  ) -> list[View]:  # fmt: skip
        """Several pictures in one pass; each equals what ``look`` gives alone."""
        start = time.perf_counter()
        pictures = [i if isinstance(i, Image.Image) else read_image(i) for i in images]
        names = [str(i.info.get("filename", "")) if isinstance(i, Image.Image) else str(i) for i in images]
        refer = [user_boxes(b, p.width, p.height) for b, p in zip(boxes or [()] * len(pictures), pictures, strict=True)]
        if (most := max(map(len, refer))) > self.model.config.max_regions:
            raise ValueError(f"box: got {most} boxes for one picture, the model takes {self.model.config.max_regions}")
        pixels = self.processor.pixels([p.convert("RGB") for p in pictures]).to(self.device, self.model.dtype)
        views = self.model.look(pixels, tuple(r.to(self.device) for r in refer))
        views = [replace(v, prefix=self._prefill(v)) for v in views]
        spent = (time.perf_counter() - start) / len(pictures)
        return [replace(v, width=p.width, height=p.height, name=n, seconds=spent)
                for v, p, n in zip(views, pictures, names, strict=True)]  # fmt: skip

    def _prefill(self, view: View) -> Any:
        """The KV cache of everything before a question: system text, image, regions, the opening pair of turns."""
        spliced = self.model.splice([view], [self._opening])
        return self.model.speak(spliced.embeds, spliced.mask, use_cache=True, last=1).past_key_values

    # -- refer --------------------------------------------------------------------------------------------------------

    def refer(self, view: View, text: str, top_k: int | None = None, min_score: float | None = None) -> Answer:
        """Where is ``text``? Boxes in pixels with scores, or ``found=False``.

        top_k: the k best regions instead of those the model writes; min_score: drop boxes below it.
        Raises ValueError for an empty expression, top_k < 1 or min_score outside [0, 1].
        """
        return self.refer_many(view, [text], top_k, min_score)[0]

    @torch.inference_mode()
    def refer_many(self, view: View, texts: Sequence[str], top_k: int | None = None, min_score: float | None = None
                   ) -> list[Answer]:  # fmt: skip
        """Many expressions on one view, in batched forward passes over its shared prefix."""
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: got {top_k}, expected 1 or more")
        if min_score is not None and not 0 <= min_score <= 1:
            raise ValueError(f"min_score: got {min_score}, expected a number from 0 to 1")
        if any(not t.strip() for t in texts):
            raise ValueError("text: got an empty expression, expected words such as 'the red cup'")
        answers: list[Answer] = []
        for i in range(0, len(texts), QUESTIONS_AT_ONCE):
            start = time.perf_counter()
            chunk = [t.strip() for t in texts[i : i + QUESTIONS_AT_ONCE]]
            read = self._point_at(view, chunk)
            spent = (time.perf_counter() - start) / len(chunk)
            answers += [self._answer(view, t, read, row, top_k, min_score or 0.0, spent) for row, t in enumerate(chunk)]
        return answers

    def _point_at(self, view: View, texts: list[str]) -> _Pointing:
        prompts = [question_prompt(self.processor, [Turn("user", refer_question(t))]) for t in texts]
        ids, mask = self.processor.pad([torch.cat((p.ids, torch.tensor([self._point]))) for p in prompts])
        last = mask.sum(1) - 1  # (Q) position of <roi>
        cache = _repeat(view.prefix, len(texts))
        pointers = view.region_tokens[None].expand(len(texts), -1, -1)
        logits, mask, cache = self._continue(ids.to(self.device), mask.to(self.device), None, cache, pointers)
        rows = torch.arange(len(texts), device=logits.device)
        start = logits[rows, last.to(logits.device) - 1].float() / self.model.config.score_temperature
        found = start[:, [self._point, self._nothing]].softmax(-1)[:, 0]  # (Q)
        proxies = self._proxies[: len(view.proposals)].to(logits.device)
        inside = torch.cat((proxies, proxies.new_tensor([self._close])))
        first = logits[rows, last.to(logits.device)][:, inside].float() / self.model.config.score_temperature
        found = found * (1 - first.softmax(-1)[:, -1])
        p = first[:, :-1].softmax(-1)
        written, shares = self._write(p, proxies, mask, cache, pointers)
        return _Pointing(found.cpu(), p.cpu(), written, shares)

    def _continue(self, ids: Tensor, new_mask: Tensor, mask: Tensor | None, cache: Any,
                  pointers: Tensor) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
        """Tokens (Q, T) after a cache → logits (Q, T, V), the mask of everything so far, the longer cache."""
        if mask is None:
            mask = new_mask.new_ones(len(ids), cache.get_seq_length())
        mask = torch.cat((mask, new_mask), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        limit = getattr(self.model.config.llm, "max_position_embeddings", None)
        if limit is not None and mask.shape[1] > limit:
            raise ValueError(f"text: the expression makes a prompt of {mask.shape[1]} tokens, the model takes {limit}")
        out = self.model.speak(self.model.get_input_embeddings()(ids), mask, cache, True, positions, pointers=pointers)
        return out.logits, mask, out.past_key_values

    def _write(self, p: Tensor, proxies: Tensor, mask: Tensor, cache: Any, pointers: Tensor
               ) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
        """Greedy decoding of the group: proxies that exist and are not written yet, until </roi> wins."""
        count = len(proxies)
        allowed = torch.cat((proxies, proxies.new_tensor([self._close])))
        steps, chosen = [torch.cat((p, p.new_zeros(len(p), 1)), 1)], [p.argmax(1)]  # the first word is a proxy
        open_rows = torch.ones(len(p), dtype=torch.bool, device=p.device)
        done = torch.zeros(len(p), count + 1, dtype=torch.bool, device=p.device)
        while len(chosen) < count and bool(open_rows.any()):
            rows = open_rows.nonzero()[:, 0]
            done[rows, chosen[-1][rows]] = True
            ids = allowed[chosen[-1]][:, None]
            logits, mask, cache = self._continue(ids, open_rows.long()[:, None], mask, cache, pointers)
            step = logits[:, -1][:, allowed].float() / self.model.config.score_temperature
            step = step.masked_fill(done, float("-inf")).softmax(-1)
            steps.append(step)
            chosen.append(step.argmax(1))
            open_rows = open_rows & (chosen[-1] != count)
        return _groups(torch.stack(steps, 1).cpu(), torch.stack(chosen, 1).cpu(), count)

    def _answer(self, view: View, text: str, read: _Pointing, row: int, top_k: int | None, min_score: float,
                spent: float) -> Answer:  # fmt: skip
        f, p = float(read.found[row]), read.p[row]
        certainty = f * read.shares[row][0]
        if top_k is None:
            regions, shares = read.written[row], read.shares[row]
        else:
            regions = p.argsort(descending=True, stable=True)[:top_k].tolist()
            shares = [float(p[k]) for k in regions]
        objectness = view.proposals.scores
        scored = [(k, f * s * float(objectness[k])) for k, s in zip(regions, shares, strict=True)]
        scored = sorted((item for item in scored if item[1] >= min_score), key=lambda item: -item[1])
        found = bool(scored) and certainty >= self.model.config.found_threshold
        scored = scored if found else []
        raw = f"{text} {''.join(markup.proxy(k) for k, _ in scored)}" if found else markup.NOTHING
        span = Span(text, 0, len(text), tuple(k for k, _ in scored), self._pixels(view, [k for k, _ in scored]),
                    tuple(s for _, s in scored))  # fmt: skip
        return Answer(text if found else markup.NOTHING, (span,) if found else (), found, text, raw, view.name,
                      view.width, view.height, self.name, {"look": view.seconds, "answer": spent}, f,
                      certainty)  # fmt: skip

    # -- propose ------------------------------------------------------------------------------------------------------

    def propose(self, view: View, max: int = 100) -> Answer:
        """The view's regions as boxes with objectness, best first, at most ``max``. ValueError for max < 1."""
        if max < 1:
            raise ValueError(f"max: got {max}, expected 1 or more")
        order = view.proposals.scores.argsort(descending=True, stable=True)[:max].tolist()
        spans = tuple(Span("", 0, 0, (k,), self._pixels(view, [k]), (float(view.proposals.scores[k]),)) for k in order)
        return Answer("", spans, bool(spans), "", "".join(markup.proxy(k) for k in order), view.name, view.width,
                      view.height, self.name, {"look": view.seconds})  # fmt: skip

    def _pixels(self, view: View, regions: list[int]) -> tuple[tuple[float, float, float, float], ...]:
        boxes = box_ops.to_pixels(box_ops.clip(view.proposals.boxes[regions].float()), view.width, view.height)
        return tuple((b[0], b[1], b[2], b[3]) for b in boxes.tolist())


def _load(name: str, dtype: torch.dtype) -> tuple[GromaForConditionalGeneration, GromaProcessor]:
    """Model and processor. Refuses another family's model, which would be taken for a Groma of the default sizes."""
    family = GromaConfig.get_config_dict(name)[0].get("model_type")
    if family != GromaConfig.model_type:
        raise ValueError(f"its config.json is of type {family!r}, expected {GromaConfig.model_type!r}")
    return GromaForConditionalGeneration.from_pretrained(name, dtype=dtype), GromaProcessor.from_pretrained(name)


def _groups(steps: Tensor, chosen: Tensor, count: int) -> tuple[list[list[int]], list[list[float]]]:
    """steps (Q, S, N + 1) and choices (Q, S), where N means "closed" → regions and shares of each row.

    The share of a region is the probability at its step of it and of all regions written after it.
    """
    written, shares = [], []
    for row, choices in zip(steps, chosen.tolist(), strict=True):
        end = choices.index(count) if count in choices else len(choices)
        regions = choices[:end]
        written.append(regions)
        shares.append([float(row[j, regions[j:]].sum()) for j in range(end)])
    return written, shares


def _repeat(cache: Any, rows: int) -> Any:
    """A copy of a one-row KV cache for ``rows`` rows; the original stays as it is."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(rows)
    return cache


def user_boxes(boxes: Sequence[Sequence[float]], width: int, height: int) -> Tensor:
    """A user's xyxy pixel boxes → (K, 4) in [0, 1]. ValueError for one that is reversed or leaves the picture."""
    for box in boxes:
        if len(box) != 4:
            raise ValueError(f"box: got {len(box)} numbers, expected x1,y1,x2,y2 in pixels")
        x1, y1, x2, y2 = box
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise ValueError(
                f"box: got {x1:g},{y1:g},{x2:g},{y2:g}, expected x1 < x2 and y1 < y2 inside {width}x{height} pixels"
            )
    given = torch.tensor([list(b) for b in boxes], dtype=torch.float32).reshape(-1, 4)
    return box_ops.to_unit(given, width, height)


def pick_device(name: str) -> torch.device:
    """ "auto" → CUDA, then MPS, then CPU. Raises ValueError for a device this machine or torch does not have."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(k for k in ("cuda", "mps", "cpu") if available[k]))
    if not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", name):
        raise ValueError(f"device: got {name!r}, expected auto, cpu, cuda or mps")
    if not available[name.split(":")[0]]:
        raise ValueError(f"device: {name!r} is not available here; available: {[k for k, v in available.items() if v]}")
    return torch.device(name)
