#!/usr/bin/env python
"""Lay out a tiny stand-in of every public data set, as datasets/README.md says, to try the stage configurations with.

The files have the layouts of the real ones (JSON, CSV, XML, pickles, tars), the pictures are drawn: coloured balls and
boxes on a grey ground. A model learns nothing of use from them.

examples:
  datasets/make_standin.py /tmp/standin
  tools/train_net.py --config stage2.yaml data_root=/tmp/standin model.init=groma/assets/tabletop output=/tmp/try \\
    optim.max_steps=10 optim.accumulate=1 data.workers=0
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import pickle
import random
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

COLOURS = {"red": (205, 45, 40), "green": (45, 165, 65), "blue": (50, 75, 205), "yellow": (220, 195, 50)}
KINDS = {"ball": ImageDraw.ImageDraw.ellipse, "box": ImageDraw.ImageDraw.rectangle}
WIDTH, HEIGHT = 128, 96
PLACES = {"left": 4, "middle": 46, "right": 88}
"""Where things stand, and from which column of pixels on."""


class Thing(NamedTuple):
    """One drawn thing; ``box`` is xywh in pixels."""

    colour: str
    kind: str
    place: str
    box: list[int]

    @property
    def name(self) -> str:
        """What sets it apart from the others of its picture."""
        return f"the {self.colour} {self.kind} on the {self.place}"


class Standin:
    """Writes below ``root``; ``count`` pictures a set; the same ``seed`` draws the same bytes."""

    def __init__(self, root: Path, count: int, seed: int) -> None:
        self.root, self.count, self.draw = root, count, random.Random(seed)

    def picture(self, place: str) -> list[Thing]:
        """Draw a picture of two or three things at ``place`` below the root."""
        content, things = self.bytes()
        self.write(place, content)
        return things

    def bytes(self) -> tuple[bytes, list[Thing]]:
        """A picture as JPEG, and its things from left to right."""
        image = Image.new("RGB", (WIDTH, HEIGHT), (self.draw.randint(110, 150),) * 3)
        pen, things = ImageDraw.Draw(image), []
        for place in sorted(self.draw.sample(list(PLACES), self.draw.choice((2, 3))), key=PLACES.__getitem__):
            colour, kind = self.draw.choice(list(COLOURS)), self.draw.choice(list(KINDS))
            x, y, side = PLACES[place], self.draw.randint(4, 50), self.draw.randint(24, 36)
            KINDS[kind](pen, (x, y, x + side - 1, y + side - 1), fill=COLOURS[colour])
            things.append(Thing(colour, kind, place, [x, y, side, side]))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        return buffer.getvalue(), things

    def write(self, place: str, content: bytes | str | Any) -> None:
        """Bytes or text as they are, anything else as JSON."""
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def link(self, place: str, target: str) -> None:
        """A hard link to ``target``, relative to its folder."""
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to((path.parent / target).resolve())

    def tar(self, place: str, members: dict[str, bytes]) -> None:
        """A tar of ``members``."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        self.write(place, buffer.getvalue())

    def coco_json(self, pictures: dict[str, list[Thing]]) -> dict[str, Any]:
        """COCO's layout: {file name: things} with kinds as categories and outlines as polygons."""
        images, annotations = [], []
        for number, (name, things) in enumerate(pictures.items(), 1):
            images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT, "license": 1})
            for thing in things:
                x, y, w, h = thing.box
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": number, "category_id": list(KINDS).index(thing.kind) + 1,
                     "bbox": thing.box, "area": w * h, "iscrowd": 0,
                     "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
                )  # fmt: skip
        categories = [{"id": i, "name": kind, "supercategory": "toy"} for i, kind in enumerate(KINDS, 1)]
        return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def coco(to: Standin) -> None:
    """COCO 2017 and, on its pictures, everything that others annotated there: RefCOCO, LVIS, LLaVA-Instruct."""
    for split in ("train", "val"):
        pictures = {f"{i:012}.jpg": to.picture(f"coco/{split}2017/{i:012}.jpg") for i in range(1, to.count + 1)}
        content = to.coco_json(pictures)
        to.write(f"coco/annotations/instances_{split}2017.json", content)
        if split == "train":
            refcoco(to, content, pictures)
            llava(to, pictures)
        else:
            for image in content["images"]:
                image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
                image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
            to.write("lvis/lvis_v1_val.json", content)


