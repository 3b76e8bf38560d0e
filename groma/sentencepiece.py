"""Tokenizers as the released checkpoints store them: a SentencePiece model and three JSON files, no tokenizer.json.

``tokenizer.model`` is a protocol buffer of which few fields matter, so it is read here: the packages that read it are
needed for nothing else, and transformers' own conversion leaves out what makes the original's ids what they are, the
white space lost beside added words and, where ``legacy`` is set, the word mark before every piece of text::

    "a <p> dog </p> b"   legacy: ▁a <p> ▁dog </p> ▁b        not legacy: ▁a <p> d og </p> b
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from groma import markup

MARK = "▁"
"""The word mark: SentencePiece writes it for every space, and once before a text."""

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # sentencepiece_model.proto: SentencePiece.Type
_BPE = 2  # TrainerSpec.ModelType

Find = Callable[[str], "str | Path | None"]


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary; its place is its id."""

    text: str
    score: float
    kind: int


def read_model(file: str | Path) -> list[Piece]:
    """The vocabulary of a ``tokenizer.model`` in order of ids.

    Raises ValueError for a file that is no SentencePiece model, and for one of another design than Llama's: anything
    but BPE with byte fallback, text left as it is, and a word mark before it.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(Path(file).read_bytes()):
            if number == 1:
                entry = dict(_fields(value))
                [score] = struct.unpack("<f", entry.get(2, bytes(4)))
                pieces.append(Piece(entry[1].decode(), score, entry.get(3, _NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"{file}: no SentencePiece model ({error!r})") from error
    if [p.kind for p in pieces].count(_UNKNOWN) != 1 or trainer.get(3, 1) != _BPE or not trainer.get(35, 0):
        raise ValueError(f"{file}: {len(pieces)} pieces, expected a SentencePiece model of kind BPE with byte fallback")
    # charsmap, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces: absent ones have the value True
    if normalizer.get(2) or [normalizer.get(k, 1) for k in (3, 4, 5)] != [1, 0, 1] or trainer.get(24, 0):
        raise ValueError(f"{file}: the model rewrites its text, expected Llama's settings, which only add a word mark")
    if odd := [p.text for p in pieces if p.kind not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE)]:
        raise ValueError(f"{file}: pieces defined by a user or unused ({odd[0]!r} …), expected none")
    return pieces


def original_tokenizer(find: Find, proxies: int = markup.MAX_PROXIES) -> PreTrainedTokenizerFast:
    """The tokenizer of a released checkpoint (or of its language model), with the same ids for every text.

    find: name of a file → where it is, or None. Words of the grammar that ``added_tokens.json`` lacks are added, in
    the published order, up to ``proxies`` proxy words where it has none. Raises ValueError for files that disagree.
    """
    file, settings = find("tokenizer.model"), _json(find("tokenizer_config.json"))
    if file is None:
        raise ValueError("no tokenizer.model, which a released checkpoint has")
    pieces = read_model(file)
    legacy = settings.get("legacy")
    backend = _backend(pieces, legacy is None or bool(legacy))
    usual = {"bos": markup.BOS, "eos": markup.EOS, "unk": markup.UNK}
    names = {name: _content(settings.get(f"{name}_token")) or word for name, word in usual.items()}
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in names.values()])
    known = backend.get_vocab(with_added_tokens=True)
    added: dict[str, int] = _json(find("added_tokens.json"))
    words = sorted((w for w in added if w not in known), key=added.__getitem__)
    has = any(w.startswith("<r") and w[2:-1].isdigit() for w in words)
    words += [w for w in markup.words(0 if has else proxies) if w not in known and w not in added]
    # White space on both sides of an added word is lost; the three above keep theirs.
    backend.add_special_tokens([AddedToken(w, lstrip=True, rstrip=True, normalized=False, special=True) for w in words])
    for word, number in added.items():
        if backend.token_to_id(word) != number:
            raise ValueError(f"added_tokens.json: {word} is {number}, but {backend.token_to_id(word)} in {file}")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=names["bos"], eos_token=names["eos"], unk_token=names["unk"],
        add_bos_token=settings.get("add_bos_token", True), add_eos_token=settings.get("add_eos_token", False),
        clean_up_tokenization_spaces=False, model_max_length=settings.get("model_max_length", 2048),
    )  # fmt: skip


def _backend(pieces: list[Piece], legacy: bool) -> Tokenizer:
    """Llama's tokenizer: legacy marks the start of every piece of text, the other only the start of the whole."""
    vocabulary = {piece.text: number for number, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ValueError(f"{len(pieces)} pieces of which {len(pieces) - len(vocabulary)} are doubles, expected none")
    [unknown] = [piece.text for piece in pieces if piece.kind == _UNKNOWN]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, best score first: SentencePiece's choice as a list of merges."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}
    ways = [
        (-score, len(text), cut, text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(ways)]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message: ints, or bytes for anything longer."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + length > len(data):
            raise ValueError(f"cut off at byte {len(data)}")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _json(file: str | Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: got a JSON {type(content).__name__}, expected an object")
    return content


def _content(token: Any) -> str | None:
    """A special token as stored: a string, an object with "content", or nothing."""
    return token.get("content") if isinstance(token, dict) else token
