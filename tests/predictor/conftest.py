"""What tests of the predictor share: tiny random models that refuse nothing, a picture, and an oracle of answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groma.model.groma import GromaForConditionalGeneration
from groma.predictor import Groma
from groma.processor import GromaProcessor
from groma.structures import Answer, Prompt, View


@pytest.fixture(scope="module")
def build(make: Callable[..., GromaForConditionalGeneration], tiny_processor: GromaProcessor) -> Callable[..., Groma]:
    """build(seed, **configuration): a predictor that refuses nothing."""

    def of(seed: int = 0, **changes: Any) -> Groma:
        return Groma(make(seed, **{"nms_threshold": 0.1, "found_threshold": 0.0} | changes), tiny_processor, "tiny")

    return of


@pytest.fixture(scope="module")
def groma(build: Callable[..., Groma]) -> Groma:
    return build()


@pytest.fixture(scope="module")
def picture(pictures: Path) -> Path:
    return pictures / "images" / "1.png"


@pytest.fixture(scope="module")
def view(groma: Groma, picture: Path) -> View:
    return groma.look(picture)


@pytest.fixture(scope="module")
def talkative(build: Callable[..., Groma]) -> Callable[..., Groma]:
    """talkative(seed): a predictor that often writes phrases and groups, and sometimes ends its answers."""

    def of(seed: int = 0, **changes: Any) -> Groma:
        groma = build(seed, **changes)
        config, vocabulary = groma.model.config, groma.model.vocabulary
        with torch.no_grad():
            for word, gain in (("<p>", 3.0), ("</p>", 4.0), ("<roi>", 6.0), ("</roi>", 3.0)):
                vocabulary.head.weight[config.token_id(word) - vocabulary.base_vocab] *= gain
            # what opens a group looks like what closes a phrase, so that groups follow phrases
            closed, opens = (config.token_id(w) - vocabulary.base_vocab for w in ("</p>", "<roi>"))
            vocabulary.head.weight[opens] += 8 * vocabulary.embed.weight[closed]
            groma.model.llm.get_output_embeddings().weight[config.token_id("</s>")] *= 3.0
        return groma

    return of


@pytest.fixture(scope="module")
def talker(talkative: Callable[..., Groma]) -> Groma:
    return talkative(3)


@pytest.fixture(scope="module")
def seen(talker: Groma, picture: Path) -> View:
    """A view whose first two regions are a user's."""
    return talker.look(picture, [(8, 16, 40, 32), (30, 4, 60, 44)])


@pytest.fixture(scope="session")
def follows() -> Callable[..., list[int]]:
    """follows(groma, view, before, answer, limit): asserts that the answer is the oracle's; its tokens."""
    return assert_follows


@torch.no_grad()
def oracle(groma: Groma, view: View, before: Prompt, limit: int) -> tuple[list[int], list[list[tuple[int, float]]]]:
    """Tokens after the prompt ``before`` and (region, score) of every group: the whole sequence anew at each step."""
    config, model, end = groma.model.config, groma.model, groma.processor.end_ids[0]
    words = {word: config.token_id(word) for word in ("<p>", "</p>", "<roi>", "</roi>")}
    proxies = config.proxy_ids[: len(view.proposals)]
    special = set(config.new_token_ids.values())  # type: ignore[union-attr]
    text = [i for i in range(config.vocab_size) if i not in special]
    tokens: list[int] = []
    groups: list[list[tuple[int, float]]] = []
    state, steps = "", []
    while len(tokens) < limit:
        ids = torch.cat((before.ids, torch.tensor(tokens, dtype=torch.long)))
        given = Prompt(ids, torch.full_like(ids, -100), before.refer_boxes, before.ground_boxes)
        spliced = model.splice([view], [given])
        logits = model.speak(spliced.embeds, pointers=spliced.pointers).logits[0, -1].double()
        room = limit - len(tokens)
        if state == "<roi>":
            free = [k for k in range(len(proxies)) if k not in [region for region, _ in steps]]
            allowed = [proxies[k] for k in free] + [words["</roi>"]]
            if room == 1:
                allowed = [words["</roi>"]]
        elif state == "<p>":
            allowed = [words["</p>"]] if room == 1 else text + ([words["</p>"]] if tokens[-1] != words["<p>"] else [])
        else:
            allowed = [*text, end, *([words["<p>"], words["<roi>"]] if room > 2 else [])]
        best = allowed[int(logits[allowed].argmax())]
        if best == end:
            break
        tokens.append(best)
        if state == "<roi>" and best != words["</roi>"]:
            p = dict(zip(allowed, (logits[allowed] / config.score_temperature).softmax(0).tolist(), strict=True))
            steps.append((proxies.index(best), p))
        elif state == "<roi>":
            if steps:
                later = [[proxies[r] for r, _ in steps[j:]] for j in range(len(steps))]
                groups.append([(region, sum(p[k] for k in later[j]) * view.proposals.scores[region].item())
                               for j, (region, p) in enumerate(steps)])  # fmt: skip
            state, steps = "", []
        elif best in words.values():
            state = next(w for w, i in words.items() if i == best) if best != words["</p>"] else ""
    return tokens, groups


def assert_follows(groma: Groma, view: View, before: Prompt, answer: Answer, limit: int) -> list[int]:
    tokens, groups = oracle(groma, view, before, limit)
    assert answer.raw == groma.processor.decode(tokens)
    assert [list(span.regions) for span in answer.spans] == [[k for k, _ in group] for group in groups]
    for span, group in zip(answer.spans, groups, strict=True):
        assert span.scores == pytest.approx([score for _, score in group], rel=1e-4)
    return tokens
