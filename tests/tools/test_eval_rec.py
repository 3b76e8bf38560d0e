"""eval_rec.py: figures, predictions.jsonl and metrics.json of a tiny model, from both layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groma.evaluation.grounding import read_rec
from groma.evaluation.rec_run import read_expressions
from groma.predictor import Groma
from tools import eval_rec

pytestmark = pytest.mark.usefixtures("quiet_torch")


@pytest.fixture(scope="module")
def model(make: Callable[..., Any], tiny_processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make(1, nms_threshold=0.1, found_threshold=0.0).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rec(model: Path, write_rec: Callable[[Groma], Path]) -> Path:
    return write_rec(Groma.from_pretrained(model))


def as_lines(rec: Path, path: Path) -> Path:
    """The same expressions as own data: one line for each."""
    rows = [{"image": e.file_name, "expressions": [{"text": e.caption, "boxes": [list(b) for b in e.referents]}]}
            for e in read_rec(rec)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(*arguments: object) -> int:
    return eval_rec.main([str(argument) for argument in arguments])


def test_files_of_a_run(
    model: Path, rec: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--images", pictures / "images", "--model", model]
    assert call("--data", rec, "--out", tmp_path / "coco", *given) == 0
    shown = capsys.readouterr()
    metrics = json.loads((tmp_path / "coco" / "metrics.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "coco" / "predictions.jsonl").read_text().splitlines()]
    assert (metrics["model"], metrics["data"]) == (str(model), str(rec))
    assert (metrics["count/pictures"], metrics["count/expressions"], len(rows)) == (3, 12, 12)
    single = [row["verdict"] for row in rows if len(row["referents"]) == 1]
    assert metrics["accuracy"] == sum(single) / len(single) and metrics["count/single"] == len(single) == 6
    assert metrics["absent_refused"] == 0  # its threshold is 0: it refuses nothing
    assert rows[0]["query"] == "the red ball" and rows[0]["image"].endswith("0.png")
    assert f"accuracy{metrics['accuracy']:29.3f}" in shown.out.splitlines()[0]
    assert shown.out.splitlines()[-1] == f"3 pictures, 12 expressions: {tmp_path / 'coco'}"
    assert "3/3" in shown.err

    assert call("--data", rec, "--out", tmp_path / "few", *given, "--limit", 1) == 0
    assert json.loads((tmp_path / "few" / "metrics.json").read_text())["count/expressions"] == 4


def test_own_data_gives_the_same_answers(model: Path, pictures: Path, tmp_path: Path) -> None:
    rec = pictures / "rec.json"
    found = []
    for name, data in (("coco", rec), ("own", as_lines(rec, tmp_path / "own.jsonl"))):
        given = ["--images", pictures / "images", "--model", model, "--limit", 2, "--quiet"]
        assert call("--data", data, "--out", tmp_path / name, *given) == 0
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        found.append({key: value for key, value in metrics.items() if key not in ("data", "seconds")})
    assert found[0] == found[1] and found[0]["count/expressions"] == 6


def test_own_expressions_are_those_of_the_rec_file(pictures: Path, tmp_path: Path) -> None:
    rec = pictures / "rec.json"
    lines = as_lines(rec, tmp_path / "own.jsonl")
    lines.write_text(lines.read_text() + '{"image": "0.png", "regions": [{"box": [1, 1, 9, 9], "caption": "x"}]}\n')
    own = read_expressions(lines, pictures / "images")
    for mine, theirs in zip(own, read_rec(rec), strict=True):
        assert (mine.file_name, mine.caption, mine.width) == (theirs.file_name, theirs.caption, theirs.width)
        assert sorted(mine.referents) == [pytest.approx(box, abs=1e-3) for box in sorted(theirs.referents)]


@pytest.mark.parametrize("line, told", [
    ('{"image": "0.png", "regions": [{"box": [1, 1, 9, 9], "caption": "x"}]}', "no line with expressions"),
    ('{"image": "0.png", "expressions": [{"text": "x", "boxes": [[9, 1, 1, 9]]}]}', "1 of 1 records unusable"),
])  # fmt: skip
def test_own_data_without_expressions_or_with_a_bad_line(line: str, told: str, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(line)
    with pytest.raises(ValueError, match=told):
        read_expressions(tmp_path / "own.jsonl", pictures / "images")


@pytest.mark.parametrize("change, told", [
    ({"--data": "gone.json"}, "gone.json: no such file"), ({"--images": "gone"}, "gone: no such file or folder"),
    ({"--model": "./gone"}, "--model ./gone: no such directory"), ({"--limit": "0"}, "at least 1"),
])  # fmt: skip
def test_mistakes(
    change: dict[str, str], told: str, rec: Path, model: Path, pictures: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = {"--data": rec, "--images": pictures / "images", "--model": model, "--out": tmp_path / "out"} | change
    with pytest.raises(SystemExit) as end:
        call(*[word for pair in given.items() for word in pair])
    shown = capsys.readouterr()
    assert (end.value.code, shown.out) == (2, "")
    assert told in shown.err and shown.err.count("\n") == 1
