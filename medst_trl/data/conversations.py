# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Questions of a benchmark as conversations of several turns, which is what gives self-questioning its later turns."""

from collections import defaultdict
from collections.abc import Iterable

from .disjoint_sets import DisjointSets
from .records import Conversation, Question
from .schema import image_part, message, text_part
from .splits import plain_question


def conversations_about_image(name: str, questions: Iterable[Question]) -> list[Conversation]:
    """
    All questions about one image, in their order, as turns of one conversation.

    Of the wordings of one question only one stands in a conversation, so that no answer is given away earlier: the
    second conversation takes the second wording of every question that has one, and so on. All data is used, once.

    Args:
        name (`str`): Opens the ids: `<name>-0`, `<name>-1`, ...
        questions: Of one image and one split.
    """
    groups = linked_groups(questions)
    conversations = []
    for number in range(max(map(len, groups), default=0)):
        messages = []
        for group in groups:
            if number < len(group):
                opening = [] if messages else [image_part()]
                messages.append(message("user", [*opening, text_part(group[number].question)]))
                messages.append(message("assistant", [text_part(group[number].answer)]))
        first = groups[0][0]
        conversations.append(Conversation(f"{name}-{number}", (first.image,), messages, first.split))
    return conversations


def linked_groups(questions: Iterable[Question]) -> list[list[Question]]:
    """
    The questions about one image by what they ask: those with one link, and those with the same words whatever their
    links say. In the order in which the groups and their members come.
    """
    questions, same = list(questions), DisjointSets()
    for question in questions:
        if question.link is not None:
            same.join(("words", plain_question(question.question)), ("link", question.link))
    groups = defaultdict(list)
    for question in questions:
        groups[same.find(("words", plain_question(question.question)))].append(question)
    return list(groups.values())
