# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Engines write text for prompts: the policy in this process, or an OpenAI-compatible server."""
