"""convert_checkpoint.py: there and back between the layouts; a mistake is one line and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging

from groma import cli
from groma.model.checkpoint import save_original
from groma.model.checkpoint_files import read
from groma.model.groma import GromaForConditionalGeneration
from groma.predictor import Groma
from tools import convert_checkpoint

QUIRKS = {"words": 0, "region_boxes": "centre", "region_stride_error": 2 * 448 / 64, "position_scale_offset": 0.1}
TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEXT = Path(__file__).resolve().parents[1] / "golden" / "text"


@pytest.fixture(autouse=True)
def _libraries_as_before(quiet_torch: None) -> Iterator[None]:
    """A tool quiets the libraries for its process: here that is the process of all tests."""
    before = logging.get_verbosity(), hub_logging.get_verbosity()
    yield
    logging.set_verbosity(before[0])
    hub_logging.set_verbosity(before[1])
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def original(make: Callable[..., Any], tiny_processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pickled checkpoint in the original layout, in shards."""
    folder = tmp_path_factory.mktemp("original")
    assert list(save_original(make(2, **QUIRKS), folder, pickled=True, shard="300KB"))
    tiny_processor.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [p for p in folder.iterdir() if p.suffix in (".bin", ".safetensors")]
    return {name: tensor for file in files for name, tensor in read(file).items()}


def one_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a wrong call says."""
    with pytest.raises(SystemExit) as caught:
        convert_checkpoint.main([str(a) for a in arguments])
    assert caught.value.code == cli.MISTAKE
    told = capsys.readouterr()
    assert told.out == ""
    lines = [line for line in told.err.replace("\r", "\n").splitlines() if line and "%|" not in line]  # progress
    assert len(lines) == 1, told.err
    return lines[0]


def test_there_and_back(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: Path) -> None:
    ours, back = tmp_path / "new" / "ours", tmp_path / "back"
    assert convert_checkpoint.main([str(original), str(ours), "--quiet"]) == cli.FOUND
    told = capsys.readouterr()
    assert told.out == f"{ours}: groma layout, 0.00 GB of float32\n"
    assert told.err == ""
    assert "llm_cfg" not in json.loads((ours / "config.json").read_text())
    groma, direct = Groma.from_pretrained(ours), Groma.from_pretrained(original)
    picture = pictures / "images" / "0.png"
    assert torch.equal(groma.look(picture).region_tokens, direct.look(picture).region_tokens)
    back.mkdir()  # empty: as good as new
    assert convert_checkpoint.main([str(ours), str(back), "--to", "original", "--format", "bin"]) == cli.FOUND
    told = capsys.readouterr()
    assert "the original's code has other region_rounds, region_groups" in told.err
    assert "writing: 100%" in told.err
    first, last = weights(original), weights(back)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert json.loads((back / "config.json").read_text())["perceiver_cfg"]["model_type"] == "ddetr"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "new"]


def test_dtype(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "rough"
    assert convert_checkpoint.main([str(original), str(target), "--dtype", "bfloat16", "--to", "original"]) == cli.FOUND
    assert capsys.readouterr().out.endswith("of bfloat16\n")
    assert {tensor.dtype for tensor in weights(target).values()} == {torch.bfloat16}
    assert GromaForConditionalGeneration.from_pretrained(target).dtype == torch.bfloat16


def test_the_original_keeps_its_tokenizer(original: Path, tmp_path: Path) -> None:
    """From the original layout to itself, the tokenizer's own files are copied as they are."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(original, source)
    (source / "tokenizer.json").unlink()
    for name in TOKENIZER:
        shutil.copyfile(TEXT / name, source / name)
    assert convert_checkpoint.main([str(source), str(target), "--to", "original", "--quiet"]) == cli.FOUND
    for name in TOKENIZER:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert not (target / "tokenizer.json").exists()


def test_a_target_in_use_is_refused_before_the_work(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GromaForConditionalGeneration, "from_pretrained", lambda *a, **k: pytest.fail("too late"))
    assert "is not empty" in one_line(capsys, original, original)
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in one_line(capsys, original, file)


def test_a_full_disk_is_told_before_writing(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 10))
    told = one_line(capsys, original, tmp_path / "ours")
    assert "needs 0.00 GB, but 0.00 GB are free" in told
    assert list(tmp_path.iterdir()) == []


def test_what_fails_leaves_nothing(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def fail(self: Any, folder: Path, **options: Any) -> None:
        (Path(folder) / "half").write_text("")
        raise OSError("No space left on device")

    monkeypatch.setattr(GromaForConditionalGeneration, "save_pretrained", fail)
    assert "No space left" in one_line(capsys, original, tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []


class Hostile:
    """Makes a directory when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


def test_wrong_sources(original: Path, tmp_path: Path, tiny: Path, make: Callable[..., Any],
                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    target = tmp_path / "target"
    assert "nowhere: no such directory" in one_line(capsys, tmp_path / "nowhere", target)
    assert "no file named" in one_line(capsys, tiny, target)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    assert "is of type 'llama', expected 'groma'" in one_line(capsys, other, target)
    (other / "config.json").write_text('{"model_type": "ddetr", "vis_encoder_cfg": {}, "ddetr_cfg": {}}')
    assert "an encoder and a proposer alone" in one_line(capsys, other, target)
    modern = tmp_path / "modern"
    shutil.copytree(tiny, modern)
    make(0).save_pretrained(modern)
    told = one_line(capsys, modern, target, "--to", "original")
    assert "the original has no model with region_boxes 'corners'" in told
    assert "is for --to original" in one_line(capsys, modern, target, "--format", "bin")
    hostile = tmp_path / "hostile"
    shutil.copytree(original, hostile)
    shard = sorted(hostile.glob("*.bin"))[0]
    torch.save({"llm.lm_head.weight": Hostile(tmp_path / "broken-in")}, shard)
    told = one_line(capsys, hostile, target)
    assert f"{shard.name}: not read as weights (UnpicklingError: " in told
    assert not (tmp_path / "broken-in").exists()
    assert not target.exists()
