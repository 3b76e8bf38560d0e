"""Packing: dialogues of one batch share rows of the language model, so that hardly any position is padding.

    dialogues of 5, 3 and 2 positions, padded        packed into rows of at most 5
    a a a a a                                        a a a a a
    b b b . .                                        b b b c c
    c c . . .                                        positions 0 1 2 0 1 in the second row

Positions start again with every dialogue and attention stays inside it, so that losses are those of padded rows. With
scaled-dot-product and flash attention all dialogues share one row, each attended to by itself: nothing is padding, and
nothing is computed between dialogues. Eager attention computes whole rows under a mask, so its rows have a limit.
Legend: B dialogues, T their padded length, R packed rows, L their length, E language-model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from groma.structures import Spliced

IGNORE = -100
WIDTHS = 32
"""Row lengths tried between the longest dialogue and the limit."""
ONE_ROW = "groma_sdpa"
"""The name of ``attend`` among transformers' attentions: "sdpa" that also knows several dialogues in a row."""


@dataclass(frozen=True)
class Packed:
    """Packed language-model input: embeds (R, L, E), labels, positions and owners (R, L); owner: the dialogue a
    position belongs to, -1 in padding. The first label of every dialogue is ignored: nothing in its row predicts it.
    ``lengths``: of the dialogues, where all of them are one row."""

    embeds: Tensor
    labels: Tensor
    positions: Tensor
    owners: Tensor
    lengths: tuple[int, ...] = ()

    def mask(self) -> Tensor:
        """A summand (R, 1, L, L) for attention: causal blocks, one a dialogue.

        Padding sees padding, since a position that sees nothing would be NaN.
        """
        length = self.owners.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.owners.device).tril()
        seen = (causal & (self.owners[:, :, None] == self.owners[:, None]))[:, None]
        away = torch.finfo(self.embeds.dtype).min
        return torch.zeros_like(seen, dtype=self.embeds.dtype).masked_fill(~seen, away)


