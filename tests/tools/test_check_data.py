"""check_data.py as a person runs it: exit status, lines and JSON, and every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import check_data


def call(*arguments: object) -> int:
    return check_data.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name, form", [
    ("rec", "rec"), ("regions", "regions"), ("instances", "detection"), ("grounded_captions", "grounded_captions"),
    ("conversations", "llava"),
])  # fmt: skip
def test_a_clean_set(pictures: Path, name: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = pictures / f"{name}.json"
    assert call(file, "--images", pictures / "images", "--jobs", 2) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{file} ({form}): ") and shown.out.endswith("8 of 8 images readable, nothing wrong\n")
    assert "8/8" in shown.err  # the bar


def test_findings(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((pictures / "rec.json").read_text())
    content["images"][0]["caption"] = "the <r5> cup"
    for image in content["images"][3:]:
        image["file_name"] = f"gone\x1b[31m/{image['file_name']}"
    file = tmp_path / "rec.json"
    file.write_text(json.dumps(content))
    assert call(file, "--images", pictures / "images", "--most", 2) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{file} (rec): 24 records, 1 of 8 images readable"
    assert lines[1] == "image-missing: 7 (no such file)"
    assert lines[2].startswith("  rec.json#3  ") and lines[2].endswith("gone\ufffd[31m/1.png: no such file")
    assert lines[4] == "  … and 5 more"
    assert lines[5].startswith("caption-special-words: 1 ") and "<r5>" in lines[6]
    assert call(file, "--images", pictures / "images", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["counts"] == {"image-missing": 7, "caption-special-words": 1}
    assert len(report["findings"]) == 8 and set(report["findings"][0]) == {"kind", "record", "told"}


@pytest.mark.parametrize("arguments, line", [
    (["nowhere.json", "--images", "."], "nowhere.json: no such annotation file"),
    (["nowhere.json", "--images", "no_folder"], "no_folder: no such folder of images"),
    (["set.csv", "--images", "."], "say --format"),
    (["x.json", "--images", ".", "--format", "voc"], "invalid choice: 'voc'"),
    (["x.json"], "--images"),
])  # fmt: skip
def test_mistakes(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    shown = capsys.readouterr()
    assert (end.value.code, shown.out) == (2, "")
    assert line in shown.err.splitlines()[-1] and "Traceback" not in shown.err
