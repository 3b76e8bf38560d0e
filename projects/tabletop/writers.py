"""The public annotation formats, written from scene records.

Each writer takes the records of a split, in order, and returns or writes one file. Boxes are
xywh in pixels. Image, annotation and category ids agree across the files of a split, and image
ids differ between splits.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

from projects.tabletop.vocabulary import KINDS, SPLITS

Record = dict
_SLOTS = 16  # annotation ids per image
_NOUNS = {  # WordNet's noun and its gloss, as LVIS has them; box is not an LVIS word
    "cup": ("cup.n.01", "a small open container usually used for drinking; usually has a handle"),
    "bowl": ("bowl.n.03", "a dish that is round and open at the top for serving foods"),
    "plate": ("plate.n.04", "dish on which food is served or from which food is eaten"),
    "bottle": ("bottle.n.01", "a glass or plastic vessel used for storing drinks or other liquids"),
    "vase": ("vase.n.01", "an open jar of glass or porcelain used as an ornament or to hold flowers"),
    "ball": ("ball.n.06", "a spherical object used as a plaything"),
    "book": ("book.n.01", "a written work or composition that has been published"),
    "box": ("box.n.01", "a (usually rectangular) container; may have a lid"),
    "can": ("can.n.01", "airtight sealed metal container for food or drink or paint etc."),
    "ring": ("ring.n.02", "a toroidal shape"),
    "cone": ("cone.n.03", "a shape whose base is a circle and whose sides taper up to a point"),
    "candle": ("candle.n.01", "stick of wax with a wick in the middle"),
}


def image_id(split: str, index: int) -> int:
    """The id of a scene's picture: a million apart between splits."""
    return SPLITS.index(split) * 1_000_000 + index + 1


def annotation_id(split: str, index: int, slot: int) -> int:
    """The id of an annotated thing; ``slot`` is its place in the record's things."""
    return image_id(split, index) * _SLOTS + slot


def category_id(kind: str) -> int:
    """A kind's id, from 1 in the vocabulary's order."""
    return KINDS.index(kind) + 1


def write_split(records: Iterable[Record], folder: Path, split: str, info: dict) -> dict[str, int]:
    """Write every annotation file of a split into ``folder``; returns how many expressions of each type.

    ``info`` goes into every file that has a place for it. Files appear whole or not at all;
    ``scenes.jsonl`` comes last, so its presence says that the split is finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    coco, lvis, refer = _Coco(), _Coco(), _Coco()
    rec, captions, regions = _Coco(), _Coco(), _Coco()
    dialogues: list[str] = []
    refs: list[dict] = []
    sentence_ids = iter(range(1, 1_000_000_000))
    counts: dict[str, int] = {}
    kept = folder / "scenes.jsonl.partial"
    with kept.open("w", encoding="utf-8") as scenes:
        for record in records:
            _add_instances(coco, record, split, rle=True)
            _add_instances(refer, record, split, rle=False)
            _add_lvis(lvis, record, split)
            refs.extend(_refs(record, split, sentence_ids))
            _add_rec(rec, record, split)
            _add_caption(captions, record, split)
            _add_regions(regions, record, split)
            dialogues.extend(_dump(entry) for entry in _dialogue(record))
            scenes.write(_dump(_slim(record)) + "\n")
            for expression in record["expressions"]:
                counts[expression["type"]] = counts.get(expression["type"], 0) + 1
    (folder / "refer" / "tabletop").mkdir(parents=True, exist_ok=True)
    coco.write(folder / "instances.json", info, _categories())
    refer.write(folder / "refer" / "tabletop" / "instances.json", info, _categories())
    lvis.write(folder / "lvis.json", info, _lvis_categories(lvis))
    rec.write(folder / "rec.json", info, _categories())
    captions.write(folder / "grounded_captions.json", info, _categories())
    regions.write(folder / "regions.json", info, _categories())
    write_whole(folder / "conversations.json", ("[\n" + ",\n".join(dialogues) + "\n]\n").encode())
    write_whole(folder / "refer" / "tabletop" / "refs(seed).p", pickle.dumps(refs, protocol=2))
    kept.replace(folder / "scenes.jsonl")
    return counts


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a kill leaves the old one or the new one, never half of it."""
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(path)


class _Coco:
    """A COCO-like file in the making; entries are kept as text, a tenth of their size as objects."""

    def __init__(self) -> None:
        self.images: list[str] = []
        self.annotations: list[str] = []
        self.seen: dict[int, list[int]] = {}  # category -> [images, instances]

    def write(self, path: Path, info: dict, categories: list[dict]) -> None:
        parts = [f'{{"info": {_dump(info)}', '"licenses": []', f'"categories": {_dump(categories)}']
        parts += [f'"{name}": [\n' + ",\n".join(getattr(self, name)) + "\n]" for name in ("images", "annotations")]
        write_whole(path, (",\n".join(parts) + "}\n").encode())


def _dump(value: object) -> str:
    return json.dumps(value, separators=(", ", ": "))


def _slim(record: Record) -> Record:
    things = [{k: v for k, v in thing.items() if k != "segmentation"} for thing in record["things"]]
    return record | {"things": things}


def _annotated(record: Record) -> Iterator[tuple[int, dict]]:
    return ((slot, thing) for slot, thing in enumerate(record["things"]) if thing["annotated"])


def _xywh(box: list[int]) -> list[int]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


def _image(record: Record, split: str) -> dict:
    return {"id": image_id(split, record["index"])} | {k: record[k] for k in ("file_name", "width", "height")}


