"""The proposer: first stage, refinement, fused scores and order by hand; every head and parameter learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from groma import boxes as box_ops
from groma.model.configuration import ProposerConfig
from groma.model.detection_loss import detection_losses
from groma.model.groma import GromaForConditionalGeneration
from groma.model.proposer import Detections, Proposer, inverse_sigmoid, sigmoid_focal, sine_boxes, sine_map
from groma.structures import ImageFeatures

Make = Callable[..., GromaForConditionalGeneration]
SMALL = {"width": 16, "encoder_layers": 1, "decoder_layers": 3, "encoder_heads": 2, "decoder_heads": 2,
         "encoder_ffn": 32, "decoder_ffn": 32, "queries": 10}  # fmt: skip


def proposer(noise: float = 0.2, **changes: Any) -> Proposer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        part = Proposer(ProposerConfig(**SMALL | changes), 12)
        part.reset()
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=noise)
    return part.eval()


def features(batch: int = 2, h: int = 6, w: int = 6, seed: int = 0) -> ImageFeatures:
    generator = torch.Generator().manual_seed(seed)
    return ImageFeatures(tuple(torch.randn(batch, 12, h, w, generator=generator) for _ in range(4)))


@torch.no_grad()
def test_proposals_come_best_first_as_corners() -> None:
    part = proposer()
    found = part(features())
    fused = part.objectness(found)
    for image, proposals in enumerate(part.propose(found)):
        order = sorted(range(10), key=lambda q: -fused[image, q].item())
        assert torch.equal(proposals.scores, fused[image, order])
        assert torch.equal(proposals.boxes, box_ops.cxcywh_to_xyxy(found.boxes[-1, image, order]))
        assert len(set(proposals.scores.tolist())) > 5


def test_equal_scores_keep_the_order_of_queries() -> None:
    part = proposer()
    boxes = torch.rand(3, 1, 10, 4)
    same = {name: torch.zeros(3, 1, 10) for name in part.config.heads}
    [proposals] = part.propose(Detections(torch.zeros(1, 36), torch.zeros(1, 36, 4), same, boxes, boxes[0]))
    assert torch.equal(proposals.boxes, box_ops.cxcywh_to_xyxy(boxes[-1, 0]))


def test_fused_score_by_hand() -> None:
    part = proposer()
    logits = {"coco": torch.zeros(3, 1, 2), "sa1b": torch.zeros(3, 1, 2)}
    logits["coco"][-1] = torch.tensor([[2.0, -1.0]])
    logits["sa1b"][-1] = torch.tensor([[0.5, 3.0]])
    score = part.objectness(Detections(torch.zeros(1, 1), torch.zeros(1, 1, 4), logits, torch.zeros(3, 1, 2, 4),
                                       torch.zeros(1, 2, 4)))  # fmt: skip

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [sigmoid(2) ** 0.4 * sigmoid(0.5) ** 0.6, sigmoid(-1) ** 0.4 * sigmoid(3) ** 0.6]
    assert score[0].tolist() == pytest.approx(expected)


@torch.no_grad()
def test_one_head_by_configuration() -> None:
    part = proposer(heads=["object"], fusion=[1.0])
    found = part(features())
    assert list(found.logits) == ["object"]
    torch.testing.assert_close(part.objectness(found), found.logits["object"][-1].sigmoid())
    with pytest.raises(ValueError, match="source: got 'coco', expected one of the proposer's heads \\['object'\\]"):
        detection_losses(found, (torch.zeros(0, 4),) * 2, "coco", part.config)


@pytest.mark.parametrize("levels, sizes", [(1, [(6, 6)]), (2, [(6, 6), (3, 3)]), (3, [(12, 12), (6, 6), (3, 3)])])
@torch.no_grad()
def test_levels(levels: int, sizes: list[tuple[int, int]]) -> None:
    part = proposer(levels=levels)
    maps = part._maps(torch.randn(2, 12, 6, 6))
    assert [tuple(m.shape[-2:]) for m in maps] == sizes
    found = part(features())
    cells = sum(h * w for h, w in sizes)
    assert found.encoder_logits.shape == (2, cells)
    assert found.encoder_boxes.shape == (2, cells, 4)
    assert found.boxes.shape == (3, 2, 10, 4)
    assert bool(((found.boxes >= 0) & (found.boxes <= 1)).all())


@torch.no_grad()
def test_first_stage_boxes_start_at_anchors_of_their_level() -> None:
    part = proposer(noise=0.0, levels=2)  # box heads start at zero: the boxes are the anchors
    boxes = part(features(1, 2, 4)).encoder_boxes[0]
    fine = [((c + 0.5) / 4, (r + 0.5) / 2, 0.05, 0.05) for r in range(2) for c in range(4)]
    coarse = [((c + 0.5) / 2, 0.5, 0.1, 0.1) for c in range(2)]
    torch.testing.assert_close(boxes, torch.tensor(fine + coarse))


@torch.no_grad()
def test_first_stage_by_hand_and_the_references_it_gives() -> None:
    part = proposer()
    memory: list[Tensor] = []
    part.encoder[-1].register_forward_hook(lambda *a: memory.append(a[2]))
    found = part(features())
    objects = part.enc_output_norm(part.enc_output(memory[0]))
    torch.testing.assert_close(found.encoder_logits, part.enc_class(objects)[..., 0])
    delta = part.enc_box(objects)
    for cell in (0, 7, 35):
        anchor = torch.tensor([(cell % 6 + 0.5) / 6, (cell // 6 + 0.5) / 6, 0.05, 0.05])
        torch.testing.assert_close(found.encoder_boxes[:, cell], (torch.logit(anchor) + delta[:, cell]).sigmoid())
    for image in range(2):  # query i starts at the i-th best cell
        best = found.encoder_logits[image].argsort(descending=True)[:10]
        torch.testing.assert_close(found.reference[image], found.encoder_boxes[image, best])


def test_cells_at_the_rim_of_a_large_map_are_void_and_harmless() -> None:
    part = proposer(queries=200)
    found = part(features(1, 2, 60))  # cx of the first and last column is 0.0083 and 0.9917
    void = torch.tensor([cell for cell in range(120) if cell % 60 in (0, 59)])
    assert bool((found.encoder_boxes[0, void] == 1).all())
    assert found.encoder_logits[0, void].unique().numel() == 1  # what they see is masked
    assert found.boxes.shape[2] == 120  # fewer cells than queries: one query each
    losses = detection_losses(found, (torch.tensor([[0.1, 0.1, 0.4, 0.5]]),), "coco", part.config)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(bool(p.grad.isfinite().all()) for p in part.parameters() if p.grad is not None)


@torch.no_grad()
def test_boxes_are_refined_from_the_layer_before() -> None:
    part = proposer()
    states: list[Tensor] = []
    references: list[Tensor] = []
    for layer in part.decoder:
        layer.register_forward_hook(lambda *a: (states.append(a[2]), references.append(a[1][2]))[0])
    found = part(features())
    first = found.reference
    for given in references:  # cross-attention keeps the first stage's boxes
        assert torch.equal(given, first)
    delta = [head(x) for head, x in zip(part.box_heads, states, strict=True)]
    start = inverse_sigmoid(first)
    expected = [
        (delta[0] + start).sigmoid(),
        (delta[1] + inverse_sigmoid((delta[0] + start).sigmoid())).sigmoid(),
        (delta[2] + inverse_sigmoid((delta[1] + start).sigmoid())).sigmoid(),
    ]
    torch.testing.assert_close(found.boxes, torch.stack(expected))
    for name, heads in part.class_heads.items():
        logits = torch.stack([heads[i](x)[..., 0] for i, x in enumerate(states)])
        torch.testing.assert_close(found.logits[name], logits)


def test_refinement_is_not_detached() -> None:
    part = proposer()
    part(features()).boxes[2].sum().backward()
    # the last box depends on the head of the layer before, and through it on no other
    assert part.box_heads[1].last.weight.grad.abs().max() > 0
    assert not part.box_heads[0].last.weight.grad.any()
    assert part.enc_box.last.weight.grad is None  # the first stage's coordinates are detached


@torch.no_grad()
def test_input_is_the_mean_of_the_levels_projected_and_normed_by_position() -> None:
    part, given = proposer(), features(1)
    seen: list[Tensor] = []
    part.encoder[0].register_forward_hook(lambda *a: seen.append(a[1][0]))
    part(given)
    [projection, norm] = part.input_proj[0]
    mean = sum(given.levels) / 4
    for cell in (0, 13, 35):
        raw = projection.weight[:, :, 0, 0] @ mean[0, :, cell // 6, cell % 6] + projection.bias
        scaled = (raw - raw.mean()) / (raw.var(correction=0) + 1e-6).sqrt()
        torch.testing.assert_close(seen[0][0, cell], scaled * norm.weight + norm.bias, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_batch_equals_its_images_alone() -> None:
    part, both = proposer(levels=3), features(2)
    found = part(both)
    for image in range(2):
        alone = part(ImageFeatures(tuple(level[image : image + 1] for level in both.levels)))
        # measured worst case 2e-6
        torch.testing.assert_close(found.boxes[:, image], alone.boxes[:, 0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found.logits["sa1b"][:, image], alone.logits["sa1b"][:, 0], atol=2e-5, rtol=1e-4)


def test_rare_objects_and_still_boxes_at_the_start() -> None:
    part = proposer(noise=0.0)
    heads = [part.enc_class, *(head for heads in part.class_heads.values() for head in heads)]
    assert all(head.bias.sigmoid().item() == pytest.approx(0.01, rel=1e-4) for head in heads)
    found = part(features())
    torch.testing.assert_close(found.boxes, found.reference.expand_as(found.boxes), atol=1e-5, rtol=1e-5)


def test_positions() -> None:
    flat = torch.zeros(1)
    d = 8
    embedded = sine_map(2, 3, d, flat)
    for row in range(2):
        for column in range(3):
            expected = []
            for at in ((row + 0.5) / 2, (column + 0.5) / 3):  # y before x
                for k in range(2):  # d / 2 channels each: sine and cosine of falling frequencies
                    angle = 2 * math.pi * at / 10000 ** (2 * k / 4)
                    expected += [math.sin(angle), math.cos(angle)]
            assert embedded[row * 3 + column].tolist() == pytest.approx(expected, abs=1e-4)
    of_box = sine_boxes(torch.tensor([0.1, 0.2, 0.3, 0.4]), d)
    expected = []
    for value in (0.1, 0.2, 0.3, 0.4):
        for k in range(2):
            angle = 2 * math.pi * value / 10000 ** (2 * k / 4)
            expected += [math.sin(angle), math.cos(angle)]
    assert of_box.tolist() == pytest.approx(expected, abs=1e-6)


def test_inverse_sigmoid_and_focal_loss() -> None:
    x = torch.tensor([0.3, 0.0, 1.0, 7.0])
    far = math.log(1e-5)
    assert inverse_sigmoid(x).tolist() == pytest.approx([math.log(0.3 / 0.7), far, -far, -far], rel=1e-4)
    p = 1 / (1 + math.exp(-1.5))
    loss = sigmoid_focal(torch.tensor([1.5, 1.5]), torch.tensor([1.0, 0.0]), 0.25)
    expected = [0.25 * (1 - p) ** 2 * -math.log(p), 0.75 * p**2 * -math.log(1 - p)]
    assert loss.tolist() == pytest.approx(expected)


# -- learning ---------------------------------------------------------------------------------------------------------

TARGETS = (torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.5, 0.5, 0.9, 0.8]]), torch.tensor([[0.2, 0.6, 0.5, 0.9]]))
TARGET_WORDS = (((0, 4), (1,)), ((2, 5),))


def pixels() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("source, other", [("coco", "sa1b"), ("sa1b", "coco")])
def test_each_source_trains_its_own_head_only(make: Make, source: str, other: str) -> None:
    model = make()
    model(pixel_values=pixels(), targets=TARGETS, source=source).loss.backward()
    for layer in range(2):
        assert model.proposer.class_heads[source][layer].weight.grad.abs().max() > 0
        assert model.proposer.class_heads[other][layer].weight.grad is None
    assert model.proposer.enc_class.weight.grad.abs().max() > 0


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_every_parameter_of_the_first_stage_of_training_learns(make: Make, levels: int) -> None:
    model = make(proposer={"levels": levels, "queries": 12})
    for source in ("coco", "sa1b"):
        out = model(pixel_values=pixels(), targets=TARGETS, target_words=TARGET_WORDS, source=source)
        assert list(out.losses) == [
            "class", "l1", "giou", "encoder_class", "encoder_l1", "encoder_giou", "words",
        ]  # fmt: skip
        torch.testing.assert_close(out.loss, torch.stack(list(out.losses.values())).sum())
        out.loss.backward()
    trained = ("encoder", "proposer", "regions", "words_head")
    still = []
    for name, parameter in model.named_parameters():
        if name.split(".")[0] not in trained or not parameter.requires_grad:
            continue
        # a key's bias shifts all logits of a query alike: its gradient is zero but for rounding
        if parameter.grad is None or (not parameter.grad.any() and not name.endswith(("key.bias", "k_proj.bias"))):
            still.append(name)
    assert still == []


def test_an_image_without_targets_gives_finite_losses(make: Make) -> None:
    model = make()
    none = torch.zeros(0, 4)
    for targets in ((none, none), (TARGETS[0], none)):
        model.zero_grad()
        out = model(pixel_values=pixels(), targets=targets, source="sa1b")
        assert all(bool(loss.isfinite()) for loss in out.losses.values())
        out.loss.backward()
        assert model.proposer.class_heads["sa1b"][0].weight.grad.abs().max() > 0
    empty = model(pixel_values=pixels(), targets=(none, none)).losses
    assert [empty[n].item() for n in ("l1", "giou", "encoder_l1", "encoder_giou")] == [0, 0, 0, 0]
    words = model(pixel_values=pixels(), targets=(none, TARGETS[1]), target_words=((), ((2, 5),))).losses["words"]
    assert bool(words.isfinite())
