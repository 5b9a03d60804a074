# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Vicuna v1's chat template as LLaVA-1.5 speaks it, and the one with the text role `VUSER:`.

SQ-LLaVA and STLLaVA-Med were trained without a token for the turns that the model writes: such a turn opens with the
words `VUSER:`, and the system prompt speaks of a virtual user. The second template renders a user message that opens
with `<vusr>` so. Then `<vusr>` is only the way to say it in a message: it is in no vocabulary and in no rendered text.
"""

TEXT_ROLE_MARK = "{#- medst_trl VUSER text role 1 -#}"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# Without a blank before "Also": so it was in training.
VUSER_SYSTEM = VICUNA_SYSTEM + (
    "Also, the artificial intelligence assistant is a curious virtual user. The virtual user asks complex questions "
    "that are relevant to the content in the image, for example, asking about background knowledge of the objects in "
    "the image, asking to discuss about events happening in the image, etc. Again, do not ask about uncertain details."
)

# `generation` marks what is trained, for TRL's own collators.
_VICUNA = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro images_of(content) -%}
{%- if content is not string -%}
{%- for part in content if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
@BOS@
{%- if not messages or messages[0]['role'] != 'system' -%}{{- @SYSTEM@ + ' ' -}}{%- endif -%}
{%- set turn = namespace(open=false) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- text_of(message['content']) + ' ' -}}
@VUSER@
{%- elif message['role'] == 'user' -%}
{{- 'USER: ' + images_of(message['content']) + text_of(message['content']) -}}
{%- else -%}
{{- ' ASSISTANT:' -}}
{%- generation -%}{{- ' ' + text_of(message['content']) + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not turn.open -%}{{- ' ASSISTANT:' -}}{%- endif -%}
"""
# Where a server hands over text alone, image placeholders stand in it.
_VUSER = """\
{%- elif message['role'] == 'user' and
    (text_of(message['content']) | replace('<image>', '') | trim).startswith('<vusr>') -%}
{%- set text = text_of(message['content']) -%}
{%- set question = text | replace('<image>', '') | replace('<vusr>', '', 1) | trim -%}
{%- set images = images_of(message['content']) + '<image>\\n' * text.count('<image>') -%}
{%- if loop.last and not question -%}
{%- set turn.open = true -%}
{{- 'VUSER:' + (' ' + images if images else '') -}}
{%- else -%}
{{- 'VUSER: ' + images + question + eos_token -}}
{%- endif -%}"""


def vicuna_template(*, text_role: bool, write_bos: bool) -> str:
    """
    A chat template in the format of Vicuna v1, with the system prompt of the model's training where a conversation
    brings none.

    Args:
        text_role (`bool`):
            Whether a user message that opens with `<vusr>` is a turn of the role `VUSER:`.
        write_bos (`bool`):
            Whether it writes the beginning-of-sequence token, for tokenizers that add none.

    Returns:
        `str`: Jinja template for content in strings or typed parts.
    """
    template = (
        _VICUNA.replace("@BOS@", "{{- bos_token -}}" if write_bos else "")
        .replace("@SYSTEM@", repr(VUSER_SYSTEM if text_role else VICUNA_SYSTEM))
        .replace("@VUSER@\n", _VUSER + "\n" if text_role else "")
    )
    return TEXT_ROLE_MARK + template if text_role else template


def has_text_role(template: str | dict[str, str] | None) -> bool:
    """Whether a chat template carries the role `VUSER:`, so that no token is needed."""
    if isinstance(template, dict):
        return bool(template) and all(has_text_role(value) for value in template.values())
    return bool(template) and template.startswith(TEXT_ROLE_MARK)
