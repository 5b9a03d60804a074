# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""What cards say about models. What they say about datasets and sources is in `KINDS` and `SOURCES`."""

ABOUT = {
    "adapter": "A LoRA adapter that makes a vision-language model answer and ask questions about medical images.",
    "model": "A vision-language model for questions about medical images.",
}
