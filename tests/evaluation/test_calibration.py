"""Calibration: known temperatures recovered, figures by hand, folds that do not leak, and the model's own scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, softmax

from groma.evaluation.calibration import calibrate, check_place, deal, fit, store
from groma.evaluation.evidence import Evidence, Settings, join, read
from groma.evaluation.grounding import read_rec
from groma.evaluation.reliability import reliability
from groma.model.configuration import GromaConfig
from groma.predictor import Groma

START = Settings(1.0, 1.0, 0.5)


def sampled(count: int = 4000, score: float = 2.0, presence: float = 3.0, seed: int = 0, regions: int = 8) -> Evidence:
    """Expressions whose truth is drawn from the model's own logits, divided by temperatures we choose."""
    random = np.random.default_rng(seed)
    logits, gap = random.normal(0, 4, (count, regions)), random.normal(2, 5, count)
    present = random.random(count) < expit(gap / presence)
    truth = np.array([random.choice(regions, p=row) for row in softmax(logits / score, 1)])
    iou = np.zeros((count, regions))
    iou[np.arange(count), truth] = present * 0.9
    written = np.arange(regions) == logits.argmax(1)[:, None]
    pictures = tuple(f"{i // 8}.jpg" for i in range(count))
    return Evidence(pictures, present, gap, logits, np.ones((count, regions)), iou, written)


def by_hand(**changes: Any) -> Evidence:
    """Two expressions about a.jpg: region 1 of three is meant, and nothing is. The second row has two regions."""
    rows: dict[str, Any] = {
        "pictures": ("a.jpg", "a.jpg"),
        "present": np.array([True, False]),
        "gap": np.array([math.log(4), 0.0]),
        "logits": np.array([[0.0, math.log(2), 0.0], [0.0, math.log(3), -np.inf]]),
        "objectness": np.array([[0.5, 0.9, 0.1], [0.5, 0.8, 0.0]]),
        "iou": np.array([[0.4, 0.7, 0.5], [0.0, 0.0, 0.0]]),
        "written": np.array([[True, True, False], [False, True, False]]),
    }
    return Evidence(**(rows | changes))


def test_scores_by_hand() -> None:
    evidence = by_hand()
    assert evidence.presence(START) == pytest.approx([0.8, 0.5])
    assert evidence.first.tolist() == [1, 1]
    # p is 1/4, 1/2, 1/4 and regions 0 and 1 are written: 0.8 · 3/4 · 0.9. Then 1/4, 3/4, one written: 0.5 · 3/4 · 0.8.
    assert evidence.top_scores(START) == pytest.approx([0.54, 0.3])
    assert evidence.pointing(START) == pytest.approx([0.6, 0.375])
    assert evidence.right.tolist() == [True, False]
    assert evidence.hits.tolist() == [[False, True, False], [False] * 3], "an IoU of 0.5 is not above it"
    # At temperature 1/2 logits double: p is 1/6, 4/6, 1/6, and presence 16/17.
    sharp = evidence.top_scores(Settings(0.5, 0.5, 0))
    assert sharp == pytest.approx([16 / 17 * 5 / 6 * 0.9, 0.5 * 0.9 * 0.8])
    assert evidence.top_scores(Settings(1.0, 1.0, 0.5, 2.0)) == pytest.approx([0.6 * 0.81, 0.375 * 0.64])


# -- fitting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score, presence", [(2.0, 3.0), (0.5, 1.0), (1.0, 0.6)])
def test_known_temperatures_are_recovered(score: float, presence: float) -> None:
    found = fit(sampled(score=score, presence=presence), START)
    # Sampling error: over eight seeds the worst fit of these three is 9.5 % off.
    assert found.score_temperature == pytest.approx(score, rel=0.12)
    assert found.presence_temperature == pytest.approx(presence, rel=0.12)
    assert fit(sampled(score=score, presence=presence), START) == found, "the same evidence, the same numbers"


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_a_known_power_of_objectness_is_recovered(power: float) -> None:
    random, evidence = np.random.default_rng(0), sampled(8000, score=1.0, presence=1.0)
    objectness = random.uniform(0.3, 1, evidence.logits.shape)
    # what is written is right less often than f · p says, by a factor of o^power
    spoilt = random.random(len(evidence)) > objectness[np.arange(len(evidence)), evidence.first] ** power
    iou = np.where(spoilt[:, None] & evidence.written, 0.0, evidence.iou)
    found = calibrate(replace(evidence, objectness=objectness, iou=iou), START, max_refused=1.0)
    assert (held := found.figures_held_out) is not None
    # The temperature is fitted before, and takes the spoilt ones for doubt: the power is 0.1 to 0.2 too low.
    assert found.after.objectness_power == pytest.approx(power, abs=0.25)
    assert held.top.ece < 0.03
    assert power == 0 or held.pointing.ece > 2 * held.top.ece


