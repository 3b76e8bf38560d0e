"""Sentences about a whole scene: grounded captions, region descriptions and conversations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from numpy.random import Generator

from projects.tabletop.phrases import Things, kinds_present, matching, may_be_said
from projects.tabletop.relations import RELATIONS
from projects.tabletop.vocabulary import KINDS, article, number, plural


@dataclass(frozen=True)
class Mention:
    """Characters [start, end) of a caption and the things they name."""

    start: int
    end: int
    referents: tuple[int, ...]


@dataclass(frozen=True)
class Caption:
    """A caption and its mentions, in order."""

    text: str
    mentions: tuple[Mention, ...]


class _Writer:
    """Grows a text and notes where things are named."""

    def __init__(self) -> None:
        self.text = ""
        self.mentions: list[Mention] = []

    def say(self, words: str) -> None:
        self.text += words

    def name(self, phrase: str, referents: tuple[int, ...]) -> None:
        if not self.text or self.text.endswith(". "):
            phrase = phrase[0].upper() + phrase[1:]
        self.mentions.append(Mention(len(self.text), len(self.text) + len(phrase), referents))
        self.text += phrase


def grounded_caption(things: Things, width: int, rng: Generator) -> Caption:
    """A caption that names two to five annotated things, each at most once.

    A group of twins is named together ("two green bowls"); a thing that a hidden twin makes
    doubtful is left out. In a scene with fewer than two such groups the caption may name less.
    """
    groups = _groups(things, rng)
    wanted = int(rng.integers(2, 6))
    writer = _Writer()
    used = 0
    while used < min(wanted, len(groups)):
        if writer.text:
            writer.say(" ")
        two = groups[used : used + 2] if used + 2 <= min(wanted, len(groups)) else []
        relation = _relation_between(things, two, width, rng)
        if relation and rng.random() < 0.65:
            _tell_relation(writer, two, relation, rng)
            used += 2
        else:
            share = groups[used : min(wanted, used + int(rng.integers(1, 4)))]
            _tell_list(writer, share, first=used == 0, rng=rng)
            used += len(share)
    if not writer.text:
        writer.say("A table stands against a wall.")
    return Caption(writer.text, tuple(writer.mentions))


Group = tuple[str, tuple[int, ...]]


def _groups(things: Things, rng: Generator) -> list[Group]:
    """Phrases such as "a red cup" or "two green bowls" with what they name, in random order."""
    out = []
    for pair in dict.fromkeys(thing.pair for thing in things):
        indices = matching(things, kind=pair[1], colour=pair[0])
        if not all(things[i].annotated for i in indices):
            continue
        if len(indices) > 1:
            out.append((f"{number(len(indices))} {pair[0]} {plural(pair[1])}", tuple(indices)))
            continue
        thing = things[indices[0]]
        extra = ("", "", thing.size, thing.finish)[int(rng.integers(4))]
        out.append((article(f"{extra} {thing.colour} {thing.kind}".strip()), tuple(indices)))
    return [out[int(i)] for i in rng.permutation(len(out))]


def _relation_between(things: Things, two: list[Group], width: int, rng: Generator) -> str:
    if len(two) < 2 or any(len(indices) > 1 for _, indices in two):
        return ""
    a, b = (things[indices[0]] for _, indices in two)
    true = [words for words, holds in RELATIONS.items() if holds(a, b, width) and words[:2] in ("to", "in", "be")]
    return true[int(rng.integers(len(true)))] if true else ""


def _tell_relation(writer: _Writer, two: list[Group], relation: str, rng: Generator) -> None:
    form = int(rng.integers(3))
    if form == 1:
        writer.say("There is ")
    writer.name(*two[0])
    writer.say((" stands ", " ", " is ")[form] + relation + " ")
    writer.name(*two[1])
    writer.say(".")


def _tell_list(writer: _Writer, groups: list[Group], first: bool, rng: Generator) -> None:
    many = len(groups) > 1 or len(groups[0][1]) > 1
    verb = "are" if many else "is"
    openings = [f"On the table {verb} ", f"There {verb} ", "The table holds ", "The picture shows "]
    later = [f"There {verb} also ", f"Here {verb} ", "One can also see "]
    choices = openings if first else later
    writer.say(choices[int(rng.integers(len(choices)))])
    for i, group in enumerate(groups):
        if i:
            writer.say(" and " if i == len(groups) - 1 else ", ")
        writer.name(*group)
    writer.say(".")


def region_caption(things: Things, index: int) -> str:
    """All that is known of one thing: "a small shiny red cup"."""
    thing = things[index]
    return article(f"{thing.size} {thing.finish} {thing.colour} {thing.kind}")


def conversation(things: Things, rng: Generator, allowed: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Two to four questions with true answers: counting, colours, existence.

    Nothing is asked that a hidden thing would make doubtful, and no pair outside ``allowed`` is named.
    """
    makers = (_count_kind, _count_all, _ask_colour, _ask_pair, _ask_kind)
    rounds: dict[str, str] = {}
    wanted = int(rng.integers(2, 5))
    for _ in range(12):
        if len(rounds) == wanted:
            break
        question, answer = makers[int(rng.integers(len(makers)))](things, rng, allowed)
        if question and may_be_said(question + " " + answer, set(allowed)):
            rounds.setdefault(question, answer)
    return list(rounds.items())


