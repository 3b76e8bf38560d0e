"""The fixed texts every dialogue starts with, and chat templates that write them (floor 0: strings only).

A tokenizer without a chat template, as Vicuna's, gets the published one. A tokenizer that brings its own keeps it:
``with_opening`` puts the system text and the opening pair of turns in front of every dialogue it renders.
"""

from __future__ import annotations

from groma import markup

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
USER, ASSISTANT = "USER:", "ASSISTANT:"
OPENING_QUESTION = f"Here is an image with region crops from it. Image: {markup.IMAGE}. Regions: {markup.REGION}."
OPENING_ANSWER = "Thank you for the image! How can I assist you with it?"

# What a user wrote is escaped, as groma.markup.escape does; a part of type "markup" is taken as it is.
_ESCAPED = "".join(f" | replace('{c}', '{markup.escape(c)}')" for c in "<[")
CHAT_TEMPLATE = (
    f"{{{{ {(markup.BOS + SYSTEM + ' USER: ' + OPENING_QUESTION + ' ASSISTANT: ' + OPENING_ANSWER)!r} }}}}"
    f"{{{{ '{markup.EOS}' }}}}"
    "{%- for message in messages -%}"
    "{%- set ns = namespace(text='') -%}"
    "{%- if message.content is string -%}"
    f"{{%- set ns.text = (message.content{_ESCAPED}) if message.role == 'user' else message.content -%}}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'text' -%}"
    f"{{%- set ns.text = ns.text + ((part.text{_ESCAPED}) if message.role == 'user' else part.text) -%}}"
    "{%- elif part.type == 'markup' -%}{%- set ns.text = ns.text + part.markup -%}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- if message.role == 'user' -%}{{ 'USER: ' + ns.text | trim }}"
    "{%- elif message.role == 'assistant' -%}"
    f"{{{{ ' ASSISTANT: {markup.SEP}' + ns.text | trim + '{markup.SEP}{markup.EOS}' }}}}"
    "{%- else -%}{{ raise_exception('roles are user and assistant, got ' + message.role) }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"
)
"""The same dialogue for ``apply_chat_template``; an image part has its place in the opening."""

_OPENED = "{#- groma: the opening pair of turns, then the tokenizer's own template -#}"
# Two variables of widely used templates are set where nobody did: models that can think aloud answer at once, and the
# date is not today's, so that the same prompt is the same bytes tomorrow.
_COLLECT = (
    "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}"
    "{%- if date_string is not defined -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}"
    f"{{%- set groma = namespace(system={SYSTEM!r}, turns=[], text='') -%}}"
    "{%- for message in messages -%}"
    "{%- set groma.text = '' -%}"
    "{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}"
    "{%- for part in parts -%}"
    "{%- if part.type == 'text' -%}"
    "{%- set groma.text = groma.text + (part.text if message.role in ['assistant', 'system'] else "
    f"(part.text{_ESCAPED})) -%}}"
    "{%- elif part.type == 'markup' -%}{%- set groma.text = groma.text + part.markup -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if message.role == 'system' -%}{%- set groma.system = groma.text -%}"
    "{%- else -%}"
    "{%- set groma.turns = groma.turns + [{'role': message.role, 'content': groma.text | trim}] -%}{%- endif -%}"
    "{%- endfor -%}"
)
_PAIR = f"{{'role': 'user', 'content': %s{OPENING_QUESTION!r}}}, {{'role': 'assistant', 'content': {OPENING_ANSWER!r}}}"


def with_opening(template: str, system: bool = True) -> str:
    """A language model's own chat template, after system text and opening pair. Outside text in it is escaped.

    system: whether ``template`` takes a system message; where not, that text opens the first user turn.
    """
    turns = ("{'role': 'system', 'content': groma.system}, " + _PAIR % "") if system else (
        _PAIR % "groma.system + '\\n\\n' + "
    )  # fmt: skip
    return f"{_OPENED}{_COLLECT}{{%- set messages = [{turns}] + groma.turns %}}{template}"


def is_own(template: str) -> bool:
    """Is ``template`` one of a language model's own, through ``with_opening``? Else it is the published one."""
    return template.startswith(_OPENED)
