"""Detection sets as released: COCO, Objects365, V3Det and LVIS JSON, OpenImages' CSV, SA-1B's folders and tars."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from groma.data.detection import Detection
from groma.data.openimages import OpenImages
from groma.data.records import AnnotationError, Records
from groma.data.sa1b import Sa1b

Write = Callable[[str, Any], Path]
Coco = Callable[..., dict[str, Any]]

# The first rows of the published training file.
HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
ROWS = [
    "000026e7ee790996,xclick,/m/07j7r,1,0.071875,0.1453125,0.20625,0.39166668,0,1,1,0,0",
    "000026e7ee790996,xclick,/m/07j7r,1,0.4390625,0.571875,0.26458332,0.43541667,0,1,1,0,0",
    "000062a39995e348,xclick,/m/015p6,1,0.20620842,0.849224,0.15463917,1,0,0,0,0,0",
    "000062a39995e348,xclick,/m/05s2s,1,0.13747229,0.37694013,0,0.88365245,1,1,0,0,0",
    "0000c64e1253d68f,xclick,/m/0k4j,1,0,0.5132743,0.32079646,0.6902655,0,1,0,0,0",
]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROMA_CACHE", str(tmp_path_factory.mktemp("cache")))


def boxes_of(records: Records, index: int) -> list[list[float]]:
    return [[round(v, 4) for v in box] for box in records[index].boxes.tolist()]


# -- COCO JSON


def test_coco_photographs(shared_data: Path) -> None:
    file = shared_data / "coco_photos/instances.json"
    content = json.loads(file.read_text())
    data = Detection(file, shared_data / "coco_photos/images")
    assert (len(data), data.problems) == (33, [])
    crowds = sum(a["iscrowd"] for a in content["annotations"])
    assert sum(len(data[i].boxes) for i in range(33)) == 246 - crowds
    for i, image in enumerate(content["images"]):
        sample = data[i]
        assert Path(sample.image).is_file()
        assert (sample.record, sample.source) == (f"instances.json#{image['id']}", "coco")
        width, height = Image.open(sample.image).size
        found = (sample.boxes * torch.tensor([width, height, width, height])).tolist()
        marks = [a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        for (x1, y1, x2, y2), (x, y, w, h) in zip(found, marks, strict=True):
            assert (x1, y1, x2, y2) == pytest.approx((x, y, x + w, y + h), abs=0.01)


def test_lvis_sample(shared_data: Path) -> None:
    data = Detection(shared_data / "lvis_val100/lvis_val_100.json", "/im")
    assert (len(data), data.problems) == (100, [])
    boxes = [data[i].boxes for i in range(100)]
    assert 900 < sum(map(len, boxes)) <= 977  # the same box under two names is one object; a few are under a pixel
    assert sum(len(b) == 0 for b in boxes) == 7


@pytest.mark.parametrize(
    "name, there, leading",
    [
        ("images/v1/patch8/objects365_v1_00420917.jpg", "patch8/objects365_v1_00420917.jpg", 2),
        ("images/Q100507578/28_284_50119550013.jpg", "Q100507578/28_284_50119550013.jpg", 1),
        ("images/Q100507578/28_284_50119550013.jpg", "images/Q100507578/28_284_50119550013.jpg", 0),
        ("000000000030.jpg", "elsewhere.jpg", 0),
    ],
)
def test_leading_folders(tmp_path: Path, write: Write, coco: Coco, name: str, there: str, leading: int) -> None:
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).touch()
    path = write("d.json", coco([{"file_name": "v/lost.jpg"}, {"file_name": name}], []))
    wanted = name.split("/", leading)[-1]
    assert Detection(path, tmp_path)[1].image == str(tmp_path / wanted)
    assert Detection(path, tmp_path, leading=1)[1].image == str(tmp_path / name.split("/", 1)[-1])


def test_captions_that_are_no_text_are_problems(write: Write, coco: Coco) -> None:
    marks = [{"image_id": 0, "bbox": [i, i, 9, 9], "caption": c} for i, c in enumerate(["cup", 7, None, ["a"]])]
    data = Detection(write("d.json", coco([{"file_name": "a.png"}], marks)), "/im", max_problems=1)
    assert data[0].phrases == ("cup",)
    assert [p.split(": ", 2)[2] for p in data.problems] == [
        "caption = 7, expected str", "caption = None, expected str", "caption = ['a'], expected str"
    ]  # fmt: skip


# -- OpenImages


def csv(*rows: str, header: str = HEADER) -> str:
    return "\n".join([header, *rows]) + "\n"


def test_openimages(write: Write) -> None:
    data = OpenImages(write("train.csv", csv(*ROWS)), "/im")
    assert (len(data), data.problems) == (3, [])
    assert (data[0].image, data[0].record, data[0].source) == (
        "/im/000026e7ee790996.jpg", "train.csv#000026e7ee790996", "coco"
    )  # fmt: skip
    assert boxes_of(data, 0) == []  # groups only
    assert boxes_of(data, 1) == [[0.2062, 0.1546, 0.8492, 1.0], [0.1375, 0.0, 0.3769, 0.8837]]
    assert boxes_of(data, 2) == [[0.0, 0.3208, 0.5133, 0.6903]]


def test_openimages_columns_go_by_name(write: Write) -> None:
    content = "\ufeffYMax,XMax,ImageID,YMin,XMin\n0.5,0.4,a,0.2,0.1\n"
    assert boxes_of(OpenImages(write("x.csv", content), "/im"), 0) == [[0.1, 0.2, 0.4, 0.5]]


def test_openimages_brings_scattered_rows_together(write: Write) -> None:
    again = ROWS[2].replace("0.20620842", "0.5")
    data = OpenImages(write("train.csv", csv(*ROWS, again)), "/im")
    assert [data[i].record.split("#")[1] for i in range(3)] == [
        "000026e7ee790996", "0000c64e1253d68f", "000062a39995e348"
    ]  # fmt: skip
    assert [box[0] for box in boxes_of(data, 2)] == [0.2062, 0.1375, 0.5]


def test_openimages_leaves_out_and_counts(write: Write) -> None:
    def row(*corners: object, name: str = "a", rest: str = "0,0,0,0,0") -> str:
        return ",".join([name, "xclick,/m/01", "1", *map(str, corners), rest])

    content = csv(
        row(0.1, 0.3, 0.2, 0.4),
        row(-0.004, 0.3, 0.2, 1.004),  # cut
        row(0.1, 0.1005, 0.2, 0.4),  # half a pixel of 1,024: dropped, no problem
        row("nan", 0.3, 0.2, 0.4),
        row("inf", 0.3, 0.2, 0.4),
        row("left", 0.3, 0.2, 0.4),
        row("", 0.3, 0.2, 0.4),
        row(0.3, 0.1, 0.2, 0.4),  # reversed
        row(0.1, 0.3, 0.4, 0.2),
        row(10, 30, 20, 40),  # pixels
        "a,xclick,/m/01,1,0.1,0.3",  # cut short
        row(0.1, 0.3, 0.2, 0.4, name=""),
        "",
    )
    data = OpenImages(write("x.csv", content), "/im", max_problems=1)
    assert len(data) == 1
    assert boxes_of(data, 0) == [[0.1, 0.2, 0.3, 0.4], [0.0, 0.2, 0.3, 1.0]]
    assert [int(p.split("line ")[1].split(":")[0]) for p in data.problems] == [*range(5, 14)]
    assert all(str(data.file) in p and "\n" not in p for p in data.problems)
    assert "corners (0.3, 0.2, 0.1, 0.4), expected XMin ≤ XMax" in data.problems[4]
    with pytest.raises(AnnotationError, match="9 of 11 parts of records unusable"):
        OpenImages(data.file, "/im")


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "no column ImageID, XMin, YMin, XMax, YMax"),
        ("ImageID,LabelName,XMin,XMax\n", "no column YMin, YMax"),
        (csv("a,b\0c,,,,,,,,,,,"), "unusable|cannot be read as CSV"),
        ('ImageID,XMin,YMin,XMax,YMax\n"' + "a" * 140_000, "cannot be read as CSV"),
    ],
)
def test_openimages_bad_files(write: Write, content: str, says: str) -> None:
    with pytest.raises(AnnotationError, match=says):
        OpenImages(write("x.csv", content), "/im")


def test_openimages_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(HEADER.encode() + b"\n\xff\xfe\x00")
    with pytest.raises(AnnotationError, match="cannot be read as CSV"):
        OpenImages(tmp_path / "x.csv", "/im")
    with pytest.raises(AnnotationError, match="no such annotation file"):
        OpenImages(tmp_path / "none.csv", "/im")


# -- SA-1B


def mark(*bbox: Any) -> dict[str, Any]:
    return {"bbox": list(bbox), "area": 9, "segmentation": {"size": [50, 100], "counts": "PQ"}, "predicted_iou": 0.9}


def masks(number: int, *marks: Any, **image: Any) -> dict[str, Any]:
    size = {"image_id": number, "width": 100, "height": 50, "file_name": f"sa_{number}.jpg"}
    return {"image": {**size, **image}, "annotations": list(marks)}


def fill(folder: Path, *contents: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for content in contents:
        (folder / f"sa_{content['image']['image_id']}.json").write_text(json.dumps(content))


def test_sa1b_keeps_boxes_by_their_own_area(tmp_path: Path) -> None:
    big = {"width": 2250, "height": 1500}
    fill(
        tmp_path / "sa_000000",
        masks(1, mark(10, 5, 20, 10), mark(0, 0, 14, 14), mark(1, 1, 14, 13.9), mark(90, 40, 14, 14)),
        masks(2, mark(421, 700, 14, 14), mark(10, 10, 400, 400), mark(10, 10, 401, 400), **big),
    )
    fill(tmp_path / "sa_000001", masks(3))
    (tmp_path / "objects.json").write_text('{"images": [], "annotations": []}')
    data = Sa1b(tmp_path, tmp_path, min_area=14.0**2, max_area=400.0**2)
    assert (len(data), data.problems) == (3, [])
    assert (data[0].image, data[0].source) == (f"{tmp_path}/sa_000000/sa_1.jpg", "sa1b")
    # 20 x 10 is 200 ≥ 196; 14 x 13.9 is not; the last one is cut to 10 x 10
    assert boxes_of(data, 0) == [[0.1, 0.1, 0.3, 0.3], [0.0, 0.0, 0.14, 0.28]]
    assert len(data[1].boxes) == 2
    assert data[2].boxes.shape == (0, 4)
    assert [len(Sa1b(tmp_path, tmp_path)[i].boxes) for i in range(3)] == [4, 3, 0]


def in_tar(file: Path, *contents: Any, prefix: str = "") -> None:
    with tarfile.open(file, "w") as tar:
        for content in contents:
            stem = f"{prefix}sa_{content['image']['image_id']}"
            for name, data in (
                (f"{stem}.jpg", b"no need to look at it"),
                (f"{stem}.json", json.dumps(content).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_sa1b_in_tars(tmp_path: Path) -> None:
    in_tar(tmp_path / "sa_000000.tar", *(masks(n, mark(10, 5, 20, 10 + n)) for n in range(4)), prefix="./")
    in_tar(tmp_path / "sa_000001.tar", masks(9, mark(0, 0, 50, 25)))
    data = Sa1b(tmp_path, "/im")
    places = [f"/im/sa_000000.tar/sa_{n}.jpg" for n in range(4)] + ["/im/sa_000001.tar/sa_9.jpg"]
    assert [data[i].image for i in range(5)] == places
    assert boxes_of(data, 2) == [[0.1, 0.1, 0.3, 0.34]]
    assert boxes_of(data, 4) == [[0.0, 0.0, 0.5, 0.5]]


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "not JSON"),
        ([], "expected an object with 'image'"),
        ({"image": {}, "annotations": []}, "no 'file_name'"),
        ({"image": masks(1)["image"]}, "no 'annotations'"),
        (masks(1, width="100"), "width = '100'"),
        (masks(1, mark(1, 2, 3), width=100), "expected four numbers"),
        (masks(1, mark(1, 2, float("nan"), 3)), "expected four numbers"),
        (masks(1, mark("1", 2, 3, 3)), "expected four numbers"),
        (masks(1, 7), "got 7"),
        (masks(1, mark(1, 2, 3, 3), height=0), "size 100 x 0"),
    ],
)
def test_sa1b_malformed(tmp_path: Path, content: Any, says: str) -> None:
    fill(tmp_path, masks(2, mark(10, 5, 20, 10)))
    (tmp_path / "sa_1.json").write_text(content if isinstance(content, str) else json.dumps(content))
    data = Sa1b(tmp_path, tmp_path)
    assert len(data[1].boxes) == 1
    with pytest.raises(AnnotationError) as error:
        data[0]
    assert str(error.value).startswith(f"{tmp_path}/sa_1.json: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_sa1b_without_anything_to_read(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="no such folder"):
        Sa1b(tmp_path / "none", tmp_path)
    with pytest.raises(AnnotationError, match=r"no sa_\*.json and no \*.tar"):
        Sa1b(tmp_path, tmp_path)


def test_sa1b_damaged_tars(tmp_path: Path) -> None:
    in_tar(tmp_path / "sa_0.tar", *map(masks, range(20)))
    in_tar(tmp_path / "sa_1.tar", masks(20), masks(21))
    whole = (tmp_path / "sa_1.tar").read_bytes()
    (tmp_path / "sa_1.tar").write_bytes(whole[:2200])
    (tmp_path / "sa_2.tar").write_bytes(b"<html>not found</html>" * 100)
    data = Sa1b(tmp_path, tmp_path, max_problems=0.1)
    assert len(data) == 21
    assert data[20].image.endswith("sa_1.tar/sa_20.jpg")
    assert ["sa_1.tar: damaged" in data.problems[0], "sa_2.tar: got no tar" in data.problems[1]] == [True, True]
    with pytest.raises(AnnotationError, match="2 of 23 records unusable"):
        Sa1b(tmp_path, tmp_path)
