"""GromaProcessor: images to pixels and grounded markup to ids, and back.

Outside text never becomes a special word: see ``groma.tokenization``. The turns of a dialogue are set apart as the
language model was trained to see them: by the tokenizer's own chat template if it brings one, else as Vicuna does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AddedToken, BatchFeature, BitImageProcessor, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from groma import markup
from groma.sentencepiece import original_tokenizer
from groma.template import CHAT_TEMPLATE, is_own, with_opening
from groma.tokenization import Part, TextCodec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet statistics, as DINOv2 was trained with."""
ORIGINAL_SIZE = 448
"""Side of the square the released checkpoints see, in pixels; it is in the original's code, in none of its files."""

_TURN = "\ue002{}\ue003"  # stands for turn number {} while a chat template is rendered
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def image_processor(
    size: int, resample: int = Image.Resampling.BILINEAR, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> BitImageProcessor:
    """The image side: resize to ``size`` x ``size`` without keeping aspect (bilinear), then mean and deviation."""
    return BitImageProcessor(
        size={"height": size, "width": size}, resample=int(resample), do_center_crop=False, do_convert_rgb=True,
        image_mean=list(mean), image_std=list(std),
    )  # fmt: skip


def extend(tokenizer: PreTrainedTokenizerFast, proxies: int = markup.MAX_PROXIES) -> int:
    """Add the special words and ``proxies`` proxy words to ``tokenizer`` in place; the number of new ids.

    Words it already has keep their ids; the others take the ids that follow its vocabulary, in the published order.
    A tokenizer with a chat template of its own keeps it, after our opening, and its <s> and </s> with it.
    Raises ValueError for a tokenizer whose ids have a hole there.
    """
    base = len(tokenizer)
    have = tokenizer.get_vocab()
    new = [word for word in markup.words(proxies) if word not in have]
    marked = tokenizer.get_added_vocab()
    unmarked = [word for word in markup.words(proxies) if word not in marked]
    tokenizer.add_tokens([AddedToken(w, special=True, normalized=False) for w in unmarked], True)
    ids = tokenizer.convert_tokens_to_ids(new)
    if ids != list(range(base, base + len(new))):
        raise ValueError(f"new words took ids {ids[:3]}…, expected {base}…{base + len(new) - 1} after the vocabulary")
    tokenizer.chat_template = _opened(tokenizer)
    tokenizer.pad_token = markup.PAD
    if not is_own(tokenizer.chat_template):
        tokenizer.bos_token, tokenizer.eos_token = markup.BOS, markup.EOS
    tokenizer.padding_side = "right"
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
        self._text = TextCodec(tokenizer)
        self.own_template = is_own(self.chat_template or "")
        self._frames: dict[tuple[int, bool], tuple[str, ...]] = {}
        self._statistics: tuple[Tensor, Tensor] | None = None
        self.end_ids = self._end_ids()
        """Ids that end an answer: generation stops at any of them, and none of them is part of the answer."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> GromaProcessor:
        """A directory or a hub id, ours or a released checkpoint, which is converted on the way in.

        Released ones are known by a tokenizer.model without a tokenizer.json; ``save_pretrained`` writes ours.
        Raises OSError for files that are missing, ValueError for a tokenizer.model of another kind.
        """
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}

        def find(name: str) -> str | None:
            file: str | None = cached_file(
                str(pretrained_model_name_or_path), name, **hub, _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
            )  # fmt: skip
            return file

        if find("tokenizer.json") is None and find("tokenizer.model") is not None:
            tokenizer = original_tokenizer(find)
            have = tokenizer.get_vocab()
            extend(tokenizer, sum(markup.proxy(i) in have for i in range(len(have))))
            return cls(_original_images(find("config.json"), find("preprocessor_config.json")), tokenizer)
        processor: GromaProcessor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return processor

    def encode(self, text: str) -> list[int]:
        """Token ids of grounded markup, without added <s> or </s>. Escaped text in it is inert.

        Raises ValueError for a proxy word the vocabulary does not have.
        """
        return self._text.encode(text)

    def encode_parts(self, parts: Sequence[Part], inside: bool = False) -> list[list[int]]:
        """Ids of every part of one text; see ``groma.tokenization.TextCodec.encode_parts``."""
        return self._text.encode_parts(parts, inside)

    def word_id(self, word: str) -> int:
        """The id of a special word. Raises ValueError for one the vocabulary does not have."""
        return self._text.word_id(word)

    @property
    def control_ids(self) -> tuple[int, ...]:
        """Ids of the tokenizer's own special words, turn marks among them: no answer has one but as its end."""
        return tuple(self._text.controls.values())

    def is_special(self, token: int) -> bool:
        """Is ``token`` the id of a special word, of the grammar or of the tokenizer's own?"""
        return self._text.is_special(token)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Grounded markup of ``ids`` (T): special words kept, plain text escaped, spaces as a person would set them."""
        return self._text.decode([int(i) for i in ids])

    def frames(self, turns: int, open_answer: bool) -> tuple[str, ...]:
        """What the chat template writes around ``turns`` turns (user, assistant, …): turns + 1 texts.

        The first holds the opening; the last ends in the head of an answer if ``open_answer``.
        Raises ValueError for a template that drops, repeats or reorders turns.
        """
        key = (turns, open_answer)
        if key not in self._frames:
            talk = [{"role": "assistant" if i % 2 else "user", "content": _TURN.format(i)} for i in range(turns)]
            text = _render(self.tokenizer, talk, str(self.chat_template), open_answer)
            cut = re.split(_TURN.format(r"(\d+)"), text)
            if cut[1::2] != [str(i) for i in range(turns)]:
                raise ValueError(f"chat template: of {turns} turns it writes {cut[1::2]}, expected each once, in order")
            self._frames[key] = tuple(cut[0::2])
        return self._frames[key]

    def _end_ids(self) -> tuple[int, ...]:
        if not self.own_template:
            return (self.word_id(markup.EOS),)
        after = self.encode_parts([Part(self.frames(2, False)[2], template=True)], inside=True)[0]
        ends = [i for i in after if self._text.is_special(i)][:1]
        if not ends:
            raise ValueError("chat template: no special word follows an answer, so that no answer would ever end")
        last = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([*ends, *([] if last is None else [int(last)])]))

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images of any size → (B, 3, S, S) float32, normalised; resized by Pillow's filter of ``resample``."""
        height, width = self.image_processor.size["height"], self.image_processor.size["width"]
        how = Image.Resampling(int(self.image_processor.resample))
        rows = [np.asarray(i.convert("RGB").resize((width, height), how), dtype=np.uint8) for i in images]
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

        ``text`` is grounded markup, complete with its <s>; escape what users typed. ``add_special_tokens`` puts the
        tokenizer's start of text in front, if it has one. Raises ValueError for neither images nor text, or tensors
        other than "pt".
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
            if add_special_tokens and self.tokenizer.bos_token_id is not None:
                rows = [[int(self.tokenizer.bos_token_id), *row] for row in rows]
            data["input_ids"], data["attention_mask"] = self.pad([torch.tensor(r, dtype=torch.long) for r in rows])
        return BatchFeature(data)

    def pad(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """B rows of ids (T_i) → ids (B, T) right-padded with [PAD], mask (B, T) of 1 and 0."""
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=self.word_id(markup.PAD))
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()

    def batch_decode(self, sequences: Sequence[Sequence[int]] | Tensor) -> list[str]:
        """``decode`` of every row."""
        return [self.decode(row) for row in sequences]


def _render(tokenizer: PreTrainedTokenizerFast, talk: list[dict[str, str]], template: str, open_answer: bool) -> str:
    text: str = tokenizer.apply_chat_template(
        talk, chat_template=template, tokenize=False, add_generation_prompt=open_answer
    )
    return text


def _opened(tokenizer: PreTrainedTokenizerFast) -> str:
    """The chat template ``tokenizer`` shall have: one of ours as it is, its own with our opening, or the published."""
    if not tokenizer.chat_template:
        return CHAT_TEMPLATE
    own: str = tokenizer.get_chat_template()
    if markup.REGION in own:
        return own
    from jinja2 import TemplateError

    system = _TURN.format(0)
    talk = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    try:
        taken = system in _render(tokenizer, talk, own, False)
    except TemplateError:  # so say templates of models that know no system role
        taken = False
    return with_opening(own, taken)


def _original_images(config: str | None, preprocessor: str | None) -> BitImageProcessor:
    """The image side of a released checkpoint: pictures are resized to the square by Pillow's default, bicubic.

    Sizes in the stored preprocessor are those of the encoder's own recipe, which the original overrides.
    """
    stored = json.loads(Path(preprocessor).read_text(encoding="utf-8")) if preprocessor else {}
    size = json.loads(Path(config).read_text(encoding="utf-8")).get("image_size") if config else None
    return image_processor(
        size if isinstance(size, int) else ORIGINAL_SIZE, Image.Resampling.BICUBIC,
        stored.get("image_mean", MEAN), stored.get("image_std", STD),
    )  # fmt: skip
