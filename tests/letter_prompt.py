# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Plugin with a judge prompt whose reply is one letter."""

from contextlib import contextmanager

from medst_trl.base.registry import PLUGINS_VARIABLE, load_plugins
from medst_trl.selftrain.judge.judge import JUDGE_PROMPTS


PLUGIN = """
from medst_trl.selftrain.judge.judge import JUDGE_PROMPTS, JudgePrompt, Reading, user_message


def messages(question, answers, image_urls, history, captions):
    text = "\\n".join(["Which is better?", question, *answers])
    return [user_message(image_urls, text)]


def read(reply):
    return {"A": Reading((10, 0), 0), "B": Reading((0, 10), 1), "C": Reading((5, 5), "tie")}.get(reply[:1])


JUDGE_PROMPTS.register(
    JudgePrompt(
        name="letter",
        summary="one letter for the better answer",
        messages=messages,
        read=read,
        reminder="Reply with A, B or C.",
        reply_tokens=1,
        defaults={"seed": 7},
    )
)
"""


@contextmanager
def letter_prompt(directory, monkeypatch):
    """Register the judge prompt `letter` inside the context, and yield the path of the plugin."""
    path = directory / "letter.py"
    path.write_text(PLUGIN)
    list(JUDGE_PROMPTS)  # load the built-in prompts first
    monkeypatch.setenv(PLUGINS_VARIABLE, str(path))
    load_plugins()
    try:
        yield path
    finally:
        del JUDGE_PROMPTS._objects["letter"]
