"""From the weights' rule to the kept boxes, against the recorded original. Tolerances are absolute: see README.md."""

from __future__ import annotations

import copy
import hashlib
from types import SimpleNamespace

import pytest
import torch

from groma import boxes as box_ops
from groma.model.regions import select
from groma.structures import Proposals
from tests.golden import weights
from tests.golden.recording import Golden

ENCODER, PROPOSER, BOX = 1e-4, 3e-4, 3e-5
NONE = torch.zeros(0, 4)


def test_the_rule_gives_its_test_vector() -> None:
    assert weights.unit("public-59", "some.key", 4).tolist() == [
        -0.15590107440948486, -0.8521991968154907, 0.09211099147796631, 0.35503578186035156,
    ]  # fmt: skip


def test_the_rule_is_the_same_in_every_block() -> None:
    """Against the docstring's formula in Python's own integers."""
    drawn = weights.unit("s", "name", weights.BLOCK + 5)
    key = int.from_bytes(hashlib.sha256(b"s|name").digest()[:8], "little")
    for i in (0, 1, weights.BLOCK - 1, weights.BLOCK, weights.BLOCK + 4):
        z = (key + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        assert drawn[i] == ((z ^ z >> 31) >> 40) / 2**23 - 1


def test_every_tensor_of_the_rule_has_its_recorded_ends(golden: Golden) -> None:
    assert torch.equal(torch.tensor(list(golden.ends.values())), golden.recorded["weights"])


def test_encoder(golden: Golden, run: SimpleNamespace) -> None:
    """The first nine tokens after the embeddings and after every layer, and the whole of the last four states.

    State 0 holds the position table, resized as the released switch position_scale_offset says.
    """
    states = run.seen["vit"][0][1].hidden_states
    for depth, state in enumerate(states):
        golden.check(f"infer/vis_hidden_{depth:02d}_head", state[:, :9], ENCODER)
    last = range(len(states) - 4, len(states))
    for depth in last:
        golden.check(f"infer/vis_hidden_{depth:02d}", states[depth], ENCODER)


def test_proposer(golden: Golden, run: SimpleNamespace) -> None:
    found, layers = run.detections, len(golden.model.proposer.decoder)
    golden.check("infer/detector_input", torch.stack(run.features.levels).mean(0).flatten(2).mT[:, :8], ENCODER)
    golden.check("infer/enc_last_hidden", run.seen["memory"][0][1][:, ::4], PROPOSER)
    golden.check("infer/enc_class_logits", found.encoder_logits[..., None], PROPOSER)
    golden.check("infer/enc_coord_logits", torch.logit(found.encoder_boxes), PROPOSER)
    golden.check("infer/init_reference", found.reference, BOX)
    hidden = torch.stack([run.seen[f"decoder{i}"][0][1] for i in range(layers)], 1)
    golden.check("infer/dec_hidden", hidden, PROPOSER)
    golden.check("infer/pred_boxes", found.boxes[-1], BOX)
    for head in ("coco", "sa1b"):
        golden.check(f"infer/logits_{head}", found.logits[head][-1][..., None], PROPOSER)
    golden.check("infer/scores_fused", golden.model.proposer.objectness(found)[0], BOX)


def queries(golden: Golden, kept: Proposals) -> list[int]:
    """Which query each kept box comes from."""
    everything = golden.candidates(0).boxes
    found = [(everything == box).all(1).nonzero()[:, 0].tolist() for box in kept.boxes]
    assert [len(f) for f in found] == [1] * len(kept)
    return [query for [query] in found]


def test_kept_boxes(golden: Golden, run: SimpleNamespace) -> None:
    """The same queries in the same order, exactly."""
    assert queries(golden, run.view.proposals) == golden.recorded["infer/nms_kept"].tolist()
    golden.check("infer/selected_boxes", box_ops.xyxy_to_cxcywh(run.view.proposals.boxes), BOX)


@pytest.mark.parametrize("case, ours", [
    ("cap", {"max_regions": 7}), ("none", {"score_threshold": 0.9999}), ("off", {"score_threshold": 0.0}),
])  # fmt: skip
def test_selection_cases(golden: Golden, case: str, ours: dict[str, float]) -> None:
    """A cap, a threshold nothing passes (the single best is kept then), and none."""
    config = copy.copy(golden.config)
    for name, value in ours.items():
        setattr(config, name, value)
    kept = select(golden.candidates(0), NONE, NONE, config)
    golden.check(f"inputs/selection_{case}_boxes", box_ops.xyxy_to_cxcywh(kept.boxes), BOX)
    recorded = golden.facts["selection"][case]["kept"]
    best = int(golden.candidates(0).scores.argmax())
    assert queries(golden, kept) == (recorded or [best])
