"""Packed rows give the losses and gradients of padded ones, whatever the language model and its attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from groma.data.prompts import build_prompt, refer_turns
from groma.model import packing
from groma.model.groma import GromaForConditionalGeneration
from groma.processor import GromaProcessor
from groma.structures import Prompt, Spliced, Turn

Make = Callable[..., GromaForConditionalGeneration]
BOX = torch.tensor([[0.1, 0.1, 0.45, 0.5]])
LLMS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "num_key_value_heads": 2},
}


@pytest.fixture(scope="module")
def batch(pixels: Tensor, tiny_processor: GromaProcessor) -> dict[str, Any]:
    """Six dialogues of six lengths, each about one of three pictures."""
    rows: list[Prompt] = []
    for i in range(6):
        chat = [Turn("user", "What is this? " * (1 + 7 * i)), Turn("assistant", "A ball. " * (1 + 3 * i))]
        rows.append(build_prompt(tiny_processor, [*refer_turns("the red ball", BOX), *chat]))
    ids, mask = tiny_processor.pad([row.ids for row in rows])
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        labels[i, : len(row.labels)] = row.labels
    nothing = tuple(torch.zeros(0, 4) for _ in rows)
    return {"pixel_values": pixels.repeat(2, 1, 1, 1), "input_ids": ids, "attention_mask": mask, "labels": labels,
            "refer_boxes": nothing, "ground_boxes": tuple(row.ground_boxes for row in rows)}  # fmt: skip


def step(model: GromaForConditionalGeneration, batch: dict[str, Any], pack: int) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**batch, pack=pack)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("pointer", [False, True])
def test_packed_equals_padded(make: Make, batch: dict[str, Any], llm: str, attention: str, pointer: bool) -> None:
    model = make(llm=LLMS[llm], pointer_head=pointer)
    model.llm.set_attn_implementation(attention)
    if pointer:  # recomputed in the backward pass, it must find the dialogues again
        model.train().gradient_checkpointing_enable()
        for part in (model.encoder, model.proposer):
            part.eval()
    padded, plain = step(model, batch, 0)
    longest = int(padded.stats["tokens"])
    for limit in (1, 700, longest):  # a row for each, several rows of several, one row for all
        packed, gradients = step(model, batch, limit)
        torch.testing.assert_close(packed.loss, padded.loss, atol=1e-5, rtol=0)  # measured worst case 1e-6
        assert packed.stats["tokens"] == padded.stats["tokens"]
        assert packed.stats["padding_share"] <= padded.stats["padding_share"]
        assert gradients.keys() == plain.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, plain[name], atol=2e-5, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert packed.stats["padding_share"] == 0  # one row for all


@torch.no_grad()
@pytest.mark.parametrize("pack", [0, 2048])
def test_the_loss_of_many_is_that_of_each_by_its_labels(make: Make, batch: dict[str, Any], pack: int) -> None:
    """Also with a pointer head, which matches every dialogue with the regions of its own picture."""
    model = make(pointer_head=True)
    model.vocabulary.pointer.weight.mul_(20)
    total = count = 0.0
    for i, prompt in enumerate(rows_of(batch, 6)):
        labelled = int((prompt.labels[1:] != -100).sum())
        alone = model(pixel_values=batch["pixel_values"][i : i + 1], input_ids=prompt.ids[None],
                      labels=prompt.labels[None], ground_boxes=(prompt.ground_boxes,))  # fmt: skip
        total, count = total + labelled * alone.loss.item(), count + labelled
    assert model(**batch, pack=pack).loss.item() == pytest.approx(total / count, abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_dialogue_sees_only_itself(make: Make, batch: dict[str, Any], attention: str) -> None:
    """The hidden states of one dialogue stay when another in its row changes."""
    model = make()
    model.llm.set_attn_implementation(attention)
    spliced = model.splice(model.look(batch["pixel_values"][:3]), rows_of(batch, 3))
    config = model.llm.get_decoder().config

    def hidden(embeds: Tensor) -> tuple[Tensor, packing.Packed]:
        changed = Spliced(embeds, spliced.ids, spliced.mask, spliced.labels, spliced.regions)
        packed = packing.pack_rows(changed, config, 10_000)
        return packing.run_packed(model.llm.get_decoder(), packed), packed

    other = spliced.embeds.clone()
    other[1] += 1.0
    with torch.no_grad():
        (before, packed), (after, _) = hidden(spliced.embeds), hidden(other)
    assert len(packed.owners) == 1
    kept = packed.owners != 1
    assert torch.equal(before[kept], after[kept])
    assert not torch.allclose(before[~kept], after[~kept])


def rows_of(batch: dict[str, Any], count: int) -> list[Prompt]:
    rows = []
    for i in range(count):
        real = batch["attention_mask"][i].bool()
        ids, labels = batch["input_ids"][i][real], batch["labels"][i][real]
        rows.append(Prompt(ids, labels, batch["refer_boxes"][i], batch["ground_boxes"][i]))
    return rows


def spliced_of(lengths: list[int]) -> Spliced:
    """Rows of these lengths, embedded as (row, position), every token labelled."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    place = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in ids.shape), indexing="ij"), -1)
    labels = (ids + 7).masked_fill(mask == 0, -100)
    return Spliced(place, ids, mask, labels, tuple(0 for _ in lengths))


