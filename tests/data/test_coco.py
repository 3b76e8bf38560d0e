"""COCO-style files read a record at a time: any order, any size, and one clear line for what is malformed."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groma.data import json_stream, store
from groma.data.coco import CocoRecords, read_coco, read_json
from groma.data.detection import Detection
from groma.data.grounding import DetectionByWords, Referring
from groma.data.json_stream import json_items, json_lines, json_lists
from groma.data.records import AnnotationError

Write = Callable[[str, Any], Path]
Coco = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=[40, 64, 1 << 20])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is read so many characters at a time."""
    monkeypatch.setattr(json_stream, "WINDOW", request.param)


VALUES = [
    1, -2.5e-3, 1e22, 12345678901234567890123, True, None, "", "a\"]}\\é\u2028😀", "\ud800", [],
    {}, [[[]]], [1, [2, {"a": []}]],
    {"id": 1, "bbox": [0.1, 2, 3e-5, -4.25], "s": "x" * 500, "t": {"": None}}, 0, 1.5, 15, 1500, 1.5e3,
]  # fmt: skip


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("indent", [None, 7])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_streamed_as_loaded(tmp_path: Path, indent: int | None, ascii_only: bool) -> None:
    path = tmp_path / "a.json"
    for count in range(len(VALUES) + 1):
        content = {"info": {"a": [1], "b": "]"}, "x": VALUES[:count], "n": 1.25, "y": [count], "rest": VALUES}
        for value, key in ((VALUES[:count], None), (content, "x")):
            text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
            path.write_text(text, "utf-8", "surrogatepass" if ascii_only else "replace")
            expected = read_json(path)
            assert list(json_items(path, key)) == (expected if key is None else expected[key])
        assert [v for k, v in json_lists(path, ("y", "x")) if k == "y"] == [count]


