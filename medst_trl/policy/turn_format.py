# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""How a chat template writes a turn: found out once, by rendering small conversations, for any family of models."""

from collections.abc import Callable
from dataclasses import dataclass

from medst_trl.base.errors import UserError

from .chat_template import VUSR


# Private-use characters that stand around text while it is located in a render; they are removed before tokenisation.
LEFT, RIGHT = "\ue0f1", "\ue0f2"


@dataclass(frozen=True)
class TurnFormat:
    """
    How a chat template writes the turns of a conversation.

    Args:
        content_form (`str`):
            Form of message content it renders: `"list"`, `"string"` or `"any"`.
        question_end (`str`):
            Special token with which the template itself closes a user turn, `""` if with none.
        answer_end (`str`):
            The same for an assistant turn.
        answer_lead (`str`):
            Blank between the generation prompt and the answer, which the model has to write itself (`" "` for
            `ASSISTANT:`, `""` where the prompt ends with a newline).
        question_lead (`str`):
            The same for a question without an image: between the open `<vusr>` turn and what the model writes there.
    """

    content_form: str
    question_end: str
    answer_end: str
    answer_lead: str
    question_lead: str


def probe_turn_format(render: Callable[..., str], special_tokens: list[str]) -> TurnFormat:
    """
    Finds out how a chat template writes turns.

    Args:
        render (`Callable`):
            `render(messages, add_generation_prompt=False) -> str`; it may raise on a content form it does not take.
        special_tokens (`list[str]`):
            Texts of the tokenizer's special tokens.

    Returns:
        [`TurnFormat`]

    Raises:
        UserError: if the template renders neither form of content, or drops the text of a turn.
    """
    content_form = _content_form(render)

    def message(role: str, text: str) -> dict:
        return {"role": role, "content": text if content_form == "string" else [{"type": "text", "text": text}]}

    question = message("user", "q")
    asked = render([message("user", VUSR + LEFT + "q" + RIGHT)])
    answered = render([question, message("assistant", LEFT + "a" + RIGHT)])
    if asked.count(RIGHT) != 1 or answered.count(RIGHT) != 1:
        raise UserError(
            "The chat template drops or repeats the text of a turn, so questions and answers cannot be located. "
            "Give the processor a chat template that renders every user and assistant message once."
        )
    prompt = render([question], add_generation_prompt=True)
    bare = render([message("user", VUSR)])
    return TurnFormat(
        content_form=content_form,
        question_end=_leading_token(asked.split(RIGHT)[1], special_tokens),
        answer_end=_leading_token(answered.split(RIGHT)[1], special_tokens),
        answer_lead=_lead(prompt, answered),
        question_lead=_lead(bare, asked),
    )


def _lead(prompt: str, written: str) -> str:
    # A template may put more into the prompt than into the history (an opened thinking block): no blank is known then.
    lead = written[len(prompt) : written.index(LEFT)] if written.startswith(prompt) else ""
    return lead if lead.isspace() else ""


def _content_form(render: Callable[..., str]) -> str:
    def takes(content) -> bool:
        try:
            text = render([{"role": "user", "content": content}])
        except Exception:  # a template may fail in any way on the form it was not written for
            return False
        return "QQZZ" in text and "'type'" not in text and '"type"' not in text

    string, parts = takes("QQZZ"), takes([{"type": "text", "text": "QQZZ"}])
    if not (string or parts):
        raise UserError(
            "The chat template renders no user message, neither from a string nor from a list of typed parts. "
            "Give the processor a chat template for chat messages."
        )
    return "any" if string and parts else "list" if parts else "string"


def _leading_token(text: str, special_tokens: list[str]) -> str:
    return max((token for token in special_tokens if text.startswith(token)), key=len, default="")
