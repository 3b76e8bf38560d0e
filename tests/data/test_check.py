"""The data check: every kind of finding on files made for it, each with its record, and nothing on whole ones."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from groma.data.check import check
from groma.data.check_images import header_size, look_at
from groma.data.check_notes import KINDS, Notes
from groma.data.images import ImageError
from groma.data.records import AnnotationError
from groma.data.store import PROBLEMS_KEPT

Write = Callable[[str, Any], Path]
Coco = Callable[..., dict[str, Any]]
GOOD = [{"file_name": name, "caption": f"the {name[0]} cup"} for name in ("a.png", "b.png", "c.png")]
BOXES = [{"image_id": i, "bbox": [10, 5, 20, 10]} for i in range(3)]


def found(report: Any) -> list[tuple[str, str]]:
    return [(finding.kind, finding.record) for finding in report.findings]


@pytest.mark.parametrize(
    "form, guessed", [("auto", "rec"), ("rec", "rec"), ("detection", "detection"), ("detection_words", None)]
)
def test_nothing_wrong(write: Write, coco: Coco, images: Path, form: str, guessed: str | None) -> None:
    file = write("d.json", coco(GOOD, BOXES, [{"id": 1, "name": "cup"}]))
    report = check(file, images, form, jobs=2)
    assert (report.findings, report.counts, report.records, report.images, report.found) == ((), {}, 3, 3, 3)
    assert report.format == (guessed or form)
    assert report.lines() == [f"{file} ({report.format}): 3 records, 3 of 3 images readable, nothing wrong"]


def test_images(write: Write, coco: Coco, images: Path, tmp_path: Path) -> None:
    Image.effect_noise((100, 50), 60).convert("RGB").save(images / "whole.jpg", quality=95)
    whole = (images / "whole.jpg").read_bytes()
    Image.new("RGB", (100, 50)).save(images / "png_inside.jpg", "PNG")  # its content decides, not its name
    for name, data in (
        ("cut.jpg", whole[: len(whole) // 2]),
        ("page.jpg", b"<!DOCTYPE html><title>404</title>"),
        ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("empty.jpg", b""),
    ):
        (images / name).write_bytes(data)
    outside = tmp_path / "outside.png"
    Image.new("RGB", (100, 50)).save(outside)
    (images / "link.png").symlink_to(outside)
    names = ["whole.jpg", "png_inside.jpg", "cut.jpg", "page.jpg", "pointer.jpg", "empty.jpg", "gone.jpg",
             "link.png", "../outside.png", str(outside), "..\\outside.png", "a.png/b.png", "x\0y.png"]  # fmt: skip
    file = write("d.json", coco([{"file_name": name} for name in names], []))
    report = check(file, images)
    assert found(report) == [
        ("image-corrupt", "d.json#2"), ("image-corrupt", "d.json#3"), ("image-corrupt", "d.json#4"),
        ("image-empty", "d.json#5"), ("image-missing", "d.json#6"),
        ("path-outside", "d.json#7"), ("path-outside", "d.json#8"), ("path-outside", "d.json#9"),
        ("path-outside", "d.json#10"), ("image-missing", "d.json#11"), ("image-corrupt", "d.json#12"),
    ]  # fmt: skip
    assert (report.images, report.found) == (13, 2)
    told = {finding.record: finding.told for finding in report.findings}
    assert "git lfs pull" in told["d.json#4"] and "HTML" in told["d.json#3"]
    assert f"a link to {outside}" in told["d.json#7"]
    # Headers alone do not tell that a file is cut.
    assert "d.json#2" not in [record for _, record in found(check(file, images, fast=True))]


def test_a_link_to_the_whole_folder_is_no_way_out(write: Write, coco: Coco, images: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(images)
    assert check(write("d.json", coco(GOOD, BOXES)), tmp_path / "linked").findings == ()


def test_images_in_a_tar(write: Write, coco: Coco, images: Path) -> None:
    with tarfile.open(images / "some.tar", "w") as tar:
        for name in ("a.png", "b.png"):
            tar.add(images / name, f"in/{name}")
        tar.addfile(tarfile.TarInfo("in/empty.png"))
    names = ["some.tar/in/a.png", "some.tar/in/b.png", "some.tar/in/gone.png", "some.tar/in/empty.png"]
    file = write("d.json", coco([{"file_name": name} for name in names], []))
    for fast in (False, True):
        report = check(file, images, fast=fast)
        assert found(report) == [("image-missing", "d.json#2"), ("image-corrupt", "d.json#3")]
        assert report.found == 2


def test_sizes(write: Write, coco: Coco, images: Path) -> None:
    turned = Image.new("RGB", (50, 100))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(images / "turned.jpg", exif=exif)
    assert header_size(images / "turned.jpg") == (100, 50)
    content = coco([{"file_name": "a.png", "width": 99}, {"file_name": "a.png"}, {"file_name": "turned.jpg"},
                    {"file_name": "turned.jpg", "width": 50, "height": 100}], [])  # fmt: skip
    for fast in (False, True):
        report = check(write("d.json", content), images, fast=fast)
        assert found(report) == [("image-size", "d.json#0"), ("image-size", "d.json#3")]
        assert report.findings[0].told == "a.png: the record says 99 x 50, the file has 100 x 50"
        assert "EXIF" in report.findings[1].told


def test_ids_boxes_and_captions(write: Write, coco: Coco, images: Path) -> None:
    pictures = [*GOOD, {"file_name": "a.png", "caption": " "}, {"file_name": "a.png", "caption": "a <r5> [grounding]"},
                {"file_name": "b.png", "id": 0, "caption": "again"}]  # fmt: skip
    boxes = [
        {"bbox": [10, 5, -20, 10]}, {"bbox": [10, 5, 0, 10]}, {"bbox": [90, 5, 20, 10]}, {"bbox": [-2, 5, 20, 10]},
        {"bbox": [1, 2, 3]}, {"bbox": [1, 2, float("nan"), 4]}, {"bbox": [81, 5, 20, 10]},  # within a pixel: as is
        {"bbox": [1, 1, 5, 5], "id": 0}, {"bbox": "1 2 3 4"}, {"bbox": [1, True, 3, 4]},
    ]  # fmt: skip
    file = write("d.json", coco(pictures, [{"image_id": 0, **box} for box in boxes]))
    report = check(file, images, "rec")
    assert [pair for pair in found(report) if pair[0] != "record-unusable"] == [
        ("caption-empty", "d.json#3"), ("caption-special-words", "d.json#4"), ("id-duplicate", "d.json#0"),
        ("box-reversed", "d.json#annotation 0"), ("box-empty", "d.json#annotation 1"),
        ("box-outside", "d.json#annotation 2"), ("box-outside", "d.json#annotation 3"),
        ("box-malformed", "d.json#annotation 4"), ("box-malformed", "d.json#annotation 5"),
        ("id-duplicate", "d.json#annotation 0"),
        ("box-malformed", "d.json#annotation 8"), ("box-malformed", "d.json#annotation 9"),
    ]  # fmt: skip
    assert "holds <r5>, [grounding]" in next(f.told for f in report.findings if f.kind == "caption-special-words")
    assert report.counts["record-unusable"] == 5  # what the reader leaves out: four boxes and an image
    assert list(report.counts) == [kind for kind in KINDS if kind in report.counts]
    lines = report.lines(most=1)
    assert "box-malformed: 4 (not four finite numbers)" in lines and "  … and 3 more" in lines
    assert json.loads(json.dumps(report.to_dict()))["counts"] == report.counts


XYXY = [[60, 30, 90, 45], [50, 10, 80, 20], [5, 5, 10, 10], [70, 20, 99, 49], [0, 0, 30, 20], [40, 30, 60, 40]]
XYWH = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in XYXY]


@pytest.mark.parametrize("layout, boxes, suspected", [
    ("xywh", XYXY, "read as xyxy, 6 fit"), ("xyxy", XYWH, "read as xywh, 6 fit"), ("xywh", XYWH, ""),
    ("xyxy", XYXY, ""),
    ("xywh", XYXY[:4], ""),  # too few to tell
    ("xywh", [*XYWH, [90, 5, 20, 10]], ""),  # one that leaves the image is no mix-up
    ("xywh", [[x / 100 for x in box] for box in XYXY], "fractions"),
])  # fmt: skip
def test_mix_ups(layout: Any, boxes: list[list[float]], suspected: str, tmp_path: Path) -> None:
    notes = Notes(tmp_path / "d.json", tmp_path, layout)
    for number, box in enumerate(boxes):
        notes.box(box, f"d.json#annotation {number}", (100, 50))
    notes.judge_boxes()
    told = [finding for finding in notes.findings if finding.kind == "boxes-mixed-up"]
    assert len(told) == bool(suspected)
    assert not told or (suspected in told[0].told and told[0].record == "d.json")


@pytest.mark.parametrize("box", [[10**400, 1, 2, 3], [1, 2, 3, -(10**30)], [float("inf"), 1, 2, 3], {}, None, [[]] * 4])
def test_what_is_no_box(box: Any, tmp_path: Path) -> None:
    notes = Notes(tmp_path / "d.json", tmp_path)
    notes.box(box, "d.json#1", (100, 50))
    assert [finding.kind for finding in notes.findings] == ["box-malformed"]


def test_conversations(write: Write, images: Path) -> None:
    def talk(*values: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]

    file = write("l.json", [
        {"id": "x", "image": "a.png", "conversations": talk("<image>\nWhat is it?", "A cup.")},
        {"id": "x", "image": "b.png", "conversations": talk("What is it?", "A cup </s> <r1>")},
        {"id": "y", "image": "gone.png", "conversations": talk("Hm?", "")},
        {"id": "z", "image": 3, "conversations": "none"}, 7,
    ])  # fmt: skip
    report = check(file, images)
    assert report.format == "llava"
    assert [pair for pair in found(report) if pair[0] != "record-unusable"] == [
        ("id-duplicate", "l.json#x"), ("caption-special-words", "l.json#x"), ("caption-empty", "l.json#y"),
        ("image-missing", "l.json#y"),
    ]  # fmt: skip


def test_json_lines(write: Write, images: Path) -> None:
    file = write("own.jsonl", "\n".join([
        '{"image": "a.png", "expressions": [{"text": "the cup", "boxes": [[10, 5, 30, 15]]}]}',
        '{"image": "a.png", "expressions": [{"text": "<r5>", "boxes": [[30, 5, 10, 15]]}]}',
        '{"image": "b.png", "regions": [{"box": [90, 5, 120, 15], "caption": ""}]}',
        '{"image": "gone.png", "width": 100, "height": 50, "boxes": {"cup": [1, 1, 1, 5]}, "conversation": '
        '[{"user": "What is {cup}?"}, {"assistant": "<roi>"}]}',
        "not json", "",
    ]))  # fmt: skip
    report = check(file, images)
    assert report.format == "jsonl" and report.records == 5
    assert [pair for pair in found(report) if pair[0] != "record-unusable"] == [
        ("caption-special-words", "own.jsonl#2"), ("box-reversed", "own.jsonl#2"),
        ("caption-empty", "own.jsonl#3"), ("box-outside", "own.jsonl#3"),
        ("caption-special-words", "own.jsonl#4"), ("box-empty", "own.jsonl#4"),
        ("image-missing", "own.jsonl#4"),
    ]  # fmt: skip
    assert report.counts["record-unusable"] == 4


def test_more_problems_than_are_told(write: Write, images: Path) -> None:
    report = check(write("own.jsonl", "bad\n" * (PROBLEMS_KEPT + 2)), images)
    assert report.records == PROBLEMS_KEPT + 2
    assert report.findings[-1].told == "2 more, which are counted but not told"


def test_what_a_reader_alone_knows(write: Write, images: Path) -> None:
    """GRIT is looked at through its reader; special words of its captions are seen all the same."""
    record = {"file": "a.png", "caption": "a <r5> cup", "ref_exps": [[0, 10, 0.1, 0.1, 0.5, 0.5, 0.9]]}
    file = write("grit.json", [record, {**record, "file": "gone.png", "caption": "a red cup."}])
    report = check(file, images)
    assert report.format == "grit"
    assert [kind for kind, _ in found(report)] == ["caption-special-words", "image-missing"]


@pytest.mark.parametrize("name, content, line", [
    ("d.json", "[]", "its format is not clear"), ("d.json", "{", "not JSON"), ("d.csv", "", "say --format"),
    ("d.json", '{"images": []}', "no list 'annotations'"),
])  # fmt: skip
def test_what_cannot_be_checked(write: Write, images: Path, name: str, content: str, line: str) -> None:
    with pytest.raises(AnnotationError, match=line):
        check(write(name, content), images)


def test_no_folder(write: Write, coco: Coco, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="no such folder of images"):
        check(write("d.json", coco(GOOD, BOXES)), tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow, about odd EXIF
def test_broken_files_that_exist(shared_data: Path) -> None:
    """Exactly the files that do not decode are corrupt; header_size raises nothing but ImageError on any."""
    folder = shared_data / "broken_images"
    kinds = {path.name: look_at(path.name, folder, os.path.realpath(folder), fast=False)[0]
             for path in folder.iterdir() if path.suffix not in (".md", ".json")}  # fmt: skip
    assert {name for name, kind in kinds.items() if kind == "image-empty"} == {"made_empty.jpg"}
    assert {name for name, kind in kinds.items() if kind == "image-corrupt"} == {
        "bmp_b_reallybig.bmp", "broken.png", "broken_data_stream.png", "made_bomb_20000x20000_1bit.png",
        "made_coco_cut_half.jpg", "made_header_only_65000x65000.png", "made_html.jpg", "made_lfs_pointer.jpg",
        "ultrahdr.jpg", "unknown_compression_method.png", "zero_width.gif",
    }  # fmt: skip
    for name in kinds:
        try:
            assert min(header_size(folder / name)) > 0
        except ImageError:
            assert kinds[name]


def test_real_photographs_are_whole(shared_data: Path) -> None:
    folder = shared_data / "coco_photos"
    report = check(folder / "instances.json", folder / "images", jobs=2)
    assert (report.format, report.images, report.found, report.findings) == ("detection", 33, 33, ())
