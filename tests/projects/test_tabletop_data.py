"""The command and the files it writes: public formats, resuming, and mistakes told in one line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vtkmodules")

from projects.tabletop.make_data import main
from projects.tabletop.phrases import names_pair
from projects.tabletop.vocabulary import HELD_OUT, KINDS

SCRIPT = Path(__file__).parents[2] / "projects" / "tabletop" / "make_data.py"
SIZES = ["--train", "55", "--val", "3", "--test", "4", "--size", "320x240", "--seed", "7"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tabletop") / "data"
    assert main(["--out", str(out), *SIZES, "--workers", "2"]) == 0
    return out


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def records(data: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (data / split / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]


def test_everything_is_there(data: Path) -> None:
    for split, size in (("train", 55), ("val", 3), ("test", 4)):
        assert len(list((data / split / "images").glob("*.jpg"))) == size
        assert len(records(data, split)) == size
        assert not (data / split / "records").exists()
    assert not list(data.rglob("*.partial"))


def test_coco_loads_and_masks_give_the_boxes(data: Path) -> None:
    coco_module = pytest.importorskip("pycocotools.coco")
    from pycocotools import mask as coco_mask

    with contextlib.redirect_stdout(io.StringIO()):
        run_lengths = coco_module.COCO(str(data / "train" / "instances.json"))
        outlines = coco_module.COCO(str(data / "train" / "refer" / "tabletop" / "instances.json"))
    assert [c["name"] for c in run_lengths.loadCats(run_lengths.getCatIds())] == list(KINDS)
    assert len(run_lengths.anns) > 150
    for number, annotation in run_lengths.anns.items():
        encoded = run_lengths.annToRLE(annotation)
        assert coco_mask.toBbox(encoded).tolist() == annotation["bbox"]
        assert coco_mask.area(encoded) == annotation["area"]
        assert np.array_equal(run_lengths.annToMask(annotation), outlines.annToMask(outlines.anns[number]))


def test_lvis_keys(data: Path) -> None:
    lvis = load(data / "train" / "lvis.json")
    assert {"synset", "frequency", "image_count", "instance_count", "def", "name", "id"} <= set(lvis["categories"][0])
    there: dict[int, set[int]] = {}
    for annotation in lvis["annotations"]:
        there.setdefault(annotation["image_id"], set()).add(annotation["category_id"])
    for image in lvis["images"]:
        assert not there.get(image["id"], set()) & set(image["neg_category_ids"])
        assert not set(image["not_exhaustive_category_ids"]) & set(image["neg_category_ids"])
    for category in lvis["categories"]:
        assert category["image_count"] == sum(category["id"] in kinds for kinds in there.values())


def test_refer_layout(data: Path) -> None:
    folder = data / "val" / "refer" / "tabletop"
    raw = (folder / "refs(seed).p").read_bytes()
    assert raw[:2] == b"\x80\x02"
    refs = pickle.loads(raw)
    annotations = {a["id"]: a for a in load(folder / "instances.json")["annotations"]}
    sentence_ids = [number for ref in refs for number in ref["sent_ids"]]
    assert len(sentence_ids) == len(set(sentence_ids)) > 5
    for ref in refs:
        annotation = annotations[ref["ann_id"]]
        assert (annotation["image_id"], annotation["category_id"]) == (ref["image_id"], ref["category_id"])
        assert ref["split"] == "val"
        assert [s["sent_id"] for s in ref["sentences"]] == ref["sent_ids"]
        assert all(s["tokens"] == s["sent"].split() for s in ref["sentences"])


def test_rec_has_one_image_for_each_expression(data: Path) -> None:
    rec = load(data / "train" / "rec.json")
    boxes: dict[int, list] = {image["id"]: [] for image in rec["images"]}
    for annotation in rec["annotations"]:
        boxes[annotation["image_id"]].append(annotation["bbox"])
    assert len(boxes) == len(rec["images"]) > 400
    for image in rec["images"]:
        count = len(boxes[image["id"]])
        kind = image["expression_type"]
        assert count == 0 if kind == "absent" else count > 1 if kind == "plural" else count == 1
    share = np.mean([image["expression_type"] == "absent" for image in rec["images"]])
    assert 0.09 < share < 0.22


def test_caption_spans(data: Path) -> None:
    captions = load(data / "train" / "grounded_captions.json")
    text = {image["id"]: image["caption"] for image in captions["images"]}
    names = {category["id"]: category["name"] for category in captions["categories"]}
    for annotation in captions["annotations"]:
        ((start, end),) = annotation["tokens_positive"]
        assert names[annotation["category_id"]] in text[annotation["image_id"]][start:end].lower()


def test_regions_and_conversations(data: Path) -> None:
    regions = load(data / "val" / "regions.json")
    assert re.fullmatch(r"an? (small|large) (matte|shiny) \w+ \w+", regions["annotations"][0]["caption"])
    for dialogue in load(data / "train" / "conversations.json"):
        turns = dialogue["conversations"]
        assert turns[0]["value"].startswith("<image>\n")
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert (data / "train" / "images" / dialogue["image"]).exists()


def test_nothing_in_training_shows_or_names_a_held_out_pair(data: Path) -> None:
    for record in records(data, "train"):
        assert not {(thing["colour"], thing["kind"]) for thing in record["things"]} & HELD_OUT
        texts = [e["text"] for e in record["expressions"]]
        texts += [record["caption"]["text"], *(part for turn in record["conversation"] for part in turn)]
        assert not [text for text in texts for pair in HELD_OUT if names_pair(text, pair)]


def test_other_workers_same_bytes(data: Path, tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "one"), *SIZES, "--workers", "1"]) == 0
    assert digest(tmp_path / "one") == digest(data)


def test_killed_and_resumed_gives_equal_bytes(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), "--out", str(out), *SIZES, "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    first_chunk = out / "train" / "records" / "000000.jsonl"
    limit = time.monotonic() + 60
    while not first_chunk.exists() and time.monotonic() < limit:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "train" / "scenes.jsonl").exists()
    assert (out / "val" / "scenes.jsonl").exists()
    before = first_chunk.stat().st_mtime_ns
    shutil.copy(first_chunk, tmp_path / "kept")
    assert first_chunk.stat().st_mtime_ns == before
    assert main([*command[2:-1], "2"]) == 0
    made = {name: value for name, value in digest(out).items() if not name.endswith(".partial")}
    assert made == digest(data)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--size", "10x10"], "'10x10' is not WIDTHxHEIGHT"),
        (["--workers", "0"], "'0' is not a whole number from 1"),
        (["--train", "-3"], "--train"),
        (["--quality", "101"], "'101' is not a whole number from 1 to 95"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--out", str(tmp_path / "x"), *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_folder_of_other_settings_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--out", str(data), *SIZES[:-1], "8"]) == 2
    assert "seed 7 (asked for 8)" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("do not touch")
    assert main(["--out", str(tmp_path), *SIZES]) == 2
    assert "not empty" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_help_has_examples() -> None:
    shown = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    assert "Examples:" in shown
    assert "--train 10000" in shown
