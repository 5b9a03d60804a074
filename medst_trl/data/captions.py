# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Images with captions as conversations of one turn, to align a projector with: LLaVA-Med's optional first step.

As in LLaVA-Med (https://huggingface.co/papers/2306.00890) the user asks for a description, a brief one where the
caption has fewer than 30 words and a detailed one otherwise, in words drawn for each record.
"""

from pathlib import Path

from .records import BadRecord, Conversation, Rejected, Source, text_value
from .schema import image_part, message, text_part
from .splits import draw
from .tables import read_rows


DETAILED_FROM = 30  # words

BRIEF = (
    "Describe this image briefly.",
    "What does this image show? Answer in short.",
    "Say in a sentence what can be seen here.",
    "Summarize this image in a few words.",
    "Give a short caption for this image.",
    "In brief, what is in the picture?",
    "State concisely what this image presents.",
    "What is shown here? Keep it short.",
)
DETAILED = (
    "Describe this image in detail.",
    "Explain thoroughly what this image shows.",
    "What can be seen in this image? Go into the details.",
    "Give a full account of the image and its findings.",
    "Write a comprehensive description of this picture.",
    "Walk me through this image, leaving nothing of importance out.",
    "Characterize the image with all the details that it presents.",
    "Examine the image closely and report everything that it shows.",
)


def read_captions(path: Path, image_folder: Path, seed: int = 0) -> Source:
    """
    Read a table of captioned images: `.csv` or `.tsv` with a header, or `.jsonl` / `.json` objects.

    Columns: `image`, a file name; `caption`; optionally `id`.

    Args:
        path (`Path`): The table.
        image_folder (`Path`): Where its file names start.
        seed (`int`, *optional*, defaults to `0`): Of the draw of instructions. A record's own hangs on its id alone.

    Set aside, by reason: `malformed_row`, `malformed_json`, `not_an_object`, `no_image`, `no_caption`, `not_text`,
    `bad_unicode`, `duplicate_id`.
    """
    source, ids = Source("captions", image_folder), set()
    for position, row in read_rows(path):
        if isinstance(row, Rejected):
            source.rejected.append(row)
            continue
        name = f"row-{position:06d}"
        try:
            name = text_value(row.get("id") or name, missing="")
            if name in ids:
                raise BadRecord("duplicate_id", name)
            image = text_value(row.get("image"), missing="no_image")
            caption = text_value(row.get("caption"), missing="no_caption")
        except BadRecord as bad:
            source.rejected.append(Rejected(name, bad.reason, bad.value))
        else:
            ids.add(name)
            question = message("user", [image_part(), text_part(instruction(name, caption, seed))])
            source.conversations.append(
                Conversation(name, (image,), [question, message("assistant", [text_part(caption)])])
            )
    return source


def instruction(name: str, caption: str, seed: int) -> str:
    """What the user of record `name` asks for: a brief or a detailed description, by the caption's length."""
    wordings = DETAILED if len(caption.split()) >= DETAILED_FROM else BRIEF
    return wordings[int(draw(f"instruction:{name}", seed) * len(wordings))]
