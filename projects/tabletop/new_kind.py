#!/usr/bin/env python
"""Draw tables with a thing on them that the embedded model has never seen, a star, to fine-tune it on.

examples:
  python projects/tabletop/new_kind.py --out data/stars
  python projects/tabletop/new_kind.py --out data/stars --train 30 --test 20 --seed 7

Writes DIR/train and DIR/test, each with images/ and the same things in three layouts: rec.json (COCO-like, an
``images`` entry per referring expression; those about stars have the expression_type "star"), own.jsonl (JSON Lines,
groma.data.jsonl) and instances.json (plain COCO boxes). The star joins the world in this process only: it is no word of
projects/tabletop/vocabulary.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from numpy.random import Generator
from PIL import Image
from tqdm import tqdm

from groma import cli
from projects.tabletop import meshes
from projects.tabletop.expressions import sample_expressions
from projects.tabletop.observed import observe
from projects.tabletop.phrases import Expression, Things, distinct, matching, phrase, single
from projects.tabletop.render import Renderer
from projects.tabletop.vocabulary import COLOURS, FINISHES, KINDS, SIZES, pairs
from projects.tabletop.world import Placed, Scene, generator, sample_scene

STAR = "star"
_TIP, _NOTCH, _DEPTH = 0.62, 0.27, 0.26  # radii of its points and of the notches between, half its thickness
_WITHOUT, _TWO = 0.2, 0.3  # share of pictures without a star, and with a second one
_ABSENT = 0.35  # share of the pictures with a star for which one is named that is not there; without one, always
_ABOUT_STARS, _ABOUT_OTHERS = 5, 6  # expressions a picture, at most


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--out", metavar="DIR", required=True, type=Path, help="a new folder for the data set")
    parser.add_argument("--train", metavar="N", type=cli.at_least_one, default=30, help="scenes (default %(default)s)")
    parser.add_argument("--test", metavar="N", type=cli.at_least_one, default=20, help="scenes (default %(default)s)")
    parser.add_argument("--seed", metavar="S", type=int, default=7, help="of every random choice; default %(default)s")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Draw both splits; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        if args.out.exists():
            raise ValueError(f"{args.out}: exists already, expected a new folder")
        os.environ.setdefault("LP_NUM_THREADS", "1")
        meshes.BUILDERS[STAR] = _star
        renderer = Renderer(640, 480)
        for split, size in (("train", args.train), ("test", args.test)):
            images = args.out / split / "images"
            images.mkdir(parents=True)
            files: dict[str, Any] = {"rec": _empty(), "instances": _empty(), "own": []}
            for index in tqdm(range(size), desc=split, unit="scene", file=sys.stderr):
                _add_scene(files, images, renderer, (args.seed, split, index))
            lines = files.pop("own")
            (images.parent / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
            for name, content in files.items():
                (images.parent / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
            stars = sum(entry["expression_type"] == STAR for entry in files["rec"]["images"])
            print(f"{images.parent}: {size} pictures, {len(files['rec']['images'])} expressions, {stars} about a star")
    return 0


def scene_with_stars(seed: int, split: str, index: int) -> Scene:
    """A scene of the world in which up to two things have become stars, where a star fits."""
    scene = sample_scene(seed, split, index)
    rng = generator(seed, split, index, 2)
    wanted = 0 if rng.random() < _WITHOUT else 2 if rng.random() < _TWO else 1
    objects = list(scene.objects)
    for i in rng.permutation(len(objects)):
        star = replace(objects[i], kind=STAR, yaw=float(rng.uniform(-50, 50)))  # edge-on it would be a stick
        if wanted and meshes.kind_mesh(objects[i].kind).radius >= meshes.kind_mesh(STAR).radius and _fits(scene, star):
            objects[i], wanted = star, wanted - 1
    return replace(scene, objects=tuple(objects))


def star_expressions(things: Things, rng: Generator) -> list[Expression]:
    """Phrases for single stars, by kind, colour, size and finish, and for stars that are not there."""
    found, absent = [], []
    for colour in ("", *COLOURS):
        for extra in ("", *SIZES, *FINISHES):
            asked = {"size" if extra in SIZES else "finish": extra}
            fits = matching(things, STAR, colour, **asked)
            text = phrase(extra, colour, STAR)
            if not fits:
                absent.append(Expression(text, "absent", ()))
            elif (one := single(things, fits)) is not None:
                found.append(Expression(text, STAR, (one,)))
    nothing = int(not found or rng.random() < _ABSENT)
    chosen = [found[int(i)] for i in rng.permutation(len(found))[:_ABOUT_STARS]]
    return chosen + [absent[int(i)] for i in rng.permutation(len(absent))[:nothing]]


def _add_scene(files: dict[str, Any], images: Path, renderer: Renderer, where: tuple[int, str, int]) -> None:
    scene = scene_with_stars(*where)
    rendered = renderer.render(scene)
    things = observe(scene, rendered)
    rng = generator(*where, 1)
    allowed = [*pairs(where[1]), *((colour, STAR) for colour in COLOURS)]
    others = sample_expressions(things, renderer.width, rng, allowed, _ABOUT_OTHERS)
    expressions = distinct([*star_expressions(things, rng), *others])
    name = f"{where[1]}_{where[2]:04d}.jpg"
    Image.fromarray(rendered.image).save(images / name, quality=90)
    size = {"file_name": name, "width": renderer.width, "height": renderer.height}
    rec, instances = files["rec"], files["instances"]
    instances["images"].append({"id": where[2], **size})
    for thing in things:
        if thing.annotated:
            _add_box(instances, where[2], thing)
    boxed = [{"text": e.text, "boxes": [things[i].box for i in e.referents]} for e in expressions]
    files["own"].append({"image": name, "expressions": boxed})
    for expression in expressions:
        number = len(rec["images"])
        entry = {"id": number, **size, "caption": expression.text, "expression_type": expression.type}
        rec["images"].append(entry)
        for referent in expression.referents:
            _add_box(rec, number, things[referent])


def _add_box(file: dict[str, Any], image: int, thing: Any) -> None:
    x1, y1, x2, y2 = thing.box
    entry = {"id": len(file["annotations"]), "image_id": image, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": thing.area}
    file["annotations"].append(entry | {"category_id": (*KINDS, STAR).index(thing.kind) + 1, "iscrowd": 0})


def _empty() -> dict[str, Any]:
    categories = [{"id": i + 1, "name": kind} for i, kind in enumerate((*KINDS, STAR))]
    return {"images": [], "annotations": [], "categories": categories}


def _fits(scene: Scene, star: Placed) -> bool:
    pixels = scene.camera.project(star.points())
    return bool((pixels >= 0).all() and (pixels <= (scene.camera.width, scene.camera.height)).all())


def _star() -> list[Any]:
    """A five-pointed star standing on two points, its faces rising to the middle of either side."""
    angles = np.radians(90 + 36 * np.arange(11))
    radii = np.where(np.arange(11) % 2, _NOTCH, _TIP)
    outline = np.stack((radii * np.cos(angles), np.zeros(11), radii * np.sin(angles)), axis=-1)
    outline[:, 2] -= outline[:, 2].min()
    patches = []
    for side in (-1.0, 1.0):
        middle = np.array([0.0, side * _DEPTH, _TIP * np.cos(np.pi / 5)])
        for a, b in pairwise(outline):
            first, second = (b, a) if side < 0 else (a, b)
            inner = [middle + 0.02 * (corner - middle) for corner in (first, second)]  # a point has no normal
            patches.append(meshes.Patch(np.array([inner, [first, second]])))
    return patches


if __name__ == "__main__":
    sys.exit(main())
