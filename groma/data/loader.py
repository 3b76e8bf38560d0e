"""Samples to batches: record to tensors in a worker (Examples), tensors to a Batch (collate), and what was left out.

A record is addressed by a Key (source, record, epoch) of groma.data.mixture, so that a worker, whatever it was told
before, makes the draws of the right epoch, and a run resumed at step k sees the batches it would have seen::

    mixture = Mixture([Source("rec", Referring("rec.json", "images"))], batch_size=32)
    examples = Examples(mixture, processor, stage="align", max_length=2048)
    DataLoader(examples, batch_sampler=mixture, collate_fn=collate, num_workers=4)
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from groma.data.augment import augment_detection, augment_published, word_ids
from groma.data.images import ImageError, read_image
from groma.data.mixture import Key, Mixture, Source
from groma.data.prompts import IGNORE, Stage, join, opening_prompt, question_prompt
from groma.data.records import AnnotationError
from groma.structures import Batch, Prompt, Sample

if TYPE_CHECKING:
    from groma.processor import GromaProcessor


@dataclass(frozen=True)
class Example:
    """One record ready to batch: pixels (3, S, S); a prompt, or targets (M, 4) with the word ids of each, or both."""

    pixels: Tensor
    prompt: Prompt | None
    targets: Tensor | None
    target_words: tuple[tuple[int, ...], ...]
    source: str
    record: str
    pad: int = 0
    image: str = ""


class TooLongError(ValueError):
    """A dialogue whose first pair of turns alone exceeds the length limit."""


_UNUSABLE = (ImageError, AnnotationError, TooLongError)
"""What makes a record be skipped; any other error is a mistake of the program."""


class Examples(torch.utils.data.Dataset["Example | None"]):
    """Key → Example. A record whose image is unusable, or whose first turns are too long, gives None and is counted.

    ``answers_only`` False takes the loss on questions too, for a language model that knows no language yet.
    ``augment`` flips and crops detection records (dialogues speak of left and right, and stay), in the way ``crop``
    names: "slight" or "published". ``words`` is the list that target phrases are looked up in. When more than
    ``max_skipped`` of all records (a share, parted evenly among the processes of a mixture) were unusable, the next one
    raises ValueError.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: GromaProcessor,
        stage: Stage = "instruct",
        max_length: int = 2048,
        words: Sequence[str] = (),
        augment: bool = False,
        max_skipped: float = 0.01,
        answers_only: bool = True,
        crop: str = "slight",
    ) -> None:
        self.mixture, self.processor, self.stage, self.max_length = mixture, processor, stage, max_length
        self.crop = crop
        self.words = {word: i for i, word in enumerate(words)}
        self.augment, self.max_skipped, self.answers_only = augment, max_skipped, answers_only
        self._opening = opening_prompt(processor)
        self._total = sum(len(source.records) for source in mixture.sources)
        limit = math.floor(max_skipped * self._total)
        # Each epoch deals the records anew: after n of them a process has met up to n of ``world`` parts of the set.
        part = math.ceil(limit / mixture.world)
        self._allowed = [min(part * parts, max(limit, part)) for parts in range(1, mixture.world + 1)]
        # Shared by all workers: how many were skipped, then (source, record) of each.
        self._skipped = mp.get_context().Array("q", 1 + 2 * self._allowed[-1])

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, key: tuple[int, int, int]) -> Example | None:
        try:
            return self.make(Key(*key))
        except _UNUSABLE as error:
            self._note(Key(*key), error)
            return None

    def __getitems__(self, keys: Sequence[tuple[int, int, int]]) -> list[Example | None]:
        """The Examples of a batch. Where every one is unusable, the first usable record after the last of them stands
        in: in training on many machines no process can do without a batch."""
        found = [self[key] for key in keys]
        spare, size = Key(*keys[-1]), len(self._source(keys[-1]).records)
        for _ in range(size - 1):
            if any(example is not None for example in found):
                break
            spare = spare._replace(record=(spare.record + 1) % size)
            found = [self[spare]]
        return found

    def sample(self, key: Key) -> Sample:
        """The record behind ``key``, with the draws of its epoch."""
        records = self._source(key).records
        records.set_epoch(key.epoch)
        return records[key.record]

    def make(self, key: Key) -> Example:
        """The tensors of ``key``. Raises ImageError or TooLongError."""
        sample = self.sample(key)
        image = read_image(sample.image)
        targets, phrases = sample.boxes, sample.phrases
        if self.augment and not sample.turns:
            draw = random.Random(f"{self.mixture.seed}/{key.epoch}/{key.source}/{key.record}")
            if self.crop == "published":
                size = self.processor.image_processor.size["height"]
                image, targets, phrases = augment_published(image, targets, phrases, draw, size, sample.source)
            else:
                image, targets, phrases = augment_detection(image, targets, phrases, draw)
        named = tuple(word_ids(text, self.words) for text in phrases) or ((),) * len(targets)
        return Example(
            pixels=self.processor.pixels([image])[0],
            prompt=self._prompt(sample) if sample.turns else None,
            targets=targets if len(targets) or not sample.turns else None,
            target_words=named if self.words else (),
            source=sample.source,
            record=sample.record,
            pad=self.processor.word_id("[PAD]"),
            image=sample.image,
        )

    @property
    def skipped(self) -> list[Key]:
        """The records skipped so far, by any worker of this process, in the order they were met (epoch 0 in all)."""
        return [Key(source, record, 0) for source, record in self._pairs().tolist()]

    def remember(self, skipped: Iterable[Key]) -> None:
        """Count records as skipped that were so before, in a run that now goes on."""
        for key in skipped:
            self._note(Key(*key)._replace(epoch=self.mixture.world), ValueError("skipped before"))

    def reason(self, key: Key) -> str:
        """One line on a record that was skipped: what is wrong with it."""
        try:
            self.make(key)
        except _UNUSABLE as error:
            return self._told(key, error)
        return f"{self.sample(key).record}: usable in epoch {key.epoch}, but not in the epoch it was skipped"

    def _prompt(self, sample: Sample) -> Prompt:
        for count in range(len(sample.turns), 0, -2):
            prompt = join(
                self._opening, question_prompt(self.processor, sample.turns[:count], self.stage, open_answer=False)
            )
            if len(prompt.ids) <= self.max_length:
                return prompt if self.answers_only else learn_questions(prompt, len(self._opening.ids))
        raise TooLongError(f"{len(prompt.ids)} tokens with one pair of turns, expected at most {self.max_length}")

    def _source(self, key: tuple[int, int, int]) -> Source:
        return self.mixture.sources[key[0]]

    def _pairs(self) -> np.ndarray:
        """(source, record) of each skipped record, int64 (S, 2): a view of what the workers share."""
        shared = np.ctypeslib.as_array(self._skipped.get_obj())
        return shared[1:].reshape(-1, 2)[: shared[0]]

    def _note(self, key: Key, error: ValueError) -> None:
        with self._skipped.get_lock():
            known = self._pairs()
            if (known == (key.source, key.record)).all(axis=1).any():
                return
            count = len(known) + 1
            if count > self._allowed[min(key.epoch, len(self._allowed) - 1)]:
                world, name = self.mixture.world, self._source(key).name
                seen = f"{self._total}, in one of {world} processes" if world > 1 else f"{self._total}"
                raise ValueError(
                    f"{count} unusable records of {seen}, more than {self.max_skipped:.1%}; last in {name}: "
                    f"{self._told(key, error)}"
                ) from error
            self._skipped[2 * count - 1 : 2 * count + 1] = [key.source, key.record]
            self._skipped[0] = count

    def _told(self, key: Key, error: ValueError) -> str:
        """The error with the name of its record, which an AnnotationError already has."""
        return str(error) if isinstance(error, AnnotationError) else f"{self.sample(key).record}: {error}"


