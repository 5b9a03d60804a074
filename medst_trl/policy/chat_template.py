# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Chat templates: the wrapper that leaves a bare `<vusr>` turn open, Vicuna's format, and how a template writes turns.

The wrapper keeps the model's own template verbatim and changes the rendering in two places:

- a conversation whose last message is a user message with exactly `<vusr>` ends right after that token, so that the
  model writes the question;
- where the template closes an assistant turn with nothing (LLaVA-1.5), the end-of-sequence token closes it, in
  training and in the history at inference alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medst_trl.base.errors import UserError
from medst_trl.data.schema import text_part


VUSR = "<vusr>"
MARK = "{#- medst_trl <vusr> template 1 -#}"
TEXT_ROLE_MARK = "{#- medst_trl VUSER text role 1 -#}"

# Files in which Python replaces each `@NAME@`. A policy is saved with their content, so comments on them are here.
# - vusr_wrapper.jinja: names carry a prefix because Jinja's top-level variables are shared with the wrapped template.
#   It never loops over message content: servers such as vLLM guess the content format of a template from such loops.
#   The wrapped template is rendered with the turn in place, its content in the caller's form, and cut after the token.
#   Everything else takes the verbatim copy: capturing a block, as the first branch does, would break transformers'
#   `{% generation %}` tracking. The `+` signs keep the newlines that trim_blocks would remove at the seams.
# - vicuna.jinja: `generation` marks what is trained, for TRL's own collators.
# - vuser_turn.jinja: a server that passes text only has image placeholders in it.
_TEMPLATES = Path(__file__).with_name("chat_templates")


def wrap_chat_template(template: str, *, image_token: str = "", answer_end: str = "") -> str:
    """
    Wrap a chat template so that it leaves a trailing bare `<vusr>` turn open. A wrapped template is returned as is.

    Args:
        template (`str`):
            Jinja chat template.
        image_token (`str`, *optional*, defaults to `""`):
            Image placeholder that may appear beside `<vusr>` where content is a string.
        answer_end (`str`, *optional*, defaults to `""`):
            Text that closes every assistant turn, for templates that close it with nothing.

    Returns:
        `str`: The wrapped template.
    """
    if template.startswith(MARK):
        return template
    # Jinja drops one newline at the end of a template; inside the wrapper it would no longer be at the end.
    inner = template.removesuffix("\n")
    close = _file("close_answers.jinja", EOS=repr(answer_end)) if answer_end else ""
    wrapper = _file("vusr_wrapper.jinja", CLOSE_ANSWERS=close, IMAGE=repr(image_token or "\x00"))
    return MARK + wrapper.removesuffix("\n").replace("@TEMPLATE@", inner)


def _file(name: str, **values: str) -> str:
    """Read a template of this package, with a value for each `@NAME@` in it."""
    text = (_TEMPLATES / name).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def saved_role(template: str | None) -> str | None:
    """
    Return how a chat template opens the turns that the model writes: `"token"` for one with the `<vusr>` wrapper,
    `"text"` for one with the role `VUSER:`, `None` for any other.
    """
    roles = {MARK: "token", TEXT_ROLE_MARK: "text"}
    return next((role for mark, role in roles.items() if template and template.startswith(mark)), None)


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# No space before "Also", as in training.
VUSER_SYSTEM = VICUNA_SYSTEM + (
    "Also, the artificial intelligence assistant is a curious virtual user. The virtual user asks complex questions "
    "that are relevant to the content in the image, for example, asking about background knowledge of the objects in "
    "the image, asking to discuss about events happening in the image, etc. Again, do not ask about uncertain details."
)
_SYSTEM = "{%- if not messages or messages[0]['role'] != 'system' -%}{{- @TEXT@ + ' ' -}}{%- endif -%}"


