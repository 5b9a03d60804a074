# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Plain images: a directory, or a table of file names, optionally with questions and answers, or with captions."""

from medst_trl.base.errors import UserError
from medst_trl.base.files import visible_files
from medst_trl.data.assemble import draw
from medst_trl.data.cells import image_cell, read_split, text_value
from medst_trl.data.reading import read_rows
from medst_trl.data.schema import dialogue
from medst_trl.data.source import (
    QUESTION_COLUMNS,
    SOURCES,
    Conversation,
    Records,
    Source,
    SourceCard,
    SourceRequest,
    question_or_image,
)


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


def read_folder(request: SourceRequest) -> Records:
    """
    Read every file in a directory, except hidden ones, as one unlabeled image.

    Whether a file is an image depends on its content, not its name; other files are rejected when they are read.
    """
    records = Records("images", request.data_path)
    names = list(visible_files(request.data_path, follow_symlinks=request.images.follow_symlinks))
    records.conversations = [Conversation(name, (name,), []) for name in names]
    if not records.conversations:
        raise UserError(f"{request.data_path} holds no files. Correct the path to the images.")
    return records


def read_table(request: SourceRequest) -> Records:
    """
    Read a table of images, see [`~medst_trl.data.reading.read_rows`]; for a directory see [`read_folder`].

    Columns: `image`, file names (see [`~medst_trl.data.cells.image_cell`]); optionally `question` and `answer`
    together, and with them `id`, `split` (train, validation or test; default train), `answer_type` (open or closed;
    default closed for yes and no), `question_type` and `link` (shared by the paraphrases of one question). A row
    without a question is an unlabeled image.

    Rejected, by reason: `malformed_row`, `bad_quotes`, `malformed_json`, `not_an_object`, `repeated_column`,
    `duplicate_id`, and those of [`~medst_trl.data.source.question_or_image`].
    """
    if request.data_path.is_dir():
        return read_folder(request)
    records = Records("images", request.image_folder, group_column=request.group_column)
    records.collect(read_rows(request.data_path, notes=records.counts), question_or_image, used=QUESTION_COLUMNS)
    return records


def read_captions(request: SourceRequest) -> Records:
    """
    Read a table of captioned images, see [`~medst_trl.data.reading.read_rows`].

    They become conversations of one turn, for LLaVA-Med's optional first step: aligning the projector. As in LLaVA-Med
    (https://huggingface.co/papers/2306.00890), the user asks for a brief description if the caption has fewer than 30
    words, and for a detailed one otherwise. The wording of the request is sampled for each record, by its id and the
    seed.

    Columns: `image`, file names (see [`~medst_trl.data.cells.image_cell`]); `caption`; optionally `id` and `split`.

    Rejected, by reason: `malformed_row`, `bad_quotes`, `malformed_json`, `not_an_object`, `repeated_column`,
    `no_image`, `no_caption`, `bad_split`, `not_text`, `bad_unicode`, `duplicate_id`.
    """

    def conversation(name: str, row: dict) -> Conversation:
        images, caption = image_cell(row.get("image")), text_value(row.get("caption"), missing="no_caption")
        turns = [(instruction(name, caption, request.seed), caption)]
        return Conversation(name, images, dialogue(turns, len(images)), read_split(row.get("split")))

    records = Records("captions", request.image_folder, group_column=request.group_column)
    rows = read_rows(request.data_path, notes=records.counts)
    records.collect(rows, conversation, used=("id", "image", "caption", "split"))
    return records


def instruction(name: str, caption: str, seed: int) -> str:
    """Return the request of record `name`: for a brief or a detailed description, by the length of the caption."""
    wordings = DETAILED if len(caption.split()) >= DETAILED_FROM else BRIEF
    return wordings[int(draw(f"instruction:{name}", seed) * len(wordings))]


SOURCES.register(
    Source(
        name="images",
        summary="a directory of images, or a table (csv, xlsx, jsonl) with image, optionally question, answer, split",
        read=read_table,
        card=SourceCard("images from the publisher of this repository"),
        reads_parquet=True,
        data_files=(),
    )
)
SOURCES.register(
    Source(
        name="captions",
        summary="a table (csv, xlsx, jsonl) with columns image and caption; each caption answers a request",
        read=read_captions,
        card=SourceCard("the publisher's own collection of captioned images"),
    )
)
