"""refer.py and propose.py as a person runs them: real processes, the embedded model, and every mistake in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "groma" / "assets" / "tabletop" / "table.jpg"
NOTE = "the embedded model knows rendered tables only"


def run(tool: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / tool, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def one_line(result: subprocess.CompletedProcess[str], *wanted: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert [word for word in wanted if word not in result.stderr] == []


def test_the_red_cup(tmp_path: Path) -> None:
    drawing = tmp_path / "found.png"
    # A terminal without "–" gets another letter there, not a traceback.
    result = run("refer.py", PICTURE, "the red cup", "--output", drawing, PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("found  ")
    assert result.stdout.rstrip().endswith("the red cup")
    assert NOTE in result.stderr
    assert result.stderr.count("\n") == 1
    with Image.open(drawing) as drawn, Image.open(PICTURE) as source:
        assert drawn.width == source.width
        assert drawn.height > source.height


def test_json_is_the_one_result_format() -> None:
    result = run("refer.py", PICTURE, "the red cup", "--json", "--quiet", "--top-k", 1)
    assert result.stderr == "", "--quiet keeps standard error empty"
    answer = json.loads(result.stdout)
    assert list(answer) == ["image", "width", "height", "query", "text", "found", "boxes", "model", "seconds"]
    assert (answer["image"], answer["query"], answer["found"]) == (str(PICTURE), "the red cup", True)
    [box] = answer["boxes"]
    x1, y1, x2, y2 = box["xyxy"]
    assert 0 <= x1 < x2 <= answer["width"]
    assert 0 <= y1 < y2 <= answer["height"]
    assert 0 < box["score"] <= 1


def test_a_score_nothing_reaches_is_nothing_found() -> None:
    result = run("refer.py", PICTURE, "the red cup", "--min-score", 1, "--quiet")
    assert (result.returncode, result.stdout) == (1, 'nothing there: "the red cup"\n')


def test_propose_lists_regions_best_first(tmp_path: Path) -> None:
    result = run("propose.py", PICTURE, "--max", 3, "--quiet", "--output", tmp_path / "regions.jpg")
    assert result.returncode == 0, result.stderr
    words = [line.split() for line in result.stdout.splitlines()]
    assert 1 <= len(words) <= 3
    assert {word[0] for word in words} == {"region"}
    scores = [float(word[1]) for word in words]
    assert scores == sorted(scores, reverse=True)
    with Image.open(tmp_path / "regions.jpg") as drawn:
        assert drawn.format == "JPEG"


@pytest.mark.parametrize("tool, more", [("refer.py", ["the red cup"]), ("propose.py", [])])
def test_a_wrong_picture_is_told_in_one_line(tool: str, more: list[str], tmp_path: Path) -> None:
    page, empty, cut, whole = (tmp_path / name for name in ("page.jpg", "empty.jpg", "cut.jpg", "whole.jpg"))
    page.write_text("<!doctype html><p>404")
    empty.touch()
    Image.effect_noise((200, 200), 80).convert("RGB").save(whole)
    cut.write_bytes(whole.read_bytes()[:4000])
    for picture in (tmp_path / "missing.jpg", page, empty, cut, tmp_path):
        one_line(run(tool, picture, *more), str(picture))


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ([PICTURE, ""], "empty text"),
        ([PICTURE, "  "], "empty text"),
        ([PICTURE], "TEXT"),
        ([PICTURE, "cup", "--min-score", "2"], "from 0 to 1, got '2'"),
        ([PICTURE, "cup", "--min-score", "nan"], "from 0 to 1, got 'nan'"),
        ([PICTURE, "cup", "--top-k", "0"], "at least 1, got '0'"),
        ([PICTURE, "cup", "--top-k", "many"], "at least 1, got 'many'"),
        ([PICTURE, "cup", "--device", "tpu"], "invalid choice: 'tpu'"),
        ([PICTURE, "cup", "--dtype", "int3"], "invalid choice: 'int3'"),
        ([PICTURE, "cup", "--colour"], "--colour"),
        ([PICTURE, "cup", "--output", "/nowhere/at/all.png"], "there is no directory /nowhere/at"),
        ([PICTURE, "cup", "--output", "drawing.doc"], "'.doc'"),
        ([PICTURE, "cup", "--output", PICTURE], "would overwrite"),
        ([PICTURE, "cup", "--model", "/nowhere/groma-7b"], "/nowhere/groma-7b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_call_is_told_in_one_line(arguments: list[object], wanted: str) -> None:
    one_line(run("refer.py", *arguments), "refer.py: ", wanted)


def test_a_device_this_machine_lacks_is_told() -> None:
    import torch

    lacking = "mps" if torch.cuda.is_available() else "cuda"
    one_line(run("refer.py", PICTURE, "the red cup", "--device", lacking), lacking)


def test_propose_refuses_an_impossible_number() -> None:
    one_line(run("propose.py", PICTURE, "--max", "-3"), "propose.py: ", "at least 1, got '-3'")


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    one_line(run("refer.py", PICTURE, "cup", "--output", tmp_path / "a.png"), "no permission")


@pytest.mark.parametrize("tool", ["refer.py", "propose.py"])
def test_help_loads_nothing_heavy(tool: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{tool}', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'tools' / tool)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "examples:" in result.stdout