def test_random_values_at_every_window(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    values = [
        draw.choice([draw.random(), draw.randrange(10**9), -(10.0 ** draw.randrange(20)), "é" * 5]) for _ in range(60)
    ]
    path = write("a.json", values)
    for size in range(17, 90):
        monkeypatch.setattr(json_stream, "WINDOW", size)
        assert list(json_items(path)) == values


def test_a_window_is_all_that_is_held(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "WINDOW", 1000)
    path = write("a.json", {"x": [{"i": i} for i in range(5000)], "z": {str(i): [i] for i in range(5000)}, "y": [1]})
    longest = []
    more = json_stream._Text._more
    monkeypatch.setattr(json_stream._Text, "_more", lambda text: (more(text), longest.append(len(text.window)))[0])
    assert sum(1 for _ in json_lists(path, ("x", "y"))) == 5001
    assert max(longest) < 3000


def test_nan_as_the_standard_decoder_does(write: Write) -> None:
    [value] = json_items(write("a.json", "[NaN]"))
    assert value != value


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize(
    "text, read, says",
    [
        ("", [], "a JSON nothing, expected a list"),
        ("  12", [], "a JSON number, expected a list"),
        ('{"a": [1]}', [], "a JSON object, expected a list"),
        ("[", [], "Expecting value at character 1, where it ends"),
        ("[1, 2", [1], "where it ends"),
        ("[1, 2,", [1, 2], "Expecting value at character 6, where it ends"),
        ('[1, {"a": "x', [1], "Unterminated string"),
        ("[1, 2,]", [1, 2], "Expecting value at character 6"),
        ("[1 2]", [1], "expected ',' or ']' at character 3"),
        ("[1, 2} " + " " * 100, [1, 2], "expected ',' or ']' at character 5"),
        ("[1, {'a': 1}, " + "2, " * 100 + "3]", [1], "Expecting property name enclosed in double quotes"),
        ("[1] [2]", [1], "more text after the list at character 4"),
        ('["\x01"]', [], "Invalid control character at at character 2"),
        ("[" * 100_000, [], "nested too deeply"),
        ("[1, tru", [1], "Expecting value"),
    ],
)  # fmt: skip
def test_malformed_lists(write: Write, text: str, read: list[Any], says: str) -> None:
    path = write("a.json", text)
    got: list[Any] = []
    with pytest.raises(AnnotationError) as error:
        got.extend(json_items(path))  # which keeps what came before
    assert says in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    if "2" not in text[-2:]:  # a last number may be believed or not: it may have gone on
        assert got == read


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize(
    "text, says",
    [
        ("[]", "a JSON list, expected an object with lists images"),
        ("{}", "no list 'images'; it has []"),
        ('{"a": 1, "b": [[2]]}', "no list 'images'; it has ['a', 'b']"),
        ('{"images": {"item": 1}}', "'images' is a JSON object, expected a list"),
        ('{"images": null}', "'images' is a JSON null, expected a list"),
        ('{"a": 1', "expected ',' or '}' at character 7, where it ends"),
        ('{"a" 1}', "expected ':'"),
        ("{1: 2}", "expected a name in double quotes at character 1"),
        ('{"a": {"b": {"c": [1, }}}', "Expecting value"),
        ('{"images": [1, 2', "where it ends"),
    ],
)
def test_malformed_objects(write: Write, text: str, says: str) -> None:
    path = write("a.json", text)
    with pytest.raises(AnnotationError) as error:
        list(json_items(path, "images"))
    assert says in str(error.value)
    assert str(error.value).startswith(f"{path}: ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'["' + b"x" * 100 + b'\xe9"]')
    for path, says in ((tmp_path / "no.json", "no such annotation file"), (tmp_path, "cannot be read"),
                       (tmp_path / "latin.json", "cannot be read")):  # fmt: skip
        for read in (json_items, lambda p: json_items(p, "images"), read_json, read_coco):
            with pytest.raises(AnnotationError, match=says):
                list(read(path))
    for path in (tmp_path / "no.json", tmp_path):
        with pytest.raises(AnnotationError, match=str(path)):
            list(json_lines(path))


def test_a_missing_bracket_does_not_fill_the_memory(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "WINDOW", 100)
    monkeypatch.setattr(json_stream, "LONGEST", 1000)
    path = write("a.json", "[[" + "1, " * 5000 + "1]")
    with pytest.raises(AnnotationError, match="a value of more than 1000 characters"):
        list(json_items(path))
    with pytest.raises(AnnotationError, match="line 1: over 1000 bytes"):
        list(json_lines(path))
    with pytest.raises(AnnotationError, match="Expecting property name .* at character 5"):  # seen at once
        list(json_items(write("c.json", "[1, {'a': [" + "1, " * 5000 + "1]}]")))
    assert list(json_items(write("b.json", "[[" + "1, " * 300 + "1]]"))) == [[1] * 301]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": \n"\xe9"\n[2]\n' + b"[" * 100_000 + b'\n"end"')
    noted: list[str] = []
    assert list(json_lines(path, noted.append)) == [(1, {"a": 1}), (5, [2]), (7, "end")]
    assert [note.split(": not JSON")[0] for note in noted] == [f"{path}: line {n}" for n in (3, 4, 6)]
    assert not any("\n" in note for note in noted)
    with pytest.raises(AnnotationError, match="line 3: not JSON"):
        list(json_lines(path))


# -- CocoRecords


def grouped(path: Path) -> tuple[list[Any], list[str]]:
    """What ``_images`` gives of a file, and what it notes."""
    records = CocoRecords.__new__(CocoRecords)
    records.file, records._noted = path, store.Problems()
    return list(records._images()), records._noted


def in_memory(content: dict[str, Any]) -> list[Any]:
    """The images with their annotations, the plain way."""
    images: dict[Any, Any] = {}
    for image in content["images"]:
        if isinstance(image, dict) and "id" in image:
            images.setdefault(image["id"], (image, []))
    for mark in content["annotations"]:
        if mark.get("image_id") in images:
            images[mark["image_id"]][1].append(mark)
    return list(images.values())


@pytest.mark.parametrize("limit", [0, 300, 32 << 20])
@pytest.mark.parametrize("first", ["images", "annotations"])
def test_images_with_their_annotations(write: Write, monkeypatch: pytest.MonkeyPatch, limit: int, first: str) -> None:
    monkeypatch.setattr(store, "LARGE", limit)
    draw = random.Random(1)
    ids = [*range(40), *map(str, range(40)), 2**65, -3]
    draw.shuffle(ids)
    images: list[Any] = [{"id": i, "n": n} for n, i in enumerate(ids)]
    images[3:3] = [{"id": 0, "n": "again"}, {"n": "none"}, 7]
    marks: list[Any] = [{"id": n, "image_id": draw.choice([*ids, "x", 99, 1.5])} for n in range(500)] + [{"id": 1}]
    content = {"images": images, "annotations": marks}
    ordered = {key: content[key] for key in sorted(content, reverse=first == "images")}
    got, noted = grouped(write("a.json", {"info": {}, **ordered, "categories": []}))
    assert got == in_memory(content)
    orphans = [m for m in marks if m.get("image_id") in ("x", 99)]
    assert sum("not among the images" in note for note in noted) == len(orphans) > 2
    assert sum("two images with id 0" in note for note in noted) == 1
    assert len(noted) == len(orphans) + 1 + 2 + sum("image_id" not in m or m["image_id"] == 1.5 for m in marks)


def test_nothing_to_group(write: Write) -> None:
    assert grouped(write("a.json", {"images": [], "annotations": []})) == ([], [])
    path = write("b.json", {"images": [], "annotations": [{"image_id": 1}]})
    assert grouped(path) == ([], [f"{path}: record {{'image_id': 1}} is of image 1, which is not among the images"])


@pytest.mark.parametrize("reader", [Detection, Referring, DetectionByWords])
def test_readers_give_the_same_from_disk(
    write: Write, coco: Coco, monkeypatch: pytest.MonkeyPatch, reader: Any
) -> None:
    images = [{"file_name": f"{i % 7}.png", "caption": f"thing {i}"} for i in range(30)]
    marks = [{"image_id": i % 32, "bbox": [i % 50, 5, 20, 10]} for i in range(90)]
    path = write("a.json", coco(images, marks, [{"id": 1, "name": "cup"}]))
    near = reader(path, "/im", max_problems=0.5)
    monkeypatch.setattr(store, "LARGE", 0)
    for _ in range(2):
        far = reader(path, "/im", max_problems=0.5)
        assert far.entries.folder is not None
        assert list(far.entries) == list(near.entries)
        assert far.problems == near.problems
        assert [far[i].record for i in range(len(far))] == [near[i].record for i in range(len(near))]
    assert len(far.problems) == 4  # of images 30 and 31


def test_categories_are_optional(write: Write, coco: Coco) -> None:
    content = coco([{"file_name": "a.png"}], [])
    del content["categories"]
    assert len(DetectionByWords(write("a.json", content), "/im")) == 0


def test_real_files(shared_data: Path) -> None:
    for path in (shared_data / "coco_photos/instances.json", shared_data / "lvis_val100"):
        for file in [path] if path.is_file() else sorted(path.glob("lvis*.json")):
            content = read_json(file)
            if isinstance(content, dict) and "annotations" in content:
                assert grouped(file) == (in_memory(content), [])
