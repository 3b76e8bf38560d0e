"""The whole model, tiny and random: rows equal ones, losses by hand, generation against a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from groma.data.prompts import build_prompt, refer_turns
from groma.model.groma import GromaForConditionalGeneration
from groma.processor import GromaProcessor
from groma.structures import Prompt, View

Make = Callable[..., GromaForConditionalGeneration]
T = torch.tensor
BOX, OTHER = T([[0.1, 0.1, 0.45, 0.5]]), T([[0.5, 0.2, 0.9, 0.6], [0.3, 0.3, 0.8, 0.9]])
NONE = torch.zeros(0, 4)


@pytest.fixture(scope="module")
def answered(tiny_processor: GromaProcessor) -> list[Prompt]:
    """Question and answer: one box, two boxes, none."""
    asked = [("the red ball", BOX), ("all the long green things", OTHER), ("the ring", NONE)]
    return [build_prompt(tiny_processor, refer_turns(text, boxes)) for text, boxes in asked]


def padded(processor: GromaProcessor, rows: list[Prompt]) -> dict[str, Any]:
    """Keyword arguments of a training step over ``rows``."""
    ids, mask = processor.pad([row.ids for row in rows])
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        labels[i, : len(row.labels)] = row.labels
    return {"input_ids": ids, "attention_mask": mask, "labels": labels,
            "refer_boxes": tuple(row.refer_boxes for row in rows),
            "ground_boxes": tuple(row.ground_boxes for row in rows)}  # fmt: skip


def tensors(view: View) -> list[Tensor]:
    return [view.proposals.boxes, view.proposals.scores, view.region_tokens, view.image_tokens, view.candidates.boxes]


# -- one image and many -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_looking_at_many_equals_looking_at_each(model: GromaForConditionalGeneration, pixels: Tensor) -> None:
    refer = (NONE, BOX, OTHER)
    views = model.look(pixels, refer)
    assert len({len(v.proposals) for v in views}) > 1
    for i, view in enumerate(views):
        [alone] = model.look(pixels[i : i + 1], refer[i : i + 1])
        assert len(view.proposals) == len(alone.proposals)
        for one, other in zip(tensors(view), tensors(alone), strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)  # measured worst case 2e-6
        mine = len(refer[i])
        assert torch.equal(view.proposals.boxes[:mine], refer[i])
        assert bool((view.proposals.scores[mine:].diff() <= 0).all())


@torch.no_grad()
def test_the_same_picture_gives_the_same_bytes(
    model: GromaForConditionalGeneration, pixels: Tensor, prompts: list[Prompt], tiny_processor: GromaProcessor
) -> None:
    for one, other in zip(model.look(pixels), model.look(pixels), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
    given = padded(tiny_processor, prompts) | {"labels": None}
    first, second = (model(pixel_values=pixels, seed=seed, **given).logits for seed in (1, 2))
    assert torch.equal(first, second)  # a seed means nothing outside training


@torch.no_grad()
def test_logits_of_many_equal_those_of_each(
    model: GromaForConditionalGeneration, pixels: Tensor, prompts: list[Prompt], tiny_processor: GromaProcessor
) -> None:
    given = padded(tiny_processor, prompts) | {"labels": None}
    before = given["input_ids"].clone()
    logits = model(pixel_values=pixels, **given).logits
    assert logits.shape[-1] == model.config.vocab_size
    assert torch.equal(given["input_ids"], before)
    views = model.look(pixels, given["refer_boxes"])
    for i, prompt in enumerate(prompts):
        alone = model(pixel_values=pixels[i : i + 1], input_ids=prompt.ids[None],
                      refer_boxes=(prompt.refer_boxes,)).logits[0]  # fmt: skip
        spliced = model.splice([views[i]], [prompt])
        assert len(alone) == spliced.ids.shape[1]
        # measured worst case 3e-6
        torch.testing.assert_close(logits[i, : len(alone)], alone, atol=5e-5, rtol=1e-4)
    left = torch.stack([torch.cat((ids[mask == 0], ids[mask == 1])) for ids, mask in
                        zip(given["input_ids"], given["attention_mask"], strict=True)])  # fmt: skip
    moved = model(pixel_values=pixels, **given | {"input_ids": left, "attention_mask": given["attention_mask"].flip(1)})
    assert torch.equal(moved.logits, logits)


@torch.no_grad()
def test_the_last_logits_alone(model: GromaForConditionalGeneration, pixels: Tensor, prompts: list[Prompt]) -> None:
    spliced = model.splice(model.look(pixels[:1]), prompts[:1])
    whole = model.speak(spliced.embeds, spliced.mask).logits
    torch.testing.assert_close(model.speak(spliced.embeds, spliced.mask, last=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(inputs_embeds=spliced.embeds, logits_to_keep=1).logits, whole[:, -1:])


@torch.no_grad()
def test_the_head_reads_last_positions_side_by_side(
    model: GromaForConditionalGeneration, pixels: Tensor, prompts: list[Prompt]
) -> None:
    """A product of rows that lie apart would copy the whole head for each of them."""
    spliced = model.splice(model.look(pixels), prompts, left=True)
    seen: list[bool] = []
    handle = model.vocabulary.head.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    model.speak(spliced.embeds, spliced.mask, last=2)
    handle.remove()
    assert seen == [True]


# -- training ---------------------------------------------------------------------------------------------------------


def order_of(model: GromaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Tensor:
    """The boxes of the first picture in the order that a forward pass took them."""
    taken: list[View] = []
    look = model.look

    def spy(*args: Any, **kwargs: Any) -> list[View]:
        taken.extend(look(*args, **kwargs))
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(model, "look", spy)
        model(**given)
    return taken[0].proposals.boxes


@torch.no_grad()
def test_regions_are_shuffled_in_training_with_a_seed_only(
    make: Make, pixels: Tensor, answered: list[Prompt], tiny_processor: GromaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(proposer={"dropout": 0.0})
    given = {"pixel_values": pixels, **padded(tiny_processor, answered)}
    sorted_ = order_of(model, monkeypatch, **given, seed=1)
    model.train()
    assert torch.equal(order_of(model, monkeypatch, **given), sorted_)
    one, again, other = (order_of(model, monkeypatch, **given, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, sorted_)
    assert not torch.equal(one, other)
    assert torch.equal(one[one[:, 0].argsort()], sorted_[sorted_[:, 0].argsort()])


@torch.no_grad()
def test_text_loss_is_the_mean_over_labelled_tokens(
    model: GromaForConditionalGeneration, pixels: Tensor, answered: list[Prompt], tiny_processor: GromaProcessor
) -> None:
    given = padded(tiny_processor, answered)
    out = model(pixel_values=pixels, **given)
    assert list(out.losses) == ["text"]
    views = model.look(pixels, given["refer_boxes"], given["ground_boxes"])
    surprises = []
    for view, prompt in zip(views, answered, strict=True):
        spliced = model.splice([view], [prompt])
        logits = model.speak(spliced.embeds).logits[0].double()
        labels = spliced.labels[0].tolist()
        for at, label in enumerate(labels):
            if label != -100:
                surprises.append((logits[at - 1].logsumexp(0) - logits[at - 1, label]).item())
        proxies = [model.config.token_id(f"<r{k}>") for k in range(20)]
        written = [proxies.index(label) for label in labels if label in proxies]
        torch.testing.assert_close(view.proposals.boxes[written], prompt.ground_boxes)  # true boxes are regions
    assert len(surprises) == sum(int((row.labels != -100).sum()) for row in answered)
    assert out.losses["text"].item() == pytest.approx(sum(surprises) / len(surprises), rel=1e-5)
    assert torch.equal(out.loss, out.losses["text"])
    nothing = model(pixel_values=pixels, **given | {"labels": torch.full_like(given["labels"], -100)})
    assert nothing.loss.item() == 0


def test_text_teaches_the_language_side_only(
    make: Make, pixels: Tensor, answered: list[Prompt], tiny_processor: GromaProcessor
) -> None:
    model = make().train()
    model.llm.requires_grad_(False)
    model(pixel_values=pixels, **padded(tiny_processor, answered), seed=3).loss.backward()
    learnt = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learnt == {"encoder", "regions", "bridge", "vocabulary"}  # boxes are given, not taught, by the proposer
    rows = model.vocabulary.embed.weight.grad.abs().sum(1) > 0
    base = model.config.base_vocab
    assert bool(rows[model.config.token_id("<r0>") - base])
    assert not bool(rows[model.config.token_id("<image>") - base])  # a place is never read as a word


def test_one_batch_may_carry_both_kinds_of_loss(
    model: GromaForConditionalGeneration, pixels: Tensor, answered: list[Prompt], tiny_processor: GromaProcessor
) -> None:
    given = padded(tiny_processor, answered)
    with torch.no_grad():
        both = model(pixel_values=pixels, **given, targets=(BOX, OTHER, NONE))
        text = model(pixel_values=pixels, **given)
        boxes = model(pixel_values=pixels, targets=(BOX, OTHER, NONE))
    assert both.losses == text.losses | boxes.losses
    torch.testing.assert_close(both.loss, text.loss + boxes.loss)
    assert "words" not in both.losses


@torch.no_grad()
def test_words_loss_by_hand_and_its_jitter(make: Make, pixels: Tensor) -> None:
    model = make(proposer={"dropout": 0.0})
    given: dict[str, Any] = {"pixel_values": pixels[:2], "targets": (BOX, OTHER),
                             "target_words": (((0, 4),), ((1,), ()))}  # fmt: skip
    tokens = torch.cat(model.regions(model.encoder(pixels[:2]), [BOX, OTHER]))
    chance = model.words_head(tokens).double().sigmoid()
    wanted = T([[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    expected = -torch.where(wanted == 1, chance, 1 - chance).log().sum().item() / 3
    assert model(**given, seed=5).losses["words"].item() == pytest.approx(expected, rel=1e-5)
    model.train()
    one, again, other = (model(**given, seed=s).losses["words"].item() for s in (5, 5, 6))
    assert one == again != other
    assert one != pytest.approx(expected, rel=1e-6)
    assert model(**given).losses["words"].item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_dropout_moves_nothing_in_parts_that_are_frozen(make: Make, pixels: Tensor) -> None:
    model = make(proposer={"dropout": 0.5}).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, other = model.look(pixels[:1])[0], model.look(pixels[:1])[0]
        assert not torch.equal(one.candidates.boxes, other.candidates.boxes)
        model.proposer.eval()
        one, other = model.look(pixels[:1])[0], model.look(pixels[:1])[0]
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_changes_nothing(
    make: Make, pixels: Tensor, answered: list[Prompt], tiny_processor: GromaProcessor
) -> None:
    model = make(proposer={"dropout": 0.0}).train()
    given = {"pixel_values": pixels, **padded(tiny_processor, answered), "targets": (BOX, OTHER, NONE), "seed": 3}
    runs, calls = [], []
    for layer in (model.llm.model.layers[0].mlp, model.encoder.vit.encoder.layer[0].mlp):
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        calls.clear()
        loss = model(**given).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        runs.append((loss, gradients, len(calls)))
    (loss, gradients, count), (loss_, gradients_, count_) = runs
    assert count_ == 2 * count  # layers of encoder and language model do run again
    torch.testing.assert_close(loss, loss_)
    assert set(gradients) == set(gradients_)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_[name], atol=1e-5, rtol=1e-4)
