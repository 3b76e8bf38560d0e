"""A golden set: recorded numbers of the original, our model with the same weights, and what compares the two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from groma import boxes as box_ops
from groma import markup
from groma.model.checkpoint import convert_config, to_ours
from groma.model.checkpoint_keys import owner
from groma.model.configuration import GromaConfig
from groma.model.groma import GromaForConditionalGeneration
from groma.structures import Prompt, Proposals
from tests.golden import weights

HERE = Path(__file__).resolve().parent
IGNORE = -100
USER_SCORE, GROUND_SCORE = 1.0, 0.2  # what the original gives the boxes of a user and of the annotations


class Golden:
    """One set. ``recorded``: the original's numbers; ``facts``: SET.json; ``model``: ours, in eval mode.

    ``pixels`` (2, 3, S, S): both pictures. ``ends``: the first, middle and last number of every tensor of the rule.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.facts: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text())
        self.recorded = load_file(HERE / f"{name}.safetensors")
        seed, side = self.facts["seed"], self.facts["side"]
        pictures = [torch.from_numpy(weights.picture(seed, f"image{i}", side)) for i in range(2)]
        self.pixels = torch.stack(pictures)
        self.config = convert_config(self.facts["config"], image_size=side)
        self.ends: dict[str, list[float]] = {}
        self.model = self._model()
        self._candidates: dict[int, Proposals] = {}

    def _model(self) -> GromaForConditionalGeneration:
        """Our model, loaded the way a checkpoint is, so that the names are those of one."""
        state = {}
        for name, shape in self.facts["keys"].items():
            values = torch.from_numpy(weights.tensor(self.facts["seed"], name, shape))
            if name in self.facts["overrides"]:
                values = torch.tensor(self.facts["overrides"][name])
            flat = values.view(-1)
            self.ends[name] = [float(flat[i]) for i in (0, len(flat) // 2, -1)]
            state[self.ours(name)] = values
        model, told = GromaForConditionalGeneration.from_pretrained(
            None, config=self.config, state_dict=state, output_loading_info=True
        )
        assert {key: bool(value) for key, value in told.items()} == dict.fromkeys(told, False)
        return model.eval()

    def ours(self, name: str) -> str:
        """Our name of an original tensor, also of one that is recorded under its alias."""
        return str(to_ours(owner(name), self.config.proposer.decoder_layers))

    def check(self, key: str, actual: Tensor, tolerance: float) -> None:
        """``actual`` against what is recorded under ``key``, a sample of it if it was large; absolute tolerance."""
        wanted = self.recorded[key]
        if taken := self.facts["sampled"].get(key):
            assert list(actual.shape) == taken["shape"], key
            actual = actual.flatten()[:: taken["stride"]]
        assert actual.shape == wanted.shape, key
        off = (actual - wanted).abs().max().item()
        assert off <= tolerance, f"{key} is off by {off:.1e}, tolerance {tolerance:.0e}"

    def corners(self, key: str) -> Tensor:
        """Recorded boxes (cx, cy, w, h), given to the original, as ours (N, 4)."""
        return box_ops.cxcywh_to_xyxy(self.recorded[key])

    def prompt(self, part: str, row: int = 0, refer: Tensor | None = None, ground: Tensor | None = None) -> Prompt:
        """One recorded row without its padding; labels as given in training, else none."""
        ids = self.recorded[f"inputs/{part}_input_ids"][row]
        real = ids != self.config.token_id(markup.PAD)
        labels = self.recorded["inputs/train_labels"][row] if part == "train" else torch.full_like(ids, IGNORE)
        nothing = torch.zeros(0, 4)
        return Prompt(ids[real], labels[real], nothing if refer is None else refer,
                      nothing if ground is None else ground)  # fmt: skip

    def slots(self, ids: Tensor) -> Tensor:
        """The original's ids after expansion, which name the placeholder in a feature slot, with our -1 there."""
        features = [self.config.token_id(word) for word in (markup.IMAGE, markup.REGION, markup.REFER_FEAT)]
        return torch.where(torch.isin(ids, torch.tensor(features)), -1, ids)

    def candidates(self, image: int) -> Proposals:
        """All proposals of a picture in the order of the queries, which is what the original counts."""
        if image not in self._candidates:
            with torch.no_grad():
                found = self.model.proposer(self.model.encoder(self.pixels[image : image + 1]))
                scores = self.model.proposer.objectness(found)[0]
            self._candidates[image] = Proposals(box_ops.cxcywh_to_xyxy(found.boxes[-1, 0]), scores)
        return self._candidates[image]


def original_selection(candidates: Proposals, refer: Tensor, ground: Tensor, config: GromaConfig) -> Tensor:
    """Indices (N) of the regions the original keeps among proposals, user's and true boxes, counted in this order.

    A user's box competes with score 1 and a true one with 0.2, so that either can vanish; ours cannot
    (groma.model.regions.select). Without such boxes both select the same.
    """
    boxes = torch.cat((candidates.boxes, refer, ground))
    scores = torch.cat((candidates.scores, torch.full((len(refer),), USER_SCORE),
                        torch.full((len(ground),), GROUND_SCORE)))  # fmt: skip
    passed = (scores > config.score_threshold).nonzero()[:, 0]
    return passed[box_ops.nms(boxes[passed], scores[passed], config.nms_threshold)][: config.max_regions]


def choose(patch: pytest.MonkeyPatch, regions: list[Tensor]) -> None:
    """Let the model take these regions, one tensor (N, 4) per image, where it would select its own.

    With the original's own boxes all that follows can be compared, and closely: where ROIAlign reads is 256 times as
    far off as a box is.
    """
    left = iter(regions)

    def chosen(*_: Any) -> Proposals:
        boxes = next(left)
        return Proposals(boxes, boxes.new_ones(len(boxes)))

    patch.setattr("groma.model.groma.select", chosen)


@contextmanager
def watch(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """name → [(first positional input or None, output) of every call] of the modules while the block runs."""
    seen: dict[str, list[tuple[Any, Any]]] = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(lambda _, given, out, name=name: seen[name].append((next(iter(given), None), out)))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
