#!/usr/bin/env python
"""Make Groma's JSON of one split of Flickr30k Entities: a caption an entry, its phrases with their boxes.

examples:
  python datasets/prepare_flickr30k.py flickr30k train flickr30k/flickr_entities_train.json
  python datasets/prepare_flickr30k.py flickr30k val flickr30k/flickr_entities_val.json

FOLDER holds Sentences/, Annotations/ and the list of the split, train.txt. Every "images" entry is one sentence
("caption"), its annotations are the boxes of its phrases: "tokens_positive" are the [start, end) characters of the
phrase. Phrases without a box, and those inside another, are plain text. The reader of the folder itself (format
"flickr30k") gives the same; this is for programs that read the JSON.

Prints what was written. Exit status: 0 written, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import sys
from itertools import count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from groma import cli, markup
from groma.data.coco_writer import CocoWriter
from groma.data.flickr import Flickr30k, read_xml


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of Sentences/, Annotations/ and SPLIT.txt")
    parser.add_argument("split", metavar="SPLIT", help="train, val or test")
    parser.add_argument("out", metavar="OUT.json", type=Path, help="the file to write")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Write the file, say what is in it; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        records = Flickr30k(args.folder, args.folder, split=args.split)
        info = {"description": f"Flickr30k Entities, {args.split}"}
        with CocoWriter(args.out, [{"id": 1, "name": "object"}], info) as out:
            for name, place, text, boxes in tqdm(records.entries, unit=" sentences", disable=args.quiet):
                caption, phrases = plain(text)
                size = sizes(args.folder / "Annotations" / f"{Path(name).stem}.xml")
                record = {"id": out.images + 1, "file_name": name, "caption": caption, **size, "sentence": place}
                out.image(record)
                for span, first, last in phrases:
                    for box in boxes[first:last]:
                        out.box(record, box, tokens_positive=[span])
        print(f"{args.out}: {out.images} sentences, {out.annotations} boxes")
        if records.problems:
            print(f"left out {records.problems.total} unusable records; the first: {records.problems[0]}")
    return 0


def plain(text: str) -> tuple[str, list[tuple[list[int], int, int]]]:
    """Grounded markup with a place for each box → caption, and of each phrase [start, end) and its boxes' range.

    >>> plain("A <p>cup</p><roi><ground_box><ground_box></roi>.")
    ('A cup.', [([2, 5], 0, 2)])
    """
    numbers = count()
    parts = text.split(markup.GROUND_BOX)
    numbered = parts[0] + "".join(markup.proxy(next(numbers)) + part for part in parts[1:])
    caption, mentions = markup.parse(numbered)
    phrases = [([m.start, m.end], m.regions[0], m.regions[-1] + 1) for m in mentions]
    return caption, phrases


def sizes(path: Path) -> dict[str, Any]:
    """Width and height in an annotation file that the reader has found usable."""
    size = read_xml(path).find("size")
    assert size is not None
    return {side: int(float(size.findtext(side) or "")) for side in ("width", "height")}


if __name__ == "__main__":
    sys.exit(main())
