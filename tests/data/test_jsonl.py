"""Own data: every example of docs/data.md, places and braces in conversations, sizes, and the line of each error."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from groma import markup
from groma.data.jsonl import JsonLines, compose
from groma.data.prompts import USER_BOX, build_prompt
from groma.data.records import AnnotationError
from groma.processor import GromaProcessor
from groma.settings import SourceConfig

CUP = "<p>red cup</p><roi><ground_box></roi>"


def lines(folder: Path, *records: Any) -> Path:
    path = folder / "own.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", "utf-8")
    return path


def test_the_examples_of_the_documentation(root: Path, tmp_path: Path, processor: GromaProcessor) -> None:
    text = (root / "docs/data.md").read_text("utf-8")
    examples = [line for body in re.findall(r"```jsonl\n(.*?)```", text, re.DOTALL) for line in body.splitlines()]
    (shown,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert [SourceConfig(**source).format for source in yaml.safe_load(shown)["data"]["sources"]] == ["jsonl"]
    Image.new("RGB", (640, 480)).save(tmp_path / "table.jpg")
    data = JsonLines(lines(tmp_path, *examples), tmp_path)
    assert (len(data), data.problems) == (len(examples), []) == (7, [])
    for i in range(7):
        build_prompt(processor, data[i].turns)
    said = [[markup.unescape(turn.text) for turn in data[i].turns] for i in range(7)]
    cup = next(i for i in (0, 2) if "<p>the red cup</p>" in said[0][i])
    assert said[0][cup + 1] == "<roi><ground_box></roi>"
    assert data[0].turns[cup + 1].boxes.tolist() == [pytest.approx([12 / 640, 40 / 480, 96 / 640, 130 / 480])]
    assert "<p>a dog</p>" in said[0][2 - cup]
    assert said[0][3 - cup] == "<roi></roi>Nothing matches."
    assert said[1][1] == "<roi><ground_box><ground_box></roi>"
    assert USER_BOX in said[2][0]
    assert said[2][1] == "A red cup without a handle"
    assert said[3] == [
        f"What is {USER_BOX}?",
        "A red cup.",
        "[grounding] What stands on the table?",
        f"A {CUP} and <p>two books</p><roi><ground_box><ground_box></roi>.",
    ]
    assert data[3].turns[3].boxes[:, 0].tolist() == pytest.approx([12 / 640, 200 / 640, 310 / 640])
    assert said[4] == ["What is the mood?", "Calm."]
    assert said[5] == [
        f"[grounding] Which label is {USER_BOX}?",
        "The <p>jar [number 2]</p><roi><ground_box></roi> says {salt} [sic].",
    ]
    assert data[6].turns[0].boxes.tolist() == [[0, 0, 1, 0.5]]
    told = re.search(r"^    mine.jsonl: line 7: (.*)$", text, re.MULTILINE)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        compose("A [red cup]{cub}.", {"cup": ...}, "assistant")
    assert told and told[1] == str(error.value)


@pytest.mark.parametrize(
    "text, role, whole, names",
    [
        ("a [red cup]{cup}", "assistant", f"a {CUP}", ["cup"]),
        ("{cup}", "assistant", "<roi><ground_box></roi>", ["cup"]),
        ("[ ]{cup}", "assistant", "<roi><ground_box></roi>", ["cup"]),
        ("{{cup}}", "assistant", "{cup}", []),
        ("{{{cup}}}", "assistant", "{<roi><ground_box></roi>}", ["cup"]),
        ("[red cup]{{cup}}", "assistant", "[red cup]{cup}", []),
        ("[red {{1}} cup]{cup}", "assistant", "<p>red {1} cup</p><roi><ground_box></roi>", ["cup"]),
        ("[a] [b] {cup} c]", "assistant", "[a] [b] <roi><ground_box></roi> c]", ["cup"]),
        ("[a [b]]{cup , a b}{cup}", "assistant",
         "<p>a [b]</p><roi><ground_box><ground_box></roi><roi><ground_box></roi>", ["cup", "a b", "cup"]),
        ("is {cup} over {a b}?", "user", f"is {USER_BOX} over {USER_BOX}?", ["cup", "a b"]),
        ("<r1> [grounding] {cup}", "user", f"<r1> [grounding] {USER_BOX}", ["cup"]),
    ],
)  # fmt: skip
def test_compose(text: str, role: Any, whole: str, names: list[str]) -> None:
    made, found = compose(text, {"cup": 1, "a b": 2}, role)
    assert (markup.unescape(made), found) == (whole, names)
    special = [piece for piece, is_special in markup.split(made) if is_special]
    assert "<r1>" not in special and "[grounding]" not in special


@pytest.mark.parametrize(
    "text, role, says",
    [
        ("a {", "assistant", "a lone brace at '{': expected {name}, or {{"),
        ("a } b", "user", "a lone brace at '} b': expected {name}, or }}"),
        ("{cup", "assistant", "a lone brace"),
        ("{}", "assistant", "no box ''; there are ['cup']"),
        ("[x]{cup,}", "assistant", "no box ''"),
        ("[cups]{cup, pot}", "assistant", "no box 'pot'"),
        ("[the [red cup]{cup}]{cup}", "assistant", "brackets in words come in pairs"),
        ("red] cup]{cup}", "assistant", "brackets in words come in pairs"),
        ("the [cup]{cup}", "user", "in a question, expected a single name"),
        ("{cup, cup}", "user", "in a question, expected a single name"),
    ],
)
def test_compose_refuses(text: str, role: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        compose(text, {"cup": 1}, role)


def test_long_texts_are_read_in_no_time() -> None:
    for text in ("[" * 20_000, "[a]" * 20_000, "[[a]" * 20_000):
        assert markup.unescape(compose(text, {}, "assistant")[0]) == text


def test_sizes_come_from_upright_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 50)).save(tmp_path / "turned.jpg", exif=exif)  # stored 100 x 50, seen 50 x 100
    record = {"image": "turned.jpg", "regions": [{"box": [5, 10, 50, 90], "caption": "a wall"}]}
    stated = {**record, "width": 100, "height": 100}
    data = JsonLines(lines(tmp_path, record, stated), tmp_path)
    assert torch.allclose(data[0].turns[0].boxes, torch.tensor([[0.1, 0.1, 1.0, 0.9]]))
    assert torch.allclose(data[1].turns[0].boxes, torch.tensor([[0.05, 0.1, 0.5, 0.9]]))


def test_a_real_photograph(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "coco_photos"
    content = json.loads((folder / "instances.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    records = []
    for image in content["images"]:
        marks = [a for a in content["annotations"] if a["image_id"] == image["id"] and not a.get("iscrowd")]
        found = [(names[a["category_id"]], [x, y, x + w, y + h]) for a in marks for x, y, w, h in [a["bbox"]]]
        boxes = [{"box": box, "caption": kind} for kind, box in found if min(box[2] - box[0], box[3] - box[1]) > 1]
        if boxes:
            records.append({"image": image["file_name"], "regions": boxes})
    data = JsonLines(lines(tmp_path, *records), folder / "images", turns=3)
    assert len(data) == len(records) > 20
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in content["images"]}
    for i, record in enumerate(records):
        width, height = sizes[record["image"]]
        scale = torch.tensor([width, height, width, height])
        known = torch.tensor([region["box"] for region in record["regions"]])
        for turn in data[i].turns[::2]:
            assert ((turn.boxes * scale - known).abs().amax(dim=1) < 1).any()


def test_draws_follow_the_epoch(tmp_path: Path, images: Path) -> None:
    things = [{"text": f"thing {i}", "boxes": [[i, 0, i + 5, 9]]} for i in range(30)]
    file = lines(tmp_path, {"image": "a.png", "expressions": things})
    data, again = JsonLines(file, images, turns=3), JsonLines(file, images, turns=3)
    drawn = set()
    for epoch in range(5):
        data.set_epoch(epoch)
        again.set_epoch(epoch)
        texts = tuple(turn.text for turn in data[0].turns)
        assert texts == tuple(turn.text for turn in again[0].turns)
        assert len(texts) == 6
        drawn.add(texts)
    assert len(drawn) == 5
    assert data[0].record == "own.jsonl#1"


SAID = {"image": "a.png", "boxes": {"cup": [10, 5, 30, 15]}}
TALK = [{"user": "What is {cup}?"}, {"assistant": "A cup."}]


def boxed(box: Any) -> dict[str, Any]:
    return {"image": "a.png", "regions": [{"box": box, "caption": "cup"}]}


@pytest.mark.parametrize(
    "record, says",
    [
        ("{", "not JSON"),
        ("[" * 50_000, "not JSON"),
        ('{"image": "a.png"} {"image": "b.png"}', "not JSON"),
        ([1], "got [1], expected an object with 'image'"),
        ({"regions": []}, "no 'image'; it has ['regions']"),
        ({"image": 3}, "image = 3"),
        ({"image": "a.png", "expresions": []}, "it has ['expresions', 'image'], expected one of expressions"),
        ({"image": "a.png", "regions": [], "conversation": []}, "expected one of"),
        ({"image": "a.png", "regions": []}, "no regions, expected at least one"),
        ({"image": "a.png", "expressions": [{"text": "cup"}]}, "no 'boxes'"),
        ({"image": "a.png", "expressions": [{"text": " ", "boxes": []}]}, "text is ' ', expected words"),
        (
            {"image": "a.png", "expressions": [{"text": "cup", "boxes": [10, 5, 30, 15]}]},
            "box 10, expected four numbers",
        ),
        ({"image": "none.png", "regions": boxed([0, 0, 9, 9])["regions"]}, "to read the size of"),
        ({"image": "own.jsonl", "regions": boxed([0, 0, 9, 9])["regions"]}, "no image known to Pillow"),
        ({**boxed([0, 0, 9, 9]), "width": 100}, "no 'height'"),
        ({**boxed([0, 0, 9, 9]), "width": 0, "height": 50}, "size 0 x 50"),
        (boxed([10, 5, 30]), "box [10, 5, 30], expected four numbers"),
        (boxed([10, 5, 30, "15"]), "expected four numbers"),
        (boxed([10, 5, True, 15]), "expected four numbers"),
        (boxed([10, 5, float("nan"), 15]), "expected four numbers"),
        (boxed([10, 5, float("inf"), 15]), "expected four numbers"),
        (boxed([30, 5, 10, 15]), "x1 < x2 and y1 < y2"),
        (boxed([10, 50, 30, 65]), "less than a pixel inside of the image, 100 x 50"),
        (boxed([10, 5, 10.5, 15]), "less than a pixel"),
        ({**SAID, "conversation": TALK[:1]}, "1 turns, expected an answer to each question"),
        ({**SAID, "conversation": TALK[1:]}, "turn 1: got {'assistant': 'A cup.'}, expected an object with 'user'"),
        ({**SAID, "conversation": [{**TALK[0], **TALK[1]}]}, "turn 1: got"),
        ({**SAID, "conversation": [TALK[0], {"assistant": "A {pot}."}]}, "'{pot}': no box 'pot'; there are ['cup']"),
        ({**SAID, "conversation": [TALK[0], {"assistant": ""}]}, "assistant is '', expected words"),
        ({**SAID, "conversation": TALK, "boxes": {"a,b": [0, 0, 9, 9]}}, "a box is called 'a,b'"),
        ({**SAID, "conversation": TALK, "boxes": [[0, 0, 9, 9]]}, "boxes = [[0, 0, 9, 9]], expected dict"),
        ({**SAID, "conversation": TALK, "boxes": {"cup": [[0, 0, 9, 9]]}}, "expected four numbers"),
    ],
)
def test_bad_lines(tmp_path: Path, images: Path, record: Any, says: str) -> None:
    good = {"image": "a.png", "expressions": [{"text": "cup", "boxes": []}]}
    path = lines(tmp_path, good, "", record)
    (images / "own.jsonl").write_text("no image")
    with pytest.raises(AnnotationError) as error:
        JsonLines(path, images)
    assert f"{path}: line 3: " in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    rest = JsonLines(path, images, max_problems=0.5)
    assert (len(rest), len(rest.problems)) == (1, 1)


def test_files(tmp_path: Path, images: Path) -> None:
    with pytest.raises(AnnotationError, match="no such annotation file"):
        JsonLines(tmp_path / "none.jsonl", images)
    path = tmp_path / "windows.jsonl"  # with a byte order mark and its line ends
    line = '{"image": "a.png", "expressions": [{"text": "die Tür", "boxes": [[0, 0, 50, 25]]}]}\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + line.encode())
    assert "die Tür" in JsonLines(path, images)[0].turns[0].text
    path.write_bytes(line.encode("latin-1"))
    with pytest.raises(AnnotationError, match="line 1: not JSON"):
        JsonLines(path, images)
