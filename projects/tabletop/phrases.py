"""Phrases for things, and what they match: the ground that expressions stand on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from numpy.random import Generator

from projects.tabletop.observed import Thing
from projects.tabletop.vocabulary import HELD_OUT, KINDS, plural

Things = tuple[Thing, ...]


@dataclass(frozen=True)
class Expression:
    """A phrase and the things it names.

    type: kind, colour_kind, size, finish, relation, superlative, plural or absent. referents:
    indices into the scene's things, none for absent. unseen_pair: it names a held-out colour+kind.
    """

    text: str
    type: str
    referents: tuple[int, ...]
    unseen_pair: bool = False


def matching(things: Things, kind: str = "", colour: str = "", size: str = "", finish: str = "") -> list[int]:
    """Indices of every existing thing, hidden ones included, that has these properties; empty = any."""
    wanted = {"kind": kind, "colour": colour, "size": size, "finish": finish}
    return [
        i
        for i, thing in enumerate(things)
        if all(not value or getattr(thing, name) == value for name, value in wanted.items())
    ]


def single(things: Things, indices: list[int]) -> int | None:
    """The one index, if there is one and it is annotated."""
    return indices[0] if len(indices) == 1 and things[indices[0]].annotated else None


def kinds_present(things: Things) -> list[str]:
    """The kinds that exist, in the vocabulary's order."""
    return [kind for kind in KINDS if matching(things, kind)]


def by_kind(things: Things, width: int) -> list[Expression]:
    """ "the cup", for every kind of which there is one."""
    found = ((kind, single(things, matching(things, kind))) for kind in kinds_present(things))
    return [Expression(f"the {kind}", "kind", (i,)) for kind, i in found if i is not None]


def by_colour(things: Things, width: int) -> list[Expression]:
    """ "the red cup", for every colour+kind of which there is one."""
    found = ((t, single(things, matching(things, t.kind, t.colour))) for t in things)
    return [Expression(f"the {t.colour} {t.kind}", "colour_kind", (i,)) for t, i in found if i is not None]


def anchors(things: Things) -> list[tuple[str, int]]:
    """Phrases that name one annotated thing for sure, to relate others to."""
    simple = distinct(by_kind(things, 0) + by_colour(things, 0))
    return [(entry.text, entry.referents[0]) for entry in simple]


def heads(things: Things) -> list[tuple[str, list[int]]]:
    """Kind and colour+kind phrases with everything they match."""
    found = {f"the {kind}": matching(things, kind) for kind in kinds_present(things)}
    found |= {f"the {t.colour} {t.kind}": matching(things, t.kind, t.colour) for t in things}
    return list(found.items())


def phrase(*words: str) -> str:
    """The words behind "the", without the empty ones."""
    return "the " + " ".join(word for word in words if word)


def distinct(entries: Iterable[Expression]) -> list[Expression]:
    """One expression for each text, in order."""
    return list({entry.text: entry for entry in entries}.values())


def names_pair(text: str, pair: tuple[str, str]) -> bool:
    """Does the phrase speak of this colour+kind, in the singular or the plural?"""
    words = text.lower().replace(",", " ").replace(".", " ").replace("?", " ").split()
    nouns = {pair[1], plural(pair[1])}
    return any(words[i] == pair[0] and words[i + 1] in nouns for i in range(len(words) - 1))


def may_be_said(text: str, named: set[tuple[str, str]]) -> bool:
    """Does the phrase keep to the pairs that may be named? Only held-out pairs are ever withheld."""
    return not any(pair not in named and names_pair(text, pair) for pair in HELD_OUT)


def draw_weighted(rng: Generator, weights: list[int]) -> int:
    """An index, drawn with these weights."""
    at = rng.random() * sum(weights)
    for i, weight in enumerate(weights):
        at -= weight
        if at < 0:
            return i
    return len(weights) - 1
