# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints of the original LLaVA code to Hugging Face's layout."""
