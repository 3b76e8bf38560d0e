"""Processors of several kinds of language model, small: the released checkpoints' (recorded), Qwen's, Llama 3's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from groma.data.prompts import texts
from groma.processor import GromaProcessor, extend, image_processor
from groma.sentencepiece import original_tokenizer

FOLDER = Path(__file__).parent / "text"
FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CORPUS = [*texts(), "system user assistant think What is it? Where are the red cups, two books and it's 12 chairs?"] * 3

# As Qwen writes it: thoughts belong to the answer being given, and are left out of earlier ones.
CHATML = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set last = namespace(question=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > last.question %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {{- message.content.split('</think>')[-1] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# As Llama 3 writes it: headers, and the day, which is another every day.
HEADERS = """\
{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# As Llama 2 and Mistral write it: brackets that are plain text, spaces beside them, no system role.
BRACKETS = """\
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}
{%- endfor %}"""

# GPT-4's way to cut text, which both use: letters may take one other character along, newlines stay together.
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
CUT = LETTERS + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def store_original(folder: Path, legacy: bool) -> Path:
    """The recorded tokenizer as a released checkpoint stores it, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(FOLDER / name, folder / name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": legacy}))
    return folder


def chatml() -> GromaProcessor:
    """Qwen's: bytes, NFC, thoughts as added words that are not special, the text's end beside the turn's."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(normalizers.NFC(), words, ["<think>", "</think>"])
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    return _processor(tokenizer, CHATML)


def headers() -> GromaProcessor:
    """Llama 3's: bytes as they are, whole words of the vocabulary before merges."""
    words = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(None, words, [])
    tokenizer.bos_token, tokenizer.eos_token = words[:2]
    return _processor(tokenizer, HEADERS)


def brackets(folder: Path, legacy: bool = True) -> GromaProcessor:
    """The recorded SentencePiece tokenizer with a chat template that writes plain words."""
    store_original(folder, legacy)
    return _processor(original_tokenizer(lambda name: folder / name), BRACKETS)


def _processor(tokenizer: PreTrainedTokenizerFast, template: str) -> GromaProcessor:
    tokenizer.chat_template = template
    extend(tokenizer)
    return GromaProcessor(image_processor(32), tokenizer)


def _byte_level(
    normalizer: normalizers.Normalizer | None, special: list[str], other: list[str]
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(ignore_merges=normalizer is None))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(CUT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    backend.add_tokens([AddedToken(word, normalized=False) for word in other])
    return PreTrainedTokenizerFast(tokenizer_object=backend)
