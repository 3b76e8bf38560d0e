"""The words of the rendered world, and which colour+kind pairs are held out of training."""

from __future__ import annotations

KINDS = (
    "cup",
    "bowl",
    "plate",
    "bottle",
    "vase",
    "ball",
    "book",
    "box",
    "can",
    "ring",
    "cone",
    "candle",
)

# Far apart in hue or lightness, so that a name survives shadows and tinted light.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.05, 0.06),
    "orange": (0.98, 0.44, 0.02),
    "yellow": (0.97, 0.84, 0.10),
    "green": (0.07, 0.52, 0.16),
    "blue": (0.07, 0.24, 0.82),
    "purple": (0.42, 0.12, 0.62),
    "pink": (0.98, 0.52, 0.70),
    "black": (0.055, 0.055, 0.06),
    "white": (0.94, 0.94, 0.92),
}

SIZES: dict[str, float] = {"small": 0.64, "large": 1.04}  # scale of the kind's mesh

FINISHES = ("matte", "shiny")

SPLITS = ("train", "val", "test")

# Neither drawn nor named in the training split; every kind and every colour occurs here.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("purple", "cup"),
        ("orange", "bowl"),
        ("yellow", "plate"),
        ("pink", "bottle"),
        ("green", "vase"),
        ("black", "ball"),
        ("white", "book"),
        ("red", "box"),
        ("blue", "can"),
        ("orange", "ring"),
        ("purple", "cone"),
        ("green", "candle"),
    }
)

_IRREGULAR = {"box": "boxes"}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def plural(noun: str) -> str:
    """The plural of a kind: ``plural("box") == "boxes"``."""
    return _IRREGULAR.get(noun, noun + "s")


def article(phrase: str) -> str:
    """The phrase behind its indefinite article: ``article("orange cup") == "an orange cup"``."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def number(count: int) -> str:
    """A count from 0 to 10 in words ("no" for 0)."""
    return _NUMBERS[count]


def pairs(split: str) -> list[tuple[str, str]]:
    """The colour+kind pairs that may be drawn or named in a split, in a fixed order."""
    every = [(colour, kind) for colour in COLOURS for kind in KINDS]
    return [pair for pair in every if split != "train" or pair not in HELD_OUT]
