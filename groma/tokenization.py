"""Grounded markup to token ids and back, with one tokenizer.

Text from outside never becomes a special word, whoever typed it and whatever the tokenizer folds or strips:

1. markup is cut at special words while outside text is still escaped (``groma.markup``), so none is found in it;
2. every piece in between is tokenised by a copy of the tokenizer that knows no added word at all;
3. should the copy's own vocabulary hold a special word's id, the piece is spelled out character by character.

Nor does it change a token beside it: a prompt is tokenised in parts, and no token reaches from one into the next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from groma import markup
from groma.template import is_own

# White space beside these is text; beside every other word of the grammar it is layout and dropped (as published).
# Chat templates of language models' own set turns apart by new lines: with them, only spaces are dropped.
_KEEPS_SPACE = (markup.BOS, markup.EOS, markup.UNK)
_NO_SPACE_BEFORE = re.compile(r"[.,;:!?)\]}'’\"]")
_OPENERS = (markup.PHRASE_OPEN, markup.ROI_OPEN, *_KEEPS_SPACE)  # no space after
_CLOSERS = (markup.PHRASE_CLOSE, markup.ROI_CLOSE, markup.REFER_FEAT)
_TIGHT = (markup.PHRASE_CLOSE, markup.ROI_CLOSE, *_KEEPS_SPACE)  # no space before
_WHITE = "".join(c for c in map(chr, range(0x3001)) if c.isspace())  # what str.strip() takes
_SURROGATE = re.compile("[\ud800-\udfff]")


class Part(NamedTuple):
    """A stretch of a prompt: grounded markup, or (``template``) text in which the tokenizer's own words count too."""

    text: str
    template: bool = False


