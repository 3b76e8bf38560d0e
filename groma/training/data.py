"""From the sources of a run configuration to what the trainer draws its batches from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groma.config import ConfigError, RunConfig, SourceConfig
from groma.data.detection import Detection, Records
from groma.data.dialogue import Dialogue
from groma.data.grounding import DetectionByWords, GroundedCaptions, Referring, RegionCaptions
from groma.data.loader import Examples, Mixture, Source, batch_inputs
from groma.structures import Batch
from groma.training.parts import TrainingError

if TYPE_CHECKING:
    from groma.processor import GromaProcessor


def examples(run: RunConfig, processor: GromaProcessor) -> tuple[Mixture, Examples]:
    """The batches of every epoch, and the records behind them; AnnotationError for a file that cannot be used."""
    sources = [Source(s.name, _records(s, run.seed), s.ratio) for s in run.data.sources]
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


def _records(source: SourceConfig, seed: int) -> Records:
    """The reader of one source."""
    plain: dict[str, Callable[..., Records]] = {"grounded_captions": GroundedCaptions, "llava": Dialogue}
    by_turns: dict[str, tuple[Callable[..., Records], str]] = {
        "rec": (Referring, "turns"),
        "region_captions": (RegionCaptions, "turns"),
        "detection_words": (DetectionByWords, "classes"),
    }
    if source.format in plain:
        return plain[source.format](source.ann, source.images, seed=seed)
    if source.format in by_turns:
        reader, argument = by_turns[source.format]
        return reader(source.ann, source.images, seed=seed, **({argument: source.turns} if source.turns else {}))
    if source.source not in ("coco", "sa1b"):
        raise TrainingError(f"data source {source.name}: source is {source.source!r}; expected 'coco' or 'sa1b'")
    return Detection(source.ann, source.images, source=source.source, seed=seed)  # type: ignore[arg-type]
