# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The policy: its `<vusr>` token and template, its parts, its adapter, and how it is loaded."""

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")  # in which a policy's weights can be loaded
