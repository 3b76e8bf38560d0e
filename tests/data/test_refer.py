"""The references of RefCOCO: real pickles, hand-made ones of every protocol, and hostile ones."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from groma.data.grounding import RegionCaptions
from groma.data.plain_pickle import load_plain, text
from groma.data.records import AnnotationError
from groma.data.refer import Refer, ReferCaptions

REAL = "refcoco_excerpt/refer_layout"


def ref(number: int, split: str, said: list[Any], **changes: Any) -> dict[str, Any]:
    """A reference to annotation 10 * number of image 7."""
    sentences = [{"sent_id": 100 * number + i, "sent": s, "raw": s, "tokens": []} for i, s in enumerate(said)]
    return {
        "ref_id": number, "ann_id": 10 * number, "image_id": 7, "split": split, "category_id": 1,
        "file_name": "COCO_train2014_000000000007_1.jpg", "sent_ids": [], "sentences": sentences, **changes,
    }  # fmt: skip


@pytest.fixture
def refer(tmp_path: Path) -> Any:
    """refer(refs, protocol=2, **options): a Refer of these references, beside an image of 100 x 50 pixels."""
    image = {"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 100, "height": 50}
    marks = [{"id": 10 * i, "image_id": 7, "bbox": [10 * i, 5, 20, 10], "area": 200} for i in range(1, 6)]
    marks[4]["bbox"] = [0, 0, 0, 10]  # of reference 5
    (tmp_path / "instances.json").write_text(json.dumps({"images": [image], "annotations": marks}))

    def make(refs: Any, protocol: int = 2, cls: type[Refer] = Refer, **options: Any) -> Refer:
        content = refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol)
        (tmp_path / "refs(unc).p").write_bytes(content)
        return cls(tmp_path / "refs(unc).p", tmp_path / "images", **options)

    return make


# (pickle, split) → expressions of each image, in file order
REAL_PARTS = {
    ("refcoco/refs(unc).p", "train"): [5],
    ("refcoco/refs(unc).p", "testA"): [6],
    ("refcoco/refs(unc).p", "testB"): [6],
    ("refcoco/refs(unc).p", "test"): [6, 6],
    ("refcoco/refs(google).p", "train"): [6],
    ("refcoco/refs(google).p", "val"): [2, 3],
    ("refcoco/refs(google).p", "test"): [6],
    ("refcoco+/refs(unc).p", "train"): [6],
    ("refcoco+/refs(unc).p", "test"): [6, 6],
    ("refcocog/refs(google).p", "train"): [4],
    ("refcocog/refs(google).p", "val"): [2, 2],
    ("refcocog/refs(umd).p", "train"): [4],
    ("refcocog/refs(umd).p", "val"): [2],
    ("refcocog/refs(umd).p", "test"): [4],
}


@pytest.mark.parametrize(("name", "split"), REAL_PARTS)
def test_real_references(shared_data: Path, name: str, split: str) -> None:
    data = Refer(shared_data / REAL / name, "/im", split=split)
    assert [len(expressions) for _, expressions in data.entries] == REAL_PARTS[name, split]
    assert data.problems == []
    assert all(len(sample.turns) == 2 * n for sample, n in zip(data, REAL_PARTS[name, split], strict=True))


def test_a_real_reference_whole(shared_data: Path) -> None:
    """Each sentence of the excerpt's own JSON comes out, at the box of its annotation."""
    source = json.loads((shared_data / "refcoco_excerpt/refcoco_tfds_excerpt.json").read_text())["ref"]
    instances = json.loads((shared_data / REAL / "refcoco/instances.json").read_text())
    boxes = {a["id"]: a["bbox"] for a in instances["annotations"]}
    wanted = {
        sentence["sent_id"]: (sentence["sent"], boxes[ref["ann_id"]])
        for ref in source
        if (ref["dataset"], ref["dataset_partition"], ref["split"]) == ("refcoco", "unc", "testA")
        for sentence in ref["sentences"]
    }
    data = Refer(shared_data / REAL / "refcoco/refs(unc).p", "/im", split="testA")
    assert data[0].image == "/im/COCO_train2014_000000495169.jpg"
    got = {number: (said, found) for number, said, found in data.entries[0][1]}
    assert got.keys() == wanted.keys()
    for number, (said, (x, y, w, h)) in wanted.items():
        assert got[number][0] == said
        assert got[number][1] == [pytest.approx([x / 640, y / 480, (x + w) / 640, (y + h) / 480], abs=1e-5)]


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(refer: Any, protocol: int) -> None:
    data = refer([ref(1, "train", ["the red cup", "cup"]), ref(2, "train", ["vase"]), ref(3, "val", ["x"])], protocol)
    assert len(data) == 1
    sample = data[0]
    assert sample.image.endswith("images/COCO_train2014_000000000007.jpg")
    answers = {q.text: a.boxes.tolist() for q, a in zip(sample.turns[::2], sample.turns[1::2], strict=True)}
    assert len(answers) == 3
    vase = next(boxes for question, boxes in answers.items() if "<p>vase</p>" in question)
    assert vase == [pytest.approx([0.2, 0.1, 0.4, 0.3])]
    assert {int(n) for n in sample.record.split("#")[1].split(",")} == {100, 101, 200}


