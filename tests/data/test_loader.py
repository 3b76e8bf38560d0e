"""The mixture's order, examples in workers, augmentation, skipping, and collation."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from groma.data.augment import augment_detection, crop_boxes, mirror_words, word_ids
from groma.data.detection import Detection
from groma.data.grounding import Referring
from groma.data.loader import Examples, Key, Mixture, Source, batch_inputs, collate
from groma.processor import GromaProcessor

Write = Callable[[str, Any], Path]
Coco = Callable[..., dict[str, Any]]


@pytest.fixture
def rec(write: Write, coco: Coco, images: Path) -> Referring:
    entries = [{"file_name": f"{n}.png", "caption": c} for n in "abc" for c in ("red cup", "vase", "the green bowl")]
    annotations = [{"image_id": i, "bbox": [10, 5, 20, 10]} for i in range(9) if i % 3 != 1]
    return Referring(write("rec.json", coco(entries, annotations)), images)


@pytest.fixture
def boxes(write: Write, coco: Coco, images: Path) -> Detection:
    annotations = [
        {"image_id": 0, "bbox": [10, 5, 20, 10], "caption": "the red cup"},
        {"image_id": 0, "bbox": [60, 5, 20, 10], "caption": "bowl on the left"},
        {"image_id": 1, "bbox": [10, 5, 20, 40], "caption": "cup"},
    ]
    return Detection(write("d.json", coco([{"file_name": f"{n}.png"} for n in "abc"], annotations)), images)


def test_mixture(rec: Referring, boxes: Detection) -> None:
    mixture = Mixture([Source("rec", rec, 3.0), Source("boxes", boxes)], batch_size=2, seed=4)
    first = list(mixture)
    assert len(mixture) == len(first) == 5 + 2  # 9 of three records, 3
    assert all(len({key.source for key in batch}) == 1 for batch in first)
    counts = [sum(key == (0, i, 0) for batch in first for key in batch) for i in range(3)]
    assert counts == [3, 3, 3]
    assert first == list(mixture) == mixture.batches(0)
    mixture.set_epoch(1)
    assert list(mixture) != first
    assert {key.epoch for batch in mixture for key in batch} == {1}
    assert list(mixture) == Mixture(mixture.sources, 2, seed=4).batches(1)
    short = Mixture([Source("boxes", boxes)], batch_size=2, drop_last=True)
    assert [len(batch) for batch in short] == [2]
    assert len(short) == 1


def test_a_share_of_a_source_changes_with_the_epoch(write: Write, coco: Coco) -> None:
    data = Detection(write("d.json", coco([{"file_name": f"{i}"} for i in range(100)], [])), "/im")
    mixture = Mixture([Source("d", data, 0.2)], batch_size=8)
    shares = [{key.record for batch in mixture.batches(epoch) for key in batch} for epoch in (0, 1)]
    assert [len(share) for share in shares] == [20, 20]
    assert shares[0] != shares[1]


def test_bad_mixtures(rec: Referring) -> None:
    with pytest.raises(ValueError, match="ratio 0 of 3"):
        Source("rec", rec, 0)
    with pytest.raises(ValueError, match="distinct names"):
        Mixture([Source("rec", rec), Source("rec", rec)], 2)
    with pytest.raises(ValueError, match="fill no batch of 8"):
        Mixture([Source("rec", rec)], 8, drop_last=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_dialogue_batches(rec: Referring, processor: GromaProcessor, workers: int) -> None:
    mixture = Mixture([Source("rec", rec)], batch_size=3)
    examples = Examples(mixture, processor, stage="align")
    (batch,) = DataLoader(examples, batch_sampler=mixture, collate_fn=collate, num_workers=workers)
    assert batch.pixels.shape == (3, 3, 32, 32)
    assert batch.ids.shape == batch.labels.shape == batch.mask.shape
    for row in range(3):
        assert (batch.ids[row] == processor.word_id("<ground_box>")).sum() == len(batch.ground_boxes[row]) == 2
        assert batch.labels[row][batch.mask[row] == 0].tolist() == [-100] * int((batch.mask[row] == 0).sum())
        assert batch.ids[row][batch.mask[row] == 0].unique().tolist() in ([], [processor.word_id("[PAD]")])
    inputs = batch_inputs(batch)
    assert set(inputs) == {
        "pixel_values", "input_ids", "attention_mask", "labels", "refer_boxes", "ground_boxes", "targets",
        "target_words", "source",
    }  # fmt: skip
    assert inputs["targets"] is None


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_see_the_epoch(rec: Referring, processor: GromaProcessor, workers: int) -> None:
    mixture = Mixture([Source("rec", rec)], batch_size=3)
    loader = DataLoader(
        Examples(mixture, processor),
        batch_sampler=mixture,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    (first,), _ = list(loader), mixture.set_epoch(1)
    (second,), _ = list(loader), mixture.set_epoch(0)
    (again,) = list(loader)
    # Records name the expressions drawn, in order: sorted, they differ by the draws and not by the order of records.
    assert sorted(first.records) != sorted(second.records)
    assert first.records == again.records
    assert torch.equal(first.ids, again.ids)


def test_detection_batches(boxes: Detection, processor: GromaProcessor) -> None:
    mixture = Mixture([Source("boxes", boxes)], batch_size=3)
    examples = Examples(mixture, processor, words=("cup", "red", "bowl"))
    batch = collate([examples[Key(0, i, 0)] for i in range(3)])
    assert batch.ids is None
    assert [len(t) for t in batch.targets] == [2, 1, 0]
    assert batch.target_words == (((1, 0), (2,)), ((0,),), ())
    assert batch_inputs(batch)["input_ids"] is None


def test_trailing_turns_are_dropped(rec: Referring, processor: GromaProcessor) -> None:
    mixture = Mixture([Source("rec", rec)], batch_size=3)
    whole = Examples(mixture, processor).make(Key(0, 0, 0)).prompt
    cut = Examples(mixture, processor, max_length=len(whole.ids) - 1).make(Key(0, 0, 0)).prompt
    end = processor.word_id("</s>")
    assert (whole.ids == end).sum() - (cut.ids == end).sum() == 1
    assert torch.equal(whole.ids[: len(cut.ids)], cut.ids)
    assert len(cut.ground_boxes) == (cut.ids == processor.word_id("<ground_box>")).sum()
    with pytest.raises(ValueError, match=r"3 unusable|1 unusable"):
        Examples(mixture, processor, max_length=20)[Key(0, 0, 0)]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_counted(boxes: Detection, images: Path, processor: GromaProcessor, workers: int) -> None:
    (images / "b.png").write_bytes(b"<html>")
    mixture = Mixture([Source("boxes", boxes)], batch_size=3)
    examples = Examples(mixture, processor, max_skipped=0.5)
    loader = DataLoader(examples, batch_sampler=mixture, collate_fn=collate, num_workers=workers)
    for _ in range(2):
        (batch,) = loader
        assert sorted(batch.records) == ["d.json#0", "d.json#2"]
    (line,) = examples.skipped
    assert line.startswith(f"d.json#1: {images / 'b.png'}: got an HTML")

    strict = Examples(mixture, processor, max_skipped=0.3)
    with pytest.raises(ValueError, match=r"1 unusable records of 3, more than 30.0%; last in boxes: d.json#1"):
        list(DataLoader(strict, batch_sampler=mixture, collate_fn=collate, num_workers=workers))


def test_collate_refuses(rec: Referring, boxes: Detection, processor: GromaProcessor) -> None:
    mixture = Mixture([Source("rec", rec), Source("boxes", boxes)], batch_size=3)
    examples = Examples(mixture, processor)
    with pytest.raises(ValueError, match="all 2 records"):
        collate([None, None])
    with pytest.raises(ValueError, match="mixes"):
        collate([examples[Key(0, 0, 0)], examples[Key(1, 0, 0)]])


def test_crop_boxes() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.4, 0.3, 0.6, 0.6], [0.9, 0.9, 1.0, 1.0]])
    cut, kept = crop_boxes(boxes, torch.tensor([0.25, 0.0, 0.75, 0.5]))
    assert kept.tolist() == [True, True, False]  # exactly half stays, so do two thirds
    assert cut[0].tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0])
    assert cut[1].tolist() == pytest.approx([0.3, 0.6, 0.7, 1.0])


def test_augmentation_keeps_boxes_on_their_objects() -> None:
    image = Image.new("RGB", (200, 100))
    image.paste((255, 0, 0), (20, 10, 60, 50))
    target = torch.tensor([[0.1, 0.1, 0.3, 0.5]])
    flipped = 0
    for seed in range(40):
        out, boxes, phrases = augment_detection(image, target, ("red thing on the left",), random.Random(seed))
        assert len(boxes) == len(phrases) == 1
        seen = out.getchannel("R").point(lambda v: 255 if v > 128 else 0).getbbox()
        assert seen is not None
        size = (out.width, out.height, out.width, out.height)
        # Window edges are rounded to pixels: at most one off.
        assert all(abs(b * s - e) <= 1.01 for b, s, e in zip(boxes[0].tolist(), size, seen, strict=True))
        assert min(out.width / 200, out.height / 100) > 0.69
        flipped += phrases[0].endswith("right")
    assert 10 < flipped < 30


def test_words() -> None:
    assert mirror_words("left of the Leftmost cup") == "right of the rightmost cup"
    assert word_ids("The red, RED cup", {"cup": 0, "red": 1}) == (1, 0)
    assert word_ids("nothing known", {"cup": 0}) == ()
