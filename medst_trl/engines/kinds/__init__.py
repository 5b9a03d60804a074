# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The built-in engines, one file each."""
