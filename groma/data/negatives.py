"""Absent referents drawn from a set itself: an expression of another image, answered by nothing.

    Negatives(Referring("rec.json", "images"), share=0.2)[17]
    … "Locate <p>the striped cat</p> in the image." "<roi></roi>Nothing matches."

An expression is taken to be absent where it shares no content word with anything that the annotations say of the image.
Words are folded first, plurals and the many words for people each into one; words of place, order and size ("the one
on the far left") name nothing, and colours alone too little. What nobody annotated can still be there: a share of the
negatives is wrong, the smaller the more fully a set describes its images.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from groma import markup
from groma.data import prompts
from groma.data.coco import stack
from groma.data.records import Records
from groma.data.store import digest
from groma.structures import Sample

TRIES = 20
"""Records looked at for one expression that fits."""
LONGEST = 120
"""Characters of an expression: whole paragraphs, as some captions are, refer to nothing."""

STOP = frozenset(
    "a an the this that these those it its he she they them his her hers their there here who whom whose which what "
    "and or but nor not no of in on at to from by with without for into onto over under up down out off about as than "
    "is are was were be been being am has have had having do does did can could will would "
    "left right top bottom middle center centre side front back behind rear near nearest close closest far farthest "
    "furthest above below beside between next corner edge end upper lower first second third fourth fifth last other "
    "another one two three four five both all each every any some single pair only same most more less very just "
    "big bigger biggest large larger largest small smaller smallest little tiny tall taller tallest short long "
    "thing something anything stuff object item part piece area picture image photo scene background foreground "
    "s t re ve ll d m".split()
)
"""Words that name nothing by themselves."""
WEAK = frozenset(
    "red green blue yellow orange purple pink brown black white gray grey tan beige gold silver dark darker darkest "
    "light lighter lightest bright colored coloured color colour striped plain".split()
)
"""Words that two phrases may not share, but that alone name nothing either."""
PEOPLE = frozenset(
    "person people man men woman women guy gal boy girl lady ladies gentleman gentlemen dude kid child children "
    "baby babies toddler adult male female human somebody someone player mother father mom dad "
    "friend worker individual crowd batter catcher pitcher umpire referee skier snowboarder surfer skater skateboarder "
    "rider cyclist biker driver pedestrian chef cook waiter waitress cop police officer soldier bride groom couple "
    "student teacher doctor nurse dancer singer musician artist farmer fisherman cowboy passenger customer spectator "
    "runner athlete golfer swimmer teenager teen son daughter husband wife grandma grandpa family".split()
)
_IRREGULAR = {"feet": "foot", "teeth": "tooth", "mice": "mouse", "geese": "goose"}
_TOKEN = re.compile(r"[^\W\d_]+")
_PHRASE = re.compile(f"{markup.PHRASE_OPEN}(.*?){markup.PHRASE_CLOSE}", re.DOTALL)


class Negatives(Records):
    """``records`` in which a ``share`` of the Samples asks, once, for something that is not in the image.

    The question is one more pair of turns at a place drawn, or replaces a pair where there are as many as the reader's
    ``turns``. Its expression is a phrase, a class or a region's caption of another record, drawn like the rest from
    (seed, epoch, index) alone; where TRIES records have none that fits, the Sample stays as it is. So do Samples
    without turns. Raises ValueError for a share outside [0, 1].
    """

    def __init__(self, records: Records, share: float, seed: int = 0) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"got a share of negatives of {share}, expected 0 to 1")
        self.records, self.share = records, share
        self.file, self.images, self.seed, self.epoch = records.file, records.images, seed, records.epoch
        self.entries, self.problems = records.entries, records.problems
        self.turns: int = getattr(records, "turns", 0)
        self.locality: int = getattr(records, "locality", 0)
        self._codes: np.ndarray | None = None  # of the image of each entry, where those of an image may lie apart
        if share and getattr(records, "apart", False):
            self._codes = np.fromiter((digest(entry[0]) for entry in self.entries), np.int64, len(self.entries))
            self._order = np.argsort(self._codes, kind="stable")

    def __getitem__(self, index: int) -> Sample:
        sample, draw = self.records[index], random.Random(f"{self.seed}/{self.epoch}/{index}/negatives")
        if not sample.turns or draw.random() >= self.share:
            return sample
        known = self._known(index)
        for _ in range(TRIES):
            other = self.records[draw.randrange(len(self.records))]
            expressions = list(phrases(other)) if other.image != sample.image else []
            draw.shuffle(expressions)
            for expression in expressions:
                words = content(expression)
                if words - _FOLDED_WEAK and not words & known and len(expression) <= LONGEST:
                    return self._ask(sample, expression, draw)
        return sample

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.records.set_epoch(epoch)

    def path(self, name: str) -> str:
        return self.records.path(name)

    def name_of(self, record: Any) -> str:
        return self.records.name_of(record)

    def _known(self, index: int) -> set[str]:
        """The content words of all that is said of the image: by the entry, of which a Sample may be a draw, and by the
        other entries of the same image: those beside it, and of sets that may have them ``apart`` all. An entry's first
        value is the name of its image."""
        entry = self.entries[index]
        words = _words(entry)
        if self._codes is not None:
            first, end = (int(np.searchsorted(self._codes, self._codes[index], side, self._order))
                          for side in ("left", "right"))  # fmt: skip
            return words.union(*(_words(self.entries[int(row)]) for row in self._order[first:end]))
        for step in (-1, 1):
            other = index + step
            while 0 <= other < len(self.entries) and (beside := self.entries[other])[0] == entry[0]:
                words |= _words(beside)
                other += step
        return words

    def _ask(self, sample: Sample, expression: str, draw: random.Random) -> Sample:
        asked = prompts.refer_turns(expression, stack([]), draw.randrange(len(prompts.REFER)))
        pairs = [sample.turns[i : i + 2] for i in range(0, len(sample.turns), 2)]
        if 0 < self.turns <= len(pairs):
            pairs[draw.randrange(len(pairs))] = asked
        else:
            pairs.insert(draw.randrange(len(pairs) + 1), asked)
        return replace(sample, turns=tuple(turn for pair in pairs for turn in pair))


def phrases(sample: Sample) -> Iterator[str]:
    """What a Sample says of things in boxes, as outside text: phrases, and captions of a user's box."""
    described = False
    for turn in sample.turns:
        yield from (markup.unescape(phrase) for phrase in _PHRASE.findall(turn.text))
        if described and turn.role == "assistant":
            yield _uncapitalised(markup.parse(turn.text)[0])
        described = turn.role == "user" and prompts.USER_BOX in turn.text


