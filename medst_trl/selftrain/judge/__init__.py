# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The judge, which compares two answers: prompts, replies, requests, judgements."""
