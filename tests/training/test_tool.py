"""tools/train_net.py: a user's mistake is one line and exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STAGE1 = "projects/tabletop/configs/stage1.yaml"
GIVEN = ["data_root=/nowhere", "output=/nowhere/out", "model.init=/nowhere/init"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config", "stage9.yaml"], "no configuration 'stage9.yaml'"),
        (["--config", STAGE1], "model.init, output must be given"),
        (["--config", STAGE1, *GIVEN], "model.init: no config.json in /nowhere/init"),
        (["--config", STAGE1, "optim.lr_rate=1", "--resume", *GIVEN], "optim.lr_rate in override"),
        (["optim.lr=1"], "--config"),
    ],
)  # fmt: skip
def test_mistakes(arguments: list[str], line: str, root: Path) -> None:
    command = [sys.executable, "tools/train_net.py", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("train_net.py: ") and line in done.stderr
    assert len(done.stderr.splitlines()) == 1
