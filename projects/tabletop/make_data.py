"""Draw a tabletop data set and write its annotations in the public formats.

Examples:
  python projects/tabletop/make_data.py --out data/tabletop --train 10000 --val 300 --test 500 --seed 0
  python projects/tabletop/make_data.py --out /tmp/few --train 20 --val 5 --test 5 --size 960x720 --workers 4

The same seed gives the same bytes, whatever the number of workers. A run that was stopped, even by
kill -9, goes on where it was when the same command is given again. Each split's annotation files
appear when the split is complete: val and test first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from projects.tabletop.records import Settings, make_scene
from projects.tabletop.render import Renderer
from projects.tabletop.writers import write_split, write_whole

_CHUNK = 25  # scenes that a kill can cost a worker
_ORDER = ("val", "test", "train")

# A worker process keeps its renderer here; a renderer cannot be sent between processes.
_worker: tuple[Renderer, Settings, Path] | None = None


class UserError(Exception):
    """A mistake of the person at the keyboard, told in one line."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 2 a user's mistake)."""
    try:
        args = _parse(argv)
        settings = Settings(args.train, args.val, args.test, args.seed, *args.size, args.quality)
        make_data(Path(args.out), settings, args.workers)
    except UserError as error:
        print(f"make_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_data: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def make_data(out: Path, settings: Settings, workers: int) -> None:
    """Make or complete a data set in ``out``. Raises UserError where ``out`` holds something else."""
    _claim(out, settings)
    sizes = {split: getattr(settings, split) for split in _ORDER}
    splits = [split for split in _ORDER if sizes[split] and not (out / split / "scenes.jsonl").exists()]
    done = sum(sizes.values()) - sum(sizes[split] for split in splits)
    os.environ.setdefault("LP_NUM_THREADS", "1")  # one drawing thread a worker; the workers are the parallelism
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=(settings, out))
    with pool, tqdm(total=sum(sizes.values()), initial=done, unit="scene", file=sys.stderr) as bar:
        for split in splits:
            bar.set_description(split)
            _draw_split(pool, out, split, sizes[split], bar)
            _finish_split(out, split, sizes[split], settings)


def _draw_split(pool: ProcessPoolExecutor, out: Path, split: str, size: int, bar: tqdm) -> None:
    (out / split / "images").mkdir(parents=True, exist_ok=True)
    (out / split / "records").mkdir(exist_ok=True)
    waiting = set()
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        if _chunk_path(out, split, start).exists():
            bar.update(stop - start)
        else:
            waiting.add(pool.submit(_draw_chunk, split, start, stop))
    try:
        while waiting:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                bar.update(future.result())
    except BrokenProcessPool:
        raise UserError("a worker process died (out of memory?); the same command goes on from here") from None


def _finish_split(out: Path, split: str, size: int, settings: Settings) -> None:
    info = {
        "description": f"Groma tabletop, {split} split",
        "version": "1",
        "command": _command(settings),
        **asdict(settings),
    }
    counts = write_split(_records(out, split, size), out / split, split, info)
    tqdm.write(f"{split}: {size} scenes, expressions {counts}", file=sys.stderr)
    shutil.rmtree(out / split / "records")


def _records(out: Path, split: str, size: int) -> Iterator[dict]:
    for start in range(0, size, _CHUNK):
        with _chunk_path(out, split, start).open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def _chunk_path(out: Path, split: str, start: int) -> Path:
    return out / split / "records" / f"{start:06d}.jsonl"


def _start(settings: Settings, out: Path) -> None:
    """Give a worker process its renderer."""
    global _worker
    _worker = (Renderer(settings.width, settings.height), settings, out)


def _draw_chunk(split: str, start: int, stop: int) -> int:
    assert _worker, "a worker draws only after _start"
    renderer, settings, out = _worker
    lines = []
    for index in range(start, stop):
        jpeg, record = make_scene(renderer, settings, split, index)
        write_whole(out / split / "images" / record["file_name"], jpeg)
        lines.append(json.dumps(record))
    write_whole(_chunk_path(out, split, start), ("\n".join(lines) + "\n").encode())
    return stop - start


def _claim(out: Path, settings: Settings) -> None:
    """Make ``out`` this data set's folder, or see that it already is."""
    note = out / "settings.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder")
    if note.exists():
        there = json.loads(note.read_text(encoding="utf-8"))
        wanted = {"version": 1, **asdict(settings)}
        differ = [f"{k} {there.get(k)} (asked for {v})" for k, v in wanted.items() if there.get(k) != v]
        if differ:
            raise UserError(f"{out} holds a data set of other settings: {', '.join(differ)}")
        return
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no data set of ours (no settings.json)")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(note, (json.dumps({"version": 1, **asdict(settings)}, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    _write_readme(out, settings)


def _command(s: Settings) -> str:
    return (
        f"python projects/tabletop/make_data.py --train {s.train} --val {s.val} --test {s.test} "
        f"--seed {s.seed} --size {s.width}x{s.height} --quality {s.quality}"
    )


def _write_readme(out: Path, settings: Settings) -> None:
    text = (
        "A rendered tabletop data set. Made by:\n\n"
        f"    {_command(settings)} --out DIR\n\n"
        "Formats and keys: projects/tabletop/README.md in the Groma repository.\n"
    )
    write_whole(out / "README.md", text.encode())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    about, examples = (__doc__ or "").split("\nExamples:\n")
    parser = _Parser(
        description=about, epilog="Examples:\n" + examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the data set")
    for split, default in (("train", 10000), ("val", 300), ("test", 500)):
        parser.add_argument(f"--{split}", type=_count, default=default, metavar="N", help=f"scenes (default {default})")
    parser.add_argument("--seed", type=_count, default=0, metavar="S", help="of every random choice (default 0)")
    parser.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="processes (default: CPU cores)")
    parser.add_argument("--size", type=_size, default=(640, 480), metavar="WxH", help="of a picture (default 640x480)")
    parser.add_argument("--quality", type=_quality, default=90, help="of the JPEG, 1 to 95 (default 90)")
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 95:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 95")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not (320 <= int(match[1]) <= 4096 and 240 <= int(match[2]) <= 4096):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT between 320x240 and 4096x4096")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