def vicuna_template(*, text_role: bool = False, write_bos: bool, system: str | None = None) -> str:
    """
    Return a chat template in the format of Vicuna v1, as LLaVA-1.5 uses it.

    SQ-LLaVA and STLLaVA-Med were trained without a token for the turns that the model writes: such a turn opens with
    the words `VUSER:`, and the system prompt mentions a virtual user. With `text_role` the template renders a user
    message that starts with `<vusr>` in this way. `<vusr>` is then only how a message says so: it is in no vocabulary
    and in no rendered text.

    Args:
        text_role (`bool`, *optional*, defaults to `False`):
            Whether a user message that starts with `<vusr>` becomes a turn of the role `VUSER:`.
        write_bos (`bool`):
            Whether the template writes the beginning-of-sequence token, for tokenizers that add none.
        system (`str`, *optional*):
            System prompt of conversations without one; `""` for none. Defaults to the one of the model's training.

    Returns:
        `str`: Jinja template for content in strings or typed parts.
    """
    if system is None:
        system = VUSER_SYSTEM if text_role else VICUNA_SYSTEM
    template = _file(
        "vicuna.jinja",
        BOS="{{- bos_token -}}" if write_bos else "",
        SYSTEM=_SYSTEM.replace("@TEXT@", repr(system)) + "\n" if system else "",
        VUSER_TURN=_file("vuser_turn.jinja") if text_role else "",
    )
    return TEXT_ROLE_MARK + template if text_role else template


# Private-use characters around text whose place in a rendered conversation is located; removed before tokenization.
LEFT, RIGHT = "\ue0f1", "\ue0f2"


@dataclass(frozen=True)
class TurnFormat:
    """
    How a chat template writes the turns of a conversation.

    Args:
        question_end (`str`):
            Special token with which the template closes a user turn, `""` for none.
        answer_end (`str`):
            The same for an assistant turn.
        answer_lead (`str`):
            Whitespace between the generation prompt and the answer, which the model has to write (`" "` after
            `ASSISTANT:`, `""` where the prompt ends with a newline).
        question_lead (`str`):
            The same for a question without an image, after the open `<vusr>` turn.
    """

    question_end: str
    answer_end: str
    answer_lead: str
    question_lead: str


def probe_turns(render: Callable[..., str], special_tokens: list[str]) -> TurnFormat:
    """
    Determine how a chat template writes turns, by rendering small conversations.

    Args:
        render (`Callable`):
            `render(messages, add_generation_prompt=False) -> str`.
        special_tokens (`list[str]`):
            Texts of the tokenizer's special tokens.

    Returns:
        [`TurnFormat`]

    Raises:
        UserError: if the template takes no typed parts, or drops the text of a turn.
    """

    def message(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [text_part(text)]}

    question = message("user", "q")
    try:
        asked = render([message("user", VUSR + LEFT + "q" + RIGHT)])
        answered = render([question, message("assistant", LEFT + "a" + RIGHT)])
    except Exception:  # a template may fail in any way on content that it was not written for
        asked = answered = ""
    if asked.count(RIGHT) != 1 or answered.count(RIGHT) != 1 or '"type"' in asked:  # or writes the list as JSON
        raise UserError(
            "The chat template drops or repeats the text of a turn, so questions and answers cannot be located. Give "
            "the processor one that renders every user and assistant message once, whose content is a list of typed "
            "parts ([{'type': 'text', 'text': 'Is it?'}])."
        )
    prompt = render([question], add_generation_prompt=True)
    bare = render([message("user", VUSR)])
    return TurnFormat(
        question_end=_leading_token(asked.split(RIGHT)[1], special_tokens),
        answer_end=_leading_token(answered.split(RIGHT)[1], special_tokens),
        answer_lead=_lead(prompt, answered),
        question_lead=_lead(bare, asked),
    )


def _lead(prompt: str, written: str) -> str:
    # Some templates put more into the prompt than into the history (an open thinking block): the lead is unknown then.
    lead = written[len(prompt) : written.index(LEFT)] if written.startswith(prompt) else ""
    return lead if lead.isspace() else ""


def _leading_token(text: str, special_tokens: list[str]) -> str:
    return max((token for token in special_tokens if text.startswith(token)), key=len, default="")