def refcoco(to: Standin, content: dict[str, Any], pictures: dict[str, list[Thing]]) -> None:
    """The `refer` layout (pickles beside instances.json) of all three."""
    old = {name: f"COCO_train2014_{name}" for name in pictures}  # RefCOCO was made on the release of 2014
    instances = {**content, "images": [{**image, "file_name": old[image["file_name"]]} for image in content["images"]]}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    things = [thing for found in pictures.values() for thing in found]
    for form, by in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        refs = []
        for mark, thing in zip(content["annotations"], things, strict=True):
            sentences = []
            for text in (thing.name, thing.name.removeprefix("the ")):
                number = 2 * mark["id"] + len(sentences)
                sentences.append({"tokens": text.split(), "raw": text, "sent_id": number, "sent": text})
            refs.append(
                {"sent_ids": [s["sent_id"] for s in sentences], "sentences": sentences, "ref_id": mark["id"],
                 "file_name": old[names[mark["image_id"]]].replace(".jpg", f"_{mark['id']}.jpg"),
                 "ann_id": mark["id"], "image_id": mark["image_id"], "category_id": mark["category_id"],
                 "split": "val" if mark["image_id"] == 1 else "train"}
            )  # fmt: skip
        to.write(f"refcoco/{form}/refs({by}).p", pickle.dumps(refs, protocol=2))
        to.write(f"refcoco/{form}/instances.json", instances)


def llava(to: Standin, pictures: dict[str, list[Thing]]) -> None:
    """LLaVA-Instruct: conversations about COCO's pictures."""
    talks, reasons = [], []
    for name, things in pictures.items():
        number = {"id": name.removesuffix(".jpg"), "image": name}
        first, last = things[0], things[-1]
        talks.append({**number, "conversations": said(
            "<image>\nHow many things are there?", f"{len(things)}.",
            f"What is on the {last.place}?", f"A {last.kind}.",
        )})  # fmt: skip
        reasons.append({**number, "conversations": said(
            f"Could the {first.kind} roll away?\n<image>", "Yes." if first.kind == "ball" else "No, it has corners.",
        )})  # fmt: skip
    to.write("llava/conversation_58k.json", talks)
    to.write("llava/complex_reasoning_77k.json", reasons)


def sharegpt4v(to: Standin) -> None:
    """Captions of pictures from several sets, each in a folder of its own."""
    folders = ("coco/train2017/{:012}.jpg", "sam/images/sa_{}.jpg", "llava/llava_pretrain/images/00453/{:09}.jpg")
    more = ("web-celebrity/images/{}.jpg", "web-landmark/images/{}.jpg", "wikiart/images/{}.jpg",
            "share_textvqa/images/{:016x}.jpg")  # fmt: skip
    for file, places in (
        ("share-captioner_coco_lcs_sam_1246k_1107", folders),
        ("sharegpt4v_instruct_gpt4-vision_cap100k", folders + more),
    ):
        records = []
        for number in range(2 * to.count):
            place = places[number % len(places)].format(1000 + number)
            things = to.picture(place)
            caption = "The image shows " + ", ".join(thing.name for thing in things) + "."
            talk = said("Describe the image in detail.\n<image>", caption)
            records.append({"id": Path(place).stem, "image": place, "conversations": talk})
        to.write(f"sharegpt4v/{file}.json", records)


def said(*texts: str) -> list[dict[str, str]]:
    """A conversation in LLaVA's layout."""
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def objects365(to: Standin) -> None:
    """Objects365: file names begin with folders that the unpacked pictures do not have."""
    names = [f"patch{i % 2}/objects365_v1_{i:08}.jpg" for i in range(to.count)]
    pictures = {f"images/v1/{name}": to.picture(f"objects365/train/{name}") for name in names}
    to.write("objects365/zhiyuan_objv2_train.json", to.coco_json(pictures))


def v3det(to: Standin) -> None:
    """V3Det: a folder for every category."""
    names = [f"images/a{66 + i % 3:08}/{i}_a.jpg" for i in range(to.count)]
    to.write("v3det/v3det_2023_v1_train.json", to.coco_json({name: to.picture(f"v3det/{name}") for name in names}))


def openimages(to: Standin) -> None:
    """OpenImages: a CSV with a row a box, in shares of the picture."""
    table = io.StringIO()
    writer = csv.writer(table)
    flags = ["IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"]
    writer.writerow(["ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax", *flags])
    for number in range(to.count):
        name = hashlib.md5(b"%d" % number).hexdigest()[:16]
        for thing in to.picture(f"openimages/train/{name}.jpg"):
            x, y, w, h = thing.box
            corners = [x / WIDTH, (x + w) / WIDTH, y / HEIGHT, (y + h) / HEIGHT]
            writer.writerow([name, "xclick", "/m/0" + thing.kind, 1, *corners, 0, 0, 0, 0, 0])
    to.write("openimages/oidv6-train-annotations-bbox.csv", table.getvalue())


def sa1b(to: Standin) -> None:
    """SA-1B: two tars of pictures, each with a JSON of its masks beside it."""
    for shard in range(2):
        members = {}
        for number in range(shard * to.count + 1, (shard + 1) * to.count + 1):
            content, things = to.bytes()
            image = {"image_id": number, "width": WIDTH, "height": HEIGHT, "file_name": f"sa_{number}.jpg"}
            marks = [
                {"id": 10 * number + i, "bbox": thing.box, "area": thing.box[2] * thing.box[3], "predicted_iou": 0.97,
                 "segmentation": {"size": [HEIGHT, WIDTH], "counts": ""}, "crop_box": [0, 0, WIDTH, HEIGHT],
                 "point_coords": [[thing.box[0] + 9.0, thing.box[1] + 9.0]], "stability_score": 0.98}
                for i, thing in enumerate(things)
            ]  # fmt: skip
            members[f"./sa_{number}.jpg"] = content
            members[f"./sa_{number}.json"] = json.dumps({"image": image, "annotations": marks}).encode()
        to.tar(f"sa1b/sa_{shard:06}.tar", members)