def content(text: str) -> set[str]:
    """The folded words of ``text`` that name something; people are all one word.

    >>> sorted(content("two boys on the left with red boxes"))
    ['box', 'person', 'red']
    """
    words = _TOKEN.findall(text.lower())
    return {fold(word) for word in words if word not in STOP and _singular(word) not in STOP}


def fold(word: str) -> str:
    """A stem that a lower-case word shares with its plural; one for a person is "person".

    >>> [fold(word) for word in ("cups", "dishes", "shoe", "shoes", "puppy", "puppies", "knife", "knives", "women")]
    ['cup', 'dish', 'sho', 'sho', 'puppi', 'puppi', 'knif', 'knif', 'person']
    """
    word = _IRREGULAR.get(word, word)
    singular = _singular(word)
    if word in PEOPLE or singular in PEOPLE:
        return "person"
    stem = singular.removesuffix("e") if len(singular) > 3 else singular
    return stem[:-1] + {"y": "i", "v": "f"}.get(stem[-1], stem[-1])


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _words(entry: Any) -> set[str]:
    """The content words of every string of an entry after its first, the name of the image."""
    found: set[str] = set()
    parts = list(entry[1:])
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            found |= content(markup.parse(part)[0])
        elif isinstance(part, list | dict):
            parts += part.values() if isinstance(part, dict) else part
    return found


def _uncapitalised(caption: str) -> str:
    caption = caption.rstrip(". ")
    return caption[:1].lower() + caption[1:] if caption[1:2].islower() or caption[:2] == "A " else caption


_FOLDED_WEAK = frozenset(map(fold, WEAK))
