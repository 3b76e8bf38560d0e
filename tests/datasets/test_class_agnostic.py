"""prepare_class_agnostic.py: COCO, OpenImages and SA-1B to one file that reads back the same."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from groma.data.coco_writer import CocoWriter
from groma.data.detection import Detection
from groma.data.images import ImageError, read_image
from groma.data.openimages import OpenImages, picture_size
from groma.data.records import Records
from groma.data.sa1b import Sa1b

SCRIPT = "prepare_class_agnostic"
Run = Callable[..., Any]


def same(made: Records, source: Records) -> None:
    assert len(made) == len(source)
    for i in range(len(made)):
        assert made[i].image == source[i].image
        assert torch.allclose(made[i].boxes, source[i].boxes, atol=1e-5)


def test_help(run: Run) -> None:
    shown = run(SCRIPT, "--help")
    assert (shown.code, "examples:" in shown.out) == (0, True)


def test_coco_photographs(run: Run, shared_data: Path, tmp_path: Path) -> None:
    source, images = shared_data / "coco_photos/instances.json", shared_data / "coco_photos/images"
    done = run(SCRIPT, source, tmp_path / "o.json", "--quiet")
    content = json.loads((tmp_path / "o.json").read_text())
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{tmp_path}/o.json: 33 pictures, {len(content['annotations'])} boxes\n"
    assert content["categories"] == [{"id": 1, "name": "object"}]
    assert [mark["id"] for mark in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    assert {mark["category_id"] for mark in content["annotations"]} == {1}
    same(Detection(tmp_path / "o.json", images), Detection(source, images))
    genuine = [mark["area"] for mark in json.loads(source.read_text())["annotations"] if not mark["iscrowd"]]
    assert sorted(mark["area"] for mark in content["annotations"]) == sorted(genuine)
    assert [p.name for p in tmp_path.iterdir()] == ["o.json"]


def test_lvis_with_and_without_file_names(run: Run, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "lvis_val100/lvis_val_100.json"
    assert run(SCRIPT, source, tmp_path / "o.json", "--quiet").code == 0
    same(Detection(tmp_path / "o.json", "/im"), Detection(source, "/im"))
    content = json.loads(source.read_text())
    for image in content["images"]:  # as version 1 has them
        del image["file_name"]
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image['id']:012}.jpg"
    (tmp_path / "v1.json").write_text(json.dumps(content))
    assert run(SCRIPT, tmp_path / "v1.json", tmp_path / "o.json", "--quiet").code == 0
    assert Detection(tmp_path / "o.json", "/im")[0].image == f"/im/val2017/{content['images'][0]['id']:012}.jpg"


@pytest.fixture
def openimages(tmp_path: Path) -> Path:
    (tmp_path / "train").mkdir()
    for name, size in (("a", (200, 100)), ("b", (100, 200))):
        Image.new("RGB", size).save(tmp_path / "train" / f"{name}.jpg")
    rows = ["ImageID,XMin,XMax,YMin,YMax,IsGroupOf", "a,0.1,0.3,0.2,0.4,0", "a,0,1,0,1,1", "b,0.5,1,0.25,0.75,0"]
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    return tmp_path


def test_openimages(run: Run, openimages: Path) -> None:
    done = run(SCRIPT, openimages / "boxes.csv", openimages / "o.json", "--images", openimages / "train", "--quiet")
    assert (done.code, done.err) == (0, "")
    content = json.loads((openimages / "o.json").read_text())
    assert [mark["bbox"] for mark in content["annotations"]] == [[20, 20, 40, 20], [50, 50, 50, 100]]
    assert [mark["area"] for mark in content["annotations"]] == [800, 5000]
    assert [(i["width"], i["height"]) for i in content["images"]] == [(200, 100), (100, 200)]
    same(
        Detection(openimages / "o.json", openimages / "train"),
        OpenImages(openimages / "boxes.csv", openimages / "train"),
    )


def test_openimages_without_its_pictures(run: Run, openimages: Path) -> None:
    done = run(SCRIPT, openimages / "boxes.csv", openimages / "o.json")
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert "--images is missing: expected the folder" in done.err
    (openimages / "train/a.jpg").unlink()
    call = (SCRIPT, openimages / "boxes.csv", openimages / "o.json", "--images", openimages / "train", "--quiet")
    done = run(*call)
    assert (done.code, "1 of 3 records unusable" in done.err, "a.jpg: got no such file" in done.err) == (2, True, True)
    assert not (openimages / "o.json").exists()
    done = run(*call, "--max-problems", 0.5)
    assert (done.code, "left out 1 unusable records" in done.out) == (0, True)


def masks(number: int, *boxes: list[float]) -> str:
    image = {"image_id": number, "width": 100, "height": 50, "file_name": f"sa_{number}.jpg"}
    return json.dumps({"image": image, "annotations": [{"bbox": box, "area": 1} for box in boxes]})


def test_sa1b(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sa1b").mkdir()
    for number in range(200):
        (tmp_path / f"sa1b/sa_{number}.json").write_text(masks(number, [10, 5, 20, 10], [0, 0, 5, 5]))
    out = tmp_path / "sa1b/objects.json"
    assert run(SCRIPT, tmp_path / "sa1b", out, "--quiet").code == 0
    same(Detection(out, tmp_path / "sa1b"), Sa1b(tmp_path / "sa1b", tmp_path / "sa1b"))
    assert json.loads(out.read_text())["annotations"][0]["area"] == 200  # of the box, as it was chosen by it

    def ids(*options: object) -> list[int]:
        assert run(SCRIPT, tmp_path / "sa1b", out, "--quiet", *options).code == 0
        return [image["id"] for image in json.loads(out.read_text())["images"]]

    half, more = ids("--subset-fraction", 0.5), ids("--subset-fraction", 0.7)
    assert 75 < len(half) < 125
    assert set(half) < set(more)
    assert ids("--subset-fraction", 0.5) == half
    assert ids("--subset-fraction", 0.5, "--seed", 1) != half
    assert ids("--subset-fraction", 0.5, "--limit", 7) == half[:7]
    assert len(ids("--min-area", 201, "--max-area", 300)) == 200
    assert json.loads(out.read_text())["annotations"] == []


def test_coco_limit_takes_along_the_boxes_of_its_pictures(run: Run, tmp_path: Path) -> None:
    content = {
        "annotations": [{"id": i, "image_id": i % 4, "bbox": [i, i, 9, 9]} for i in range(8)],
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 50} for i in range(4)],
    }  # annotations first
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert run(SCRIPT, tmp_path / "c.json", tmp_path / "o.json", "--limit", 2, "--quiet").code == 0
    made = json.loads((tmp_path / "o.json").read_text())
    assert [image["id"] for image in made["images"]] == [0, 1]
    assert [(mark["image_id"], mark["bbox"][0]) for mark in made["annotations"]] == [(0, 0), (1, 1), (0, 4), (1, 5)]


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [], "annotations": []}', "not written, as no image is left"),
        ('{"images": [7], "annotations": []}', "1 of 1 records unusable"),
        (
            '{"images": [{"id": 1, "file_name": "a", "width": 9, "height": 9}],'
            ' "annotations": [{"image_id": 2, "bbox": [1, 2, 3, 3]}]}',
            "of image 2, which is not among the images",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a", "width": 9, "height": 9}],'
            ' "annotations": [{"image_id": 1, "bbox": [NaN, 2, 3, 3]}]}',
            "expected four numbers",
        ),
    ],
)
def test_mistakes_leave_nothing_behind(run: Run, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "c.json").write_text(content)
    (tmp_path / "o.json").write_text("what was there")
    done = run(SCRIPT, tmp_path / "c.json", tmp_path / "o.json", "--quiet")
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert says in done.err
    assert (tmp_path / "o.json").read_text() == "what was there"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "o.json"]


def test_out_must_be_another_file_in_a_folder(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "c.json"
    source.write_text('{"images": [], "annotations": []}')
    for out, says in (
        (source, "would replace the file it is made from"),
        (tmp_path, "is a folder"),
        (tmp_path / "none/o.json", "there is no folder"),
    ):
        done = run(SCRIPT, source, out)
        assert (done.code, says in done.err) == (2, True)
    assert "expected an existing folder" in run(SCRIPT, tmp_path / "none", tmp_path / "o.json").err


def test_as_a_program(process: Run, tmp_path: Path) -> None:
    done = process(SCRIPT, tmp_path / "none.json", tmp_path / "o.json")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1] == f"{SCRIPT}.py: {tmp_path}/none.json: no such annotation file"


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), CocoWriter(tmp_path / "o.json") as out:  # noqa: PT012
        out.image({"id": 1})
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("o.json", "old")]


def test_a_full_disk_is_told_in_a_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("groma.data.coco_writer.os.fsync", full)
    image = {"id": 1, "file_name": "a", "width": 9, "height": 9}
    (tmp_path / "c.json").write_text(json.dumps({"images": [image], "annotations": []}))
    done = run(SCRIPT, tmp_path / "c.json", tmp_path / "o.json", "--quiet")
    assert (done.code, done.out, done.err.count("\n"), "No space left" in done.err) == (2, "", 1, True)
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_picture_size_is_that_of_the_upright_picture(shared_data: Path, tmp_path: Path) -> None:
    for file in sorted((shared_data / "broken_images").iterdir()):
        if file.suffix in (".md", ".json"):
            continue
        try:
            size = read_image(file).size
        except ImageError:
            continue
        assert picture_size(file) == size, file.name
    for bad in ("made_empty.jpg", "made_html.jpg", "made_bomb_20000x20000_1bit.png"):
        with pytest.raises(ImageError, match=bad):
            picture_size(shared_data / "broken_images" / bad)
    with pytest.raises(ImageError, match="no such file"):
        picture_size(tmp_path / "none.jpg")
