"""Export: what is stored is what was measured, rounded weights and fitted settings together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from groma.evaluation.evidence import Settings, join, read
from groma.evaluation.grounding import read_rec
from groma.predictor import Groma
from projects.tabletop import export

pytestmark = pytest.mark.usefixtures("quiet_torch")


def test_export_stores_what_it_measured(
    make: Callable[..., Any], tiny_processor: Any, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    make(1, nms_threshold=0.1).save_pretrained(model)
    tiny_processor.save_pretrained(model)
    assert export.main(["--model", str(model), "--data", str(pictures), "--out", str(out), "--limit", "3"]) == 0
    first, held_out, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{out}: ")
    assert "of 3 absent expressions" in held_out
    assert "of 6 present" in held_out

    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    record = json.loads((out / "calibration.json").read_text())
    assert record["counts"]["expressions"] == 9
    stored = Groma.from_pretrained(out, dtype="float32")
    settings = Settings.of(stored.model.config)
    assert settings == Settings(**record["settings"]["after"])
    evidence = join(list(read(stored, read_rec(pictures / "rec.json"), pictures / "images", limit=3)))
    refused = evidence.presence(settings)[evidence.present] < settings.found_threshold
    assert refused.mean() == record["figures"]["after_same_data"]["present_refused"]
    top = evidence.top_scores(settings)
    brier = ((top - evidence.right) ** 2).mean()
    assert brier == pytest.approx(record["figures"]["after_same_data"]["top"]["brier"], abs=2e-5)


def test_a_wrong_split_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        export.main(["--model", str(tmp_path / "nowhere"), "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "no such directory" in capsys.readouterr().err
