"""benchmark.py as a person runs it: one real run with its processes, a saved model, and mistakes in one line."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "benchmark.py"
TABLE = ROOT / "groma" / "assets" / "tabletop" / "table.jpg"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=900, check=False,
        encoding="utf-8", env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_both_sides_in_their_processes() -> None:
    result = run("--config", "tiny", "--device", "cpu", "--dtype", "float32", "--naive", "--expressions", 2, "--repeat",
                 1, "--no-parts", "--json", "--quiet")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "--quiet keeps standard error empty"
    report = json.loads(result.stdout)
    assert report["gain"]["same_answers"] == report["expressions"] == 2
    assert (report["model"], report["random_weights"], report["regions"]) == ("tiny", True, 10)
    ours, naive = report["sides"]["ours"], report["sides"]["naive"]
    assert (ours["dtype"], naive["dtype"], ours["gemm_peak_gflops"]) == ("float32", "float32", 0)
    assert min(ours["peak_mib"], naive["peak_mib"]) > 50
    assert ours["many_ms"]["median"] > 0


@pytest.mark.parametrize("arguments, wanted", [
    (["--config", "huge"], "invalid choice: 'huge'"),
    (["--config", "tiny", "--model", "groma-7b"], "--model is not taken with it"),
    (["--config", "tiny", "--quantise", "8bit"], "--save DIR"),
    (["--save", "somewhere"], "which --config"),
    (["--expressions", "0"], "at least 1, got '0'"),
    (["--repeat", "-1"], "at least 1, got '-1'"),
    (["--config", "tiny", "--image", "missing.jpg"], "missing.jpg"),
])  # fmt: skip
def test_a_wrong_call_is_told_in_one_line(arguments: list[str], wanted: str) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("benchmark.py: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert wanted in result.stderr


@pytest.mark.usefixtures("quiet_torch")
def test_a_saved_model_is_the_same(tmp_path: Path) -> None:
    import torch

    from groma.evaluation.random_weights import SIZES, random_groma
    from groma.predictor import Groma

    tool = runpy.run_path(str(TOOL))
    assert tool["CONFIGS"] == tuple(SIZES)
    assert tool["main"](["--config", "tiny", "--dtype", "float32", "--device", "cpu", "--save", str(tmp_path)]) == 0
    loaded = Groma.from_pretrained(tmp_path, device="cpu", dtype="float32")
    made = random_groma("tiny", torch.device("cpu"), "float32")
    one, other = (groma.refer(groma.look(TABLE), "the red cup") for groma in (loaded, made))
    assert one.scores == pytest.approx(other.scores)
    assert one.boxes == other.boxes
