"""The tabletop tokenizer: frequent words are one token, the same everywhere; same files, same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from groma.processor import GromaProcessor
from projects.tabletop.tokenizer import main, word_list

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    captions = [f"the {c} {k} left of the {c} vase" for c in ("red", "green") for k in ("cup", "bowl", "candle")] * 5
    rec = {"images": [{"id": i, "caption": c} for i, c in enumerate(captions)], "annotations": []}
    (folder / "rec.json").write_text(json.dumps(rec))
    talk = [{"from": "human", "value": "<image>\nHow many objects are there?"}, {"from": "gpt", "value": "Seven."}]
    (folder / "conversations.json").write_text(json.dumps([{"image": "a", "conversations": talk}] * 30))
    return folder.parent


def test_words_are_whole(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(data), "--out", str(tmp_path / "out"), "--image-size", "64", "--vocab", "700"]) == 0
    assert "tokens" in capsys.readouterr().out
    processor = GromaProcessor.from_pretrained(tmp_path / "out")
    for word in ("red", "candle", "vase", "left", "assistant", "Locate", "objects", "Seven"):
        assert len(processor.encode(word)) == 1, word
    (red,) = processor.encode("red")
    assert red in processor.encode("the red cup")
    assert red in processor.encode("<p>red cup</p>")
    assert processor.tokenizer.pad_token_id == processor.word_id("[PAD]") == 3
    assert len(processor.tokenizer) == processor.word_id("<r99>") + 1 == processor.word_id("<sep>") + 113
    text = "The <p>red cup</p><roi><r3></roi> stands."
    assert processor.decode(processor.encode(text)) == text


def test_same_files_same_bytes(data: Path, tmp_path: Path) -> None:
    script = ROOT / "projects/tabletop/tokenizer.py"
    for name in ("one", "two"):
        arguments = [sys.executable, str(script), "--data", str(data), "--out", str(tmp_path / name), "--vocab", "500"]
        subprocess.run(arguments, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "found none of rec.json" in capsys.readouterr().err


def test_word_list() -> None:
    assert word_list(["The cup, the bowl", "a cup"], minimum=2) == ("cup", "the")