def test_constant_objectness_leaves_the_power_alone() -> None:
    assert fit(sampled(400), Settings(1.0, 1.0, 0.5, 0.7)).objectness_power == 0.7


def test_calibration_mends_what_is_overconfident() -> None:
    result = calibrate(sampled(), START, max_refused=1.0)
    before, held = result.figures_before, result.figures_held_out
    assert held is not None
    for name in ("top", "presence"):
        assert getattr(before, name).ece > 0.05
        assert getattr(held, name).ece < 0.03
        assert getattr(held, name).nll < getattr(before, name).nll
        assert getattr(result.figures_fitted, name).nll <= getattr(held, name).nll
    assert len(result.folds) == 5
    assert len(set(result.folds)) == 5
    assert result.notes == ()
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_likelihood_of_several_right_regions_is_their_sum() -> None:
    # The model splits p over two overlapping regions that are both right: all of it is right, so it is not unsure.
    logits = np.tile([3.0, 1.0, -3.0], (60, 1))
    iou = np.tile([0.8, 0.6, 0.0], (60, 1))
    iou[0] = (0, 0, 0.9)  # one of sixty is the third region: right with 1/60
    written = np.tile([True, False, False], (60, 1))
    rows = tuple(map(str, range(60)))
    evidence = Evidence(rows, np.ones(60, bool), np.zeros(60), logits, np.ones((60, 3)), iou, written)
    # The third has 1/60 where e^(3/T) + e^(1/T) = 59 e^(-3/T): with x = e^(2/T), x^3 + x^2 = 59.
    x = max(np.roots([1, 1, 0, -59]), key=lambda root: root.real).real
    assert fit(evidence, START).score_temperature == pytest.approx(2 / math.log(x), rel=1e-3)


def test_without_absent_expressions_presence_is_left_alone() -> None:
    evidence = sampled(800)
    evidence = evidence.take(evidence.present)
    result = calibrate(evidence, Settings(1.0, 1.7, 0.42))
    assert (result.after.presence_temperature, result.after.found_threshold) == (1.7, 0.42)
    assert result.after.score_temperature == pytest.approx(2, rel=0.2)
    assert result.figures_before.presence is result.figures_before.absent_refused is None
    assert "no absent expressions" in result.notes[0]


def test_without_present_expressions_there_is_nothing_to_fit() -> None:
    evidence = sampled(100)
    with pytest.raises(ValueError, match="none of .* has a referent"):
        calibrate(evidence.take(~evidence.present), START)


def test_regions_that_all_miss_leave_the_temperature_alone() -> None:
    evidence = sampled(400)
    result = calibrate(replace(evidence, iou=evidence.iou * 0.5), Settings(1.3, 1.0, 0.5))
    assert result.after.score_temperature == 1.3
    assert result.counts["with_a_right_region"] == 0
    assert result.figures_fitted.presence is not None
    assert any("score_temperature is left" in note for note in result.notes)


def test_notes_tell_of_few_expressions_of_a_bound_and_of_a_single_picture() -> None:
    certain = replace(by_hand(), gap=np.array([2.0, -2.0]))  # never wrong: the sharper the better, without end
    result = calibrate(certain, START)
    assert (result.after.score_temperature, result.after.presence_temperature) == (0.05, 0.05)
    assert result.figures_held_out is None
    told = " | ".join(result.notes)
    for words in ("only 1 expressions with right", "only 1 expressions without", "at an end of the range", "a single"):
        assert words in told


