"""Run a script of datasets/ as its user does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


class Result:
    """What a script said: ``code``, ``out`` and ``err``."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROMA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def run(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("prepare_vg", "in.json", "out.json"): its main, in this process, with what it wrote."""

    def call(script: str, *arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{script}.py"])
        spec = spec_from_file_location(script, root / "datasets" / f"{script}.py")
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, script, module)
        spec.loader.exec_module(module)
        capsys.readouterr()
        try:
            code = module.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
        said = capsys.readouterr()
        return Result(code, said.out, said.err)

    return call


@pytest.fixture
def process(root: Path) -> Run:
    """The same in a process of its own."""

    def call(script: str, *arguments: object) -> Result:
        done = subprocess.run(
            [sys.executable, f"datasets/{script}.py", *map(str, arguments)],
            cwd=root, capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    return call
