"""Samples to batches: which record when (Mixture), record to tensors in a worker (Examples), tensors to a Batch.

A record is addressed by a Key (source, record, epoch), so that a worker, whatever it was told before, makes the draws
of the right epoch, and a run resumed at step k sees the batches it would have seen::

    mixture = Mixture([Source("rec", Referring("rec.json", "images"))], batch_size=32)
    examples = Examples(mixture, processor, stage="align", max_length=2048)
    DataLoader(examples, batch_sampler=mixture, collate_fn=collate, num_workers=4)
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from groma.data.augment import augment_detection, word_ids
from groma.data.images import ImageError, read_image
from groma.data.prompts import IGNORE, Stage, join, opening_prompt, question_prompt
from groma.data.records import Records
from groma.structures import Batch, Prompt, Sample

if TYPE_CHECKING:
    from groma.processor import GromaProcessor


class Key(NamedTuple):
    """One record of one epoch: ``Mixture.sources[source].records[record]``."""

    source: int
    record: int
    epoch: int


@dataclass(frozen=True)
class Source:
    """A named data set and the share of its records used in an epoch (above 1: some are seen more than once)."""

    name: str
    records: Records
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if not self.ratio > 0 or len(self.records) == 0:
            got = f"ratio {self.ratio} of {len(self.records)} records"
            raise ValueError(f"source {self.name}: {got}, expected both above 0")


class Mixture:
    """A torch ``batch_sampler`` over several sources: every batch of Keys is from one source, batches are shuffled.

    The order depends on (seed, epoch) alone. With a ratio below 1 each epoch draws its own share of the source.
    """

    def __init__(self, sources: Sequence[Source], batch_size: int, seed: int = 0, drop_last: bool = False) -> None:
        names = [source.name for source in sources]
        if not sources or len(set(names)) != len(names) or batch_size < 1:
            raise ValueError(f"got sources {names} and batch size {batch_size}, expected distinct names and at least 1")
        self.sources, self.batch_size, self.seed, self.drop_last = tuple(sources), batch_size, seed, drop_last
        self.epoch = 0
        if len(self) == 0:
            raise ValueError(f"sources {names} fill no batch of {batch_size}: every one is smaller")

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration that of ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        rounded = math.floor if self.drop_last else math.ceil
        return sum(rounded(self._count(source) / self.batch_size) for source in self.sources)

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches(self.epoch))

    def batches(self, epoch: int) -> list[list[Key]]:
        """All batches of ``epoch`` in order."""
        draw = random.Random(f"{self.seed}/{epoch}")
        batches: list[list[Key]] = []
        for number, source in enumerate(self.sources):
            order: list[int] = []
            while len(order) < self._count(source):
                order += draw.sample(range(len(source.records)), len(source.records))
            keys = [Key(number, index, epoch) for index in order[: self._count(source)]]
            rows = [keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size)]
            batches += [row for row in rows if len(row) == self.batch_size or not self.drop_last]
        draw.shuffle(batches)
        return batches

    @staticmethod
    def _count(source: Source) -> int:
        return max(1, round(source.ratio * len(source.records)))


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


class TooLongError(ValueError):
    """A dialogue whose first pair of turns alone exceeds the length limit."""


class Examples(torch.utils.data.Dataset["Example | None"]):
    """Key → Example. A record whose image is unusable, or whose first turns are too long, gives None and is counted.

    ``answers_only`` False takes the loss on questions too, for a language model that knows no language yet.
    ``augment`` flips and crops detection records (dialogues speak of left and right, and stay). ``words`` is the list
    that target phrases are looked up in. When more than ``max_skipped`` of all records (a share) were unusable, the
    next one raises ValueError.
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
    ) -> None:
        self.mixture, self.processor, self.stage, self.max_length = mixture, processor, stage, max_length
        self.words = {word: i for i, word in enumerate(words)}
        self.augment, self.max_skipped, self.answers_only = augment, max_skipped, answers_only
        self._opening = opening_prompt(processor)
        self._total = sum(len(source.records) for source in mixture.sources)
        # Shared by all workers: how many were skipped, then (source, record) of each.
        self._skipped = mp.get_context().Array("q", 3 + 2 * math.floor(max_skipped * self._total))

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, key: tuple[int, int, int]) -> Example | None:
        try:
            return self.make(Key(*key))
        except (ImageError, TooLongError) as error:
            self._note(Key(*key), error)
            return None

    def sample(self, key: Key) -> Sample:
        """The record behind ``key``, with the draws of its epoch."""
        records = self.mixture.sources[key.source].records
        records.set_epoch(key.epoch)
        return records[key.record]

    def make(self, key: Key) -> Example:
        """The tensors of ``key``. Raises ImageError or TooLongError."""
        sample = self.sample(key)
        image = read_image(sample.image)
        targets, phrases = sample.boxes, sample.phrases
        if self.augment and not sample.turns:
            draw = random.Random(f"{self.mixture.seed}/{key.epoch}/{key.source}/{key.record}")
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
        )

    @property
    def skipped(self) -> list[str]:
        """One line per record skipped so far, by any worker: what was wrong with it."""
        lines = []
        for i in range(self._skipped[0]):
            key = Key(self._skipped[1 + 2 * i], self._skipped[2 + 2 * i], 0)
            try:
                self.make(key)
                lines.append(f"{self.sample(key).record}: usable in epoch 0, but not in the epoch it was skipped")
            except (ImageError, TooLongError) as error:
                lines.append(f"{self.sample(key).record}: {error}")
        return lines

    def _prompt(self, sample: Sample) -> Prompt:
        for count in range(len(sample.turns), 0, -2):
            prompt = join(
                self._opening, question_prompt(self.processor, sample.turns[:count], self.stage, open_answer=False)
            )
            if len(prompt.ids) <= self.max_length:
                return prompt if self.answers_only else learn_questions(prompt, len(self._opening.ids))
        raise TooLongError(f"{len(prompt.ids)} tokens with one pair of turns, expected at most {self.max_length}")

    def _note(self, key: Key, error: ValueError) -> None:
        with self._skipped.get_lock():
            count = self._skipped[0]
            known = [tuple(self._skipped[1 + 2 * i : 3 + 2 * i]) for i in range(count)]
            if (key.source, key.record) in known:
                return
            if count + 1 > self.max_skipped * self._total:
                name = self.mixture.sources[key.source].name
                raise ValueError(
                    f"{count + 1} unusable records of {self._total}, more than {self.max_skipped:.1%}; last in {name}: "
                    f"{self.sample(key).record}: {error}"
                ) from error
            self._skipped[1 + 2 * count : 3 + 2 * count] = [key.source, key.record]
            self._skipped[0] = count + 1


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
        pixels, targets=targets, target_words=words, source=usable[0].source, records=tuple(e.record for e in usable)
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
