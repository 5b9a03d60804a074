# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Images with captions, as conversations of one turn, for LLaVA-Med's optional first step: aligning the projector.

As in LLaVA-Med (https://huggingface.co/papers/2306.00890), the user asks for a brief description if the caption has
fewer than 30 words, and for a detailed one otherwise. The wording of the request is sampled for each record.
"""

from pathlib import Path

from medst_trl.data.assemble import draw
from medst_trl.data.schema import dialogue
from medst_trl.data.source import SOURCES, Conversation, Records, Source, SourceCard, text_value

from .images import collect_rows


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


def read_captions(path: Path, image_folder: Path, seed: int = 0) -> Records:
    """
    Read a table of captioned images: `.csv` or `.tsv` with a header, or `.jsonl` / `.json` objects.

    Columns: `image`, a file name; `caption`; optionally `id`.

    Args:
        path (`pathlib.Path`):
            The table.
        image_folder (`pathlib.Path`):
            Where its file names start.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw of requests. That of a record depends on its id alone.

    Rejected, by reason: `malformed_row`, `malformed_json`, `not_an_object`, `no_image`, `no_caption`, `not_text`,
    `bad_unicode`, `duplicate_id`.
    """

    def conversation(name: str, image: str, row: dict) -> Conversation:
        caption = text_value(row.get("caption"), missing="no_caption")
        return Conversation(name, (image,), dialogue([(instruction(name, caption, seed), caption)], num_images=1))

    records = Records("captions", image_folder)
    collect_rows(records, path, conversation)
    return records


def instruction(name: str, caption: str, seed: int) -> str:
    """Return the request of record `name`: for a brief or a detailed description, by the length of the caption."""
    wordings = DETAILED if len(caption.split()) >= DETAILED_FROM else BRIEF
    return wordings[int(draw(f"instruction:{name}", seed) * len(wordings))]


SOURCES.register(
    Source(
        name="captions",
        summary="a table (csv, tsv, jsonl) with columns image and caption; each caption answers a request",
        read=lambda request: read_captions(request.data_path, request.image_folder, request.seed),
        card=SourceCard("the publisher's own collection of captioned images"),
    )
)
