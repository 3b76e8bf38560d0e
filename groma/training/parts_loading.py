"""Pre-trained parts: weights of an encoder or a language model into a Groma, and a starting Groma made of both.

    model, processor = assemble("facebook/dinov2-large", "lmsys/vicuna-7b-v1.5")

Everything between the two (proposer, region encoder, token MLP, new words) starts random, in the published sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from groma import markup
from groma.settings import RunConfig
from groma.training.parts import TrainingError

if TYPE_CHECKING:
    from groma.model.groma import GromaForConditionalGeneration
    from groma.processor import GromaProcessor

SHOWN = 3
"""How many names of weights that do not fit are told."""


def load_parts(model: GromaForConditionalGeneration, run: RunConfig) -> None:
    """Replace the weights of the parts that model.encoder and model.llm name: directories or hub ids.

    With another language model the rows of the new words start anew, at the mean of its words. Raises TrainingError,
    one line, for what is no such part or does not fit.
    """
    if run.model.encoder:
        load_encoder(model, run.model.encoder)
    if run.model.llm:
        load_llm(model, run.model.llm)


def load_encoder(model: GromaForConditionalGeneration, name: str) -> None:
    """Weights of a vision transformer of the model's own kind and size."""
    from transformers import AutoModel

    _copy(model.encoder.vit, _pretrained(AutoModel, name, "model.encoder"), f"model.encoder: {name}")


def load_llm(model: GromaForConditionalGeneration, name: str) -> None:
    """Weights of a language model of the model's own kind and size; new words start at the mean of its words."""
    from transformers import AutoModelForCausalLM

    _copy(model.llm, _pretrained(AutoModelForCausalLM, name, "model.llm"), f"model.llm: {name}")
    model.vocabulary.reset(model.llm.get_input_embeddings())


def assemble(encoder: str, llm: str, tokenizer: str | None = None, image_size: int = 448,
             proxies: int = markup.MAX_PROXIES, seed: int = 0, **settings: Any
             ) -> tuple[GromaForConditionalGeneration, GromaProcessor]:  # fmt: skip
    """A Groma that training can start from, and its processor.

    encoder, llm: directories or hub ids of a DINO-type vision transformer and a causal language model; tokenizer: the
    same, by default ``llm``; proxies: how many regions can be named; settings: of GromaConfig. Raises TrainingError or
    ValueError, in one line, for parts that cannot be read or do not go together.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    from groma.model.configuration import GromaConfig
    from groma.model.groma import GromaForConditionalGeneration
    from groma.processor import GromaProcessor, extend, image_processor

    words = _pretrained(AutoTokenizer, tokenizer or llm, "tokenizer")
    if not isinstance(words, PreTrainedTokenizerFast):
        raise TrainingError(f"tokenizer: {tokenizer or llm} has no tokenizer.json, which is needed")
    eye, speech = _pretrained(AutoConfig, encoder, "encoder"), _pretrained(AutoConfig, llm, "llm")
    base = len(words)
    if base > speech.vocab_size:
        raise TrainingError(f"tokenizer: {base} words, but {llm} has rows for {speech.vocab_size}")
    extend(words, proxies)
    vocabulary = words.get_vocab()
    config = GromaConfig(
        **{"encoder": eye, "llm": speech, "image_size": image_size, "proxies": proxies, "base_vocab": base,
           "max_regions": min(100, proxies), "new_token_ids": {w: vocabulary[w] for w in markup.words(proxies)},
           **settings}
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GromaForConditionalGeneration(config)
        load_encoder(model, encoder)
        load_llm(model, llm)
    mean, std = _statistics(encoder)
    return model.eval(), GromaProcessor(image_processor(image_size, mean=mean, std=std), words)


def _pretrained(kind: Any, name: str, key: str) -> Any:
    """``kind.from_pretrained``, in float32, with one line for what goes wrong."""
    from transformers import AutoConfig, AutoTokenizer

    options = {} if kind in (AutoConfig, AutoTokenizer) else {"dtype": torch.float32}
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().splitlines()[0][:200]
        raise TrainingError(f"{key}: {name} cannot be loaded ({why})") from error


def _copy(part: nn.Module, given: nn.Module, what: str) -> None:
    """Every weight of ``given`` into ``part``, name by name."""
    kinds = [str(getattr(m.config, "model_type", "")) for m in (given, part)]
    if kinds[0] != kinds[1]:
        raise TrainingError(f"{what} is of type {kinds[0]!r}, expected {kinds[1]!r} as the model's configuration says")
    new, own = given.state_dict(), part.state_dict()
    odd = [_difference(name, new.get(name), own.get(name)) for name in sorted(new.keys() | own.keys())]
    told = [line for line in odd if line]
    if told:
        more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        raise TrainingError(f"{what} does not fit the model: {', '.join(told[:SHOWN])}{more}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(new[name])


def _difference(name: str, new: Tensor | None, own: Tensor | None) -> str:
    if new is None or own is None:
        return f"{name} is in {'the model' if new is None else 'the part'} alone"
    return "" if new.shape == own.shape else f"{name} is {tuple(new.shape)}, expected {tuple(own.shape)}"


def _statistics(encoder: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of pixels the encoder was trained with, where it says so; else ImageNet's."""
    from transformers.utils import cached_file

    from groma.processor import MEAN, STD

    file = cached_file(
        encoder, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    stored = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    return stored.get("image_mean") or list(MEAN), stored.get("image_std") or list(STD)
