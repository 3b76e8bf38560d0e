"""Files of a checkpoint, in a directory or on the hub: found, read without running anything in them, and written."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import extract_commit_hash

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""What from_pretrained takes to find files on the hub."""
SHARD = "5GB"
# What a damaged or hostile file makes torch's reader raise. It runs with weights_only, so that it runs nothing else.
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError,
               TypeError, zipfile.BadZipFile)  # fmt: skip
# What torch's refusal of a pickle ends in, after its advice how to run it after all.
_REASON = re.compile(r"(?:WeightsUnpickler error:\s*|\n\n)([^\n]+)")


@dataclass(frozen=True)
class Source:
    """A directory, or a repository of the hub with the OPTIONS to reach it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def file(self, name: str) -> Path | None:
        """Where file ``name`` is, downloaded if need be; None if there is none. OSError for a hub out of reach."""
        if Path(self.name).is_dir():
            path = Path(self.name) / (self.options.get("subfolder") or "") / name
            return path if path.is_file() else None
        options = {k: v for k, v in self.options.items() if k != "subfolder" or v}
        try:
            return Path(hf_hub_download(self.name, name, **options))
        except EntryNotFoundError:
            return None

    def config(self) -> dict[str, Any] | None:
        """What config.json holds; None if there is none to be read, which transformers then explains."""
        try:
            path = self.file("config.json")
            content = json.loads(path.read_text(encoding="utf-8")) if path else None
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def pinned(self) -> Source:
        """The same source at the commit its config.json comes from, so that all files are of one commit."""
        commit = extract_commit_hash(str(self.file("config.json")), None)
        return replace(self, options={**self.options, "revision": commit}) if commit else self

    def weights(self, use_safetensors: bool | None = None) -> list[Path]:
        """The files that hold tensors: one, or the shards an index names. ``use_safetensors``: None is either kind.

        Raises ValueError when there is none, or when an index is damaged or names a file that is not there.
        """
        kinds = {None: (SAFE, PICKLED), True: (SAFE,), False: (PICKLED,)}[use_safetensors]
        for kind in kinds:
            if path := self.file(kind):
                return [path]
            if index := self.file(kind + INDEX):
                return [self._shard(name, index) for name in _shards(index)]
        either = " or ".join(f"{kind}[{INDEX}]" for kind in kinds)
        raise ValueError(f"{self.name} holds no weights, expected {either}")

    def _shard(self, name: str, index: Path) -> Path:
        path = self.file(name)
        if path is None:
            raise ValueError(f"{index}: names {name}, which is not there")
        return path


def _shards(index: Path) -> list[str]:
    """Names of the files an index lists, none of which leaves its folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: not an index of weights ({type(error).__name__}: {error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index}: names {name!r}, expected a file beside it")
    return names


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of one .safetensors or .bin file, as views of the file: they take memory when they are used.

    A .bin is a pickle; only tensors are read from it, and nothing in it is run. Raises ValueError with file and reason.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        mapped = zipfile.is_zipfile(path)  # the format since torch 1.6; the older one cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (SafetensorError, *_UNREADABLE) as error:
        raise ValueError(f"{path}: not read as weights ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected tensors by name")
    wrong = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]!r} is a {type(content[wrong[0]]).__name__}, expected tensors by name")
    return content


def _reason(error: BaseException) -> str:
    """One line of an error, without torch's advice to run what the file holds."""
    text = str(error).strip()
    found = _REASON.search(text)
    line = found[1] if found else (text.splitlines() or [""])[0]
    return f"{type(error).__name__}: {line.split('. Please use')[0]}"[:300]


def write(tensors: dict[str, Tensor], folder: Path, pickled: bool = False, shard: int | str = SHARD) -> Iterator[int]:
    """Write tensors as shards of at most ``shard``, with an index where there are several; yields the bytes of each.

    Empties ``tensors`` on the way. Tensors that share memory are written apart in safetensors, together in a pickle.
    """
    kind = PICKLED if pickled else SAFE
    pattern = "{suffix}.".join(kind.split("."))
    plan = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=shard)
    save: Callable[[dict[str, Tensor], Path], None] = torch.save if pickled else _save_safe
    for name, members in plan.filename_to_tensors.items():
        part = {member: tensors.pop(member).contiguous().cpu() for member in members}
        save(part, folder / f".{name}")
        (folder / f".{name}").replace(folder / name)  # tensors may be views of the file that had this name
        yield size(part)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / (kind + INDEX)).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_safe(part: dict[str, Tensor], path: Path) -> None:
    seen: set[int] = set()
    for name, tensor in part.items():
        where = tensor.data_ptr()
        part[name] = tensor.clone() if where in seen else tensor
        seen.add(where)
    save_file(part, path, metadata={"format": "pt"})


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