def test_calibrate_honours_the_cap() -> None:
    evidence = sampled(1500)
    free, tight = calibrate(evidence, START, 1.0), calibrate(evidence, START, 0.02)
    assert free.figures_fitted.present_refused > 0.05
    assert 0 < tight.figures_fitted.present_refused <= 0.02
    assert tight.figures_fitted.absent_refused < free.figures_fitted.absent_refused
    with pytest.raises(ValueError, match="max_refused: got 1.5"):
        calibrate(evidence, START, 1.5)


# -- folds ------------------------------------------------------------------------------------------------------------


def test_folds_hold_whole_pictures() -> None:
    pictures = [f"{i % 13}.jpg" for i in range(200)]
    members = deal(pictures, 5, seed=3)
    homes = {name: {int(m) for n, m in zip(pictures, members, strict=True) if n == name} for name in set(pictures)}
    assert all(len(home) == 1 for home in homes.values())
    sizes = np.bincount([min(home) for home in homes.values()])
    assert sorted(sizes) == [2, 2, 3, 3, 3]
    again = deal(pictures[::-1], 5, seed=3)[::-1]
    assert members.tolist() == again.tolist(), "the order of the file does not matter"
    assert members.tolist() != deal(pictures, 5, seed=4).tolist()
    assert deal(["a", "b", "a"], 5, seed=0).max() == 1
    with pytest.raises(ValueError, match="folds: got 1"):
        deal(pictures, 1, 0)


def test_a_picture_has_no_part_in_its_own_figures() -> None:
    """Turn the truth of one fold around: the settings fitted without that fold stay what they were, the rest moves."""
    evidence = sampled(400)
    members = deal(evidence.pictures, 5, seed=0)
    own = members == 2
    turned = replace(evidence, present=evidence.present ^ own, iou=np.where(own[:, None], 0, evidence.iou))
    before, after = (calibrate(e, START).folds for e in (evidence, turned))
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True, False, False]


def test_held_out_figures_are_those_of_the_folds() -> None:
    evidence = sampled(400)
    result = calibrate(evidence, START)
    members = deal(evidence.pictures, 5, seed=0)
    presence = np.zeros(len(evidence))
    for fold, settings in enumerate(result.folds):
        assert settings == fit(evidence.take(members != fold), START)
        presence[members == fold] = evidence.take(members == fold).presence(settings)
    assert result.figures_held_out is not None
    assert result.figures_held_out.presence == reliability(presence, evidence.present)


# -- hostile evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"gap": np.array([0.0, np.nan])},
        {"gap": np.array([0.0, np.inf])},
        {"logits": np.array([[0.0, np.nan, 0.0], [0.0, 0.0, 0.0]])},
        {"logits": np.array([[0.0, 0.0, 0.0], [-np.inf] * 3])},
        {"logits": np.array([[0.0, 0.0, 0.0], [0.0, 0.0, np.inf]])},
        {"objectness": np.full((2, 3), np.nan)},
        {"objectness": np.full((2, 3), 1.5)},
        {"iou": np.full((2, 3), -0.5)},
        {"written": np.zeros((2, 3), bool)},
    ],
)
def test_evidence_that_is_no_number_is_refused(changes: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"a\.jpg: .* not numbers that make sense"):
        by_hand(**changes)


def test_evidence_of_two_shapes_or_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"objectness: got shape \(2, 2\), expected \(2, 3\)"):
        by_hand(objectness=np.ones((2, 2)))
    with pytest.raises(ValueError, match="no expressions"):
        join([])


def test_join_pads_with_regions_that_are_not_there() -> None:
    narrow = by_hand().take(np.array([False, True]))
    narrow = Evidence(narrow.pictures, narrow.present, narrow.gap, *(
        getattr(narrow, name)[:, :2] for name in ("logits", "objectness", "iou", "written")
    ))  # fmt: skip
    both = join([narrow, by_hand()])
    assert both.top_scores(START) == pytest.approx([0.3, 0.54, 0.3])
    assert both.logits[0, 2] == -np.inf


# -- a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groma(make: Callable[..., Any], tiny_processor: Any, quiet_torch: None) -> Groma:
    return Groma(make(1, nms_threshold=0.1, found_threshold=0.999, score_temperature=0.7), tiny_processor, "tiny")


