"""Phrases that nothing in a scene fits, mostly close to something that is there."""

from __future__ import annotations

from numpy.random import Generator

from projects.tabletop.phrases import Things, anchors, draw_weighted, heads, matching, may_be_said, phrase
from projects.tabletop.relations import Relation, left_of, nearer, right_of
from projects.tabletop.vocabulary import FINISHES, KINDS, plural

# A relation is absent where every candidate clearly stands the other way round.
_CONTRARY: dict[str, Relation] = {
    "to the left of": left_of,
    "to the right of": right_of,
    "in front of": lambda a, b, width: nearer(a, b),
    "behind": lambda a, b, width: nearer(b, a),
}


def absent_phrase(things: Things, width: int, rng: Generator, allowed: list[tuple[str, str]]) -> str:
    """A phrase that nothing in the scene fits, mostly close to something that is there; "" if none was found."""
    forms = (_wrong_colour, _wrong_kind, _no_such_kind, _wrong_finish, _no_such_relation, _no_such_plural)
    form = forms[draw_weighted(rng, [38, 18, 20, 8, 11, 5])]
    texts = form(things, width, allowed)
    texts = [text for text in texts if may_be_said(text, set(allowed))]
    return texts[int(rng.integers(len(texts)))] if texts else ""


def _missing_pairs(things: Things, allowed: list[tuple[str, str]]) -> list[tuple[str, str]]:
    there = {thing.pair for thing in things}
    return [pair for pair in allowed if pair not in there]


def _wrong_colour(things: Things, width: int, allowed: list[tuple[str, str]]) -> list[str]:
    return [f"the {c} {k}" for c, k in _missing_pairs(things, allowed) if matching(things, k)]


def _wrong_kind(things: Things, width: int, allowed: list[tuple[str, str]]) -> list[str]:
    missing = _missing_pairs(things, allowed)
    return [f"the {c} {k}" for c, k in missing if not matching(things, k) and matching(things, colour=c)]


def _no_such_kind(things: Things, width: int, allowed: list[tuple[str, str]]) -> list[str]:
    return [f"the {kind}" for kind in KINDS if not matching(things, kind)]


def _wrong_finish(things: Things, width: int, allowed: list[tuple[str, str]]) -> list[str]:
    out = []
    for thing in things:
        for finish in FINISHES:
            for colour in ("", thing.colour):
                if not matching(things, thing.kind, colour, finish=finish):
                    out.append(phrase(finish, colour, thing.kind))
    return out


def _no_such_relation(things: Things, width: int, allowed: list[tuple[str, str]]) -> list[str]:
    out = []
    for head, candidates in heads(things):
        for anchor, at in anchors(things):
            if at in candidates:
                continue
            for words, holds in _CONTRARY.items():
                if all(holds(things[at], things[j], width) for j in candidates):
                    out.append(f"{head} {words} {anchor}")
    return out


def _no_such_plural(things: Things, width: int, allowed: list[tuple[str, str]]) -> list[str]:
    return [f"all the {c} {plural(k)}" for c, k in _missing_pairs(things, allowed) if matching(things, k)]
