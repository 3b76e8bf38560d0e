"""Examples in workers, augmentation, skipping and its report, and collation."""

import gc
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
from groma.data.loader import Examples, Key, Mixture, Source, batch_inputs, collate, report
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
    assert examples.skipped == [Key(0, 1, 0)]
    assert examples.reason(Key(0, 1, 0)).startswith(f"d.json#1: {images / 'b.png'}: got an HTML")

    strict = Examples(mixture, processor, max_skipped=0.3)
    with pytest.raises(ValueError, match=r"1 unusable records of 3, more than 30.0%; last in boxes: d.json#1"):
        list(DataLoader(strict, batch_sampler=mixture, collate_fn=collate, num_workers=workers))
    gc.collect()  # a torch loader ended by an error closes files late, among them those of a loader begun meanwhile


@pytest.mark.parametrize("workers", [0, 2])
def test_another_record_stands_in_for_a_batch_without_one(
    boxes: Detection, images: Path, processor: GromaProcessor, workers: int
) -> None:
    (images / "b.png").write_bytes(b"")
    mixture = Mixture([Source("boxes", boxes)], batch_size=1)
    examples = Examples(mixture, processor, max_skipped=0.5)
    loader = DataLoader(examples, batch_sampler=mixture, collate_fn=collate, num_workers=workers)
    assert sorted(r for batch in loader for r in batch.records) == ["d.json#0", "d.json#2", "d.json#2"]
    assert examples.skipped == [Key(0, 1, 0)]
    for name in "ac":
        (images / f"{name}.png").write_bytes(b"")
    hopeless = Examples(mixture, processor, max_skipped=1.0)
    assert hopeless.__getitems__([Key(0, 0, 0)]) == [None]
    assert sorted(hopeless.skipped) == [Key(0, i, 0) for i in range(3)]


def test_report(
    rec: Referring, boxes: Detection, write: Write, coco: Coco, images: Path, processor: GromaProcessor
) -> None:
    entries = [{"file_name": f"{n}.png", "caption": "cup"} for n in "abc"] + [{"file_name": "a.png"}] * 2
    short = Referring(write("short.json", coco(entries, [])), images, max_problems=0.5)
    mixture = Mixture([Source("rec", rec), Source("boxes", boxes), Source("short", short)], batch_size=3)
    examples = Examples(mixture, processor, max_skipped=0.5)
    assert report(examples)[0] == "short: left out 2 unusable annotations, and 0 of 3 records when they were due"
    (images / "b.png").write_bytes(b"<html>")
    (images / "c.png").unlink()
    for source in (1, 1, 2):
        examples.__getitems__([Key(source, i, 7) for i in range(3)])
    lines = report(examples, shown=1)
    assert lines[0] == "boxes: left out 0 unusable annotations, and 2 of 3 records when they were due"
    assert lines[1].startswith(f"  d.json#1: {images / 'b.png'}: got an HTML")
    assert lines[2] == "short: left out 2 unusable annotations, and 2 of 3 records when they were due"
    assert "short.json: record 3: no 'caption'" in lines[3]
    assert lines[4].startswith("  short.json#1: ")
    assert len(lines) == 5
    elsewhere = [*examples.skipped, Key(0, 2, 0), Key(1, 1, 0)]  # another process met one more, and one of these too
    assert report(examples, elsewhere, shown=0)[:2] == [
        "rec: left out 0 unusable annotations, and 1 of 3 records when they were due",
        "boxes: left out 0 unusable annotations, and 2 of 3 records when they were due",
    ]
    assert report(Examples(Mixture([Source("boxes", boxes)], 3), processor)) == []


def test_each_process_has_its_part_of_the_limit(
    write: Write, coco: Coco, tmp_path: Path, processor: GromaProcessor
) -> None:
    data = Detection(write("d.json", coco([{"file_name": f"{i}"} for i in range(40)], [])), tmp_path)
    mixture = Mixture([Source("d", data)], batch_size=2, drop_last=True, world=4)
    examples = Examples(mixture, processor, max_skipped=0.2)  # 8 of 40, 2 of each process
    assert [examples[Key(0, i, 0)] for i in (0, 1, 0)] == [None] * 3
    with pytest.raises(
        ValueError, match=r"^3 unusable records of 40, in one of 4 processes, more than 20.0%; last in d"
    ):
        examples[Key(0, 2, 0)]
    resumed = Examples(mixture, processor, max_skipped=0.2)
    resumed.remember(examples.skipped)
    assert resumed.skipped == examples.skipped == [Key(0, 0, 0), Key(0, 1, 0)]
    with pytest.raises(ValueError, match="^3 unusable"):
        resumed[Key(0, 2, 0)]


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