def flickr30k(to: Standin) -> None:
    """Flickr30k Entities: sentences with phrases in brackets, XML with their boxes, and lists of splits."""
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number in range(to.count + 2):
        name = str(1000000 + 7919 * number)
        things = to.picture(f"flickr30k/flickr30k-images/{name}.jpg")
        splits["val" if number == 0 else "test" if number == 1 else "train"].append(name)
        phrases = [f"[/EN#{i}/other a {t.colour} {t.kind}]" for i, t in enumerate(things, 1)]
        end = "[/EN#0/notvisual a day] ."
        to.write(
            f"flickr30k/Sentences/{name}.txt",
            "".join(f"{' beside '.join(p)} on {end}\n" for p in (phrases, phrases[::-1], phrases[:1]) * 2)[:-1],
        )
        objects = "".join(
            f"<object><name>{i}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for i, (x, y, w, h) in enumerate((t.box for t in things), 1)
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        to.write(f"flickr30k/Annotations/{name}.xml",
                 f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>")  # fmt: skip
    for split, names in splits.items():
        to.write(f"flickr30k/{split}.txt", "\n".join(names) + "\n")


def visual_genome(to: Standin) -> None:
    """Visual Genome: regions with phrases, picture sizes in a file of their own, pictures in two folders; Groma
    Instruct on the same pictures."""
    described, sizes, talks = [], [], []
    for number in range(1, to.count + 1):
        folder = "VG_100K" if number % 2 else "VG_100K_2"
        things = to.picture(f"vg/{folder}/{number}.jpg")
        to.link(f"vg/images/{number}.jpg", f"../{folder}/{number}.jpg")
        regions = [
            {"region_id": 10 * number + i, "image_id": number, "phrase": f"{thing.name} ",
             **dict(zip(("x", "y", "width", "height"), thing.box, strict=True))}
            for i, thing in enumerate(things)
        ]  # fmt: skip
        described.append({"id": number, "regions": regions})
        url = f"https://cs.stanford.edu/people/rak248/{folder}/{number}.jpg"
        sizes.append({"image_id": number, "url": url, "width": WIDTH, "height": HEIGHT, "coco_id": None})
        marked = " and ".join(f"<p>{thing.name}</p><roi><ground_box></roi>" for thing in things)
        talks.append(
            {"file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT, "boxes": [t.box for t in things],
             "conversation": [{"value": "What do you see?", "box_inds": []},
                              {"value": f"I see {marked}.", "box_inds": list(range(len(things)))}]}
        )  # fmt: skip
    to.write("vg/region_descriptions.json", described)
    to.write("vg/image_data.json", sizes)
    to.write("groma_instruct/groma_instruct.json", talks)


def grit(to: Standin) -> None:
    """GRIT as img2dataset stores it: tars with a picture, its caption and its record under one key."""
    for shard in range(2):
        members = {}
        for number in range(2 * to.count):
            content, things = to.bytes()
            key, caption, marks = f"{shard:05}{number:04}", "", []
            for thing in things:
                caption += " and " if caption else ""
                start, (x, y, w, h) = len(caption), thing.box
                caption += thing.name
                corners = [x / WIDTH, y / HEIGHT, (x + w) / WIDTH, (y + h) / HEIGHT]
                marks.append([start, len(caption), *corners, 0.9])
            record = {"key": key, "status": "success", "caption": caption, "width": WIDTH, "height": HEIGHT,
                      "url": f"https://example.org/{key}.jpg", "noun_chunks": marks, "ref_exps": marks}  # fmt: skip
            beside = {".txt": caption.encode(), ".json": json.dumps(record).encode()}
            members |= {key + ending: data for ending, data in {".jpg": content, **beside}.items()}
        to.tar(f"grit/{shard:05}.tar", members)


SETS: tuple[Callable[[Standin], None], ...] = (
    coco, objects365, openimages, v3det, sa1b, flickr30k, visual_genome, grit, sharegpt4v,
)  # fmt: skip


def make(root: Path, count: int = 8, seed: int = 0) -> None:
    """Write every set below ``root``, ``count`` pictures each (some of them twice as many)."""
    to = Standin(root, count, seed)
    for write in SETS:
        write(to)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the data_root to make; must not exist or be empty")
    parser.add_argument("--pictures", type=int, default=8, metavar="N", help="of a set (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.exit(2, f"{parser.prog}: {args.out} is not an empty folder\n")
    if args.pictures < 4:
        parser.exit(2, f"{parser.prog}: --pictures {args.pictures}, expected at least 4\n")
    make(args.out, args.pictures, args.seed)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
