"""The two golden sets, one model at a time, and one run of each through the whole model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.golden.recording import Golden, watch

SETS = ("public", "exotic")


@pytest.fixture(scope="session", params=SETS)
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    """Both sets, one after the other: pytest runs all tests of the first before it makes the second."""
    made = Golden(request.param)
    yield made
    del made.model
    gc.collect()


@pytest.fixture(scope="session")
def run(golden: Golden) -> SimpleNamespace:
    """The first picture and its prompt through the whole model, step by step as the model's own ``look`` takes them.

    view, spliced, features, detections; seen: inputs and outputs of inner parts.
    """
    model = golden.model
    proposer, regions = model.proposer, model.regions
    inner: dict[str, nn.Module] = {
        "vit": model.encoder.vit, "memory": proposer.encoder[-1], "detections": proposer,
        **{f"decoder{i}": layer for i, layer in enumerate(proposer.decoder)},
        "fuse": regions.fuse, "first_norm": regions.fuse.norms[0], "flatten": regions.flatten,
        "box_embedding": regions.box_embedding, **{f"pooled{i}": conv for i, conv in enumerate(regions.convs)},
        "merged": model.bridge.mlp,
    }  # fmt: skip
    with torch.no_grad(), watch(inner) as seen:
        [view] = model.look(golden.pixels[:1])
        spliced = model.splice([view], [golden.prompt("infer")])
    return SimpleNamespace(seen=seen, view=view, spliced=spliced, detections=seen["detections"][0][1],
                           features=seen["detections"][0][0])  # fmt: skip