@pytest.fixture(scope="module")
def rec(groma: Groma, write_rec: Callable[[Groma], Path]) -> Path:
    return write_rec(groma)


@pytest.fixture(scope="module")
def evidence(groma: Groma, rec: Path, pictures: Path) -> Evidence:
    return join(list(read(groma, read_rec(rec), pictures / "images")))


def test_reading_leaves_the_model_as_it_was(groma: Groma, evidence: Evidence, rec: Path, pictures: Path) -> None:
    config = groma.model.config
    before = config.to_dict()
    next(read(groma, read_rec(rec), pictures / "images"))  # left half-way
    assert config.to_dict() == before
    assert len(join(list(read(groma, read_rec(rec), pictures / "images", limit=2)))) == 8
    assert evidence.present.tolist() == [True, True, True, False] * 3
    assert evidence.hits.any(1).tolist() == evidence.present.tolist()


@pytest.mark.parametrize("score, presence", [(1.0, 1.0), (2.5, 2.5), (0.2, 0.2), (2.0, 0.5)])
def test_scores_are_those_the_predictor_gives(
    groma: Groma, evidence: Evidence, rec: Path, pictures: Path, score: float, presence: float
) -> None:
    """Whatever the temperatures, what follows from the evidence is what a model so configured answers."""
    config, settings = groma.model.config, Settings(score, presence, 0.0)
    before = Settings.of(config)
    settings.apply(config)
    try:
        answers = []
        for number in range(3):
            view = groma.look(pictures / "images" / f"{number}.png")
            asked = [e.caption for e in read_rec(rec) if e.file_name == f"{number}.png"]
            answers += groma.refer_many(view, asked)
    finally:
        before.apply(config)
        config.presence_temperature = None
    assert evidence.presence(settings) == pytest.approx([a.presence for a in answers], rel=1e-4)
    first = [dict(zip(a.regions, a.scores, strict=True))[k] for a, k in zip(answers, evidence.first, strict=True)]
    assert evidence.top_scores(settings) == pytest.approx(first, rel=1e-4)


def test_a_model_of_nan_is_told(make: Callable[..., Any], tiny_processor: Any, rec: Path, pictures: Path) -> None:
    import torch

    model = make(1, nms_threshold=0.1)
    with torch.no_grad():
        model.llm.get_output_embeddings().weight.fill_(math.nan)
        model.llm.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(ValueError, match="0.png: .* not numbers"):
        list(read(Groma(model, tiny_processor, "nan"), read_rec(rec), pictures / "images"))


# -- storing ----------------------------------------------------------------------------------------------------------

FITTED = Settings(1.25, 0.75, 0.3125)


def test_settings_go_into_the_configuration_and_nothing_else_changes(tiny: Path, tmp_path: Path) -> None:
    model, copy = tmp_path / "model", tmp_path / "deep" / "copy"
    model.mkdir()
    for file in tiny.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "model.safetensors").write_bytes(b"weights")
    original = {file.name: file.read_bytes() for file in model.iterdir()}
    store(model, FITTED, copy)
    assert {file.name: file.read_bytes() for file in model.iterdir()} == original
    store(model, FITTED)
    for folder in (model, copy):
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert files.keys() == original.keys(), "nothing half-written stays"
        assert [name for name in files if files[name] != original[name]] == ["config.json"]
        assert Settings.of(GromaConfig.from_pretrained(folder)) == FITTED
    with pytest.raises(ValueError, match="is there already"):
        store(model, FITTED, copy)


@pytest.mark.parametrize("content", ['{"model_type": "llava"}', '{"model_type": "groma", "llm_cfg": {}}', "[]", "{"])
def test_another_configuration_is_not_rewritten(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: (expected the configuration of a Groma|not JSON)"):
        check_place(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json"):
        store(tmp_path, FITTED)
    assert (tmp_path / "config.json").read_text() == content


@pytest.mark.parametrize("changes", [{"score_temperature": 0.0}, {"presence_temperature": -1.0},
                                     {"found_threshold": 1.5}, {"objectness_power": math.nan}])  # fmt: skip
def test_a_configuration_of_impossible_settings_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: got .*, expected a number"):
        GromaConfig(**changes)
