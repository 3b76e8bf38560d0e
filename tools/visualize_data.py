#!/usr/bin/env python
"""Draw a contact sheet of a data set: samples as the model sees them in training.

examples:
  python tools/visualize_data.py train/rec.json --images train/images --format rec --output sheet.png
  python tools/visualize_data.py own.jsonl --images pictures --format jsonl --count 9 --seed 3 --output sheet.png
  python tools/visualize_data.py instances.json --images images --format detection --augment --output sheet.png

A tile is the squared picture, its boxes with their numbers, and the dialogue after the opening, token for token, with
places as <ground_box:1>; what the loss is taken on has a coloured ground. --model names the processor that cuts text
into tokens (default: the embedded one's). Exit status: 0 done, 1 no sample to draw, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Sequence
from itertools import count, groupby
from typing import TYPE_CHECKING

from groma import cli
from groma.settings import FORMATS

if TYPE_CHECKING:
    from PIL import Image

    from groma.data.loader import Example
    from groma.processor import GromaProcessor
    from groma.visualize import Tile


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("annotations", metavar="ANN", help="an annotation file, or a set's own folder")
    parser.add_argument("--images", metavar="DIR", required=True, help="the folder that image names are relative to")
    parser.add_argument("--format", metavar="F", choices=FORMATS, required=True, help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--split", metavar="S", default="", help="the part of a set whose files hold several")
    parser.add_argument("--output", metavar="OUT.png", required=True, help="the picture to write")
    parser.add_argument("--count", metavar="N", type=cli.at_least_one, default=9, help="samples (default %(default)s)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="which samples; default: %(default)s")
    parser.add_argument("--augment", action="store_true", help="cut and flip detection samples, as training does")
    parser.add_argument("--stage", choices=("align", "instruct"), default="instruct", help="default: %(default)s")
    parser.add_argument("--model", metavar="NAME", help="a model's directory or hub id")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Draw once; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        cli.check_output(args.output, args.annotations)
        from groma.data.formats import open_records
        from groma.data.loader import Examples
        from groma.data.mixture import Key, Mixture, Source
        from groma.loading import EMBEDDED
        from groma.processor import GromaProcessor
        from groma.visualize import contact_sheet

        records = open_records(args.format, args.annotations, args.images, split=args.split, max_problems=1.0)
        if not len(records):
            cli.tell(f"{args.annotations}: no usable record")
            return cli.NOTHING_FOUND
        processor = GromaProcessor.from_pretrained(args.model or str(EMBEDDED))
        mixture = Mixture([Source(args.format, records)], batch_size=1, seed=args.seed)
        examples = Examples(mixture, processor, stage=args.stage, augment=args.augment, max_skipped=1.0)
        chosen = random.Random(args.seed).sample(range(len(records)), min(args.count, len(records)))
        tiles = []
        for key in (Key(0, index, args.seed) for index in chosen):
            example = examples[key]
            if example is not None:
                phrases = () if args.augment else examples.sample(key).phrases
                tiles.append(tile(example, processor, phrases))
        for key in examples.skipped:
            cli.tell(examples.reason(key))
        if not tiles:
            return cli.NOTHING_FOUND
        contact_sheet(tiles).save(args.output)
        print(f"{args.output}: {len(tiles)} of {len(records)} samples")
    return cli.FOUND


def tile(example: Example, processor: GromaProcessor, phrases: Sequence[str]) -> Tile:
    """An example as a tile: numbered boxes of the dialogue, then the detection targets, and the text."""
    import torch

    from groma import markup
    from groma.data.prompts import opening_prompt
    from groma.visualize import Tile

    said: list[tuple[str, bool]] = []
    boxes = [torch.zeros(0, 4)]
    if example.prompt is not None:
        boxes += [example.prompt.refer_boxes, example.prompt.ground_boxes]
        numbers = {markup.REFER_BOX: count(1), markup.GROUND_BOX: count(len(example.prompt.refer_boxes) + 1)}
        places = re.compile("|".join(numbers))
        start = len(opening_prompt(processor).ids)
        tokens = zip(example.prompt.ids[start:].tolist(), (example.prompt.labels[start:] >= 0).tolist(), strict=True)
        for learned, group in groupby(tokens, key=lambda token: token[1]):
            text = processor.decode([token for token, _ in group])
            text = places.sub(lambda place: f"{place[0][:-1]}:{next(numbers[place[0]])}>", text)
            said.append((markup.unescape(text), learned))
    if example.targets is not None:
        boxes.append(example.targets)
    found = torch.cat(boxes).tolist()
    labels = phrases if len(phrases) == len(found) else [""] * len(found)
    return Tile(picture(example, processor), example.record, found, labels, said)


def picture(example: Example, processor: GromaProcessor) -> Image.Image:
    """The pixels of an example, which are normalised, as a picture."""
    import torch
    from PIL import Image

    deviation, mean = (torch.tensor(v)[:, None, None] for v in (processor.image_processor.image_std,
                                                                processor.image_processor.image_mean))  # fmt: skip
    values = (example.pixels * deviation + mean).clamp(0, 1) * 255
    return Image.fromarray(values.round().byte().permute(1, 2, 0).numpy())


if __name__ == "__main__":
    sys.exit(main())
