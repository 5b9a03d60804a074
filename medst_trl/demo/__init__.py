# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo without data: phantoms, a tiny model to start from, and a judge that knows the truth."""
