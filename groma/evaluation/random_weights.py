"""Models of real sizes with random weights, for measuring: no checkpoint needed, made in seconds in any number format.

Two things are arranged, since random weights would do neither. Every picture has the same number of regions: no
threshold and no suppression, so the ``max_regions`` best proposals are kept. And the model answers as a trained one
does, ``<roi><rK></roi></s>``, with K left to chance: five channels of the word embeddings say which word came last, and
the head rows of the words that may follow read them. So every way of answering does the work of a real answer.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from groma import markup
from groma.data.prompts import question_prompt
from groma.loading import EMBEDDED, pick_dtype
from groma.model.configuration import GromaConfig
from groma.model.groma import GromaForConditionalGeneration
from groma.predictor import Groma
from groma.processor import GromaProcessor, extend, image_processor
from groma.structures import Turn

PERIOD = 1_000_003  # random numbers repeat after a prime number of entries, so that no two rows are the same
LOUD = 100.0  # the embedding of the channel that names the last word; what layers add to it is below 10

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "encoder": {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
                    "image_size": 64, "patch_size": 8, "mlp_ratio": 2},
        "proposer": {"width": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_heads": 4, "decoder_heads": 4,
                     "encoder_ffn": 64, "decoder_ffn": 64, "queries": 12},
        "llm": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 2048},
        "image_size": 64, "base_vocab": 800, "max_regions": 10, "region_rounds": 1, "region_groups": 4,
        "region_size": 4, "region_hidden": 32, "region_box_hidden": 16,
    },
    "mid": {
        "encoder": {"model_type": "dinov2", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                    "image_size": 518, "patch_size": 14},
        "llm": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2,
                "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    },
    "7b": {"llm": {"model_type": "llama", "max_position_embeddings": 4096}},
}  # fmt: skip
"""Settings of GromaConfig by name. "7b" is the released structure; "mid" is it with a DINOv2-B encoder and a language
model of 2 layers instead of 32; "tiny" is for tests."""


def random_groma(size: str, device: torch.device, dtype: str = "auto", seed: int = 0) -> Groma:
    """A predictor of one of ``SIZES``, in eval mode. Weights are made in ``dtype`` where they stay, without a copy.

    Raises ValueError, with the names there are, for another size or dtype.
    """
    if size not in SIZES:
        raise ValueError(f"config: got {size!r}, expected one of {', '.join(SIZES)}")
    settings = {"score_threshold": 0.0, "nms_threshold": 1.0, "found_threshold": 0.0, **SIZES[size]}
    vocabulary = settings.get("base_vocab", 32000)
    processor = processor_of(vocabulary, settings.get("image_size", 448))
    words = processor.tokenizer.get_vocab()
    settings["llm"] = {**settings["llm"], "vocab_size": vocabulary}
    config = GromaConfig(**settings, new_token_ids={word: words[word] for word in markup.words()})
    kind = pick_dtype(dtype, device, config.llm.hidden_size)
    with torch.device("meta"):
        model = GromaForConditionalGeneration(config)
    for parameter in model.parameters():  # buffers, such as rotary angles, stay float32
        parameter.data = parameter.data.to(kind)
    model.to_empty(device=device).requires_grad_(False)
    _fill(model, torch.Generator().manual_seed(seed))
    _point_once(model, processor)
    return Groma(model, processor, size)


def processor_of(vocabulary: int, image_size: int) -> GromaProcessor:
    """The embedded model's tokenizer, padded with words that never occur to ``vocabulary``, then the new words."""
    state = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = state["model"]["vocab"]
    pieces.update({f"unused{i}": i for i in range(len(pieces), vocabulary)})
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in pieces]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token=markup.UNK, bos_token=markup.BOS,
        eos_token=markup.EOS,
    )  # fmt: skip
    extend(tokenizer)
    return GromaProcessor(image_processor(image_size), tokenizer)


def _fill(model: GromaForConditionalGeneration, generator: torch.Generator) -> None:
    """Matrices get deviation 1/sqrt(inputs), which keeps the size of what passes; norms are 1, biases 0."""
    pattern = torch.randn(PERIOD, generator=generator)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(not name.endswith("bias")))
        else:
            _tile(parameter, pattern.to(parameter) * parameter[0].numel() ** -0.5)
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):  # what is computed from the configuration, such as angles
            model._init_weights(module)


def _tile(parameter: Tensor, pattern: Tensor) -> None:
    """Fill with a pattern over and over, at the speed of copying."""
    flat = parameter.view(-1)
    whole = len(flat) // PERIOD * PERIOD
    flat[:whole].view(-1, PERIOD).copy_(pattern)
    flat[whole:].copy_(pattern[: len(flat) - whole])


def _point_once(model: GromaForConditionalGeneration, processor: GromaProcessor) -> None:
    """After a question comes <roi>, then a proxy, then </roi>, then </s>: four transitions, a channel each."""
    config = model.config
    asked = int(question_prompt(processor, [Turn("user", "?")]).ids[-1])  # the last word of every open question
    opened, closed, end = (config.token_id(w) for w in (markup.ROI_OPEN, markup.ROI_CLOSE, markup.EOS))
    chain = ([asked], [opened], config.proxy_ids, [closed], [end])
    for channel, (last, following) in enumerate(pairwise(chain), start=1):
        for token in last:
            row = _row(config, model.llm.get_input_embeddings(), model.vocabulary.embed, token)
            row.zero_()
            row[channel] = LOUD
        for token in following:
            _row(config, model.llm.get_output_embeddings(), model.vocabulary.head, token)[channel] = 1.0


def _row(config: GromaConfig, base: nn.Module, new: nn.Module, token: int) -> Tensor:
    """The row (E) of one word in the base matrix or in that of the new words."""
    first, weight = (0, base.weight) if token < config.base_vocab else (config.base_vocab, new.weight)
    row: Tensor = weight[token - first]  # type: ignore[index]
    return row
