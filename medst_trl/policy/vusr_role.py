# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How a policy is told to write a user turn: by the token `<vusr>` (any family) or by the text role `VUSER:`.

The choice is made once, before training. It is saved as the chat template, which decides from then on.
"""

import re
from typing import TYPE_CHECKING

from medst_trl.base.errors import UserError

from .chat_template import VUSR, is_wrapped
from .vicuna import has_text_role, vicuna_template
from .vusr import tokenizer_of, turn_format


if TYPE_CHECKING:
    from transformers import ProcessorMixin

VUSR_ROLES = ("token", "text")
_VICUNA = re.compile(r"USER: q1\s+ASSISTANT: a1(?:</s>|\s)*USER: q2\s+ASSISTANT:$")


def set_vusr_role(processor: "ProcessorMixin", role: str | None) -> None:
    """
    Chooses how a processor without `<vusr>` opens the turns that the model writes, in place.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Processor of a vision-language model, before [`add_vusr`].
        role (`str`, *optional*):
            `"text"` gives it the template of SQ-LLaVA and STLLaVA-Med with the role `VUSER:` and its system prompt.
            `"token"` and `None` leave it as it is: [`add_vusr`] then adds the token, unless the template has the role.

    Raises:
        UserError: if there is no such role, the template is not in Vicuna's format, or the processor was saved with
            the other role.
    """
    if role is None:
        return
    if role not in VUSR_ROLES:
        raise UserError(f"There is no vusr_role {role!r}; choose from {', '.join(VUSR_ROLES)}.")
    tokenizer = tokenizer_of(processor)
    template = processor.chat_template or tokenizer.chat_template
    if has_text_role(template) == (role == "text"):
        return
    if role == "token" or is_wrapped(template) or VUSR in tokenizer.get_vocab():
        saved = "text" if role == "token" else "token"
        raise UserError(
            f"vusr_role is {role!r}, but this model was saved with the role {saved!r}, which its chat template "
            "decides. Leave vusr_role out, or start from the model it was trained from."
        )
    rendered = _render_two_turns(processor) if template else ""
    if not _VICUNA.search(rendered):
        raise UserError(
            "vusr_role: text is for models with Vicuna's chat format (USER: ... ASSISTANT: ...), as LLaVA-1.5, "
            "SQ-LLaVA and STLLaVA-Med have it. Leave it out: the token <vusr> works with any family."
        )
    writes_bos = bool(tokenizer.bos_token) and rendered.startswith(tokenizer.bos_token)
    processor.chat_template = vicuna_template(text_role=True, write_bos=writes_bos)
    if tokenizer.chat_template is not None:
        tokenizer.chat_template = processor.chat_template


def _render_two_turns(processor: "ProcessorMixin") -> str:
    processor.chat_template = processor.chat_template or tokenizer_of(processor).chat_template
    form = turn_format(processor).content_form
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2")]
    messages = [
        {"role": role, "content": text if form == "string" else [{"type": "text", "text": text}]}
        for role, text in turns
    ]
    return processor.apply_chat_template(messages, add_generation_prompt=True)
