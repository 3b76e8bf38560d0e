"""The fixed texts every dialogue starts with, and the same dialogue as a chat template (floor 0: strings only)."""

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
    f"{{%- elif message.role == 'assistant' -%}}{{{{ ' ASSISTANT: ' + ns.text | trim + '{markup.EOS}' }}}}"
    "{%- else -%}{{ raise_exception('roles are user and assistant, got ' + message.role) }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"
)
"""The same dialogue for ``apply_chat_template``; an image part has its place in the opening."""
