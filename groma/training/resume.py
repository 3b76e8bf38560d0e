"""May a run go on from a checkpoint of another configuration? Where the data would come in another order it may not."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from groma.settings import RunConfig
from groma.training.parts import TrainingError

FILE = "run.json"
FREE = ("output", "log", "save", "evaluate", "data.workers", "data.prefetch", "data.max_skipped", "data.proposal_cache",
        "optim.max_nonfinite")  # fmt: skip
"""Sections and keys that change nothing of what is learnt."""
ORDER = ("stage", "seed", "data.sources", "data.pack", "optim.batch_size", "optim.accumulate")
"""Those that decide which record comes when."""
STATE = ("model.train", "model.lr_scale", "model.lora", "model.quantise", "optim.deepspeed")
"""Those that decide what the optimiser's state in a checkpoint looks like."""
PATHS = ("ann", "images", "section")
"""The keys of a source that may differ in ORDER: data that moved is the same data."""


def record(run: RunConfig, batches: int, world: int, folder: Path) -> None:
    """Write beside a checkpoint what ``compare`` reads: configuration, batches of an epoch, number of processes."""
    content = {"config": asdict(run), "batches": batches, "processes": world}
    (folder / FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def compare(run: RunConfig, batches: int, world: int, checkpoint: Path) -> list[str]:
    """The keys whose value is another than when ``checkpoint`` was written, those of FREE left out: "key: was → is".

    Raises TrainingError, one line, where the checkpoint cannot be gone on from.
    """
    file = checkpoint / FILE
    if not file.is_file():
        return []
    saved = json.loads(file.read_text(encoding="utf-8"))
    was, now = _flat(saved["config"]), _flat(json.loads(json.dumps(asdict(run))))
    differ = {key for key in was.keys() | now.keys() if was.get(key) != now.get(key) and not _within(key, FREE)}
    told = {key: f"{key}: {_shown(was.get(key))} → {_shown(now.get(key))}" for key in sorted(differ)}
    # a checkpoint of adapters does not hold what they were trained over
    base = ("model.init", "model.config", "model.llm", "model.encoder") if run.model.lora.rank else ()
    state = [line for key, line in told.items() if _within(key, (*STATE, *base))]
    if state:
        raise TrainingError(f"{checkpoint.name} holds another optimiser ({'; '.join(state)}): start a new output")
    order = [line for key, line in told.items() if _within(key, ORDER) and key.rpartition(".")[2] not in PATHS]
    if saved["processes"] != world:
        order.append(f"processes: {saved['processes']} → {world}")
    if saved["batches"] != batches and not order:
        order.append(f"batches an epoch: {saved['batches']} → {batches}, so a data set has changed")
    if order:
        raise TrainingError(
            f"{checkpoint.name} was reached with another order of the data ({'; '.join(order)}): "
            "set it back, or start a new output"
        )
    return list(told.values())


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} → {"a.b.0": 1}; an empty list or mapping is a value."""
    if isinstance(value, dict) and value:
        items = list(value.items())
    elif isinstance(value, list) and value:
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
