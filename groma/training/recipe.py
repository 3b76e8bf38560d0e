"""Whether the files that a run configuration names are in place: asked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from groma.config import ConfigError
from groma.settings import EvalSet, RunConfig

_BESIDE = {"refer": ("instances.json",), "refer_captions": ("instances.json",), "vg": ("image_data.json",)}
"""What a reader needs besides the paths of the configuration: by format, in the folder of the annotations."""


def missing_sets(run: RunConfig) -> list[str]:
    """One line for each data set of ``run`` of which a file or folder is missing: the paths looked at, and the section
    of datasets/README.md that tells how to get them. Sets for scores count where the run takes scores."""
    lines = []
    for source in run.data.sources:
        beside = [str(Path(source.ann).parent / name) for name in _BESIDE.get(source.format, ())]
        lines.append(_line(source.name, [source.ann, *beside, source.images], source.section))
    scored: dict[str, EvalSet | None] = {"evaluate.proposals": run.evaluate.proposals, "evaluate.rec": run.evaluate.rec}
    for name, there in scored.items():
        if run.evaluate.every and there is not None:
            lines.append(_line(name, [there.ann, there.images], ""))
    return [line for line in lines if line]


def require_inputs(run: RunConfig) -> None:
    """Raises ConfigError, in one line that tells all of it, where the starting model or data sets are missing."""
    key, start = ("init", run.model.init) if run.model.init else ("config", run.model.config)
    told = [] if (Path(start or "") / "config.json").is_file() else [f"model.{key}: no config.json in {start}"]
    if missing := missing_sets(run):
        told.append(f"data sets missing ({len(missing)}): {'; '.join(missing)}")
    if told:
        raise ConfigError("; ".join(told))


def _line(name: str, paths: list[str], section: str) -> str:
    """Which of ``paths`` are missing, or "" where all are there."""
    gone = list(dict.fromkeys(path for path in paths if not _there(Path(path))))
    hint = f" (datasets/README.md, section {section!r})" if section else ""
    return f"{name}: no {', '.join(gone)}{hint}" if gone else ""


def _there(path: Path) -> bool:
    """Is there such a file or folder, or a tar that it may lie in ("train2017.tar/train2017")?"""
    return path.exists() or any(folder.suffix == ".tar" and folder.is_file() for folder in path.parents)
