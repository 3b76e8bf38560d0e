"""visualize_data.py: what stands on a sheet is what the model is given; and the sheet's own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from groma.data.formats import open_records
from groma.data.loader import Examples
from groma.data.mixture import Key, Mixture, Source
from groma.visualize import LEARNED, PALETTE, Tile, contact_sheet
from tools import visualize_data


def first(pictures: Path, processor: Any, name: str, form: str, phrases: tuple[str, ...] = ()) -> Tile:
    records = open_records(form, pictures / f"{name}.json", pictures / "images")
    examples = Examples(Mixture([Source("it", records)], batch_size=1), processor)
    return visualize_data.tile(examples.make(Key(0, 0, 0)), processor, phrases)


def test_a_dialogue_as_the_model_sees_it(pictures: Path, tiny_processor: Any) -> None:
    tile = first(pictures, tiny_processor, "rec", "rec")
    learned = [text for text, is_learned in tile.said if is_learned]
    told = "".join(text for text, is_learned in tile.said if not is_learned)
    assert sorted(learned) == ["<roi></roi> Nothing matches.</s>", "<roi><ground_box:1></roi></s>",
                               "<roi><ground_box:2></roi></s>"]  # fmt: skip
    assert told.count("USER:") == told.count("ASSISTANT:") == 3
    assert "<p>the purple ring</p>" in told and "Here is an image" not in told
    assert len(tile.boxes) == 2 and tile.title.startswith("rec.json#")
    # The picture is the file's, squared to the model's side, but for rounding.
    with Image.open(pictures / "images" / "0.png") as source:
        difference = np.abs(np.asarray(tile.picture, float) - np.asarray(source.convert("RGB"), float))
    assert tile.picture.size == (64, 64) and difference.max() <= 1


def test_boxes_of_questions_come_first(pictures: Path, tiny_processor: Any) -> None:
    tile = first(pictures, tiny_processor, "regions", "region_captions")
    asked = "".join(text for text, is_learned in tile.said if not is_learned)
    assert "<refer_box:1>" in asked and "<refer_box:2>" in asked and len(tile.boxes) == 2


def test_targets_and_their_phrases(pictures: Path, tiny_processor: Any) -> None:
    tile = first(pictures, tiny_processor, "regions", "regions", ("red ball", "green box"))
    assert (tile.said, tile.labels, len(tile.boxes)) == ([], ("red ball", "green box"), 2)


def grid(image: Image.Image, colour: str) -> np.ndarray:
    near: np.ndarray = np.abs(np.asarray(image, int) - ImageColor.getrgb(colour)[:3]).sum(-1) < 12
    return near


def test_the_sheet() -> None:
    grey = Image.new("RGB", (64, 32), (120, 120, 120))
    plain = Tile(grey, "plain")
    boxed = Tile(grey, "boxed", [(0.25, 0.25, 0.75, 0.75)], [""], [("USER: Where?", False), ("There </s>", True)])
    sheet = contact_sheet([plain, boxed, plain], side=200)
    assert sheet.width == 2 * (200 + 7) + 7  # three tiles in two columns
    marked = np.argwhere(grid(sheet, PALETTE[0]))  # (row, column) of the box of the second tile
    assert abs(marked[:, 1].min() - (7 + 207 + 50)) <= 3 and abs(marked[:, 1].max() - (7 + 207 + 150)) <= 3
    ground = np.argwhere(grid(sheet, LEARNED))
    # Under the second tile, and there behind the question, which is not learned.
    assert ground[:, 1].min() > 214 + 40 and ground[:, 0].min() > 207
    assert sheet.tobytes() == contact_sheet([plain, boxed, plain], side=200).tobytes()
    assert contact_sheet([plain]).width == 448 + 2 * 16


def test_long_text_is_cut_and_long_words_too() -> None:
    grey = Image.new("RGB", (8, 8))
    short = Tile(grey, "t", said=[("word " * 400, True)])
    long = Tile(grey, "t" * 500, said=[("word " * 4000, True), ("w" * 4000, False)])
    assert contact_sheet([short], 200, lines=5).size == contact_sheet([long], 200, lines=5).size
    with pytest.raises(ValueError, match="no tiles"):
        contact_sheet([])


def call(*arguments: object) -> int:
    return visualize_data.main([str(argument) for argument in arguments])


def test_the_tool(pictures: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(name: str, form: str, *more: object) -> bytes:
        output = tmp_path / "sheet.png"
        given = [pictures / f"{name}.json", "--images", pictures / "images", "--format", form, "--output", output]
        assert call(*given, "--model", tiny, *more) == 0
        assert capsys.readouterr().out == f"{output}: {more[1]} of 8 samples\n"
        return output.read_bytes()

    assert draw("rec", "rec", "--count", 2) == draw("rec", "rec", "--count", 2)
    assert draw("rec", "rec", "--count", 2) != draw("rec", "rec", "--count", 2, "--seed", 1)
    plain = draw("instances", "detection", "--count", 8)
    assert plain != draw("instances", "detection", "--count", 8, "--augment")


def test_a_corrupt_picture_is_told_and_left_out(
    pictures: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0.png").write_bytes(b"<html>")
    (tmp_path / "1.png").write_bytes((pictures / "images" / "1.png").read_bytes())
    given = [pictures / "instances.json", "--images", tmp_path, "--format", "detection", "--model", tiny]
    assert call(*given, "--output", tmp_path / "sheet.png") == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'sheet.png'}: 1 of 8 samples\n"
    assert "HTML" in shown.err and shown.err.count("\n") == 7
    (tmp_path / "1.png").unlink()
    assert call(*given, "--output", tmp_path / "other.png") == 1
    assert not (tmp_path / "other.png").exists()


@pytest.mark.parametrize("arguments, line", [
    (["--format", "rec", "--output", "sheet.txt"], "no picture format ends in '.txt'"),
    (["--format", "rec", "--output", "sheet.png", "--images", "gone"], "gone: no such file or folder of images"),
    (["--format", "jsonl", "--output", "sheet.png", "--split", "val"], "no option 'split'"),
    (["--output", "sheet.png"], "--format"),
])  # fmt: skip
def test_mistakes(
    arguments: list[str], line: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        call(pictures / "rec.json", "--images", pictures / "images", *arguments)
    shown = capsys.readouterr()
    assert (end.value.code, shown.out) == (2, "")
    assert line in shown.err and shown.err.count("\n") == 1
