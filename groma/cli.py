"""What the command lines share: arguments, mistakes told in one line, and the model they load.

Standard library only until a model is loaded, so that ``--help`` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import gc
import io
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from groma.predictor import Groma
    from groma.structures import Answer

FOUND, NOTHING_FOUND, MISTAKE = 0, 1, 2
"""The exit statuses of every tool."""
EMBEDDED_NOTE = "the embedded model knows rendered tables only; for photographs name another with --model"


class Parser(argparse.ArgumentParser):
    """Shows its description as written, and tells a wrong call in one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Leave with one line on standard error and exit status 2."""
        self.exit(MISTAKE, f"{self.prog}: {_one_line(message)} (see --help)\n")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --device, --dtype and --quiet, in a group of their own."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="a directory or a hub id (default: the embedded tabletop model)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: %(default)s")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: %(default)s")
    group.add_argument("--quiet", action="store_true", help="no remarks on standard error")


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a user's mistake inside the block into one line on standard error and exit status 2.

    Mistakes are the ValueErrors and OSErrors that groma's readers and models raise with the whole story in their text.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter must not end the program
    try:
        yield
    except (ValueError, OSError) as error:
        tell(str(error) or type(error).__name__)
        raise SystemExit(MISTAKE) from None
    except KeyboardInterrupt:
        tell("interrupted")
        raise SystemExit(130) from None


def load(model: str | None, device: str, dtype: str, quiet: bool) -> Groma:
    """The model of the command line; says on standard error what the embedded one is for, unless ``quiet``."""
    if model is not None and (model.startswith(("/", ".", "~")) or model.count("/") > 1) and not Path(model).is_dir():
        raise ValueError(f"--model {model}: no such directory")  # before the seconds that the libraries take to load
    gc.disable()  # the libraries make a million objects that stay: looking for garbage there takes a fifth of the start
    try:
        _hush_libraries()
        from groma.predictor import Groma

        groma = Groma.from_pretrained(model, device=device, dtype=dtype)
    finally:
        gc.freeze()
        gc.enable()
    if groma.is_embedded and not quiet:
        tell(EMBEDDED_NOTE)
    return groma


def check_output(output: str | None, source: str) -> None:
    """ValueError if no picture can be written to ``output``: asked before the work, not after it."""
    if output is None:
        return
    from PIL import Image

    path = Path(output)
    Image.init()
    ending = path.suffix.lower()
    if Image.registered_extensions().get(ending) not in Image.SAVE:
        raise ValueError(f"--output {output}: no picture format ends in {ending!r}; .png and .jpg do")
    if path.is_dir():
        raise ValueError(f"--output {output}: is a directory")
    if not path.parent.is_dir():
        raise ValueError(f"--output {output}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--output {output}: no permission to write there")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise ValueError(f"--output {output}: would overwrite the picture asked about")


def save_drawing(answer: Answer, source: str, output: str) -> None:
    """Draw ``answer`` on the picture ``source`` and write it to ``output``."""
    from groma.data.images import read_image
    from groma.visualize import draw

    draw(read_image(source), answer).save(output)


def describe_boxes(answer: Answer, word: str) -> Iterator[str]:
    """One line per box for people: ``word  0.93  (12, 40) – (96, 130)  the red cup``, corners in pixels."""
    for span in answer.spans:
        for (x1, y1, x2, y2), score in zip(span.boxes, span.scores, strict=True):
            yield f"{word}  {score:.2f}  ({x1:.0f}, {y1:.0f}) – ({x2:.0f}, {y2:.0f})  {span.phrase}".rstrip()


def box(text: str) -> tuple[float, float, float, float]:
    """An argument that is a box in pixels: X1,Y1,X2,Y2."""
    try:
        x1, y1, x2, y2 = (float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a box X1,Y1,X2,Y2 in pixels, got {text!r}") from None
    if not (x1 < x2 and y1 < y2 and math.isfinite(x1 + y1 + x2 + y2)):
        raise argparse.ArgumentTypeError(f"expected a box with X1 < X2 and Y1 < Y2, got {text!r}")
    return x1, y1, x2, y2


def at_least_one(text: str) -> int:
    """An argument that counts something: 1, 2, 3, …"""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def share(text: str) -> float:
    """An argument that lies in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def not_empty(text: str) -> str:
    """An argument that says something."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a few words, got empty text")
    return text.strip()


def tell(line: str) -> None:
    """One line for people on standard error."""
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {_one_line(line)}\n")
    sys.stderr.flush()


def printable(text: str) -> str:
    """Text from a model as a terminal may see it: no control characters but new lines."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _hush_libraries() -> None:
    """Keep the libraries' advice and progress bars off standard error: one line is promised there."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
