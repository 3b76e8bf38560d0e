"""Answering the way the original does, as the yardstick for speed: one question at a time, everything recomputed.

Every question runs the encoder, the proposer and the region encoder again, feeds its whole prompt through the language
model with logits at every position, and decodes word by word with a growing cache until the group of regions closes.
The modules are ours, so what makes a single pass of them faster is in this figure too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LogitsProcessorList

from groma import boxes as box_ops
from groma import markup
from groma.data.images import read_image
from groma.data.prompts import build_prompt, refer_question
from groma.model.groma import ExistingProxies
from groma.predictor import Groma
from groma.structures import Turn

Box = tuple[float, float, float, float]


@torch.inference_mode()
def answer(groma: Groma, image: str | Path, text: str) -> list[Box]:
    """The boxes, xyxy in pixels of the upright picture, that greedy decoding writes for ``text``; none is an answer."""
    picture = read_image(image)
    model, config = groma.model, groma.model.config
    pixels = groma.processor.pixels([picture]).to(groma.device, model.dtype)
    views = model.look(pixels)
    prompt = build_prompt(groma.processor, [Turn("user", refer_question(text))], open_answer=True)
    spliced = model.splice(views, [prompt])
    written = model.generate(
        inputs_embeds=spliced.embeds, attention_mask=spliced.mask, pointers=spliced.pointers,
        logits_processor=LogitsProcessorList([ExistingProxies(config, list(spliced.regions))]),
        do_sample=False, num_beams=1, max_new_tokens=config.max_regions + 4, logits_to_keep=0,
        eos_token_id=[config.token_id(markup.EOS), config.token_id(markup.ROI_CLOSE)],
        pad_token_id=config.token_id(markup.PAD),
    )[0].tolist()  # fmt: skip
    proxies = {token: k for k, token in enumerate(config.proxy_ids)}
    regions = list(dict.fromkeys(proxies[token] for token in written if token in proxies))
    boxes = box_ops.clip(views[0].proposals.boxes[regions].float())
    return [(b[0], b[1], b[2], b[3]) for b in box_ops.to_pixels(boxes, picture.width, picture.height).tolist()]
