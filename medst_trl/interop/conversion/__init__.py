# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints of the original LLaVA code to Hugging Face's layout: [`convert_checkpoint`]."""

from .convert import convert_checkpoint as convert_checkpoint
from .convert import planned_config as planned_config
