# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""A wrapper around any chat template that leaves a bare `<vusr>` turn open, so that the model asks.

The model's own template stays inside, verbatim, and renders everything else exactly as before. Two things are added:

- a conversation whose last message is a user message with exactly `<vusr>` ends right after that token;
- where the template closes an assistant turn with nothing (LLaVA-1.5), the end-of-sequence token closes it, in
  training
  and in the history at inference alike, so that the two agree.
"""

VUSR = "<vusr>"
MARK = "{#- medst_trl <vusr> template 1 -#}"

# Names carry a prefix because Jinja's top-level variables are shared with the wrapped template. The wrapper never
# loops over message content: servers such as vLLM guess the content format of a template from such loops.
_CLOSE_ANSWERS = """\
{%- set vusr_ns = namespace(messages=[]) -%}
{%- for vusr_m in messages -%}
{%- if vusr_m['role'] == 'assistant' and vusr_m['content'] is string -%}
{%- set vusr_m = dict(vusr_m, content=vusr_m['content'] ~ @EOS@) -%}
{%- elif vusr_m['role'] == 'assistant' and vusr_m['content'] -%}
{%- set vusr_t = vusr_m['content'][-1] -%}
{%- set vusr_m = dict(vusr_m, content=vusr_m['content'][:-1] + [dict(vusr_t, text=vusr_t['text'] ~ @EOS@)]) -%}
{%- endif -%}
{%- set vusr_ns.messages = vusr_ns.messages + [vusr_m] -%}
{%- endfor -%}
{%- set messages = vusr_ns.messages -%}
"""
_LAST_USER_TEXT = """\
{%- set vusr_c = messages[-1]['content'] if messages and messages[-1]['role'] == 'user' else '' -%}
{%- set vusr_t = vusr_c if vusr_c is string else
    (vusr_c | selectattr('type', 'equalto', 'text') | map(attribute='text') | join) -%}
"""
# The wrapped template is rendered with the turn in place and cut behind the token. Everything else takes the verbatim
# copy: capturing a block, as the first branch does, would break transformers' `{% generation %}` tracking. The `+`
# signs keep the newlines that trim_blocks would eat at the seams.
_OPEN_TURN = """\
{%- if vusr_t | replace(@IMAGE@, '') | trim == '<vusr>' -%}
{%- set vusr_images = [] if vusr_c is string else (vusr_c | rejectattr('type', 'equalto', 'text') | list) -%}
{%- set vusr_c = @CONTENT@ -%}
{%- set vusr_rendered +%}{% set messages = messages[:-1] + [{'role': 'user', 'content': vusr_c}] +%}"""
_ELSE = "{% endset %}{{- (vusr_rendered.split('<vusr>')[:-1] | join('<vusr>')) + '<vusr>' -}}\n{%- else +%}"
# What reaches the wrapped template as the content of the open turn: the caller's form where the template takes any.
_CONTENT = {
    "any": "vusr_c if vusr_c is string else vusr_images + [{'type': 'text', 'text': '<vusr>'}]",
    "list": "vusr_images + [{'type': 'text', 'text': '<vusr>'}]",
    "string": "vusr_t",
}


def wrap_chat_template(
    template: str | dict[str, str], *, content_form: str = "any", image_token: str = "", answer_end: str = ""
) -> str | dict[str, str]:
    """
    Wraps a chat template so that a trailing bare `<vusr>` turn is left open for the model. Wrapping twice is harmless.

    Args:
        template (`str` or `dict[str, str]`):
            Jinja chat template, or the named templates of a processor.
        content_form (`str`, *optional*, defaults to `"any"`):
            Form of message content the template renders: `"list"` of typed parts, `"string"` or `"any"` of the two.
        image_token (`str`, *optional*, defaults to `""`):
            Image placeholder that may stand beside `<vusr>` where content is a string.
        answer_end (`str`, *optional*, defaults to `""`):
            Text that closes every assistant turn, for templates that close it with nothing.

    Returns:
        `str` or `dict[str, str]`: The wrapped template(s).
    """
    if isinstance(template, dict):
        named = {"content_form": content_form, "image_token": image_token, "answer_end": answer_end}
        return {name: wrap_chat_template(value, **named) for name, value in template.items()}
    if template.startswith(MARK):
        return template
    # Jinja drops one newline at the end of a template; inside the wrapper it would not be at the end any more.
    inner = template.removesuffix("\n")
    close = _CLOSE_ANSWERS.replace("@EOS@", repr(answer_end)) if answer_end else ""
    head = _OPEN_TURN.replace("@IMAGE@", repr(image_token or "\x00")).replace("@CONTENT@", _CONTENT[content_form])
    return MARK + close + _LAST_USER_TEXT + head + inner + _ELSE + inner + "{%+ endif %}"


def is_wrapped(template: str | dict[str, str] | None) -> bool:
    """Whether the template (every one of a processor's named templates) carries the `<vusr>` wrapper."""
    if isinstance(template, dict):
        return bool(template) and all(is_wrapped(value) for value in template.values())
    return bool(template) and template.startswith(MARK)