def test_bytes_of_python_2(refer: Any) -> None:
    """Its pickles hold bytes, as text of protocol 0 (S) or counted (U, T)."""
    body = b"(dp1\nS'ref_id'\nI1\nsS'ann_id'\nI10\nsS'image_id'\nL7L\nsS'split'\nS'train'\nsS'sentences'\n"
    body += (
        b"(lp2\n(dS'sent_id'\nI5\nsS'sent'\nS'caf\\xe9 cup'\nsa(dS'sent_id'\nI6\nsS'sent'\nU\x0ccaf\xc3\xa9 teapotsas"
    )
    data = refer(b"(lp0\n" + body + b"a.")
    assert [(number, said) for number, said, _ in data.entries[0][1]] == [(5, "café cup"), (6, "café teapot")]


def test_parts(refer: Any) -> None:
    refs = [ref(1, "testA", ["a b"]), ref(2, "testB", ["b"]), ref(3, "testAB", ["c"]), ref(4, "val", ["d"])]
    for split, count in (("testA", 2), ("testB", 2), ("test", 3), ("val", 1)):
        assert [len(found) for _, found in refer(refs, split=split).entries] == [count], split
    with pytest.raises(AnnotationError, match="no references of split 'train'; it has testA, testAB, testB, val"):
        refer(refs)


def test_turns_and_a_box_to_leave_out(refer: Any) -> None:
    refs = [ref(1, "train", [f"cup {i}" for i in range(6)]), ref(5, "train", ["a line"])]
    data = refer(refs, turns=4)
    assert len(data[0].turns) == 8
    assert (len(data.entries[0][1]), data.problems) == (6, [])


def test_the_names_of_2017(refer: Any, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/000000000007.jpg").touch()
    assert refer([ref(1, "train", ["cup"])])[0].image == str(tmp_path / "images/000000000007.jpg")
    (tmp_path / "images/COCO_train2014_000000000007.jpg").touch()
    assert "COCO_train2014" in refer([ref(1, "train", ["cup"])])[0].image


def test_captions(refer: Any, shared_data: Path) -> None:
    refs = [ref(1, "train", ["the red cup", "a cup"]), ref(4, "train", ["vase"])]
    data = refer(refs, cls=ReferCaptions)
    said = set()
    for epoch in range(20):
        data.set_epoch(epoch)
        answers = {round(float(q.boxes[0, 0]), 2): a.text for q, a in zip(*[iter(data[0].turns)] * 2, strict=True)}
        assert answers[0.4] == "Vase"
        said.add(answers[0.1])
    assert said == {"The red cup", "A cup"}
    real = ReferCaptions(shared_data / REAL / "refcocog/refs(umd).p", "/im", split="val")
    assert real[0].turns[1].text in ("The snack in the orange container", "A sweet foo in an orange bowl")


def test_expressions_of_json_as_region_captions(tmp_path: Path) -> None:
    size = {"width": 100, "height": 50}
    images = [
        {"id": 1, "file_name": "a.png", "caption": "the red cup", **size},
        {"id": 2, "file_name": "b.png", "caption": "a bowl", **size},
        {"id": 3, "file_name": "a.png", "caption": "vase", **size},
        {"id": 4, "file_name": "c.png", "caption": "nothing there", **size},
    ]
    boxes = {1: [10, 5, 20, 10], 2: [0, 0, 10, 10], 3: [60, 5, 20, 10]}
    annotations = [{"id": i, "image_id": i, "bbox": box} for i, box in boxes.items()]
    path = tmp_path / "rec.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    data = RegionCaptions(path, "/im")
    assert [(s.image, s.record) for s in data] == [("/im/a.png", "rec.json#1"), ("/im/b.png", "rec.json#2")]
    assert {t.text for t in data[0].turns[1::2]} == {"The red cup", "Vase"}
    assert data.problems == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"ann_id": 999}, "reference 1: no annotation 999 in instances.json"),
        ({"image_id": 999}, "reference 1: no image 999 in instances.json"),
        ({"ann_id": "10"}, "reference 0: ann_id = '10', expected int"),
        ({"split": None}, "reference 0: split = None, expected str"),
        ({"sentences": {}}, "reference 1: sentences = dict, expected list"),
        ({"sentences": ["cup"]}, "reference 1: got 'cup', expected a dict"),
        ({"sentences": [{"sent_id": 1, "sent": "  "}]}, "reference 1: an empty sentence"),
        ({"sentences": [{"sent_id": 1, "sent": "\ud800"}]}, "reference 1: sent is no text"),
        ({"sentences": [{"sent_id": 1, "sent": "a"}] * 1001}, "reference 1: 1001 sentences"),
    ],
)
def test_a_bad_reference_is_a_problem(refer: Any, change: dict[str, Any], line: str) -> None:
    refs = [
        {**ref(1, "train", ["cup"]), **change},
        ref(2, "train", ["vase"]),
        "no reference",
        ref(2, "train", ["again"]),
    ]
    data = refer(refs, max_problems=1.0)
    assert [said for _, said, _ in data.entries[0][1]] == ["vase"]
    assert len(data.problems) == 3
    assert any(line in problem for problem in data.problems)
    assert any("two references with ref_id 2" in problem for problem in data.problems)
    with pytest.raises(AnnotationError, match="(3 of 4|2 of 3) records unusable"):
        refer(refs)


