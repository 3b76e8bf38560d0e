"""Make the small files of this folder from the full recording of the original implementation.

    python tests/golden/thin.py RECORDING        # the folder that holds public/ and exotic/

Run by hand, once per recording; the tests read only what it wrote. For every set it writes SET.safetensors, the
recorded numbers, and SET.json, what is needed to make the model and read the numbers:

- integers and small tensors whole; of a larger one every k-th number in row-major order, about LIMIT of them, with k
  coprime to their count so that all columns are met. SET.json names its shape and k under "sampled";
- of every gradient its norm, followed by the recorded samples (every (n // 32)-th number, n // 16 for detection);
- no weights and no pictures: weights.py makes them. This script compares its pictures and its tensors' first, middle
  and last numbers with the recording, and fails where they differ.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import weights  # noqa: E402

LIMIT = 6000
PARTS = ("inputs", "infer", "region", "refer", "train", "det")
# Of the recording, what no test reads: the pictures, and what shows the original's own bookkeeping.
LEFT_OUT = {"inputs/images", "infer/dec_reference_unused", "refer/mutated_input_ids", "train/mutated_input_ids"}


def thin(recording: Path, name: str) -> None:
    """Read ``recording``/``name`` and write name.safetensors and name.json beside this file."""
    folder = recording / name
    meta, config = (json.loads((folder / f).read_text()) for f in ("meta.json", "config.json"))
    listed = json.loads((folder / "state_dict_keys.json").read_text())
    keys = {key: entry["shape"] for key, entry in listed.items() if "alias_of" not in entry}
    full = {
        f"{part}/{key}": value for part in PARTS for key, value in load_file(folder / f"{part}.safetensors").items()
    }
    check(name, meta, listed, full["inputs/images"].float())
    numbers = {"weights": torch.tensor([listed[key]["check"] for key in keys])}
    sampled: dict[str, Any] = {}
    for key, value in full.items():
        if "/grad/" not in key and key not in LEFT_OUT:
            numbers[key], stride = sample(value)
            if stride > 1:
                sampled[key] = {"shape": list(value.shape), "stride": stride}
    numbers |= gradients(full, meta)
    facts = {
        "seed": meta["seed"], "side": full["inputs/images"].shape[-1], "config": config,
        "overrides": meta["overrides"],
        "selection": meta["selection_cases"], "train_loss": meta["train"]["loss"],
        "detection": {source: meta["det"][source]["loss_dict"] | {"loss": meta["det"][source]["loss"]}
                      for source in ("coco", "sa1b")},
        "sampled": sampled, "keys": keys,
    }  # fmt: skip
    save_file(numbers, HERE / f"{name}.safetensors")
    lines = [f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in facts.items()]
    (HERE / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def sample(value: Tensor) -> tuple[Tensor, int]:
    """(float32 or int64 numbers, stride): all of the shape given with stride 1, or a flat sample."""
    if not value.is_floating_point():
        return value.long(), 1
    if value.numel() <= LIMIT:
        return value.float(), 1
    stride = -(-value.numel() // LIMIT)
    while math.gcd(stride, value.numel()) > 1:
        stride += 1
    return value.float().flatten()[::stride].clone(), stride


def gradients(full: dict[str, Tensor], meta: dict[str, Any]) -> dict[str, Tensor]:
    """Per trainable tensor its gradient's norm and samples; of the other detection source the norm alone."""
    found = {}
    for part, norms in (("train", meta["train"]["grads"]), ("det", meta["det"]["coco"]["grads"])):
        for key, norm in norms.items():
            samples = full.get(f"{part}/grad/{key}")
            if samples is not None:
                value = norm["norm"] if isinstance(norm, dict) else norm
                found[f"{part}/grad/{key}"] = torch.cat((torch.tensor([value]), samples.float()))
    for key, norm in meta["det"]["sa1b"]["grads"].items():
        if norm is not None:
            found[f"det/grad_sa1b/{key}"] = torch.tensor([norm])
    return found


def check(name: str, meta: dict[str, Any], listed: dict[str, Any], images: Tensor) -> None:
    """SystemExit where the rule in weights.py does not give the recorded weights and pictures."""
    for i, image in enumerate(images):
        if not torch.equal(torch.from_numpy(weights.picture(meta["seed"], f"image{i}", image.shape[-1])), image):
            raise SystemExit(f"{name}: image{i} differs from the rule")
    for key, entry in listed.items():
        if "alias_of" in entry or key in meta["overrides"]:
            continue
        if weights.spread(key, entry["shape"]) != (entry["scale"], entry["offset"]):
            raise SystemExit(f"{name}: {key} has another scale or offset than the rule")
        values = weights.tensor(meta["seed"], key, entry["shape"]).ravel()
        if [float(values[i]) for i in (0, values.size // 2, -1)] != torch.tensor(entry["check"]).tolist():
            raise SystemExit(f"{name}: {key} differs from the rule")


if __name__ == "__main__":
    for each in ("public", "exotic"):
        thin(Path(sys.argv[1]), each)
