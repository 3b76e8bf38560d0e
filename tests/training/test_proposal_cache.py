"""Cached proposals: the losses of the proposer's own, another folder for other weights, no half-written record read."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groma.model.groma import GromaForConditionalGeneration
from groma.settings import DataConfig, ModelConfig, RunConfig
from groma.structures import Proposals
from groma.training import proposal_cache
from groma.training.parts import TrainingError
from groma.training.proposal_cache import ProposalCache, open_cache

Make = Callable[..., GromaForConditionalGeneration]
NAMES = ["images/0.png", "images/1.png", "bilder/zwölf.png"]


def config(folder: Path, **model: Any) -> RunConfig:
    return RunConfig(stage="alignment", output="out", model=ModelConfig(**({"train": ["bridge"]} | model)),
                     data=DataConfig(proposal_cache=str(folder)))  # fmt: skip


def some(seed: int, queries: int = 12) -> Proposals:
    draw = torch.Generator().manual_seed(seed)
    return Proposals(torch.rand(queries, 4, generator=draw), torch.rand(queries, generator=draw))


def same(one: Proposals | None, other: Proposals) -> bool:
    return one is not None and torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)


def calls(model: GromaForConditionalGeneration) -> list[int]:
    """How many images the proposer is asked about, call by call."""
    seen: list[int] = []
    model.proposer.register_forward_pre_hook(lambda _, given: seen.append(len(given[0].levels[0])))
    return seen


def test_losses_are_the_same_with_and_without(make: Make, step: dict[str, Any], tmp_path: Path) -> None:
    model, run = make(), config(tmp_path)
    expected = model(**step).loss
    seen = calls(model)
    cache = open_cache(model, run)
    assert cache is not None
    out = model(**step, candidates=cache.find(NAMES))
    assert out.loss.item() == expected.item()
    cache.add(NAMES, out.candidates)
    again = open_cache(model, run)  # as the next run would
    assert again is not None
    assert len(again) == 3
    for reader in (cache, again):
        assert model(**step, candidates=reader.find(NAMES)).loss.item() == expected.item()
    assert seen == [3]  # the proposer ran once
    some_known = [*again.find(NAMES[:1]), None, *again.find(NAMES[2:])]
    partly = model(**step, candidates=some_known)
    assert seen == [3, 1]
    assert partly.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for one, other in zip(partly.candidates, out.candidates, strict=True):
        torch.testing.assert_close(one.boxes, other.boxes, atol=1e-5, rtol=1e-5)


def test_other_candidates_give_another_loss(make: Make, step: dict[str, Any]) -> None:
    model = make()
    mine = model(**step, candidates=[some(i) for i in range(3)])
    assert mine.loss.item() != model(**step).loss.item()
    assert model(**step).candidates is None


def test_other_weights_or_sizes_have_another_folder(make: Make, tmp_path: Path) -> None:
    def folder(model: GromaForConditionalGeneration, run: RunConfig | None = None) -> str:
        cache = open_cache(model, run or config(tmp_path))
        assert cache is not None
        return cache.folder.name

    model = make()
    first = folder(model)
    assert folder(make()) == first
    model.bridge.mlp[0].weight.data += 1  # decides no proposal
    assert folder(model) == first
    other = config(tmp_path)
    other.optim.dtype = "bfloat16"
    names = {first, folder(model, other), folder(make(image_size=48)), folder(make(proposer={"fusion": [0.5, 0.5]}))}
    model.proposer.content.weight.data[0, 0] += 1e-3
    names.add(folder(model))
    model.encoder.vit.embeddings.cls_token.data += 1e-3
    names.add(folder(model))
    assert len(names) == 6


def test_nothing_is_cached_of_what_learns(make: Make, tmp_path: Path) -> None:
    model = make()
    with pytest.raises(TrainingError, match="but the proposer learns"):
        open_cache(model, config(tmp_path, train=["proposer"]))
    with pytest.raises(TrainingError, match="but model.eval_mode_frozen is off"):
        open_cache(model, config(tmp_path, eval_mode_frozen=False))
    run = config(tmp_path)
    run.data.proposal_cache = ""
    assert open_cache(model, run) is None


def test_what_is_added_is_found_and_kept_once(tmp_path: Path) -> None:
    cache = ProposalCache(tmp_path, 12)
    assert cache.find(NAMES) == [None] * 3
    cache.add(NAMES[:2], [some(0), some(1)])
    cache.add(NAMES[1:], [some(9), some(2)])  # one is known already
    assert [same(p, some(i)) for i, p in enumerate(cache.find(NAMES))] == [True] * 3
    [boxes] = tmp_path.glob("*.boxes")
    assert boxes.stat().st_size == 3 * (12 * 5 * 4 + 4)
    cache.add(["few"], [some(3, queries=5)])  # an image with fewer candidates has no place in a record
    assert cache.find(["few"]) == [None]


def test_an_unfinished_or_damaged_record_is_not_read(tmp_path: Path) -> None:
    cache = ProposalCache(tmp_path, 12)
    cache.add(NAMES, [some(i) for i in range(3)])
    [boxes], [keys] = tmp_path.glob("*.boxes"), tmp_path.glob("*.keys")
    size = boxes.stat().st_size // 3
    whole, names = boxes.read_bytes(), keys.read_bytes()

    def found(boxes_now: bytes, keys_now: bytes) -> list[bool]:
        boxes.write_bytes(boxes_now)
        keys.write_bytes(keys_now)
        return [p is not None and same(p, some(i)) for i, p in enumerate(ProposalCache(tmp_path, 12).find(NAMES))]

    assert found(whole, names) == [True] * 3
    assert found(whole[: 2 * size + 7], names) == [True, True, False]  # killed within a record
    assert found(whole, names[:-5]) == [True, True, False]  # within a key
    assert found(whole, names[:16]) == [True, False, False]  # between the two
    assert found(b"", names) == [False] * 3
    hole = whole[:size] + bytes(size) + whole[2 * size :]
    assert found(hole, names) == [True, False, True]  # the power went
    assert found(whole, names[16:32] + names[:16] + names[32:]) == [False, False, True]  # keys of other records


def test_a_full_disk_ends_writing_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ProposalCache(tmp_path, 12)
    cache.add(NAMES[:1], [some(0)])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_append", full)
    cache.add(NAMES[1:], [some(1), some(2)])
    monkeypatch.undo()
    cache.add(NAMES[1:], [some(1), some(2)])
    assert [p is not None for p in cache.find(NAMES)] == [True, False, False]


def write(folder: Path, start: int) -> None:
    cache = ProposalCache(folder, 12)
    for i in range(start, start + 40):
        cache.add([f"{i % 60}.png"], [some(i % 60)])


def test_processes_write_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers whose images overlap, and a reader that was there before them."""
    reader = ProposalCache(tmp_path, 12)
    workers = [mp.get_context("fork").Process(target=write, args=(tmp_path, start)) for start in (0, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    names = [f"{i}.png" for i in range(60)]
    assert reader.find(names) == [None] * 60
    monkeypatch.setattr(proposal_cache, "LOOK_AGAIN", 1)
    reader.find(names)
    assert [same(p, some(i)) for i, p in enumerate(reader.find(names))] == [True] * 60
    assert len(ProposalCache(tmp_path, 12)) == 60


def test_half_keys_that_are_equal_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, bytes] = {"a": b"12345678" + b"a" * 8, "b": b"12345678" + b"b" * 8}
    monkeypatch.setattr(proposal_cache, "_key", lambda image: keys[image])
    cache = ProposalCache(tmp_path, 12)
    cache.add(["a"], [some(0)])
    [a, b] = cache.find(["a", "b"])
    assert same(a, some(0))
    assert b is None
