# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Phantoms as rows of a benchmark."""

from medst_trl.data.images import image_id


def benchmark_rows(phantoms):
    """Yield one row per image in the columns of a benchmark: `image_id`, `image`, `questions`."""
    for phantom in phantoms:
        yield {"image_id": image_id(phantom.image), "image": phantom.image, "questions": phantom.questions}
