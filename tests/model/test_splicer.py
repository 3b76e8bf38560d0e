"""The splicer by hand: every place, both paddings, and errors with the counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from groma.model.configuration import GromaConfig
from groma.model.splicer import Splicer
from groma.structures import Prompt, Proposals, View

CONFIG = GromaConfig(proxies=5, max_regions=5, base_vocab=100,
                     encoder={"model_type": "dinov2", "patch_size": 14, "hidden_size": 8})  # fmt: skip
SPLICER = Splicer(CONFIG)
NONE = torch.zeros(0, 4)
PAD, IMAGE, REGION, BOX, FEAT, GROUND = (
    CONFIG.token_id(w) for w in ("[PAD]", "<image>", "<region>", "<refer_box>", "<refer_feat>", "<ground_box>")
)
R = CONFIG.proxy_ids
REGIONS = torch.tensor([[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 1, 1]])
WIDTH = 4
EMBEDDING = torch.nn.Embedding(CONFIG.vocab_size, WIDTH)


def view(regions: int = 3, shift: float = 0.0) -> View:
    """Two image tokens of 100 and 101, region tokens of 200, 201 …, all plus ``shift``."""
    proposals = Proposals(REGIONS[:regions], torch.ones(regions))
    image = torch.tensor([100.0, 101])[:, None].expand(-1, WIDTH) + shift
    tokens = (200.0 + torch.arange(regions))[:, None].expand(-1, WIDTH) + shift
    return View(image, proposals, tokens, proposals)


def prompt(ids: list[int], labels: list[int] | None = None, refer: Tensor = NONE, ground: Tensor = NONE) -> Prompt:
    return Prompt(torch.tensor(ids), torch.tensor(labels or [-100] * len(ids)), refer, ground)


def test_every_place_by_hand() -> None:
    given = prompt(
        [1, IMAGE, 7, REGION, 8, BOX, FEAT, 9, BOX, FEAT, 10, GROUND, GROUND, 2],
        [-100] * 10 + [10, GROUND, GROUND, 2],
        refer=REGIONS[[1, 0]] * 0.99, ground=REGIONS[[2, 1]] * 0.98,
    )  # fmt: skip
    ids, labels, features, names = SPLICER.expand(given, view())
    assert ids == [1, -1, -1, 7, R[0], -1, R[1], -1, R[2], -1, 8, R[1], -1, 9, R[0], -1, 10, R[2], R[1], 2]
    assert labels == [-100] * 16 + [10, R[2], R[1], 2]
    assert features[:, 0].tolist() == [100, 101, 200, 201, 202, 201, 200]
    assert names == [-1, -1, R[0], R[1], R[2], R[1], R[0]]  # the proxy each slot belongs to


def test_a_feature_belongs_to_the_last_box_before_it() -> None:
    given = prompt([BOX, BOX, FEAT, FEAT], refer=REGIONS[[0, 2]])
    ids, _, features, names = SPLICER.expand(given, view())
    assert ids == [R[0], R[2], -1, -1]
    assert features[:, 0].tolist() == [202, 202]
    assert names == [R[2], R[2]]


def test_a_ground_box_without_label_stays_without() -> None:
    ids, labels, *_ = SPLICER.expand(prompt([GROUND, 5], [-100, 5], ground=REGIONS[1:2]), view())
    assert ids == [R[1], 5]
    assert labels == [-100, 5]


def test_a_prompt_without_places_is_itself() -> None:
    ids, labels, features, names = SPLICER.expand(prompt([1, 5, 2], [-100, 5, 2]), view())
    assert (ids, labels, tuple(features.shape), names) == ([1, 5, 2], [-100, 5, 2], (0, WIDTH), [])


@pytest.mark.parametrize("given, message", [
    (prompt([BOX, BOX], refer=REGIONS[:1]), "prompt has 2 <refer_box> places but 1 boxes"),
    (prompt([1, 2], refer=REGIONS[:2]), "prompt has 0 <refer_box> places but 2 boxes"),
    (prompt([GROUND]), "prompt has 1 <ground_box> places but 0 boxes"),
    (prompt([1], ground=REGIONS), "prompt has 0 <ground_box> places but 3 boxes"),
])  # fmt: skip
def test_places_and_boxes_must_agree(given: Prompt, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SPLICER.expand(given, view())


ROWS = [
    prompt([1, IMAGE, REGION, 5], [-100, -100, -100, 5]),
    prompt([1, 6, 7, IMAGE, REGION, GROUND, 2], [-100] * 5 + [GROUND, 2], ground=REGIONS[:1]),
    prompt([3], [3]),
]
EXPANDED = [
    [1, -1, -1, R[0], -1, 5],
    [1, 6, 7, -1, -1, R[0], -1, R[1], -1, R[2], -1, R[0], 2],
    [3],
]
FEATURES = [[100, 101, 200], [1100, 1101, 1200, 1201, 1202], []]


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_rows_of_different_lengths_and_region_counts(left: bool) -> None:
    before = [row.ids.clone() for row in ROWS]
    spliced = SPLICER(ROWS, [view(1), view(3, 1000.0), view(2, 5000.0)], EMBEDDING, left)
    assert spliced.regions == (1, 3, 2)
    assert spliced.embeds.shape == (3, 13, WIDTH)
    for i, (ids, values) in enumerate(zip(EXPANDED, FEATURES, strict=True)):
        padding = 13 - len(ids)
        real = slice(padding, 13) if left else slice(0, len(ids))
        assert spliced.ids[i, real].tolist() == ids
        assert spliced.mask[i].tolist() == ([0] * padding + [1] * len(ids) if left else [1] * len(ids) + [0] * padding)
        assert spliced.ids[i][spliced.mask[i] == 0].tolist() == [PAD] * padding
        assert spliced.labels[i][spliced.mask[i] == 0].tolist() == [-100] * padding
        embeds = spliced.embeds[i, real]
        slots = iter(values)
        for token, row in zip(ids, embeds, strict=True):
            expected = torch.full((WIDTH,), float(next(slots))) if token == -1 else EMBEDDING.weight[token]
            assert torch.equal(row, expected)
    assert spliced.labels[1][spliced.mask[1] == 1].tolist() == [-100] * 11 + [R[0], 2]
    for row, ids in zip(ROWS, before, strict=True):  # the caller's ids are the caller's
        assert torch.equal(row.ids, ids)


def test_gradient_reaches_the_features_and_the_words() -> None:
    given = view(2)
    image, tokens = given.image_tokens.clone().requires_grad_(), given.region_tokens.clone().requires_grad_()
    EMBEDDING.weight.grad = None
    spliced = SPLICER([ROWS[0]], [View(image, given.proposals, tokens, given.candidates)], EMBEDDING)
    weights = torch.arange(1.0, 1 + spliced.embeds.shape[1])[None, :, None]
    (spliced.embeds * weights).sum().backward()
    assert image.grad[:, 0].tolist() == [2, 3]  # slots at positions 2 and 3, counted from 1
    assert tokens.grad[:, 0].tolist() == [5, 7]
    assert EMBEDDING.weight.grad[R[1], 0].item() == 6


@torch.no_grad()
def test_named_slots_carry_the_word_of_their_region() -> None:
    named = Splicer(GromaConfig(**{**CONFIG.to_dict(), "named_slots": True}))
    rows = [ROWS[1], prompt([1, IMAGE, BOX, FEAT], refer=REGIONS[1:2])]
    views = [view(3), view(2, 1000.0)]
    plain, with_names = SPLICER(rows, views, EMBEDDING, True), named(rows, views, EMBEDDING, True)
    expected = plain.embeds.clone()
    for row in range(2):
        for at in (plain.ids[row] == -1).nonzero().flatten().tolist():
            before = plain.ids[row, at - 1].item()
            if before in R:  # a region's slot follows its word; an image's does not
                expected[row, at] += EMBEDDING.weight[before]
    assert int((expected != plain.embeds).any(2).sum()) == 4
    assert torch.equal(with_names.embeds, expected)
    assert torch.equal(with_names.ids, plain.ids)


def test_features_take_the_kind_of_number_of_the_words() -> None:
    rough = torch.nn.Embedding(CONFIG.vocab_size, WIDTH, dtype=torch.bfloat16)
    assert SPLICER([ROWS[0]], [view(1)], rough).embeds.dtype == torch.bfloat16
