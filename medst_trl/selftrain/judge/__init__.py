# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The judge: which of two answers is better? Prompts, replies, calls and their cost, verdicts."""
