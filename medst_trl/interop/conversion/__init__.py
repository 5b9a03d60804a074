# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Original LLaVA layouts into Hugging Face's: [`convert_checkpoint`]."""

from .convert import convert_checkpoint as convert_checkpoint