class TextCodec:
    """The text side of a processor. ``tokenizer`` must have been through ``groma.processor.extend``.

    ``ids``: the words of the grammar. ``controls``: the tokenizer's own added words, such as turn marks, which only
    a template may write; those that ``markup.escape`` cannot break open (runs of spaces, in some) are not read at all.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids = _special_ids(tokenizer)
        added = {token.content: (i, token) for i, token in tokenizer.added_tokens_decoder.items()}
        own = {word: entry for word, entry in added.items() if word not in self.ids and markup.protects(word)}
        self.controls = {word: i for word, (i, _) in own.items()}
        self._layout = " " if is_own(tokenizer.chat_template or "") else _WHITE
        # what a word takes away to its left and to its right
        self._strips = {word: ("", "") if word in _KEEPS_SPACE else (self._layout,) * 2 for word in self.ids}
        self._strips |= {w: (_WHITE * token.lstrip, _WHITE * token.rstrip) for w, (_, token) in own.items()}
        self._lead, self._inside, self._mark = _plain_tokenizers(tokenizer)
        self._words = {i: word for word, i in (self.ids | self.controls).items()}
        self._forbidden = {*self._words, *(i for i, _ in added.values())} - {self.ids[markup.UNK]}
        self._template_words = markup.special_words(self.controls)

    def encode(self, text: str) -> list[int]:
        """Token ids of a whole text of markup, turn marks included; without added <s> or </s>."""
        return self.encode_parts([Part(text, template=True)])[0]

    def encode_parts(self, parts: Sequence[Part], inside: bool = False) -> list[list[int]]:
        """Ids of each part of one text. ``inside``: plain text stands before the first, so no word mark is due there.

        Raises ValueError for a proxy word the vocabulary does not have.
        """
        pieces = [
            (piece, special, number)
            for number, part in enumerate(parts)
            for piece, special in (markup.split(part.text, self._template_words) if part.template
                                   else markup.split(part.text))
        ]  # fmt: skip
        rows: list[list[int]] = [[] for _ in parts]
        opened = bool(pieces) and not inside and pieces[0][:2] == (markup.BOS, True)
        for i, (piece, special, number) in enumerate(pieces):
            first = opened and i == 1
            if special:
                if first and piece not in (*_KEEPS_SPACE, markup.PAD):
                    rows[number] += self._plain_ids("", fresh=True, first=True)
                if piece != markup.SEP:
                    rows[number].append(self.word_id(piece))
                continue
            after_special = pieces[i - 1][1] if i else not inside
            if i and after_special:
                piece = piece.lstrip(self._strips[pieces[i - 1][0]][1])
            if i + 1 < len(pieces) and pieces[i + 1][1]:
                piece = piece.rstrip(self._strips[pieces[i + 1][0]][0])
            if piece:
                rows[number] += self._plain_ids(piece, after_special, first)
        return rows

    def word_id(self, word: str) -> int:
        """The id of a special word. Raises ValueError for one the vocabulary does not have."""
        found = self.ids.get(word, self.controls.get(word))
        if found is None:
            proxies = sum(w.startswith("<r") and w[2].isdigit() for w in self.ids)
            raise ValueError(f"no word {word} in the vocabulary, which has the proxies <r0> to <r{proxies - 1}>")
        return found

    def is_special(self, token: int) -> bool:
        """Is ``token`` the id of a special word, of the grammar or the tokenizer's own?"""
        return token in self._words

    def decode(self, ids: Sequence[int]) -> str:
        """Markup of ``ids``: special words kept, plain text escaped, spaces as a person would set them."""
        pieces: list[tuple[str, bool]] = []
        plain: list[int] = []
        for token in ids:
            word = self._words.get(token)
            if word is None:
                plain.append(token)
                continue
            self._flush(plain, pieces, before_control=word in self.controls)
            pieces.append((word, True))
        self._flush(plain, pieces, before_control=False)
        return self._join(pieces)

    def _flush(self, plain: list[int], pieces: list[tuple[str, bool]], before_control: bool) -> None:
        """Move ``plain`` to ``pieces`` as text. White space counts beside the tokenizer's own words and there alone."""
        if not plain:
            return
        text = self._lead.decode(plain, skip_special_tokens=False)
        plain.clear()
        if not (pieces and pieces[-1][0] in self.controls and pieces[-1][1]):
            text = text.lstrip(self._layout)
        if not before_control:
            text = text.rstrip(self._layout)
        if text:
            pieces.append((markup.escape(text), False))

    def _join(self, pieces: list[tuple[str, bool]]) -> str:
        """Put (piece, is special) together with the spaces of ordinary text: "The <p>cup</p>."."""
        text, previous, after_special = "", "", True
        for piece, special in pieces:
            if piece in self.controls or previous in self.controls:
                space = False
            elif special and after_special:
                space = piece == markup.PHRASE_OPEN and previous in _CLOSERS
            elif special:
                space = piece not in _TIGHT
            elif after_special:
                space = bool(text) and previous not in _OPENERS and not _NO_SPACE_BEFORE.match(piece)
            else:
                space = True
            text += f" {piece}" if space else piece
            previous, after_special = piece, special
        return text

    def _plain_ids(self, text: str, fresh: bool, first: bool) -> list[int]:
        """``fresh``: a special word stands before; ``first``: it is the one that opens the text."""
        if _SURROGATE.search(text):  # halves of characters: joined where they are two of one, else no text at all
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        tokenizer = self._lead if fresh else self._inside
        if first and self._mark:
            tokenizer, text = self._inside, self._mark + text
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        letters = [(tokenizer if i == 0 else self._inside, letter) for i, letter in enumerate(text)]
        ids = [i for spell, letter in letters for i in spell.encode(letter, add_special_tokens=False).ids]
        return [i for i in ids if i not in self._forbidden]


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    vocabulary = tokenizer.get_vocab()
    missing = [word for word in markup.SPECIAL_WORDS if word not in vocabulary]
    if missing:
        raise ValueError(f"the tokenizer lacks {missing}: pass it through groma.processor.extend first")
    words = [*markup.SPECIAL_WORDS]
    while (word := markup.proxy(len(words) - len(markup.SPECIAL_WORDS))) in vocabulary:
        words.append(word)
    return {word: vocabulary[word] for word in words}


def _plain_tokenizers(tokenizer: PreTrainedTokenizerFast) -> tuple[Tokenizer, Tokenizer, str]:
    """The same model without any added word, template or padding: (after a special word, inside text, word mark).

    Inside text no space or word mark is put before a piece. The mark is one that only the start of a text gets.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(added_tokens=[], post_processor=None, padding=None, truncation=None)
    mark = "".join(step["replacement"] for step in _steps(state["pre_tokenizer"]) if _marks_first(step))
    for step in _steps(state["pre_tokenizer"]):
        if _marks_first(step):
            step["prepend_scheme"] = "never"
    lead = Tokenizer.from_str(json.dumps(state))
    for step in _steps(state["pre_tokenizer"]):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    for step in _steps(state["normalizer"]):
        if step["type"] == "Prepend":
            step["prepend"] = ""
    return lead, Tokenizer.from_str(json.dumps(state)), mark


def _marks_first(step: dict[str, Any]) -> bool:
    return step["type"] == "Metaspace" and step["prepend_scheme"] == "first"


def _steps(stage: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be one, a sequence of them, or none."""
    if stage is None:
        return []
    inner = stage.get("normalizers", stage.get("pretokenizers"))
    return [stage] if inner is None else [step for part in inner for step in _steps(part)]
