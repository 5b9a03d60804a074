# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The policy: its `<vusr>` token and template, its parts, its adapter, and how it is loaded."""
