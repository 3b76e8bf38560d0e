"""From the sources of a run configuration to what the trainer draws its batches from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from groma.config import ConfigError
from groma.data.formats import open_records
from groma.data.loader import Examples, Mixture, Source, batch_inputs
from groma.data.records import Records
from groma.settings import RunConfig, SourceConfig
from groma.structures import Batch

if TYPE_CHECKING:
    from groma.processor import GromaProcessor


def examples(run: RunConfig, processor: GromaProcessor) -> tuple[Mixture, Examples]:
    """The batches of every epoch, and the records behind them; AnnotationError for a file that cannot be used."""
    sources = [Source(s.name, _records(s, run), s.ratio) for s in run.data.sources]
    mixture = Mixture(sources, run.optim.batch_size, seed=run.seed, drop_last=True)
    return mixture, Examples(
        mixture,
        processor,
        stage="align" if run.prompt_stage == "align" else "instruct",
        max_length=run.data.max_length,
        answers_only=run.data.answers_only,
        words=read_words(run.data.words),
        augment=run.data.augment,
    )


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
    """The reader of one source."""
    head = source.source if source.format in ("detection", "regions") else ""
    return open_records(
        source.format,
        source.ann,
        source.images,
        section=source.section,
        turns=source.turns,
        source=head,
        split=source.split,
        seed=run.seed,
        max_problems=run.data.max_skipped,
    )
