"""From the sources of a run configuration to what the trainer draws its batches from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from groma.config import ConfigError
from groma.data.formats import open_records, options_of
from groma.data.loader import Examples, batch_inputs, report
from groma.data.mixture import Key, Mixture, Source
from groma.data.records import Records
from groma.settings import RunConfig, SourceConfig
from groma.structures import Batch

if TYPE_CHECKING:
    from groma.processor import GromaProcessor


def examples(run: RunConfig, processor: GromaProcessor) -> tuple[Mixture, Examples]:
    """The batches of every epoch, for all processes (torchrun and its like say in WORLD_SIZE how many there are), and
    the records behind them. Raises AnnotationError for a file that cannot be used, ConfigError for too small a source.
    """
    sources = [Source(s.name, _records(s, run), s.ratio, s.cap) for s in run.data.sources]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        mixture = Mixture(sources, run.optim.batch_size, seed=run.seed, drop_last=True, world=world)
    except ValueError as error:
        raise ConfigError(f"data.sources: {error}") from error
    return mixture, Examples(
        mixture,
        processor,
        stage="align" if run.prompt_stage == "align" else "instruct",
        max_length=run.data.max_length,
        answers_only=run.data.answers_only,
        words=read_words(run.data.words),
        augment=run.data.augment,
        crop=run.data.crop,
        max_skipped=run.data.max_skipped,
    )


def left_out(examples: Examples) -> list[str]:
    """What was unusable, by source, in the files and in any process of the run; every process must call it."""
    skipped = examples.skipped
    if dist.is_available() and dist.is_initialized():
        gathered: list[list[Key]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, skipped)
        skipped = [key for part in gathered for key in part]
    return report(examples, skipped)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The arguments of the model's forward that ``batch`` carries.

    Without a single described box the words are left out: silence about a box does not say that no word fits it.
    """
    inputs = {name: value for name, value in batch_inputs(batch).items() if value is not None}
    if not any(ids for image in batch.target_words for ids in image):
        inputs.pop("target_words", None)
    return inputs


def read_words(words: Any) -> list[str]:
    """The region-words vocabulary of ``data.words``: the list itself, or the lines of the text file it names."""
    if not isinstance(words, str):
        return [str(word) for word in words or ()]
    path = Path(words)
    if not path.is_file():
        raise ConfigError(f"data.words: no file {words}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _records(source: SourceConfig, run: RunConfig) -> Records:
    """The reader of one source, with absent referents if it asks for them."""
    records = open_records(
        source.format,
        source.ann,
        source.images,
        section=source.section,
        turns=source.turns,
        # The head has a default that every source carries: it means something to a reader of boxes alone.
        source=source.source if "source" in options_of(source.format) else "",
        split=source.split,
        seed=run.seed,
        max_problems=run.data.max_skipped,
    )
    if not source.negatives:
        return records
    from groma.data.negatives import Negatives

    return Negatives(records, source.negatives, run.seed)
