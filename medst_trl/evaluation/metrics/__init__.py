# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Built-in metrics, one file each. Every file registers its metric in `METRICS` and imports nothing heavy."""
