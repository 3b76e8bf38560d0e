"""The grounded-text grammar: special words, escaping, and parsing; standard library only.

Grounded text marks phrases and points at regions with proxy words::

    The <p>red cup</p><roi><r3></roi> stands by <p>two books</p><roi><r0><r7></roi>.

What a user typed or a data set's caption holds is *escaped* before it joins such text: the characters that open a
special word become private-use stand-ins, which the tokenizer turns back after it has split on special words. So
"<r5>" typed by a user reaches the model as the four characters it is, never as region 5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PAD, BOS, EOS, UNK, SEP = "[PAD]", "<s>", "</s>", "<unk>", "<sep>"
IMAGE, REGION = "<image>", "<region>"
REFER_BOX, REFER_FEAT, GROUND_BOX = "<refer_box>", "<refer_feat>", "<ground_box>"
ROI_OPEN, ROI_CLOSE, PHRASE_OPEN, PHRASE_CLOSE = "<roi>", "</roi>", "<p>", "</p>"
GROUNDING = "[grounding]"
SPECIAL_WORDS: tuple[str, ...] = (
    PAD, BOS, EOS, UNK, SEP, "<img>", "</img>", ROI_OPEN, ROI_CLOSE, PHRASE_OPEN, PHRASE_CLOSE,
    IMAGE, REGION, REFER_BOX, GROUND_BOX, REFER_FEAT, GROUNDING,
)  # fmt: skip
"""The 17 special words in the order of the published vocabulary; the proxies follow them.

SEP stands around answers in a template. It parts them from the text before and leaves no token (as published).
"""
MAX_PROXIES = 100
NOTHING = "Nothing matches."
"""What a person reads when a referent is absent; the model writes an empty group, ``<roi></roi>``, before it."""

_STAND_IN = {"<": "\ue000", "[": "\ue001"}
_BACK = {v: k for k, v in _STAND_IN.items()}
_WORD = "|".join(re.escape(w) for w in SPECIAL_WORDS) + r"|<r(?:0|[1-9]\d*)>"
_SPECIAL = re.compile(_WORD)
_PROXY = re.compile(r"<r(0|[1-9]\d*)>")
_GROUP = re.compile(r"(?:<p>(?P<phrase>(?:(?!</?p>).)*)</p>\s*)?<roi>(?P<proxies>(?:\s*<r\d+>)*)\s*</roi>", re.DOTALL)


def proxy(index: int) -> str:
    """The proxy word of region ``index``: 3 → "<r3>"."""
    return f"<r{index}>"


def words(proxies: int = MAX_PROXIES) -> tuple[str, ...]:
    """All new words in vocabulary order: the special words, then ``proxies`` proxy words."""
    return SPECIAL_WORDS + tuple(proxy(i) for i in range(proxies))


def escape(text: str) -> str:
    """Make text from outside inert: no special word survives in it. ``unescape`` gives it back, but for the two
    characters it borrows (U+E000, U+E001), which become those they stand for."""
    for character, stand_in in _STAND_IN.items():
        text = text.replace(character, stand_in)
    return text


def unescape(text: str) -> str:
    """Undo ``escape`` for display or, after splitting on special words, for the tokenizer."""
    for stand_in, character in _BACK.items():
        text = text.replace(stand_in, character)
    return text


def protects(word: str) -> bool:
    """Does ``escape`` break ``word`` open? A word that it leaves whole must never be read out of text."""
    return escape(word) != word


def special_words(others: Iterable[str] = ()) -> re.Pattern[str]:
    """What ``split`` cuts at: the words of the grammar and ``others``, such as a tokenizer's own turn marks."""
    longest_first = sorted(map(re.escape, others), key=len, reverse=True)
    return re.compile("|".join([*longest_first, _WORD]))


def split(text: str, special: re.Pattern[str] = _SPECIAL) -> list[tuple[str, bool]]:
    """Cut grounded text into (piece, is_special) in order; plain pieces are unescaped, empty ones left out.

    >>> split("Locate <p>a cup</p>.")
    [('Locate ', False), ('<p>', True), ('a cup', False), ('</p>', True), ('.', False)]
    """
    pieces: list[tuple[str, bool]] = []
    end = 0
    for match in special.finditer(text):
        if match.start() > end:
            pieces.append((unescape(text[end : match.start()]), False))
        pieces.append((match.group(), True))
        end = match.end()
    if end < len(text):
        pieces.append((unescape(text[end:]), False))
    return pieces


@dataclass(frozen=True)
class Mention:
    """One grounded place in an answer: the phrase it grounds ("" if none), its offsets in the clean text, regions."""

    phrase: str
    start: int
    end: int
    regions: tuple[int, ...]


def parse(text: str) -> tuple[str, list[Mention]]:
    """Grounded text → (clean text without markup, mentions in order).

    Offsets count characters of the clean text. Malformed markup (an unclosed group, a lone tag) is dropped from the
    clean text and grounds nothing. Proxies outside any <roi> group are kept as mentions without a phrase.

    >>> parse("The <p>red cup</p><roi><r3></roi>.")
    ('The red cup.', [Mention(phrase='red cup', start=4, end=11, regions=(3,))])
    """
    clean, mentions, end = "", [], 0
    for match in _GROUP.finditer(text):
        clean, loose = _append(clean, text[end : match.start()])
        mentions.extend(loose)
        phrase = match.group("phrase") or ""
        start = len(clean)
        clean, inner = _append(clean, phrase)
        regions = tuple(int(i) for i in _PROXY.findall(match.group("proxies")))
        if regions:
            mentions.append(Mention(clean[start:], start, len(clean), regions))
        mentions.extend(inner)
        end = match.end()
    clean, loose = _append(clean, text[end:])
    mentions.extend(loose)
    return clean, mentions


def _append(clean: str, raw: str) -> tuple[str, list[Mention]]:
    """Add a stretch of text that holds no group: strip special words, note loose proxies."""
    loose: list[Mention] = []
    for piece, special in split(raw):
        if not special:
            clean += piece
        elif match := _PROXY.fullmatch(piece):
            loose.append(Mention("", len(clean), len(clean), (int(match.group(1)),)))
    return clean, loose
