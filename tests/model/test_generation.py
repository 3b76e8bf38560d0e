"""Generation of the whole model, tiny and random, against a plain loop; proxies that do not exist are never written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList

from groma.model.groma import ExistingProxies, GromaForConditionalGeneration
from groma.processor import GromaProcessor
from groma.structures import Prompt

Make = Callable[..., GromaForConditionalGeneration]
T = torch.tensor


def padded(processor: GromaProcessor, rows: list[Prompt]) -> dict[str, Any]:
    """Keyword arguments of ``generate`` over ``rows``."""
    ids, mask = processor.pad([row.ids for row in rows])
    boxes = tuple(row.refer_boxes for row in rows)
    return {"input_ids": ids, "attention_mask": mask, "refer_boxes": boxes}


def options(model: GromaForConditionalGeneration, **more: Any) -> dict[str, Any]:
    return {"eos_token_id": model.config.token_id("</s>"), "pad_token_id": model.config.token_id("[PAD]"),
            "max_new_tokens": 10, **more}  # fmt: skip


def plain_loop(model: GromaForConditionalGeneration, pixels: Tensor, prompt: Prompt, steps: int) -> list[int]:
    """Greedy decoding, one picture, the whole sequence anew at every step."""
    [view] = model.look(pixels[None], (prompt.refer_boxes,))
    embeds = model.splice([view], [prompt]).embeds
    written: list[int] = []
    for _ in range(steps):
        logits = model.speak(embeds).logits[0, -1]
        logits[model.config.proxy_ids[len(view.proposals) :]] = float("-inf")
        written.append(int(logits.argmax()))
        if written[-1] == model.config.token_id("</s>"):
            break
        embeds = torch.cat((embeds, model.get_input_embeddings()(T([[written[-1]]]))), 1)
    return written


@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_greedy_generation_equals_the_plain_loop(
    make: Make, seed: int, pixels: Tensor, prompts: list[Prompt], tiny_processor: GromaProcessor
) -> None:
    model = make(seed, nms_threshold=0.1)
    given = padded(tiny_processor, prompts)
    out = model.generate(given["input_ids"], pixels, given["attention_mask"], given["refer_boxes"], **options(model))
    for i, prompt in enumerate(prompts):
        expected = plain_loop(model, pixels[i], prompt, 10)
        assert out[i].tolist() == expected + [model.config.token_id("[PAD]")] * (out.shape[1] - len(expected))
    assert len({tuple(row) for row in out.tolist()}) == 3


class ProxiesOnly(LogitsProcessor):
    """Makes everything but proxies impossible."""

    def __init__(self, proxies: list[int]) -> None:
        self.proxies = proxies

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Only proxies keep their scores."""
        out = torch.full_like(scores, float("-inf"))
        out[:, self.proxies] = scores[:, self.proxies]
        return out


@pytest.mark.parametrize("how", [
    {"do_sample": True, "temperature": 1000.0},
    {"do_sample": True, "temperature": 1000.0, "num_return_sequences": 4},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2},
    {"num_beams": 2, "do_sample": True, "temperature": 50.0},
    {"generation_config": GenerationConfig(num_beams=3, num_return_sequences=3)},
])  # fmt: skip
def test_proxies_that_do_not_exist_are_never_written(
    model: GromaForConditionalGeneration, pixels: Tensor, prompts: list[Prompt], tiny_processor: GromaProcessor,
    how: dict[str, Any],
) -> None:  # fmt: skip
    given = padded(tiny_processor, prompts)
    counts = [len(view.proposals) for view in model.look(pixels, given["refer_boxes"])]
    assert min(counts) < max(counts) < 20
    only = LogitsProcessorList([ProxiesOnly(model.config.proxy_ids)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model.generate(given["input_ids"], pixels, given["attention_mask"], given["refer_boxes"], only,
                             **options(model, max_new_tokens=30), **how)  # fmt: skip
    copies = how.get("num_return_sequences", 3 if "generation_config" in how else 1)
    assert out.shape == (3 * copies, 30)
    first = model.config.token_id("<r0>")
    for row, written in enumerate(out.tolist()):
        assert all(0 <= token - first < counts[row // copies] for token in written)
    if how.get("temperature") == 1000.0:  # every region that exists can be written
        for image, count in enumerate(counts):
            seen = {token for row in out[image * copies : (image + 1) * copies].tolist() for token in row}
            assert len(seen) > 0.8 * count


@torch.no_grad()
def test_one_beam_is_greedy_and_more_are_no_worse(
    model: GromaForConditionalGeneration, pixels: Tensor, prompts: list[Prompt]
) -> None:
    ids = prompts[0].ids[None]
    greedy = model.generate(ids, pixels[:1], **options(model, max_new_tokens=5))
    assert torch.equal(model.generate(ids, pixels[:1], num_beams=1, **options(model, max_new_tokens=5)), greedy)
    how = options(model, max_new_tokens=5) | {"eos_token_id": None}
    best = model.generate(ids, pixels[:1], num_beams=8, num_return_sequences=2, **how)
    [view] = model.look(pixels[:1])
    start = model.splice([view], prompts[:1]).embeds

    def likelihood(written: Tensor) -> float:
        embeds = torch.cat((start, model.get_input_embeddings()(written[None])), 1)
        logits = model.speak(embeds).logits[0, -len(written) - 1 : -1]
        logits[:, model.config.proxy_ids[len(view.proposals) :]] = float("-inf")
        return logits.log_softmax(1)[torch.arange(len(written)), written].sum().item()

    plain = model.generate(ids, pixels[:1], **how)[0]
    assert likelihood(best[0]) >= likelihood(best[1])
    assert likelihood(best[0]) >= likelihood(plain) - 1e-4


def test_generation_without_a_prompt_says_so(model: GromaForConditionalGeneration, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="pixel_values came without input_ids"):
        model.generate(pixel_values=pixels)


def test_existing_proxies_by_hand(model: GromaForConditionalGeneration) -> None:
    process = ExistingProxies(model.config, [2, 0])
    scores = torch.zeros(2, model.config.vocab_size)
    out = process(torch.zeros(2, 1, dtype=torch.long), scores)
    proxies = model.config.proxy_ids
    assert out[0].isinf().nonzero().flatten().tolist() == proxies[2:]
    assert out[1].isinf().nonzero().flatten().tolist() == proxies
    assert not scores.any()
    twice = process(torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, model.config.vocab_size))  # two rows an image
    assert torch.equal(twice, out.repeat_interleave(2, 0))
