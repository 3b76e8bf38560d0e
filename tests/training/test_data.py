"""From sources to batches: readers by format, words, and what reaches the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from groma.config import ConfigError
from groma.data.loader import collate
from groma.data.negatives import Negatives
from groma.data.records import AnnotationError
from groma.processor import GromaProcessor
from groma.settings import DataConfig, OptimConfig, RunConfig, SourceConfig
from groma.structures import Batch
from groma.training.data import examples, left_out, model_inputs, read_words


def run_of(pictures: Path, kind: str, file: str, **more: object) -> RunConfig:
    source = SourceConfig(kind, kind, f"{pictures}/{file}.json", f"{pictures}/images", **more)  # type: ignore[arg-type]
    return RunConfig("detection", "out", data=DataConfig(words=["red", "ball"], sources=[source], augment=False),
                     optim=OptimConfig(batch_size=4))  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "file", "carries"),
    [
        ("detection", "instances", {"targets"}),
        ("regions", "regions", {"targets", "target_words"}),
        ("rec", "rec", {"input_ids", "labels", "attention_mask", "refer_boxes", "ground_boxes"}),
        ("region_captions", "regions", {"input_ids", "labels", "attention_mask", "refer_boxes", "ground_boxes"}),
        ("grounded_captions", "grounded_captions",
         {"input_ids", "labels", "attention_mask", "refer_boxes", "ground_boxes"}),
        ("detection_words", "instances", {"input_ids", "labels", "attention_mask", "refer_boxes", "ground_boxes"}),
        ("llava", "conversations", {"input_ids", "labels", "attention_mask", "refer_boxes", "ground_boxes"}),
    ],
)  # fmt: skip
def test_every_format_reaches_the_model(kind: str, file: str, carries: set[str], pictures: Path, tiny: Path) -> None:
    processor = GromaProcessor.from_pretrained(str(tiny))
    mixture, dataset = examples(run_of(pictures, kind, file), processor)
    inputs = model_inputs(collate([dataset[key] for key in next(iter(mixture))]))
    assert set(inputs) == carries | {"pixel_values", "source"}
    assert inputs["pixel_values"].shape == (4, 3, 64, 64)


def test_turns_limit_the_dialogue_and_sources_name_the_head(pictures: Path, tiny: Path) -> None:
    processor = GromaProcessor.from_pretrained(str(tiny))
    mixture, dataset = examples(run_of(pictures, "rec", "rec", turns=1), processor)
    assert {len(dataset.sample(key).turns) for key in next(iter(mixture))} == {2}
    mixture, dataset = examples(run_of(pictures, "detection", "instances", source="sa1b"), processor)
    assert collate([dataset[key] for key in next(iter(mixture))]).source == "sa1b"
    with pytest.raises(AnnotationError, match="got source 'gold', expected 'coco' or 'sa1b'"):
        examples(run_of(pictures, "detection", "instances", source="gold"), processor)
    with pytest.raises(AnnotationError, match="no such file or folder of annotations"):
        examples(run_of(pictures, "rec", "nowhere"), processor)


def test_share_cap_negatives_and_processes(pictures: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = GromaProcessor.from_pretrained(str(tiny))
    mixture, _ = examples(run_of(pictures, "rec", "rec", ratio=2.0, cap=12), processor)
    assert (len(mixture), mixture.world) == (3, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    mixture, dataset = examples(run_of(pictures, "rec", "rec", negatives=0.5), processor)
    assert (len(mixture), mixture.world) == (2, 2)
    assert isinstance(mixture.sources[0].records, Negatives) and mixture.sources[0].records.share == 0.5
    asked = [dataset.sample(key) for batch in mixture for key in batch]
    assert len({sample.record for sample in asked}) == 8
    run = run_of(pictures, "rec", "rec")
    run.optim.batch_size = 5
    with pytest.raises(
        ConfigError, match=r"data.sources: source rec: 8 records .* no batch of 5 for each of 2 processes"
    ):
        examples(run, processor)


def test_the_limit_of_unusable_records_is_the_runs(pictures: Path, tiny: Path, tmp_path: Path) -> None:
    processor = GromaProcessor.from_pretrained(str(tiny))
    content = json.loads((pictures / "rec.json").read_text())
    del content["images"][0]["caption"]  # one of 24
    (tmp_path / "rec.json").write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(pictures / "images")
    run = run_of(tmp_path, "rec", "rec")
    with pytest.raises(AnnotationError, match=r"unusable, more than 1.0%"):
        examples(run, processor)
    run.data.max_skipped = 0.2
    _, dataset = examples(run, processor)
    assert dataset.max_skipped == 0.2
    assert left_out(dataset)[0].startswith("rec: left out 1 unusable annotations, and 0 of 8 records")


def test_boxes_without_a_single_known_word_ask_for_no_words() -> None:
    pixels, boxes = torch.zeros(1, 3, 4, 4), (torch.rand(2, 4),)
    assert "target_words" not in model_inputs(Batch(pixels, targets=boxes, target_words=(((), ()),)))
    assert model_inputs(Batch(pixels, targets=boxes, target_words=(((), (1,)),)))["target_words"] == (((), (1,)),)


def test_words(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("red\n\n cup \n")
    assert read_words(str(path)) == ["red", "cup"]
    assert read_words(["a", 1]) == ["a", "1"]
    assert read_words(None) == []
    with pytest.raises(ConfigError, match="no file"):
        read_words("nowhere.txt")