def report(examples: Examples, skipped: Iterable[Key] | None = None, shown: int = 3) -> list[str]:
    """What was left out, by source: how many records, and one line on each of the first ``shown`` of them.

    ``skipped``: that of every process (default: of this one). Empty where every record was usable.
    """
    keys = dict.fromkeys(map(tuple, examples.skipped if skipped is None else skipped))
    lines: list[str] = []
    for number, source in enumerate(examples.mixture.sources):
        problems, late = source.records.problems, [Key(*key) for key in keys if key[0] == number]
        if problems or late:
            lines.append(f"{source.name}: left out {problems.total} unusable annotations, and {len(late)} of "
                         f"{len(source.records)} records when they were due")  # fmt: skip
            lines += [f"  {line}" for line in (*problems[:shown], *map(examples.reason, late[:shown]))]
    return lines


def learn_questions(prompt: Prompt, start: int) -> Prompt:
    """``prompt`` with every token from ``start`` on as its own label: questions as well as answers."""
    labels = prompt.labels.clone()
    labels[start:] = prompt.ids[start:]
    return Prompt(prompt.ids, labels, prompt.refer_boxes, prompt.ground_boxes)


def collate(examples: Sequence[Example | None]) -> Batch:
    """Examples of one source → Batch, right-padded. Raises ValueError where every one was skipped or kinds mix."""
    usable = [example for example in examples if example is not None]
    if not usable:
        raise ValueError(f"all {len(examples)} records of a batch are unusable, expected at least one")
    dialogues = [e.prompt for e in usable if e.prompt is not None]
    targets = tuple(e.targets for e in usable if e.targets is not None)
    kinds = {(e.prompt is None, e.targets is None, e.source) for e in usable}
    if len(kinds) != 1:
        raise ValueError(f"a batch mixes records of different kinds: {[e.record for e in usable]}")
    pixels = torch.stack([e.pixels for e in usable])  # (B, 3, S, S)
    words = tuple(e.target_words for e in usable) if any(e.target_words for e in usable) else ()
    batch = Batch(
        pixels,
        targets=targets,
        target_words=words,
        source=usable[0].source,
        records=tuple(e.record for e in usable),
        images=tuple(e.image for e in usable),
    )
    if not dialogues:
        return batch
    ids = pad_sequence([p.ids for p in dialogues], batch_first=True, padding_value=usable[0].pad)  # (B, T)
    lengths = torch.tensor([len(p.ids) for p in dialogues])
    prompts: dict[str, Any] = {
        "ids": ids,
        "labels": pad_sequence([p.labels for p in dialogues], batch_first=True, padding_value=IGNORE),
        "mask": (torch.arange(ids.shape[1])[None] < lengths[:, None]).long(),
        "refer_boxes": tuple(p.refer_boxes for p in dialogues),
        "ground_boxes": tuple(p.ground_boxes for p in dialogues),
    }
    return Batch(**{**vars(batch), **prompts})


def batch_inputs(batch: Batch) -> dict[str, Any]:
    """The keyword arguments of the model's forward for ``batch``; what the batch does not carry is None."""
    return {
        "pixel_values": batch.pixels,
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "labels": batch.labels,
        "refer_boxes": batch.refer_boxes or None,
        "ground_boxes": batch.ground_boxes or None,
        "targets": batch.targets or None,
        "target_words": batch.target_words or None,
        "source": batch.source,
    }
