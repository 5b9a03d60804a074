# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Plain images: a directory, or a table of file names, optionally with questions and answers, or with captions."""

from collections.abc import Callable, Collection
from pathlib import Path

from medst_trl.base.errors import UserError
from medst_trl.base.files import visible_files
from medst_trl.data.assemble import draw
from medst_trl.data.reading import read_rows
from medst_trl.data.schema import dialogue
from medst_trl.data.source import (
    QUESTION_COLUMNS,
    SOURCES,
    Conversation,
    Question,
    Records,
    Source,
    SourceCard,
    image_cell,
    question_or_image,
    text_value,
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


def read_folder(directory: Path, follow_symlinks: bool = False) -> Records:
    """
    Read every file in a directory, except hidden ones, as one unlabeled image.

    Whether a file is an image depends on its content, not its name; other files are rejected when they are read.
    """
    records, names = Records("images", directory), visible_files(directory, follow_symlinks=follow_symlinks)
    records.conversations = [Conversation(name, (name,), []) for name in names]
    if not records.conversations:
        raise UserError(f"{directory} holds no files. Correct the path to the images.")
    return records


def read_table(
    path: Path, image_folder: Path, follow_symlinks: bool = False, group_column: str | None = None
) -> Records:
    """
    Read a table of images, see [`~medst_trl.data.reading.read_rows`]; for a directory see [`read_folder`].

    Columns: `image`, file names (see [`~medst_trl.data.source.image_cell`]); optionally `question` and `answer`
    together, and with them `id`, `split` (train, validation or test; default train), `answer_type` (open or closed;
    default closed for yes and no), `question_type` and `link` (shared by the paraphrases of one question). A row
    without a question is an unlabeled image.

    Rejected, by reason: `malformed_row`, `bad_quotes`, `malformed_json`, `not_an_object`, `repeated_column`,
    `duplicate_id`, and those of [`~medst_trl.data.source.Question.from_row`].
    """
    if path.is_dir():
        return read_folder(path, follow_symlinks)
    records = Records("images", image_folder, group_column=group_column)
    return _read_rows(records, path, question_or_image, QUESTION_COLUMNS)


def read_captions(path: Path, image_folder: Path, seed: int = 0, group_column: str | None = None) -> Records:
    """
    Read a table of captioned images, see [`~medst_trl.data.reading.read_rows`].

    They become conversations of one turn, for LLaVA-Med's optional first step: aligning the projector. As in LLaVA-Med
    (https://huggingface.co/papers/2306.00890), the user asks for a brief description if the caption has fewer than 30
    words, and for a detailed one otherwise. The wording of the request is sampled for each record.

    Columns: `image`, file names (see [`~medst_trl.data.source.image_cell`]); `caption`; optionally `id`.

    Args:
        path (`pathlib.Path`):
            The table.
        image_folder (`pathlib.Path`):
            Where its file names start.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw of requests. That of a record depends on its id alone.
        group_column (`str`, *optional*):
            Column with the group of a record, such as a patient.

    Rejected, by reason: `malformed_row`, `bad_quotes`, `malformed_json`, `not_an_object`, `repeated_column`,
    `no_image`, `no_caption`, `not_text`, `bad_unicode`, `duplicate_id`.
    """

    def conversation(name: str, row: dict) -> Conversation:
        images, caption = image_cell(row.get("image")), text_value(row.get("caption"), missing="no_caption")
        return Conversation(name, images, dialogue([(instruction(name, caption, seed), caption)], len(images)))

    return _read_rows(
        Records("captions", image_folder, group_column=group_column), path, conversation, ("id", "image", "caption")
    )


def _read_rows(
    records: Records, path: Path, make: Callable[[str, dict], Question | Conversation], used: Collection[str]
) -> Records:
    """Add what `make` returns for the id and the columns of each row of a table, of which it uses some."""
    records.collect(
        read_rows(path, notes=records.counts),
        make,
        default_id=lambda position, _: f"row-{position:06d}",
        own_id=lambda row: row.get("id"),
        used=used,
    )
    return records


def instruction(name: str, caption: str, seed: int) -> str:
    """Return the request of record `name`: for a brief or a detailed description, by the length of the caption."""
    wordings = DETAILED if len(caption.split()) >= DETAILED_FROM else BRIEF
    return wordings[int(draw(f"instruction:{name}", seed) * len(wordings))]


SOURCES.register(
    Source(
        name="images",
        summary="a directory of images, or a table (csv, xlsx, jsonl) with image, optionally question, answer, split",
        read=lambda request: read_table(
            request.data_path, request.image_folder, request.follow_symlinks, request.group_column
        ),
        card=SourceCard("images from the publisher of this repository"),
        reads_parquet=True,
        reads_folders=True,
        data_files=(),
    )
)
SOURCES.register(
    Source(
        name="captions",
        summary="a table (csv, xlsx, jsonl) with columns image and caption; each caption answers a request",
        read=lambda request: read_captions(
            request.data_path, request.image_folder, request.seed, request.group_column
        ),
        card=SourceCard("the publisher's own collection of captioned images"),
    )
)