def test_rows_positions_and_labels_by_hand() -> None:
    packed = packing.pack_rows(spliced_of([2, 5, 3]), eager(), 5)
    assert packed.owners.tolist() == [[1, 1, 1, 1, 1], [2, 2, 2, 0, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert packed.embeds[1].tolist() == [[2, 0], [2, 1], [2, 2], [0, 0], [0, 1]]
    assert packed.labels.tolist() == [[-100, 7, 7, 7, 7], [-100, 7, 7, -100, 7]]
    assert packed.lengths == ()
    assert (packed.mask()[1, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip


def test_padding_is_marked_and_sees_itself() -> None:
    packed = packing.pack_rows(spliced_of([4, 2]), eager(), 4)
    assert packed.owners.tolist() == [[0, 0, 0, 0], [1, 1, -1, -1]]
    assert packed.labels[1].tolist() == [-100, 7, -100, -100]
    assert bool((packed.mask() == 0).any(-1).all())
    assert {k: v.item() for k, v in packing.stats_of(packed.owners >= 0).items()} == {
        "tokens": 6, "positions": 8, "padding_share": 0.25}  # fmt: skip


def eager() -> Any:
    config = AutoConfig.for_model("llama")
    config._attn_implementation = "eager"
    return config


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_other_attention_gets_one_row(attention: str) -> None:
    config = AutoConfig.for_model("llama")
    config._attn_implementation = attention
    packed = packing.pack_rows(spliced_of([2, 5, 3]), config, 5)
    assert packed.owners.tolist() == [[0] * 2 + [1] * 5 + [2] * 3]
    assert packed.positions.tolist() == [[0, 1, 0, 1, 2, 3, 4, 0, 1, 2]]
    assert packed.lengths == (2, 5, 3)


def test_flash_attention_is_told_positions_and_no_mask() -> None:
    config = AutoConfig.for_model("llama")
    config._attn_implementation = "flash_attention_2"
    told: dict[str, Any] = {}

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config

        def forward(self, **given: Any) -> Any:
            told.update(given)
            return SimpleNamespace(last_hidden_state=given["inputs_embeds"])

    packing.run_packed(Decoder(), packing.pack_rows(spliced_of([2, 3]), config, 5))
    assert told["attention_mask"] is None
    assert told["position_ids"].tolist() == [[0, 1, 0, 1, 2]]  # by which it finds the two
    assert len(told["inputs_embeds"]) == 1  # it looks for them in batches of one row only


@torch.no_grad()
def test_a_model_that_has_packed_answers_as_before(
    make: Make, batch: dict[str, Any], pixels: Tensor, prompts: list[Prompt], tiny_processor: GromaProcessor,
    tmp_path: Path
) -> None:  # fmt: skip
    """Padding and a cache go through the same attention as packed rows, afterwards."""
    model = make()
    ids, mask = tiny_processor.pad([prompt.ids for prompt in prompts])
    asked = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask,
             "refer_boxes": tuple(prompt.refer_boxes for prompt in prompts)}  # fmt: skip

    def answers() -> list[Tensor]:
        words = model.generate(**asked, max_new_tokens=4, pad_token_id=0)
        return [model(**asked).logits, model(**batch).loss, words]

    before = answers()
    model(**batch, pack=2048)
    assert packing.attention_of(model.llm.config) == packing.ONE_ROW
    assert all(torch.equal(a, b) for a, b in zip(answers(), before, strict=True))
    model.save_pretrained(tmp_path)
    assert packing.ONE_ROW not in (tmp_path / "config.json").read_text()


def test_layers_that_do_not_tell_the_dialogues_are_refused() -> None:
    part = torch.zeros(1, 2, 6, 4)
    with pytest.raises(ValueError, match="Identity does not hand on which dialogues a row has"):
        packing.attend(torch.nn.Identity(), part, part, part, torch.ones(1, 1, 1, 1, dtype=torch.bool))


@pytest.mark.parametrize(("lengths", "limit", "rows"), [
    ([5, 3, 2], 8, [[0], [1, 2]]),  # two rows of 5, not one of 8 and one of 2
    ([5, 3, 2], 10, [[0, 1, 2]]),  # as little room as two rows of 5, and fewer rows
    ([4, 4, 4], 8, [[0], [1], [2]]),  # a row of 8 and one of 4 would take 16
    ([9, 1], 4, [[0], [1]]),  # longer than the limit: a row of its own
    ([6], 2, [[0]]),
])  # fmt: skip
def test_placing(lengths: list[int], limit: int, rows: list[list[int]]) -> None:
    assert packing.place(lengths, limit) == rows


def test_placing_never_takes_more_room_than_a_row_each() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 900, (int(torch.randint(1, 40, (1,), generator=generator)),), generator=generator)
        rows = packing.place(lengths.tolist(), 2048)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        longest = max(int(lengths[row].sum()) for row in rows)
        assert longest <= 2048
        assert len(rows) * longest <= len(lengths) * int(lengths.max())


def test_layers_that_cannot_be_kept_apart_are_refused() -> None:
    window = AutoConfig.for_model("mistral", sliding_window=4)
    with pytest.raises(ValueError, match="a dialogue of 5 positions, but the language model's window is 4"):
        packing.pack_rows(spliced_of([2, 5]), window, 8)
    packing.pack_rows(spliced_of([2, 4]), window, 8)
    linear = AutoConfig.for_model("qwen3", num_hidden_layers=2, layer_types=["full_attention", "full_attention"])
    linear.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="linear_attention carry a state"):
        packing.pack_rows(spliced_of([2, 5]), linear, 8)
    linear.layer_types, linear._attn_implementation = ["full_attention"] * 2, "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' takes no packed rows"):
        packing.pack_rows(spliced_of([2, 5]), linear, 8)