T = TypeVar("T")


def _pick(choices: list[T], rng: Generator) -> T | None:
    return choices[int(rng.integers(len(choices)))] if choices else None


def _count_kind(things: Things, rng: Generator, allowed: list[tuple[str, str]]) -> tuple[str, str]:
    kinds = kinds_present(things) if rng.random() < 0.8 else list(KINDS)
    kind = kinds[int(rng.integers(len(kinds)))]
    indices = matching(things, kind)
    if not all(things[i].annotated for i in indices):
        return "", ""
    question = f"How many {plural(kind)} are there?"
    if len(indices) == 1:
        return question, f"There is one {kind}."
    return question, f"There are {number(len(indices))} {plural(kind)}."


def _count_all(things: Things, rng: Generator, allowed: list[tuple[str, str]]) -> tuple[str, str]:
    if not all(thing.annotated for thing in things):
        return "", ""
    return "How many objects are on the table?", f"There are {number(len(things))} objects on the table."


def _ask_colour(things: Things, rng: Generator, allowed: list[tuple[str, str]]) -> tuple[str, str]:
    sole = [t for t in things if t.annotated and len(matching(things, t.kind)) == 1]
    thing = _pick(sole, rng)
    return (f"What colour is the {thing.kind}?", f"The {thing.kind} is {thing.colour}.") if thing else ("", "")


def _ask_pair(things: Things, rng: Generator, allowed: list[tuple[str, str]]) -> tuple[str, str]:
    there = {thing.pair for thing in things}
    if rng.random() < 0.5:
        thing = _pick([t for t in things if t.annotated], rng)
        if thing is None:
            return "", ""
        name = article(f"{thing.colour} {thing.kind}")
        return f"Is there {name}?", f"Yes, there is {name}."
    near = [(c, k) for c, k in allowed if (c, k) not in there and matching(things, k)]
    pair = _pick(near, rng)
    name = f"{pair[0]} {pair[1]}" if pair else ""
    return (f"Is there {article(name)}?", f"No, there is no {name}.") if pair else ("", "")


def _ask_kind(things: Things, rng: Generator, allowed: list[tuple[str, str]]) -> tuple[str, str]:
    kind = KINDS[int(rng.integers(len(KINDS)))]
    indices = matching(things, kind)
    if not indices:
        return f"Is there {article(kind)}?", f"No, there is no {kind}."
    if any(things[i].annotated for i in indices):
        return f"Is there {article(kind)}?", f"Yes, there is {article(kind)}."
    return "", ""