def _annotation(record: Record, split: str, slot: int) -> dict:
    thing = record["things"][slot]
    return {
        "id": annotation_id(split, record["index"], slot),
        "image_id": image_id(split, record["index"]),
        "category_id": category_id(thing["kind"]),
        "bbox": _xywh(thing["box"]),
        "area": thing["area"],
        "iscrowd": 0,
    }


def _categories() -> list[dict]:
    return [{"id": category_id(kind), "name": kind, "supercategory": "object"} for kind in KINDS]


def _add_instances(out: _Coco, record: Record, split: str, rle: bool) -> None:
    """COCO instances; the mask as run lengths, or as polygons for the tools that know nothing else."""
    out.images.append(_dump(_image(record, split)))
    size = [record["height"], record["width"]]
    for slot, thing in _annotated(record):
        mask = {"size": size, "counts": thing["rle"]} if rle else thing["segmentation"]
        out.annotations.append(_dump(_annotation(record, split, slot) | {"segmentation": mask}))


def _add_lvis(out: _Coco, record: Record, split: str) -> None:
    """LVIS: kinds surely absent are negative, kinds with a hidden thing are not exhaustively annotated."""
    there = {thing["kind"] for thing in record["things"]}
    hidden = {thing["kind"] for thing in record["things"] if not thing["annotated"]}
    extra = {
        "license": 0,
        "flickr_url": "",
        "coco_url": f"{split}/images/{record['file_name']}",
        "date_captured": "",
        "neg_category_ids": [category_id(kind) for kind in KINDS if kind not in there],
        "not_exhaustive_category_ids": sorted(category_id(kind) for kind in hidden),
    }
    out.images.append(_dump(_image(record, split) | extra))
    in_image = set()
    for slot, thing in _annotated(record):
        entry = _annotation(record, split, slot) | {"segmentation": thing["segmentation"]}
        del entry["iscrowd"]
        out.annotations.append(_dump(entry))
        tally = out.seen.setdefault(entry["category_id"], [0, 0])
        tally[0] += entry["category_id"] not in in_image
        tally[1] += 1
        in_image.add(entry["category_id"])


def _lvis_categories(seen: _Coco) -> list[dict]:
    out = []
    for kind in KINDS:
        images, instances = seen.seen.get(category_id(kind), [0, 0])
        synset, gloss = _NOUNS[kind]
        out.append(
            {
                "id": category_id(kind),
                "name": kind,
                "synset": synset,
                "synonyms": [kind],
                "def": gloss,
                "frequency": "r" if images <= 10 else "c" if images <= 100 else "f",
                "image_count": images,
                "instance_count": instances,
            }
        )
    return out


def _refs(record: Record, split: str, sentence_ids: Iterator[int]) -> list[dict]:
    """Refs of the `refer` layout: one for each thing that a singular expression names."""
    by_slot: dict[int, list[dict]] = {}
    for expression in record["expressions"]:
        if expression["type"] != "plural" and len(expression["referents"]) == 1:
            text = expression["text"]
            sentence = {"raw": text, "sent": text, "tokens": text.split(), "sent_id": next(sentence_ids)}
            by_slot.setdefault(expression["referents"][0], []).append(sentence)
    out = []
    for slot in sorted(by_slot):
        number = annotation_id(split, record["index"], slot)
        out.append(
            {
                "ref_id": number,
                "ann_id": number,
                "image_id": image_id(split, record["index"]),
                "category_id": category_id(record["things"][slot]["kind"]),
                "split": split,
                "file_name": record["file_name"].replace(".jpg", f"_{number}.jpg"),
                "sentences": by_slot[slot],
                "sent_ids": [sentence["sent_id"] for sentence in by_slot[slot]],
            }
        )
    return out


def _add_rec(out: _Coco, record: Record, split: str) -> None:
    """Groma's REC file: an image entry is one expression, an annotation one of its referents.

    Beyond the usual keys: expression_type, unseen_pair, and scene_id, the picture's id elsewhere.
    """
    for expression in record["expressions"]:
        number = SPLITS.index(split) * 10_000_000 + len(out.images) + 1
        entry = _image(record, split) | {
            "id": number,
            "caption": expression["text"],
            "expression_type": expression["type"],
            "unseen_pair": expression["unseen_pair"],
            "scene_id": image_id(split, record["index"]),
        }
        out.images.append(_dump(entry))
        for slot in expression["referents"]:
            out.annotations.append(
                _dump(_annotation(record, split, slot) | {"id": len(out.annotations) + 1, "image_id": number})
            )


def _add_caption(out: _Coco, record: Record, split: str) -> None:
    """Flickr30k-Entities style: each named box with the characters that name it."""
    out.images.append(_dump(_image(record, split) | {"caption": record["caption"]["text"]}))
    for mention in record["caption"]["mentions"]:
        for slot in mention["referents"]:
            entry = _annotation(record, split, slot)
            out.annotations.append(_dump(entry | {"tokens_positive": [[mention["start"], mention["end"]]]}))


def _add_regions(out: _Coco, record: Record, split: str) -> None:
    """Visual-Genome style: a description for each annotated thing."""
    out.images.append(_dump(_image(record, split)))
    for slot, thing in _annotated(record):
        out.annotations.append(_dump(_annotation(record, split, slot) | {"caption": thing["caption"]}))


def _dialogue(record: Record) -> list[dict]:
    """LLaVA style: one conversation, its first question behind the image."""
    turns = []
    for question, answer in record["conversation"]:
        lead = "" if turns else "<image>\n"
        turns += [{"from": "human", "value": lead + question}, {"from": "gpt", "value": answer}]
    name = record["file_name"]
    return [{"id": name.removesuffix(".jpg"), "image": name, "conversations": turns}] if turns else []
