"""Referring expressions a person would find unambiguous, from the facts of a scene.

An object too hidden to be annotated still exists: an expression it might also fit is not
written, and a phrase it fits is not called absent. Comparisons carry margins and have three
outcomes: yes, no, and too close to call; the referent must be a yes, every rival a no.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

from numpy.random import Generator

from projects.tabletop.absent import absent_phrase
from projects.tabletop.phrases import (
    Expression,
    Things,
    anchors,
    by_colour,
    by_kind,
    distinct,
    draw_weighted,
    heads,
    kinds_present,
    matching,
    may_be_said,
    names_pair,
    phrase,
    single,
)
from projects.tabletop.relations import LOOK_MARGIN, RELATIONS, Relation, between, larger, left_of, nearer, right_of
from projects.tabletop.vocabulary import HELD_OUT, plural

# Shares of what is written about a scene; absent ones come on top. side, depth and between are relations.
MIX = {
    "kind": 20,
    "colour_kind": 32,
    "size": 8,
    "finish": 8,
    "side": 7,
    "depth": 6,
    "between": 3,
    "superlative": 10,
    "plural": 7,
}
ABSENT_SHARE = 0.15


def sample_expressions(
    things: Things, width: int, rng: Generator, allowed: list[tuple[str, str]], count: int = 8
) -> list[Expression]:
    """Draw up to ``count`` distinct expressions about a scene ``width`` pixels wide.

    ``allowed`` lists the colour+kind pairs that a phrase may name (``vocabulary.pairs(split)``).
    """
    named = set(allowed)
    menu = {name: [e for e in write(things, width) if may_be_said(e.text, named)] for name, write in _WRITERS.items()}
    absent = sum(rng.random() < ABSENT_SHARE for _ in range(count))
    chosen: dict[str, Expression] = {}
    while len(chosen) < count - absent:
        for entries in menu.values():
            entries[:] = [entry for entry in entries if entry.text not in chosen]
        left = [name for name in MIX if menu[name]]
        if not left:
            break
        weights = [MIX[name] for name in left]
        name = left[draw_weighted(rng, weights)]
        entry = menu[name][int(rng.integers(len(menu[name])))]
        chosen[entry.text] = entry
    for _ in range(20 * absent):
        if sum(e.type == "absent" for e in chosen.values()) == absent:
            break
        text = absent_phrase(things, width, rng, allowed)
        if text and text not in chosen:
            chosen[text] = Expression(text, "absent", ())
    order = rng.permutation(len(chosen))
    found = list(chosen.values())
    return [_flag(found[int(i)]) for i in order]


def _flag(entry: Expression) -> Expression:
    unseen = any(names_pair(entry.text, pair) for pair in HELD_OUT)
    return Expression(entry.text, entry.type, entry.referents, unseen)


def _by_size(things: Things, width: int) -> list[Expression]:
    out = []
    for thing in things:
        for colour in ("", thing.colour):
            i = single(things, matching(things, thing.kind, colour, size=thing.size))
            if i is not None and _looks_its_size(things, i, matching(things, thing.kind, colour)):
                out.append(Expression(phrase(thing.size, colour, thing.kind), "size", (i,)))
    return out


def _looks_its_size(things: Things, i: int, rivals: list[int]) -> bool:
    """Perspective must not contradict the size: a far large cup beside a near small one is unclear."""
    mine = things[i].whole_area
    for j in rivals:
        other = things[j].whole_area
        big, little = (mine, other) if things[i].size == "large" else (other, mine)
        if j != i and big < LOOK_MARGIN * little:
            return False
    return True


def _by_finish(things: Things, width: int) -> list[Expression]:
    out = []
    for thing in things:
        for colour in ("", thing.colour):
            i = single(things, matching(things, thing.kind, colour, finish=thing.finish))
            if i is not None:
                out.append(Expression(phrase(thing.finish, colour, thing.kind), "finish", (i,)))
    return out


def _plurals(things: Things, width: int) -> list[Expression]:
    out = []
    for thing in things:
        queries = (
            (f"all the {plural(thing.kind)}", matching(things, thing.kind)),
            (f"all the {thing.colour} {plural(thing.kind)}", matching(things, thing.kind, thing.colour)),
            (f"all the {thing.finish} {plural(thing.kind)}", matching(things, thing.kind, finish=thing.finish)),
            (f"all the {thing.colour} objects", matching(things, colour=thing.colour)),
        )
        for text, indices in queries:
            if len(indices) > 1 and all(things[i].annotated for i in indices):
                out.append(Expression(text, "plural", tuple(indices)))
    return distinct(out)


def _sides(things: Things, width: int) -> list[Expression]:
    return _relations(things, width, [words for words in RELATIONS if "left" in words or "right" in words])


def _depths(things: Things, width: int) -> list[Expression]:
    return _relations(things, width, ["in front of", "behind"])


def _relations(things: Things, width: int, relations: list[str]) -> list[Expression]:
    told, spare = [], []
    known = anchors(things)
    for head, candidates in heads(things):
        for anchor, at in known:
            if at in candidates:
                continue
            for words in relations:
                i = _only([RELATIONS[words](things[j], things[at], width) for j in candidates], candidates)
                if i is not None and things[i].annotated:
                    found = Expression(f"{head} {words} {anchor}", "relation", (i,))
                    (told if len(candidates) > 1 else spare).append(found)
    return told * 3 + spare  # where the relation decides among several, it is asked more often


def _betweens(things: Things, width: int) -> list[Expression]:
    out = []
    known = anchors(things)
    for head, candidates in heads(things):
        for (first, a), (second, b) in combinations(known, 2):
            if a == b or a in candidates or b in candidates:
                continue
            i = _only([between(things[j], things[a], things[b], width) for j in candidates], candidates)
            if i is not None and things[i].annotated:
                out.append(Expression(f"{head} between {first} and {second}", "relation", (i,)))
    return out


def _only(outcomes: list[bool | None], candidates: list[int]) -> int | None:
    """The one candidate with a yes, if every other is a no."""
    sure = [j for j, outcome in zip(candidates, outcomes, strict=True) if outcome]
    return sure[0] if len(sure) == 1 and None not in outcomes else None


def _superlatives(things: Things, width: int) -> list[Expression]:
    out = []
    groups = [(kind, matching(things, kind)) for kind in kinds_present(things)]
    groups.append(("object", list(range(len(things)))))
    for noun, group in groups:
        if len(group) < 2 or not all(things[i].annotated for i in group):
            continue
        for word, beats in _SUPERLATIVES.items():
            best = [i for i in group if all(beats(things[i], things[j], width) for j in group if j != i)]
            if best:
                out.append(Expression(f"the {word} {noun}", "superlative", (best[0],)))
    return out


_SUPERLATIVES: dict[str, Relation] = {
    "largest": lambda a, b, width: larger(a, b),
    "smallest": lambda a, b, width: larger(b, a),
    "leftmost": lambda a, b, width: left_of(a, b, width) and a.whole_box[0] < b.whole_box[0],
    "rightmost": lambda a, b, width: right_of(a, b, width) and a.whole_box[2] > b.whole_box[2],
    "nearest": lambda a, b, width: nearer(a, b),
    "farthest": lambda a, b, width: nearer(b, a),
}


_WRITERS: dict[str, Callable[[Things, int], list[Expression]]] = {
    "kind": by_kind,
    "colour_kind": by_colour,
    "size": _by_size,
    "finish": _by_finish,
    "side": _sides,
    "depth": _depths,
    "between": _betweens,
    "superlative": _superlatives,
    "plural": _plurals,
}