class Hostile:
    """What a pickle runs when it is read the usual way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_runs_nothing(refer: Any, tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "run"
    refs = [{**ref(1, "train", ["cup"]), "extra": Hostile(marker)}]
    with pytest.raises(AnnotationError, match=r"refs\(unc\).p: byte \d+: the pickle names \w+\.system, expected only"):
        refer(refs, protocol)
    assert not marker.exists()
    pickle.loads(pickle.dumps(refs, protocol))
    assert marker.exists()  # so the test can fail


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "not a whole pickle"),
        (b"nothing of the kind", "not a whole pickle"),
        (pickle.dumps([1, 2, "three"], 2)[:-4], "not a whole pickle"),
        (b"\x8d" + b"\xff" * 8 + b".", "not a whole pickle"),  # a string of 2**64 bytes
        (b"Nr\xff\xff\xff\xff.", "memo place 4294967295"),  # 32 GB of places
        (b"}]]s.", "unhashable"),
        (b"cos\nsystem\n(S'x'\ntR.", "names os.system"),
        (b"(S'x'\nios\nsystem\n.", "names os.system"),
        (b"\x8c\x02os\x8c\x06system\x93.", "names os.system"),
        (b"Pname\n.", "opcode PERSID"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"N\x85.", "opcode TUPLE1"),  # a deep nest of tuples cannot be hashed
        (b"}.", "a pickled dict, expected a list"),
    ],
)
def test_a_broken_pickle_is_one_line(refer: Any, content: bytes, line: str) -> None:
    with pytest.raises(AnnotationError, match=line) as caught:
        refer(content)
    assert "\n" not in str(caught.value)


def test_bombs(refer: Any, tmp_path: Path) -> None:
    """A nest of a million lists, and a hundred lists of which each holds the one before ten times."""
    path = tmp_path / "nest.p"
    path.write_bytes(b"]" * 1_000_000 + b"a" * 999_999 + b".")
    assert len(load_plain(path)) == 1
    laughs: list[Any] = ["ha"]
    for _ in range(100):
        laughs = [laughs] * 10
    data = refer([ref(1, "train", ["cup"]), ref(2, "train", ["a"], sentences=[laughs]), laughs], max_problems=1.0)
    assert (len(data), len(data.problems)) == (1, 2)
    assert max(map(len, data.problems)) < 300


def test_text() -> None:
    assert text("café") == "café"
    assert text(b"caf\xe9 \xc3".decode("utf-8", "surrogateescape")) == "café Ã"


def test_a_folder_is_not_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "refs(umd).p").touch()
    with pytest.raises(AnnotationError, match=r"a folder, expected one of the pickles in it: \['refs\(umd\).p'\]"):
        Refer(tmp_path, "/im")
    with pytest.raises(AnnotationError, match="no such annotation file"):
        Refer(tmp_path / "refs(unc).p", "/im")
