"""Train the tabletop tokenizer: a small byte-level BPE in which the frequent words of the rendered world are one token.

    python projects/tabletop/tokenizer.py --data tabletop_data/train --out tabletop_processor --image-size 256

Reads rec.json, regions.json, grounded_captions.json, conversations.json and instances.json of ``--data`` (those that
exist) and the fixed texts of the prompt template; writes a GromaProcessor. Same files, same bytes out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from groma import markup
from groma.data import prompts
from groma.data.coco import read_json
from groma.data.records import AnnotationError
from groma.processor import GromaProcessor, extend, image_processor

FILES = ("rec.json", "regions.json", "grounded_captions.json", "conversations.json", "instances.json")
_WORD = re.compile(r"\w+")


def texts_of(content: Any) -> Iterator[str]:
    """Every caption, category name and conversation turn of one annotation file, in file order."""
    if isinstance(content, list):
        for record in content:
            for turn in record.get("conversations", []):
                yield turn["value"]
        return
    for part in ("images", "annotations", "categories"):
        for record in content.get(part, []):
            yield from (record[key] for key in ("caption", "name") if isinstance(record.get(key), str))


def read_texts(files: Sequence[Path]) -> list[str]:
    """The texts of annotation files, then the template's, often enough that its words become tokens too."""
    texts = [plain(text) for file in files for text in texts_of(read_json(file))]
    return texts + [plain(t) for t in prompts.texts()] * max(20, len(texts) // 50)


def plain(text: str) -> str:
    """Text without special words: they are tokens already."""
    return " ".join(piece.strip() for piece, special in markup.split(text) if not special)


def word_list(texts: Iterable[str], minimum: int = 20) -> tuple[str, ...]:
    """Lower-cased words found at least ``minimum`` times, most frequent first, ties by the alphabet."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in _WORD.findall(text.lower()):
            counts[word] = counts.get(word, 0) + 1
    return tuple(sorted((w for w, n in counts.items() if n >= minimum), key=lambda w: (-counts[w], w)))


def train(texts: Iterable[str], vocabulary: int, proxies: int = markup.MAX_PROXIES) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocabulary`` tokens with <s> </s> <unk> [PAD], extended by the words of groma.markup.

    Every word starts with its space, also after a special word, so "red" is the same token wherever it stands.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[markup.BOS, markup.EOS, markup.UNK, markup.PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=markup.BOS, eos_token=markup.EOS, unk_token=markup.UNK, pad_token=markup.PAD
    )
    extend(tokenizer, proxies)
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when the processor is written, 2 for a mistake told in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of annotation files (or of a train/ with them)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the processor to")
    parser.add_argument("--image-size", type=int, default=256, help="side of the square the model sees, in pixels")
    parser.add_argument("--vocab", type=int, default=1000, help="tokens, before the words of the grammar")
    parser.add_argument("--proxies", type=int, default=markup.MAX_PROXIES, help="proxy words <r0> …")
    options = parser.parse_args(arguments)
    folder = options.data / "train" if (options.data / "train").is_dir() else options.data
    files = [folder / name for name in FILES if (folder / name).is_file()]
    try:
        if not files:
            raise AnnotationError(f"{folder}: found none of {', '.join(FILES)}")
        texts = read_texts(files)
    except AnnotationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tokenizer = train(texts, options.vocab, options.proxies)
    processor = GromaProcessor(image_processor(options.image_size), tokenizer)
    processor.save_pretrained(options.out)
    words = word_list(texts)
    whole = sum(len(processor.encode(word)) == 1 for word in words)
    print(
        f"{options.out}: {len(tokenizer)} tokens; {whole} of the {len(words)} words seen 20 times or more are one token"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
