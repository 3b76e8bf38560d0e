#!/usr/bin/env python
"""Convert a checkpoint between the released (original) layout and ours.

examples:
  python tools/convert_checkpoint.py path/to/groma-7b outputs/groma-7b --dtype bfloat16
  python tools/convert_checkpoint.py outputs/stage3/final outputs/original --to original
  python tools/convert_checkpoint.py outputs/stage3/final outputs/original --to original --format bin

A released checkpoint loads as it is; converting it once makes loading quicker, and gives files that are read without
unpickling. SRC is a directory or a hub id of either layout. DST must be new or empty, and is complete or not there.
Exit status: 0 done, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groma import cli

if TYPE_CHECKING:
    from groma.model.checkpoint_files import Source

SPARE = 1.05  # of the weights' size, for all the other files
ORIGINAL_TEXT = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                 "preprocessor_config.json")  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("source", metavar="SRC", help="a checkpoint: a directory or a hub id")
    parser.add_argument("target", metavar="DST", type=Path, help="the directory to write")
    parser.add_argument("--to", choices=("groma", "original"), default="groma", help="layout; default: %(default)s")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="of the weights; auto leaves them as they are")  # fmt: skip
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors",
                        help="of the weights of the original layout; default: %(default)s")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress and no remarks on standard error")
    args = parser.parse_args(arguments)
    if args.format == "bin" and args.to != "original":
        parser.error("--format bin is for --to original")
    return args


def check_source(source: str) -> None:
    """ValueError for what reads like a directory and is none: asked before the seconds that the libraries take."""
    if (source.startswith(("/", ".", "~")) or source.count("/") > 1) and not Path(source).is_dir():
        raise ValueError(f"{source}: no such directory")


def check_target(target: Path) -> None:
    """ValueError for a target that is a file or holds anything: asked before the work, not after it."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file, expected a new or empty directory")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target}: is not empty, expected a new or empty directory")


def check_space(target: Path, needed: int) -> None:
    """ValueError if the disk of ``target`` has less than ``needed`` bytes free."""
    folder = next(p for p in (target.absolute(), *target.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{target}: needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free on its disk")


@contextmanager
def complete(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target`` to write into; it takes its name at the end, or goes where anything fails."""
    part = target.absolute().with_name(f".{target.absolute().name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if target.is_dir():
            target.rmdir()
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_original(model: Any, processor: Any, source: Source, folder: Path, pickled: bool, quiet: bool) -> None:
    """The original layout: config, weights, and the tokenizer's own files where the source has them."""
    from tqdm import tqdm

    from groma.model.checkpoint import save_original, size

    total = size(model.state_dict())
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=quiet, file=sys.stderr) as bar:
        for written in save_original(model, folder, pickled):
            bar.update(min(written, total - bar.n))  # a tensor with two names is counted once
    if source.file(ORIGINAL_TEXT[0]) is None:
        processor.save_pretrained(folder)
    for name in ORIGINAL_TEXT:
        if source.file(ORIGINAL_TEXT[0]) and (path := source.file(name)):
            shutil.copyfile(path, folder / name)


def main(arguments: list[str] | None = None) -> int:
    """Read, write, tell; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        check_source(args.source)
        check_target(args.target)
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
        if args.quiet:
            logging.disable_progress_bar()
        from groma.model.checkpoint import foreign_sizes, size
        from groma.model.checkpoint_config import original
        from groma.model.checkpoint_files import Source
        from groma.model.configuration import GromaConfig
        from groma.model.groma import GromaForConditionalGeneration
        from groma.processor import GromaProcessor

        source = Source(args.source)
        kind = GromaConfig.get_config_dict(args.source)[0].get("model_type")
        if kind not in ("groma", "ddetr"):  # would be taken for a Groma of the default sizes
            raise ValueError(f"{args.source}: its config.json is of type {kind!r}, expected 'groma'")
        config = GromaConfig.from_pretrained(args.source)
        if args.to == "original":
            original(config)  # says what has no form there, before the weights, which take long
            if (sizes := foreign_sizes(config)) and not args.quiet:
                cli.tell(f"the original's code has other {', '.join(sizes)}: only groma reads this checkpoint")
        processor = GromaProcessor.from_pretrained(args.source)
        model = GromaForConditionalGeneration.from_pretrained(args.source, dtype=args.dtype)
        check_space(args.target, int(size(model.state_dict()) * SPARE))
        with complete(args.target) as folder:
            if args.to == "original":
                write_original(model, processor, source, folder, args.format == "bin", args.quiet)
            else:
                model.save_pretrained(folder, max_shard_size="5GB")
                processor.save_pretrained(folder)
        weights = sum(p.stat().st_size for p in args.target.iterdir() if p.suffix in (".safetensors", ".bin"))
        print(f"{args.target}: {args.to} layout, {weights / 1e9:.2f} GB of {str(model.dtype).removeprefix('torch.')}")
    return cli.FOUND


if __name__ == "__main__":
    sys.exit(main())
