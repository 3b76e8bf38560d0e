"""GromaProcessor: images to pixels and grounded markup to ids, and back.

Outside text never becomes a special word: markup is cut on the special words that were *written by us*
(``groma.markup.split``), and every piece in between is tokenised by a copy of the tokenizer that knows no added word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AddedToken, BatchFeature, BitImageProcessor, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from groma import markup
from groma.template import CHAT_TEMPLATE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet statistics, as DINOv2 was trained with."""

# White space beside these is text; beside every other special word it is layout and dropped (as published).
_KEEPS_SPACE = (markup.BOS, markup.EOS, markup.UNK)
_NO_SPACE_BEFORE = re.compile(r"[.,;:!?)\]}'’\"]")
_OPENERS = (markup.PHRASE_OPEN, markup.ROI_OPEN, *_KEEPS_SPACE)  # no space after
_CLOSERS = (markup.PHRASE_CLOSE, markup.ROI_CLOSE, markup.REFER_FEAT)
_TIGHT = (markup.PHRASE_CLOSE, markup.ROI_CLOSE, *_KEEPS_SPACE)  # no space before


def image_processor(size: int) -> BitImageProcessor:
    """The image side: bilinear resize to ``size`` x ``size`` without keeping aspect, ImageNet mean and deviation."""
    return BitImageProcessor(
        size={"height": size, "width": size}, resample=2, do_center_crop=False, do_convert_rgb=True,
        image_mean=list(MEAN), image_std=list(STD),
    )  # fmt: skip


def extend(tokenizer: PreTrainedTokenizerFast, proxies: int = markup.MAX_PROXIES) -> int:
    """Add the special words and ``proxies`` proxy words to ``tokenizer`` in place; the number of new ids.

    Words it already has keep their ids; the others take the ids that follow its vocabulary, in the published order.
    Raises ValueError for a tokenizer whose ids have a hole there.
    """
    base = len(tokenizer)
    have = tokenizer.get_vocab()
    new = [word for word in markup.words(proxies) if word not in have]
    tokenizer.add_tokens([AddedToken(w, special=True, normalized=False) for w in markup.words(proxies)], True)
    ids = tokenizer.convert_tokens_to_ids(new)
    if ids != list(range(base, base + len(new))):
        raise ValueError(f"new words took ids {ids[:3]}…, expected {base}…{base + len(new) - 1} after the vocabulary")
    tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token = markup.PAD, markup.BOS, markup.EOS
    tokenizer.padding_side = "right"
    tokenizer.chat_template = CHAT_TEMPLATE
    return len(new)


