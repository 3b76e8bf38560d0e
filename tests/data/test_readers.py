"""The readers: hand-computed boxes and turns, draws by epoch, and one clear line for a bad file."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groma import markup
from groma.data.detection import Detection
from groma.data.formats import READERS, open_records, options_of, reader_of
from groma.data.grounding import DetectionByWords, GroundedCaptions, Referring, RegionCaptions, ground
from groma.data.records import AnnotationError, Records
from groma.settings import FORMATS

Write = Callable[[str, Any], Path]
Coco = Callable[..., dict[str, Any]]
DERIVED = Path(__file__).parents[2].parent / "shared/data/groma_style_derived"


def test_detection(write: Write, coco: Coco) -> None:
    annotations = [
        {"image_id": 0, "bbox": [10, 5, 20, 10], "area": 200},
        {"image_id": 0, "bbox": [-10, 40, 30, 20]},  # cut to the image: 0, 40, 20, 50
        {"image_id": 0, "bbox": [0, 0, 10, 10], "iscrowd": 1},
        {"image_id": 0, "bbox": [0, 0, 10, 10], "area": 0},
        {"image_id": 0, "bbox": [0, 0, 0.5, 10]},
        {"image_id": 0, "bbox": [99.5, 0, 10, 10]},  # half a pixel inside
        {"image_id": 0, "bbox": [10, 5, 20, 10]},  # the first once more
    ]
    data = Detection(
        write("d.json", coco([{"file_name": "a.png"}, {"file_name": "b.png"}], annotations)), "/im", "sa1b"
    )
    assert len(data) == 2
    sample = data[0]
    assert sample.boxes.tolist() == torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.0, 0.8, 0.2, 1.0]]).tolist()
    assert (sample.image, sample.record, sample.source, sample.phrases) == ("/im/a.png", "d.json#0", "sa1b", ())
    assert data[1].boxes.shape == (0, 4)


def test_detection_with_captions(write: Write, coco: Coco) -> None:
    annotations = [
        {"image_id": 0, "bbox": [10, 5, 20, 10], "caption": "red cup"},
        {"image_id": 0, "bbox": [10, 5, 20, 10], "caption": "cup"},
        {"image_id": 0, "bbox": [0, 0, 20, 10], "caption": "bowl"},
    ]
    data = Detection(write("d.json", coco([{"file_name": "a.png"}], annotations)), "/im")
    drawn = set()
    for epoch in range(20):
        data.set_epoch(epoch)
        assert data[0].phrases[1] == "bowl"
        drawn.add(data[0].phrases[0])
    assert drawn == {"red cup", "cup"}


def test_referring(write: Write, coco: Coco) -> None:
    images = [
        {"file_name": "a.png", "caption": "red <r3> cup"},
        {"file_name": "b.png", "caption": "the bowls"},
        {"file_name": "a.png", "caption": "vase"},
    ]
    annotations = [
        {"image_id": 0, "bbox": [10, 5, 20, 10]},
        {"image_id": 1, "bbox": [50, 0, 10, 10]},
        {"image_id": 1, "bbox": [0, 0, 10, 10]},
    ]
    data = Referring(write("rec.json", coco(images, annotations)), "/im", turns=8)
    assert len(data) == 2
    answers = {u.text: a for u, a in zip(data[0].turns[::2], data[0].turns[1::2], strict=True)}
    assert len(answers) == 2
    cup = next(q for q in answers if "cup" in q)
    assert [p for p, special in markup.split(cup) if special] == ["<p>", "</p>"]
    assert markup.unescape(cup).count("<p>red <r3> cup</p>") == 1
    assert answers[cup].boxes.tolist() == torch.tensor([[0.1, 0.1, 0.3, 0.3]]).tolist()
    vase = next(a for q, a in answers.items() if "vase" in q)
    assert (vase.text, len(vase.boxes)) == ("<roi></roi>Nothing matches.", 0)
    bowls = data[1].turns[1]
    assert bowls.text == "<roi><ground_box><ground_box></roi>"
    assert bowls.boxes[0, 0] == 0  # left to right


def test_referring_draws(write: Write, coco: Coco) -> None:
    images = [{"file_name": "a.png", "caption": f"thing {i}"} for i in range(20)]
    path = write("rec.json", coco(images, []))
    data, again = Referring(path, "/im", turns=4), Referring(path, "/im", turns=4)
    seen = set()
    for epoch in range(5):
        data.set_epoch(epoch)
        again.set_epoch(epoch)
        texts = [t.text for t in data[0].turns]
        assert len(texts) == 8
        assert texts == [t.text for t in again[0].turns] == [t.text for t in data[0].turns]
        seen.add(data[0].record)
    assert len(seen) == 5
    assert [t.text for t in Referring(path, "/im", turns=4, seed=1)[0].turns] != [
        t.text for t in Referring(path, "/im", turns=4)[0].turns
    ]


def test_an_expression_whose_boxes_are_all_unusable_is_not_absent(write: Write, coco: Coco) -> None:
    images = [{"file_name": "a.png", "caption": "cup"}, {"file_name": "b.png", "caption": "bowl"}]
    annotations = [{"image_id": 0, "bbox": [10, 5, 0, 0]}, {"image_id": 1, "bbox": [10, 5, 10, 10]}]
    assert len(Referring(write("rec.json", coco(images, annotations)), "/im")) == 1


def test_grounded_captions(write: Write, coco: Coco) -> None:
    caption = "A red cup and [two] bowls."
    annotations = [
        {"image_id": 0, "bbox": [50, 0, 10, 10], "tokens_positive": [[14, 25]]},
        {"image_id": 0, "bbox": [10, 5, 20, 10], "tokens_positive": [[0, 9]]},
        {"image_id": 0, "bbox": [0, 0, 10, 10], "tokens_positive": [[14, 25]]},
    ]
    data = GroundedCaptions(write("g.json", coco([{"file_name": "a.png", "caption": caption}], annotations)), "/im")
    question, answer = data[0].turns
    assert question.text.startswith("[grounding] ")
    assert markup.unescape(answer.text) == (
        "<p>A red cup</p><roi><ground_box></roi> and <p>[two] bowls</p><roi><ground_box><ground_box></roi>."
    )
    assert answer.boxes[:, 0].tolist() == pytest.approx([0.1, 0.0, 0.5])


def test_ground_leaves_overlapping_phrases_plain() -> None:
    box = (0.0, 0.0, 1.0, 1.0)
    text, boxes = ground("the red cup", {(4, 11): [box], (0, 11): [box], (8, 11): [box]})
    assert text == "<p>the red cup</p><roi><ground_box></roi>"
    assert len(boxes) == 1


def test_region_captions(write: Write, coco: Coco) -> None:
    annotations = [
        {"image_id": 0, "bbox": [10, 5, 20, 10], "caption": "red cup"},
        {"image_id": 0, "bbox": [10, 5, 20, 11], "caption": "a cup </s>"},  # the same place
        {"image_id": 0, "bbox": [60, 5, 20, 10], "caption": "bowl"},
    ]
    images = [{"file_name": "a.png"}, {"file_name": "b.png"}]
    data = RegionCaptions(write("r.json", coco(images, annotations)), "/im")
    assert len(data) == 1
    for epoch in range(10):
        data.set_epoch(epoch)
        turns = data[0].turns
        assert len(turns) == 4
        assert {turn.text for turn in turns[1::2]} in ({"Red cup", "Bowl"}, {markup.escape("A cup </s>"), "Bowl"})
        assert all("<roi><refer_box></roi><refer_feat>" in t.text and len(t.boxes) == 1 for t in turns[::2])


def test_detection_by_words(write: Write, coco: Coco) -> None:
    annotations = [{"image_id": 0, "bbox": [10 * i, 5, 8, 8], "category_id": i % 4} for i in range(8)]
    categories = [{"id": i, "name": f"kind {i}"} for i in range(4)]
    data = DetectionByWords(write("d.json", coco([{"file_name": "a.png"}], annotations, categories)), "/im")
    turns = data[0].turns
    assert len(turns) == 6
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        kind = next(i for i in range(4) if f"<p>kind {i}</p>" in question.text)
        assert answer.boxes[:, 0].tolist() == pytest.approx([0.1 * kind, 0.1 * (kind + 4)])


BOX = {"image_id": 0, "bbox": [1, 1, 5, 5]}


@pytest.mark.parametrize(
    "reader, content, says",
    [
        (Detection, "{", "not JSON"),
        (Detection, [], "expected an object"),
        (Detection, {"images": []}, "no list 'annotations'"),
        (Detection, {"images": [{"id": 1, "file_name": "a"}] * 2, "annotations": []}, "two images with id 1"),
        (Detection, {"images": [{"id": 1}], "annotations": []}, "record 1: no 'file_name'"),
        (Detection, ([{"file_name": "a"}], [{**BOX, "image_id": 9}]), "of image 9"),
        (Detection, ([{"file_name": "a"}], [{**BOX, "bbox": [1, 2, 3]}]), "expected four numbers"),
        (Detection, ([{"file_name": "a"}], [{**BOX, "bbox": [1, 2, 3, float("nan")]}]), "expected four numbers"),
        (Detection, ([{"file_name": "a", "width": 0}], [BOX]), "size 0 x 50"),
        (Detection, ([{"file_name": "a", "width": None}], [BOX]), "width = None"),
        (Referring, ([{"file_name": "a"}], []), "no 'caption'"),
        (GroundedCaptions, ([{"file_name": "a", "caption": "cup"}], [BOX]), "no 'tokens_positive'"),
        (
            GroundedCaptions,
            ([{"file_name": "a", "caption": "cup"}], [{**BOX, "tokens_positive": [[0, 9]]}]),
            "caption of 3",
        ),
        (RegionCaptions, ([{"file_name": "a"}], [BOX]), "no 'caption'"),
        (DetectionByWords, ([{"file_name": "a"}], [BOX]), "no category 1"),
    ],
)
def test_bad_files(write: Write, coco: Coco, reader: Any, content: Any, says: str) -> None:
    path = write("bad.json", coco(*content) if isinstance(content, tuple) else content)
    with pytest.raises(AnnotationError) as error:
        reader(path, "/im")
    assert str(error.value).startswith(str(path))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_every_format_has_a_reader() -> None:
    assert tuple(READERS) == FORMATS
    for form in FORMATS:
        assert issubclass(reader_of(form), Records)
        assert {"seed", "max_problems"} <= set(options_of(form))
    with pytest.raises(AnnotationError, match="no format 'voc'; there are detection, "):
        reader_of("voc")


def test_open_records(write: Write, coco: Coco, images: Path) -> None:
    path = write("d.json", coco([{"file_name": "a.png"}], []))
    data = open_records("detection", path, images, turns=0, source="sa1b", split="", seed=3)
    assert isinstance(data, Detection) and (data.source, data.seed) == ("sa1b", 3)
    with tarfile.open(path.parent / "all.tar", "w") as tar:
        tar.add(images, "train")
    assert len(open_records("detection", path, path.parent / "all.tar/train")) == 1
    with pytest.raises(AnnotationError, match="format 'detection' has no option 'turns'; it has source, "):
        open_records("detection", path, images, turns=3)
    with pytest.raises(
        AnnotationError, match=r"none.json: no such .* of annotations; datasets/README.md, section 'COCO', tells how"
    ):
        open_records("detection", path.parent / "none.json", images, section="COCO")
    with pytest.raises(AnnotationError, match=r"nowhere: no such file or folder of images$"):
        open_records("detection", path, path.parent / "nowhere")


def test_no_file() -> None:
    with pytest.raises(AnnotationError, match="no such annotation file"):
        Detection("/nowhere.json", "/im")


def test_many_expressions_of_a_picture(write: Write, coco: Coco) -> None:
    images = [{"file_name": f"{i // 8}.jpg", "caption": f"the red cup {i}"} for i in range(16_000)]
    path = write("rec.json", coco(images, [{"image_id": i, "bbox": [i % 50, 5, 20, 10]} for i in range(16_000)]))
    data = Referring(path, "/im")
    assert len(data) == 2000
    assert len(data[1999].turns) == 16


def test_the_derived_files() -> None:
    if not DERIVED.is_dir():
        pytest.skip(f"no derived files at {DERIVED}")
    regions = RegionCaptions(DERIVED / "vg_region_cap.json", "/im")
    assert len(regions) == 5
    assert all(0 < len(regions[i].turns) <= 20 for i in range(5))
    detection = Detection(DERIVED / "vg_region_cap.json", "/im")
    assert len(detection[0].phrases) == len(detection[0].boxes) > 100


def test_lvis_names_its_images_by_their_address(write: Write, coco: Coco) -> None:
    image = {"coco_url": "http://images.cocodataset.org/val2017/000000397133.jpg"}
    content = coco([image], [{"image_id": 0, "bbox": [10, 5, 20, 10]}], [{"id": 1, "name": "cup"}])
    for reader in (Detection, DetectionByWords):
        data = reader(write("lvis.json", content), "/coco")
        assert data[0].image == "/coco/val2017/000000397133.jpg"
        with pytest.raises(AnnotationError, match="no 'file_name'"):
            reader(write("none.json", coco([{}], content["annotations"], content["categories"])), "/coco")


def test_a_bad_annotation_counts_among_annotations(write: Write, coco: Coco) -> None:
    marks = [{"image_id": i % 10, "bbox": [10, 5, 20, 10]} for i in range(200)]
    marks[7]["bbox"] = [10, 5, -20, 10]
    data = Detection(write("d.json", coco([{"file_name": f"{i}.png"} for i in range(10)], marks)), "/im")
    assert (len(data), len(data.problems), data.problems.parts, data.problems.parts_seen) == (10, 1, 1, 200)
    marks[8]["bbox"] = marks[9]["bbox"] = marks[10]["bbox"] = marks[11]["bbox"] = [0]
    with pytest.raises(AnnotationError, match="5 of 200 parts of records unusable, more than 1.0%"):
        Detection(write("d.json", coco([{"file_name": f"{i}.png"} for i in range(10)], marks)), "/im")
    with pytest.raises(AnnotationError, match="1 of 10 records unusable"):  # of images, one is too many
        Detection(write("d.json", coco([{"file_name": f"{i}.png"} for i in range(9)] + [{}], marks[:7])), "/im")
