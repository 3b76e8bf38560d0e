"""GRIT: web images whose captions have grounded expressions (Peng et al., arXiv 2306.14824), in three layouts.

A JSON list, as Groma reads it; the parquet shards of the public set; and what img2dataset makes of those, tars with a
picture and a JSON of all columns under one key::

    grit.json       [{file (or filename), caption, ref_exps: [[start, end, x1, y1, x2, y2, score] …]} …]
    *.parquet       columns caption, ref_exps, and key (img2dataset) or id
    00000.tar       000000012.jpg, 000000012.json {key, caption, ref_exps, …}, 000000012.txt, …

``start`` and ``end`` are characters of the caption, often written as floats; corners are in [0, 1] of the picture.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groma import markup
from groma.data import prompts
from groma.data.coco import Box, stack
from groma.data.detection import DIGITS
from groma.data.grounding import caption_sample, ground
from groma.data.json_stream import json_items
from groma.data.records import MAX_PROBLEMS, AnnotationError, Record, Records, field
from groma.data.shards import Member, Shard, ShardError
from groma.structures import Sample, Turn

SLACK = 0.1
"""How far a corner may lie outside of the picture, and is cut; what is farther out is in another unit."""
SHARD = 10_000
"""Records of a tar, as img2dataset makes them."""
_GROUNDED = re.compile(
    f"{markup.PHRASE_OPEN}(.*?){markup.PHRASE_CLOSE}{markup.ROI_OPEN}((?:{markup.GROUND_BOX})+){markup.ROI_CLOSE}",
    re.DOTALL,
)
"""A phrase and its places in the markup of an entry, whose own text is escaped."""
_COLUMNS = ("key", "id", "status", "caption", "ref_exps")


class Grit(Records):
    """One Sample a record: a caption whose expressions are grounded in their boxes; or, with ``turns``, up to that many
    of its expressions, drawn per epoch, as referring questions (the original asks for one).

    ``annotations`` is a JSON file, a parquet file, a tar, or a folder of tars or of parquet files. Of expressions that
    overlap, the one that starts first and is longest stays, so that of nested ones it is the outermost (section 3.1 of
    the paper); those with a score under ``min_score`` are not looked at. Records without one left, and downloads that
    img2dataset marks as failed, are left out.

    A record of shard 00000 with key 000000012 has its picture in ``images``/00000.tar, or in ``images``/00000/, or in
    ``images`` itself, as 000000012.jpg; one with an id has ID.jpg. Pictures in tars are read block by block
    (``locality``). A damaged shard, of which what can be read is used, is a problem. Raises AnnotationError.
    """

    def __init__(self, annotations: str | Path, images: str | Path, min_score: float = 0.0, turns: int = 0,
                 seed: int = 0, max_problems: float = MAX_PROBLEMS) -> None:  # fmt: skip
        self.min_score, self.turns = min_score, turns
        self._folders: dict[str, str] = {}
        super().__init__(annotations, images, seed, max_problems)
        inside = len(self.entries) > 0 and ".tar/" in self.path(self.entries[0][0])
        self.locality = SHARD if inside else 0

    def path(self, name: str) -> str:
        shard, _, file = name.rpartition("/")
        if not shard.endswith(".tar"):
            return super().path(name)
        if shard not in self._folders:
            there = [s for s in (shard, shard.removesuffix(".tar")) if (self.images / s).exists()]
            self._folders[shard] = f"{there[0]}/" if there else ""
        return super().path(self._folders[shard] + file)

    def _files(self) -> list[Path]:
        return [self.file, *self._shards()] if self.file.is_dir() else [self.file]

    def _options(self) -> str:
        return str(self.min_score)

    def _shards(self) -> list[Path]:
        if not self.file.is_dir():
            return [self.file]
        shards = sorted(self.file.glob("*.tar")) or sorted(self.file.glob("*.parquet"))
        if not shards:
            raise AnnotationError(f"{self.file}: no *.tar and no *.parquet, expected a folder of GRIT's shards")
        return shards

    def _read(self) -> Iterator[Any]:
        for shard in self._shards():
            rows = {".tar": self._tar, ".parquet": self._parquet}.get(shard.suffix, self._json)(shard)
            for name, row in rows:
                entry = self._usable(self._caption, shard, name, row)
                if entry is not None:
                    yield entry

    def _json(self, shard: Path) -> Iterator[tuple[str, Record]]:
        for number, record in enumerate(json_items(shard)):
            key = "filename" if isinstance(record, dict) and "file" not in record and "filename" in record else "file"
            name = self._usable(field, record, key, str, shard)
            if name is not None:
                yield name, {"id": number, **record}

    def _parquet(self, shard: Path) -> Iterator[tuple[str, Record]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(shard) as file:
                there = [column for column in _COLUMNS if column in file.schema_arrow.names]
                if not {"caption", "ref_exps"} <= set(there) or not {"key", "id"} & set(there):
                    got = ", ".join(file.schema_arrow.names)
                    raise AnnotationError(f"{shard}: columns {got}, expected caption, ref_exps, and key or id")
                for batch in file.iter_batches(1024, columns=there):
                    for row in batch.to_pylist():
                        if row.get("status", "success") != "success":
                            continue
                        key = row.get("key", row.get("id"))
                        yield f"{shard.stem}.tar/{key}.jpg" if "key" in row else f"{key}.jpg", {"id": key, **row}
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            self._noted.append(f"{shard}: cannot be read to its end ({' '.join(str(error).split())})")

    def _tar(self, path: Path) -> Iterator[tuple[str, Record]]:
        """Each record with the name of its picture, which lies beside it and is not read."""
        shard = Shard(path)
        try:
            for key, files in shard.samples():
                picture = next((file for kind, file in files.items() if kind not in ("json", "txt")), None)
                if picture is None or "json" not in files:
                    self._noted.append(f"{path}: {key}: got {', '.join(files)}, expected a picture and a json")
                    continue
                row = self._usable(self._row, path, key, files["json"])
                if row is not None:
                    yield f"{path.name}/{picture.name}", row
            if shard.damage:
                self._noted.append(f"{path}: damaged, only its first part is used: {shard.damage}")
        except ShardError as error:
            self._noted.append(str(error))

    def _row(self, path: Path, key: str, file: Member) -> Record:
        try:
            row = json.loads(file.read())
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            raise AnnotationError(f"{path}: {key}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise AnnotationError(f"{path}: {key}: a JSON {type(row).__name__}, expected an object")
        return {**row, "id": key}

    def _caption(self, shard: Path, name: str, row: Record) -> Any:
        """[image name, id, markup, boxes], or None without an expression."""
        caption = field(row, "caption", str, shard)
        phrases: dict[tuple[int, int], list[Box]] = {}
        for expression in field(row, "ref_exps", list, shard):
            try:
                found = read_expression(expression, len(caption), self.min_score)
                if found is not None and not caption[slice(*found[0])].strip():
                    raise ValueError(f"characters {found[0]} are blank")
            except ValueError as error:
                raise AnnotationError(f"{shard}: record {row['id']}: ref_exps: {error}") from error
            if found is not None:
                phrases.setdefault(found[0], []).append(found[1])
        if not phrases:
            return None
        text, boxes = ground(caption, phrases)
        return name, row["id"], text, boxes

    def _sample(self, entry: Any, draw: random.Random) -> Sample:
        name, number, text, boxes = entry
        if not self.turns:
            return caption_sample(self.path(name), self.name_of(number), text, boxes, draw)
        asked, start = [], 0
        for phrase, places in _GROUNDED.findall(text):
            end = start + places.count(markup.GROUND_BOX)
            asked.append((markup.unescape(phrase), stack(boxes[start:end])))
            start = end
        turns: list[Turn] = []
        for phrase, found in draw.sample(asked, min(self.turns, len(asked))):
            turns += prompts.refer_turns(phrase, found, draw.randrange(len(prompts.REFER)))
        return Sample(self.path(name), self.name_of(number), tuple(turns))


def read_expression(values: Any, length: int, min_score: float = 0.0) -> tuple[tuple[int, int], Box] | None:
    """[start, end, x1, y1, x2, y2, score] → ((start, end), box), the box cut to [0, 1].

    None where the score is under ``min_score`` or the box empty. Raises ValueError for what is malformed, for a span
    outside a caption of ``length`` characters, and for corners that are reversed or not in [0, 1].

    >>> read_expression([0.0, 5.0, 0.1, 0.2, 0.5, 1.01, 0.9], 5)
    ((0, 5), (0.1, 0.2, 0.5, 1.0))
    """
    numbers = isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e9 for v in values)
    if not numbers or len(values) not in (6, 7):
        raise ValueError(f"{values!r:.80}, expected [start, end, x1, y1, x2, y2, score]")
    start, end, *corners = values[:6]
    if start != int(start) or end != int(end) or not 0 <= start < end <= length:
        raise ValueError(f"span {start, end}, expected [start, end) inside a caption of {length} characters")
    x1, y1, x2, y2 = corners
    if not all(-SLACK <= v <= 1 + SLACK for v in corners) or x2 < x1 or y2 < y1:
        raise ValueError(f"box {tuple(corners)}, expected x1 <= x2 and y1 <= y2 in [0, 1]")
    x1, y1, x2, y2 = (round(min(max(v, 0.0), 1.0), DIGITS) for v in corners)
    if (len(values) == 7 and values[6] < min_score) or x1 == x2 or y1 == y2:
        return None
    return (int(start), int(end)), (x1, y1, x2, y2)
