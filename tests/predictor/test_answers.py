"""The predictor on tiny random models: scores by an oracle without cache, frames of boxes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from groma import decoding, markup, predictor
from groma.data.prompts import build_prompt, refer_question
from groma.predictor import Groma
from groma.structures import Prompt, Turn, View

pytestmark = pytest.mark.usefixtures("quiet_torch")
TEXTS = ["the red ball", "cup", "the second of all the long green boxes that stand behind the ball", "a ring?"]


# -- scores -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def oracle(groma: Groma, view: View, text: str) -> tuple[float, Tensor, list[int], list[float]]:
    """(f, p over regions, regions written, their scores) from whole forward passes, one question, no cache."""
    model, processor, config = groma.model, groma.processor, groma.model.config
    prompt = build_prompt(processor, [Turn("user", refer_question(text))], open_answer=True)
    point, close = config.token_id("<roi>"), config.token_id("</roi>")
    [nothing, *_] = processor.encode("Nothing matches.")

    def logits(after: list[int], temperature: float = config.score_temperature) -> Tensor:
        ids = torch.cat((prompt.ids, torch.tensor(after, dtype=torch.long)))
        given = Prompt(ids, torch.full_like(ids, -100), prompt.refer_boxes, prompt.ground_boxes)
        return model.speak(model.splice([view], [given]).embeds).logits[0, -1].double() / temperature

    def share(scores: Tensor, tokens: list[int]) -> Tensor:
        return scores[tokens].softmax(0)

    proxies = config.proxy_ids[: len(view.proposals)]
    points = share(logits([], 1), [point, nothing])[0] * (1 - share(logits([point], 1), [*proxies, close])[-1])
    f = torch.sigmoid(torch.logit(points) / config.temperatures[1]).item()
    p = share(logits([point]), proxies)
    steps, written, left = [dict(enumerate(p.tolist()))], [int(p.argmax())], set(range(len(proxies)))
    while True:
        left.discard(written[-1])
        if not left:
            break
        options = [*sorted(left), -1]
        after = [point, *(proxies[k] for k in written)]
        step = share(logits(after), [proxies[k] if k >= 0 else close for k in options])
        best = options[int(step.argmax())]
        if best == -1:
            break
        steps.append(dict(zip(options, step.tolist(), strict=True)))
        written.append(best)
    scores = [f * sum(steps[j][k] for k in written[j:]) * view.proposals.scores[written[j]].item()
              for j in range(len(written))]  # fmt: skip
    return f, p, written, scores


@pytest.mark.parametrize("seed, changes", [
    (0, {}), (1, {}), (2, {"score_temperature": 2.5}), (3, {"score_temperature": 0.3, "presence_temperature": 1.7}),
    (4, {"max_regions": 1}), (5, {"max_regions": 2}), (6, {"score_threshold": 0.99}),
])  # fmt: skip
def test_scores_and_regions_equal_the_oracle(
    build: Callable[..., Groma], picture: Path, seed: int, changes: dict[str, Any]
) -> None:
    groma = build(seed, **changes)
    view = groma.look(picture)
    for text, answer in zip(TEXTS, groma.refer_many(view, TEXTS), strict=True):
        f, _, written, scores = oracle(groma, view, text)
        expected = sorted(zip(written, scores, strict=True), key=lambda item: -item[1])
        assert answer.regions == [k for k, _ in expected]
        assert answer.scores == pytest.approx([s for _, s in expected], rel=1e-4)
        assert answer.presence == pytest.approx(f, rel=1e-4)
        assert answer.certainty == pytest.approx(scores[0] / view.proposals.scores[written[0]].item(), rel=1e-4)
        assert answer.found
        assert all(0 <= s <= 1 for s in answer.scores)


def test_the_oracle_is_put_to_work(build: Callable[..., Groma], picture: Path) -> None:
    """Random models must write groups of several lengths, and close some, for the test above to mean anything."""
    lengths, counts = set(), set()
    for seed in range(4):
        groma = build(seed)
        view = groma.look(picture)
        counts.add(len(view.proposals))
        lengths |= {len(answer.regions) for answer in groma.refer_many(view, TEXTS)}
    assert len(lengths) > 2
    assert min(lengths) < max(counts)


def test_groups_share_by_hand() -> None:
    # two regions and "closed". One row writes 1, closes; another writes 0, then 1.
    first = torch.tensor([[0.3, 0.7, 0], [0.1, 0, 0.9]])
    other = torch.tensor([[0.6, 0.4, 0], [0, 0.8, 0.2]])
    assert decoding.shares(list(first), [1]) == pytest.approx((0.7,))
    assert decoding.shares(list(other), [0, 1]) == pytest.approx((1.0, 0.8))


def test_top_k_takes_the_most_likely(groma: Groma, view: View) -> None:
    f, p, _, _ = oracle(groma, view, TEXTS[0])
    objectness = view.proposals.scores
    for k in (1, 3, 99):
        answer = groma.refer(view, TEXTS[0], top_k=k)
        best = p.argsort(descending=True)[:k].tolist()
        expected = sorted(((r, f * p[r].item() * objectness[r].item()) for r in best), key=lambda item: -item[1])
        assert answer.regions == [r for r, _ in expected]
        assert answer.scores == pytest.approx([s for _, s in expected], rel=1e-4)
    assert len(answer.regions) == len(view.proposals)


def test_min_score_drops_what_is_below(groma: Groma, view: View) -> None:
    every = groma.refer(view, TEXTS[0], top_k=5)
    assert every.scores == sorted(every.scores, reverse=True)
    cut = every.scores[2]
    some = groma.refer(view, TEXTS[0], top_k=5, min_score=cut)
    assert some.scores == every.scores[:3]  # the threshold itself is kept
    none = groma.refer(view, TEXTS[0], top_k=5, min_score=1.0)
    assert (none.found, none.boxes, none.text, none.raw) == (False, [], markup.NOTHING, markup.NOTHING)


def test_found_is_certainty_at_the_threshold(groma: Groma, view: View) -> None:
    config = groma.model.config
    before = config.found_threshold
    certainty = [answer.certainty for answer in groma.refer_many(view, TEXTS)]
    try:
        config.found_threshold = sorted(certainty)[1]
        answers = groma.refer_many(view, TEXTS)
    finally:
        config.found_threshold = before
    assert [answer.found for answer in answers] == [p >= sorted(certainty)[1] for p in certainty]
    for text, answer in zip(TEXTS, answers, strict=True):
        assert answer.query == text
        assert bool(answer.boxes) == bool(answer.spans) == answer.found
        proxies = "".join(f"<r{k}>" for k in answer.regions)
        assert answer.raw == (f"{text} {proxies}" if answer.found else "Nothing matches.")
        assert answer.text == (text if answer.found else "Nothing matches.")
        if answer.found:
            [span] = answer.spans
            assert answer.text[span.start : span.end] == span.phrase == text


# -- many questions, one view -----------------------------------------------------------------------------------------


def test_many_questions_equal_each_alone(groma: Groma, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [groma.refer(view, text) for text in TEXTS]
    together = groma.refer_many(view, TEXTS)
    monkeypatch.setattr(predictor, "QUESTIONS_AT_ONCE", 3)
    in_chunks = groma.refer_many(view, TEXTS)
    for one, many, chunk in zip(alone, together, in_chunks, strict=True):
        assert one.regions == many.regions == chunk.regions
        assert one.boxes == many.boxes == chunk.boxes
        assert many.scores == pytest.approx(one.scores, rel=1e-4)  # measured worst case 5e-6
        assert chunk.scores == pytest.approx(one.scores, rel=1e-4)
    assert groma.refer_many(view, []) == []


def test_rows_at_once_are_bounded_by_the_memory_of_their_prefixes(
    groma: Groma, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, length = groma.model.config.llm, view.prefix.get_seq_length()
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    one = 2 * config.num_hidden_layers * heads * length * width * 4  # keys and values in float32
    monkeypatch.setattr(decoding, "ROWS_BYTES", 2 * one + 1)
    assert [decoding.at_once([view.prefix] * 5, most) for most in (64, 1)] == [2, 1]
    monkeypatch.setattr(decoding, "ROWS_BYTES", 0)
    assert decoding.at_once([view.prefix], 64) == 1, "one row is always read"
    assert len(groma.refer_many(view, TEXTS)) == len(TEXTS)


def test_a_question_leaves_the_view_as_it_was(groma: Groma, picture: Path) -> None:
    view = groma.look(picture)
    before, length = copy.deepcopy(view), view.prefix.get_seq_length()
    first = groma.refer_many(view, TEXTS)
    groma.propose(view)
    second = groma.refer_many(view, TEXTS)
    assert [(a.regions, a.scores, a.boxes) for a in first] == [(a.regions, a.scores, a.boxes) for a in second]
    assert view.prefix.get_seq_length() == length
    assert torch.equal(view.region_tokens, before.region_tokens)
    for layer, kept in zip(view.prefix.layers, before.prefix.layers, strict=True):
        assert torch.equal(layer.keys, kept.keys)
        assert torch.equal(layer.values, kept.values)


def test_many_pictures_equal_each_alone(groma: Groma, pictures: Path) -> None:
    files = [pictures / "images" / f"{i}.png" for i in range(3)]
    boxes = [[], [(4, 6, 30, 40)], [(1, 1, 20, 20), (2, 2, 60, 50)]]
    for file, given, view in zip(files, boxes, groma.look_many(files, boxes), strict=True):
        alone = groma.look(file, given)
        assert view.name == alone.name == str(file)
        torch.testing.assert_close(view.proposals.boxes, alone.proposals.boxes, atol=2e-5, rtol=1e-4)
        one, other = groma.refer(view, TEXTS[0]), groma.refer(alone, TEXTS[0])
        assert one.regions == other.regions
        assert one.scores == pytest.approx(other.scores, rel=1e-3)


# -- frames -----------------------------------------------------------------------------------------------------------


def test_boxes_are_pixels_of_an_oblong_picture(groma: Groma, tmp_path: Path) -> None:
    oblong = Image.effect_noise((120, 50), 90).convert("RGB")
    oblong.save(tmp_path / "oblong.png")
    view = groma.look(tmp_path / "oblong.png")
    assert (view.width, view.height) == (120, 50)
    answer = groma.propose(view)
    assert (answer.width, answer.height) == (120, 50)
    assert answer.regions == list(range(len(view.proposals)))
    for box, unit in zip(answer.boxes, view.proposals.boxes.clamp(0, 1).tolist(), strict=True):
        assert box == pytest.approx([unit[0] * 120, unit[1] * 50, unit[2] * 120, unit[3] * 50], abs=1e-4)
    pointed = groma.refer(view, TEXTS[0])
    assert pointed.boxes == [answer.boxes[k] for k in pointed.regions]
    assert max(box[2] for box in answer.boxes) > 60  # not read in the other frame


def test_a_turned_file_is_seen_upright(groma: Groma, tmp_path: Path) -> None:
    lying = Image.effect_noise((96, 48), 90).convert("RGB")
    lying.paste((250, 10, 10), (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    lying.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "turned.jpg") as stored:
        upright = stored.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    turned, expected = groma.look(tmp_path / "turned.jpg"), groma.look(upright)
    assert (turned.width, turned.height) == (48, 96)
    assert torch.equal(turned.proposals.boxes, expected.proposals.boxes)
    one, other = groma.refer(turned, TEXTS[0]), groma.refer(expected, TEXTS[0])
    assert one.boxes == other.boxes
    mine = groma.look(tmp_path / "turned.jpg", [(0, 0, 48, 96)])  # a box of the upright frame
    assert mine.proposals.boxes[0].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="inside 48x96 pixels"):
        groma.look(tmp_path / "turned.jpg", [(0, 0, 96, 48)])


def test_a_users_box_is_the_first_region(groma: Groma, picture: Path) -> None:
    view = groma.look(picture, [(8, 16, 40, 32)])
    assert view.proposals.boxes[0].tolist() == [0.125, 0.25, 0.625, 0.5]
    assert view.proposals.scores[0].item() == 1
    assert groma.propose(view, max=1).boxes == [(8, 16, 40, 32)]


def test_proposals_come_best_first(groma: Groma, view: View) -> None:
    answer = groma.propose(view, max=4)
    assert answer.scores == sorted(view.proposals.scores.tolist(), reverse=True)[:4]
    assert [span.phrase for span in answer.spans] == [""] * 4
    assert answer.raw == "".join(f"<r{k}>" for k in answer.regions)
    assert len(groma.propose(view).spans) == len(view.proposals)
    with pytest.raises(ValueError, match="^max: got 0, expected 1 or more$"):
        groma.propose(view, max=0)


def test_an_answer_is_json(groma: Groma, view: View, picture: Path) -> None:
    row = json.loads(json.dumps(groma.refer(view, "the red ball", top_k=2).to_dict()))
    assert (row["image"], row["width"], row["height"], row["model"]) == (str(picture), 64, 64, "tiny")
    assert set(row["seconds"]) == {"look", "answer"}
    assert [box["phrase"] for box in row["boxes"]] == ["the red ball"] * 2
