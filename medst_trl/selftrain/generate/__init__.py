# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Candidates: the policy's questions about images and its answers, drawn, filtered and written."""

from .generator import CandidateGenerator


__all__ = ["CandidateGenerator"]