class GromaProcessor(ProcessorMixin):
    """Images and grounded text of one model. ``tokenizer`` must have been through ``extend``.

    >>> processor = GromaProcessor(image_processor(448), tokenizer)
    >>> processor.decode(processor.encode("The <p>red cup</p><roi><r3></roi> stands."))
    'The <p>red cup</p><roi><r3></roi> stands.'
    """

    def __init__(
        self, image_processor: BitImageProcessor, tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self._ids, self._plain = _special_ids(tokenizer), _plain_tokenizer(tokenizer)
        self._words = {i: word for word, i in self._ids.items()}
        self._forbidden = set(self._words) - {self._ids[markup.UNK]}
        self._statistics: tuple[Tensor, Tensor] | None = None

    def encode(self, text: str) -> list[int]:
        """Token ids of grounded markup, without added <s> or </s>. Escaped text in it is inert.

        Raises ValueError for a proxy word the vocabulary does not have.
        """
        ids: list[int] = []
        pieces = markup.split(text)
        for i, (piece, special) in enumerate(pieces):
            if special:
                ids.append(self.word_id(piece))
                continue
            if i > 0 and pieces[i - 1][0] not in _KEEPS_SPACE:
                piece = piece.lstrip()
            if i + 1 < len(pieces) and pieces[i + 1][0] not in _KEEPS_SPACE:
                piece = piece.rstrip()
            if piece:
                ids.extend(self._encode_plain(piece))
        return ids

    def word_id(self, word: str) -> int:
        """The id of a special word. Raises ValueError for one the vocabulary does not have."""
        if word not in self._ids:
            proxies = sum(w.startswith("<r") and w[2].isdigit() for w in self._ids)
            raise ValueError(f"no word {word} in the vocabulary, which has the proxies <r0> to <r{proxies - 1}>")
        return self._ids[word]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Grounded markup of ``ids`` (T): special words kept, plain text escaped, spaces as a person would set them."""
        pieces: list[tuple[str, bool]] = []
        plain: list[int] = []
        for token in [*(int(i) for i in ids), None]:
            word = self._words.get(token) if token is not None else ""
            if word is None:
                plain.append(token)  # type: ignore[arg-type]  # None has word ""
                continue
            if plain:
                pieces.append((self._decode_plain(plain).strip(), False))
                plain = []
            if word:
                pieces.append((word, True))
        return _join([(piece, special) for piece, special in pieces if piece])

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images of any size → (B, 3, S, S) float32, normalised; resized by Pillow's bilinear filter."""
        height, width = self.image_processor.size["height"], self.image_processor.size["width"]
        rows = [
            np.asarray(i.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), dtype=np.uint8)
            for i in images
        ]
        # Channels move while they are still bytes: a quarter of the memory traffic.
        stack = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous().float()  # (B, 3, S, S)
        if self._statistics is None:
            mean, std = torch.tensor(self.image_processor.image_mean), torch.tensor(self.image_processor.image_std)
            self._statistics = ((1 / (255 * std)).view(1, 3, 1, 1), (-mean / std).view(1, 3, 1, 1))
        scale, shift = self._statistics
        return stack.mul_(scale).add_(shift)

    def __call__(  # only what this model takes: anything else is a mistake, worth a TypeError
        self,
        images: Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        add_special_tokens: bool = False,
        videos: None = None,
        audio: None = None,
    ) -> BatchFeature:
        """Images and/or markup → pixel_values (B, 3, S, S), input_ids and attention_mask (B, T), right-padded.

        ``text`` is grounded markup, complete with its <s>; escape what users typed. ``add_special_tokens`` puts <s>
        in front. Raises ValueError for neither images nor text, or tensors other than "pt".
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors: got {return_tensors!r}, expected 'pt'")
        if videos is not None or audio is not None:
            raise ValueError("got videos or audio, expected images and text only")
        if images is None and text is None:
            raise ValueError("got neither images nor text, expected at least one of them")
        data: dict[str, Tensor] = {}
        if images is not None:
            rows_of = [images] if isinstance(images, Image.Image) else images
            data["pixel_values"] = self.pixels(
                [image for row in rows_of for image in ([row] if isinstance(row, Image.Image) else row)]
            )
        if text is not None:
            rows = [self.encode(t) for t in ([text] if isinstance(text, str) else text)]
            if add_special_tokens:
                rows = [[self._ids[markup.BOS], *row] for row in rows]
            data["input_ids"], data["attention_mask"] = self.pad([torch.tensor(r, dtype=torch.long) for r in rows])
        return BatchFeature(data)

    def pad(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """B rows of ids (T_i) → ids (B, T) right-padded with [PAD], mask (B, T) of 1 and 0."""
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=self._ids[markup.PAD])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()

    def batch_decode(self, sequences: Sequence[Sequence[int]] | Tensor) -> list[str]:
        """``decode`` of every row."""
        return [self.decode(row) for row in sequences]

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        # A model vocabulary may hold <s> as an ordinary piece: cut the word open, so that it cannot be matched whole.
        parts = re.findall(r"[<\[]|[^<\[]+", text)
        ids = [i for part in parts for i in self._plain.encode(part, add_special_tokens=False).ids]
        return [i for i in ids if i not in self._forbidden]

    def _decode_plain(self, ids: list[int]) -> str:
        return markup.escape(self._plain.decode(ids, skip_special_tokens=False)) if ids else ""


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    vocabulary = tokenizer.get_vocab()
    missing = [word for word in markup.SPECIAL_WORDS if word not in vocabulary]
    if missing:
        raise ValueError(f"the tokenizer lacks {missing}: pass it through groma.processor.extend first")
    words = [*markup.SPECIAL_WORDS]
    while (word := markup.proxy(len(words) - len(markup.SPECIAL_WORDS))) in vocabulary:
        words.append(word)
    return {word: vocabulary[word] for word in words}


def _plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The same model without any added word, template or padding."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(added_tokens=[], post_processor=None, padding=None, truncation=None)
    return Tokenizer.from_str(json.dumps(state))


def _join(pieces: list[tuple[str, bool]]) -> str:
    """Put (piece, is special) together with the spaces of ordinary text.

    >>> _join([("The", False), ("<p>", True), ("cup", False), ("</p>", True), (".", False)])
    'The <p>cup</p>.'
    """
    text, previous, after_special = "", "", True
    for piece, special in pieces:
        if special and after_special:
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