def run_packed(decoder: nn.Module, packed: Packed) -> Tensor:
    """The decoder's last hidden states (R, L, E) of packed rows."""
    attention = attention_of(decoder.config)
    options: dict[str, Any] = {"attention_mask": None}  # flash attention finds the dialogues by their positions
    if attention == ONE_ROW:
        # A mask of four dimensions is handed on as it is, so that none is made.
        options = {"attention_mask": packed.owners.new_ones(1, 1, 1, 1, dtype=torch.bool), "dialogues": packed.lengths}
    elif attention == "eager":
        options = {"attention_mask": packed.mask()}
    hidden: Tensor = decoder(
        inputs_embeds=packed.embeds, position_ids=packed.positions, use_cache=False, **options
    ).last_hidden_state
    return hidden


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           dialogues: Sequence[int] = (), **options: Any) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' scaled-dot-product attention (1, heads, L, d) → (1, L, heads, d), inside each of ``dialogues``.

    Without dialogues it is transformers' own, with any mask.
    """
    if not dialogues:
        if attention_mask is not None and attention_mask.shape[-1] != key.shape[-2]:
            raise ValueError(f"data.pack: {type(module).__name__} does not hand on which dialogues a row has")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    pieces = zip(*(part.split(list(dialogues), 2) for part in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in pieces], 1), None


AttentionInterface.register(ONE_ROW, attend)
AttentionMaskInterface.register(ONE_ROW, sdpa_mask)


def pack_rows(spliced: Spliced, config: PreTrainedConfig, limit: int) -> Packed:
    """Spliced rows, padded on the right and with labels → one packed row, or for eager attention rows of at most
    ``limit`` positions (of the longest dialogue if that is more). ``config``: the language model's, whose "sdpa"
    becomes ONE_ROW for good; it does the same for rows that are not packed.

    Raises ValueError for a language model whose layers cannot be kept inside a dialogue.
    """
    lengths = spliced.mask.sum(1).tolist()
    check(config, max(lengths))
    if attention_of(config) == "sdpa":
        config._attn_implementation = ONE_ROW
    one = attention_of(config) != "eager"
    rows = [list(range(len(lengths)))] if one else place(lengths, limit)
    width = max(sum(lengths[i] for i in row) for row in rows)
    stride = spliced.mask.shape[1]
    source = torch.zeros(len(rows), width, dtype=torch.long)  # of every packed position, in the B·T of before
    positions, owners = torch.zeros_like(source), torch.full_like(source, -1)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            here, count = slice(at, at + lengths[i]), torch.arange(lengths[i])
            source[r, here], positions[r, here], owners[r, here] = i * stride + count, count, i
            at += lengths[i]
        positions[r, at:] = torch.arange(width - at)
    device = spliced.embeds.device
    source, positions, owners = source.to(device), positions.to(device), owners.to(device)
    embeds = spliced.embeds.flatten(0, 1)[source]
    labels = spliced.labels.flatten()[source].masked_fill((owners < 0) | (positions == 0), IGNORE)  # type: ignore[union-attr]
    return Packed(embeds, labels, positions, owners, tuple(lengths) if one else ())


def place(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which dialogues share a row: first-fit decreasing at several row lengths up to ``limit``, of which the one that
    takes the least room (rows x longest row) is kept; never more than one dialogue a row would take.

    >>> place([5, 3, 2], 8)
    [[0], [1, 2]]
    """
    longest = max(lengths)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    best: list[list[int]] = []
    least = (0, 0)
    step = max(1, (limit - longest) // WIDTHS)
    for width in range(longest, max(limit, longest) + 1, step):
        rows, used = _first_fit(lengths, order, width)
        if not best or (len(rows) * max(used), len(rows)) < least:
            best, least = rows, (len(rows) * max(used), len(rows))
    return best


def _first_fit(lengths: Sequence[int], order: Sequence[int], width: int) -> tuple[list[list[int]], list[int]]:
    """Each dialogue in ``order`` goes to the first row with room; rows, and how full each is."""
    rows: list[list[int]] = []
    used: list[int] = []
    for i in order:
        free = next((r for r, full in enumerate(used) if full + lengths[i] <= width), None)
        if free is None:
            rows.append([i])
            used.append(lengths[i])
        else:
            rows[free].append(i)
            used[free] += lengths[i]
    return rows, used


def attention_of(config: PreTrainedConfig) -> str:
    """The attention a language model runs with: "sdpa", "eager", "flash_attention_2", …"""
    return str(getattr(config, "_attn_implementation", None) or "sdpa")


def check(config: PreTrainedConfig, longest: int) -> None:
    """Raises ValueError for attention or layers that would see across dialogues, or less than a whole one."""
    attention = attention_of(config)
    if attention not in ("sdpa", ONE_ROW, "eager") and not attention.startswith("flash_attention"):
        raise ValueError(f"data.pack: attention {attention!r} takes no packed rows; expected sdpa or flash attention")
    kinds: Any = getattr(config, "layer_types", None) or ()
    odd = sorted({kind for kind in kinds if kind not in ("full_attention", "sliding_attention")})
    if odd:
        raise ValueError(f"data.pack: layers of kind {', '.join(odd)} carry a state from one dialogue into the next")
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds or not kinds else None
    if window is not None and window < longest:
        raise ValueError(f"data.pack: a dialogue of {longest} positions, but the language model's window is {window}")


def stats_of(real: Tensor) -> dict[str, Tensor]:
    """Of the positions (R, L) that the language model works on, ``real`` where there is a token and not padding:
    how many "tokens" and "positions", and the "padding_share" in [0, 1]; scalars that stay on the device."""
    tokens, positions = real.sum(), torch.full((), real.numel(), device=real.device)
    return {"tokens": tokens, "positions": positions, "padding_share": 1 - tokens / positions}
